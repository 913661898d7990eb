"""What the native planner reads of a pattern of labels: clusters or buckets, perhaps in union with windows and named tokens.

Each link counts once: the fixed part is planned whole, and its links are left out of the labelled pieces (`routed_union`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.patterns.expression import Atom, Pattern, Sizes
from farlight.patterns.membership import between
from farlight.patterns.packing import padding
from farlight.patterns.positional import causal
from farlight.patterns.tables import clusters
from farlight.plan.chosen_links import ExcludedLinks
from farlight.plan.routed import labellings
from farlight.plan.routed_union import read_union

__all__ = ["LabelPiece", "LabelUnion", "label_union"]


@dataclass(frozen=True)
class LabelPiece:
    """The row at position i sees the key at j where their labels agree, i + lower <= j <= i + upper and starts[i] <= j.

    query, key: `(B|1, H|1, n)` int64, negative = none. starts: `(B|1, H|1, n_q)` int64, None = 0. real_keys:
    `(B|1, n_k)` uint8, None = all. excluded_rows, excluded_keys: `(n_q,)` and `(n_k,)` uint8, 1 = without a label; None = none.
    """

    query: Tensor
    key: Tensor
    starts: Tensor | None
    real_keys: Tensor | None
    excluded_rows: Tensor | None
    excluded_keys: Tensor | None
    lower: int
    upper: int

    @property
    def shape(self) -> tuple[int, int]:
        """Extents of the batch and head dimensions over which the links differ."""
        tables = [table for table in (self.query, self.key, self.starts) if table is not None]
        batches = [table.shape[0] for table in (*tables, *(() if self.real_keys is None else (self.real_keys,)))]
        return max(batches), max(table.shape[1] for table in tables)


@dataclass(frozen=True)
class LabelUnion:
    """A pattern of labels as disjoint parts: `fixed`, planned on its own (None without one), and labelled pieces."""

    fixed: Pattern | None
    pieces: list[LabelPiece]


def label_union(pattern: Pattern, sizes: Sizes) -> LabelUnion | None:
    """The parts of a pattern of labels whose tables are in memory of the host; None for any other pattern.

    Raises PatternError when a table or a fixed part does not fit the sizes.
    """
    if any(table.device.type != "cpu" for table in pattern._tables) or not sizes.n_q or not sizes.n_k:
        return None
    union = read_union(pattern, sizes)
    if union is None:
        return None
    atoms = union.routed
    masks = [atom for atom in atoms if isinstance(atom, padding) and atom._tables]
    limits = [atom for atom in atoms if isinstance(atom, between)]
    others = [
        atom for atom in atoms if not isinstance(atom, causal | between) and not (isinstance(atom, padding) and atom._tables)
    ]
    if len(others) != 1 or len(limits) > 1:
        return None
    for atom in atoms:
        atom.check(sizes)
    starts = _starts(limits, sizes)
    labels = None if limits and starts is None else _labels(others[0], sizes)
    if labels is None:
        return None
    real = torch.stack(torch.broadcast_tensors(*(mask._tables[0] for mask in masks))).all(0) if masks else None
    is_causal = any(isinstance(atom, causal) for atom in atoms)
    sides, excluded = _sides(sizes, is_causal, union.excluded), union.excluded
    real, rows, keys = (_bytes(mask) for mask in (real, excluded.rows, excluded.keys))
    pieces = [LabelPiece(query, key, starts, real, rows, keys, *side) for query, key in labels for side in sides]
    return LabelUnion(union.fixed, pieces)


def _labels(choice: Atom, sizes: Sizes) -> list[tuple[Tensor, Tensor]] | None:
    """(query labels, key labels) of disjoint clusterings whose union is the choice; None where it is no such union."""
    if isinstance(choice, clusters) and _is_aligned(choice._tables[0], sizes):
        pairs: list[tuple[Tensor, Tensor]] | None = [(choice._tables[0], choice._tables[-1])]
    else:
        pairs = labellings(choice, sizes)
    return None if pairs is None else [(query.contiguous(), key.contiguous()) for query, key in pairs]


def _starts(limits: Sequence[between], sizes: Sizes) -> Tensor | None:
    """The first position that each query sees; None without limits, and where the native planner does not read them."""
    if not limits or len(limits[0]._tables) != 1 or not _is_aligned(limits[0]._tables[0], sizes):
        return None
    return limits[0]._tables[0].contiguous()


def _is_aligned(table: Tensor, sizes: Sizes) -> bool:
    """Whether row r of a table of queries is that of query r."""
    return table.shape[2] == sizes.n_q and (sizes.n_q != sizes.n_k or sizes.q_offset == 0)


def _sides(sizes: Sizes, is_causal: bool, excluded: ExcludedLinks) -> list[tuple[int, int]]:
    """(lower, upper) of the keys around a query's position that a piece holds: left and right of the excluded band."""
    limit = sizes.n_q + sizes.n_k + abs(sizes.q_offset)
    if excluded.band is None:
        return [(-limit, 0 if is_causal else limit)]
    left, right = (min(side, limit) for side in excluded.band)
    before, behind = (-limit, -left - 1), (right + 1, limit)
    return [before] if is_causal else [before, behind]


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.to(torch.uint8).contiguous()
