"""The forms in which a primitive hands its pairs to the planner and to the key cache.

| form | the primitive gives | planned as |
|---|---|---|
| `"spans"` | key intervals of each row (`spans.Spans`) | runs of key blocks |
| `"points"` | single keys of each row, `(rows, m)` | gathered keys |
| `"labels"` | one label per query and per key (`Labels`) | dense blocks, after tokens are sorted by label |

For the key cache a primitive also gives `ColumnChanges`: the query positions at which a column of the pattern may change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

__all__ = ["ColumnChanges", "Form", "Labels"]

Form = Literal["spans", "points", "labels"]


@dataclass(frozen=True)
class Labels:
    """Pair (r, j) of variant v is allowed when `query[v, r] == key[v, j] >= 0`.

    query: `(V, n_q)` int64, key: `(V, n_k)` int64; -1 = in no cluster.
    """

    query: Tensor
    key: Tensor


@dataclass(frozen=True)
class ColumnChanges:
    """The query positions at which the column of a key may change.

    Take the query positions of one residue mod `period`. Whether key j is allowed to i - 1 and to i (neighbours within that
    residue) can differ only if i is in row j of `positions` `(keys, m)` int64, in any order, repeats allowed. None: nowhere.

    anywhere: the column may change at every position; `positions` and `period` then say nothing.
    """

    positions: Tensor | None = None
    period: int = 1
    anywhere: bool = False
