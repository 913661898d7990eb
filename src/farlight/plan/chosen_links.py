"""Work lists of a router's choice on the device: what `routed` computes and the Triton lowering reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from farlight.patterns.tables import check_indices

__all__ = ["STEP", "ChosenLinks", "ExcludedLinks", "IndexRange"]

# Row granularity of the grid of items: the row counts of a kernel's row blocks are multiples of it.
STEP = 16


@dataclass(frozen=True)
class ChosenLinks:
    """Links over one row order and one key order, for V variants: the (batch, head) with a choice of their own.

    shape: (B or 1, H or 1), V = B · H. rows: `(V, n_q)` int64, the row at each place: sorted by label, unlabelled rows last,
    or reversed; None = identity. keys: `(V, n_k)` likewise the key at each slot. row_count, key_count: `(V,)` real places and
    slots.

    The links are a grid of I items, `(V or 1, I)` each: item i is the place `place`, the row `within` of a group of `length`
    rows that share their ranges of slots; `valid`: that row exists. lo: `(V, I, m)` int64, where the item's m disjoint ranges
    begin; `ends(places)[v, i]`: where they end for the rows at `places` `(V or 1, I)`, equal to lo for an empty range. Ends
    are constant within a group, or (`causal`) do not decrease with the place.

    covers: every row is in some group. causal_offset: in an unsorted causal order, the row at place p sees slots before
    p + causal_offset; else None. points: `(V, n_q, m)` int64, single keys of each row, ascending and distinct, -1 = none.
    index_range: the bounds of the choice's indices, unchecked; None for labels.
    """

    shape: tuple[int, int]
    rows: Tensor | None
    keys: Tensor | None
    row_count: Tensor
    key_count: Tensor
    place: Tensor
    within: Tensor
    length: Tensor
    valid: Tensor
    lo: Tensor
    ends: Callable[[Tensor], Tensor]
    causal: bool
    covers: bool
    causal_offset: int | None = None
    points: Tensor | None = None
    index_range: IndexRange | None = None

    @property
    def variants(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class IndexRange:
    """The smallest and largest index of a choice, 0-dimensional tensors on its device; valid are -1 … limit - 1."""

    smallest: Tensor
    largest: Tensor
    argument: str
    limit: int
    things: str

    def check(self, smallest: int, largest: int) -> None:
        """Raise PatternError when the two values, read from the device, are out of range."""
        check_indices(self.argument, smallest, largest, self.limit, self.things)


@dataclass(frozen=True)
class ExcludedLinks:
    """Links that belong to another pattern: a diagonal band, and all links of named tokens.

    band: (left, right), the keys `i - left … i + right` of the row at position i; rows, keys: `(n_q,)` and `(n_k,)` bool, the
    named queries and keys. None = nothing excluded.
    """

    band: tuple[int, int] | None = None
    rows: Tensor | None = None
    keys: Tensor | None = None
