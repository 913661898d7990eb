"""Intervals of block patterns by tile: one evaluation per tile where its rows agree, per row only where they may differ.

The rows of a tile see the same blocks of a block pattern. Each pattern of the term is therefore bounded per tile from both
sides: an *inner* bound, the keys that every row of the tile sees, and an *outer* bound, the keys that some row sees. The
bounds propagate through the term's unions, intersections and differences (of a difference the inner bound is inner − outer).
The inner bound becomes unmasked runs. The rest, outer − inner (window edges, a causal diagonal), is small and evaluated row
by row. Planning a block layout costs time in the number of its blocks, not of its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.patterns.expression import Atom, Pattern, Sizes
from farlight.patterns.spans import Spans
from farlight.plan.normal_form import Conjunction, Term

__all__ = ["TileSpans", "tile_spans"]


@dataclass(frozen=True)
class TileSpans:
    """A term's intervals in two disjoint parts: `whole`, by tile, seen by all rows of the tile; `rest`, by row."""

    whole: Spans
    rest: Spans


@dataclass(frozen=True)
class _Bounds:
    """By tile: the keys that every row sees (`inner`) and that some row may see (`outer`); equal where `exact`."""

    inner: Spans
    outer: Spans
    exact: bool = False


@dataclass(frozen=True)
class _Rows:
    """Batch item, head, position and tile of each row, sorted by tile; index of the first and last row of each tile."""

    sizes: Sizes
    b: Tensor
    h: Tensor
    i: Tensor
    tile: Tensor
    first: Tensor
    last: Tensor

    @property
    def tiles(self) -> int:
        return self.first.numel()

    def agree(self, pattern: Pattern) -> bool:
        """Whether the rows of each tile see the same keys of this pattern."""
        if not isinstance(pattern, Atom):
            return False
        return bool(pattern._rows_equal(self.sizes, self.i[self.first], self.i[self.last]).all())

    def spans_of_tiles(self, pattern: Pattern) -> Spans:
        """The keys that the first row of each tile sees."""
        return pattern._spans(self.sizes, self.b[self.first], self.h[self.first], self.i[self.first])

    def spans_of_rows(self, pattern: Pattern) -> Spans:
        return pattern._spans(self.sizes, self.b, self.h, self.i)


def tile_spans(term: Term, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, tile: Tensor, count: Tensor) -> TileSpans | None:
    """The term's intervals by tile as far as rows agree; None for terms that are not made of blocks.

    b, h, i, tile: (rows,) batch item, head, position and tile of each row, sorted by tile; count: (tiles,) rows of each tile.
    """
    if term.labels or term.points or term.hard or any(part.rest for part in term.parts):
        return None
    last = count.cumsum(0) - 1
    rows = _Rows(sizes, b, h, i, tile, last - count + 1, last)
    patterns = [pattern for part in term.parts for pattern in (*part.within, *part.without)]
    if not any(rows.agree(pattern) and not rows.spans_of_tiles(pattern).is_thin for pattern in patterns):
        return None
    earlier = [part for earlier_term in term.earlier for part in earlier_term.parts]
    cache: dict[Pattern, _Bounds] = {}  # a pattern may occur in several conjunctions

    def bounds(pattern: Pattern) -> _Bounds:
        if pattern not in cache:
            cache[pattern] = _bounds_of(pattern, rows)
        return cache[pattern]

    parts = [_conjunction_bounds(part, bounds, rows) for part in term.parts]
    inner, outer = parts[0].inner, parts[0].outer
    for part in parts[1:]:
        inner, outer = inner | part.inner, outer | part.outer
    for conjunction in earlier:
        removed = _conjunction_bounds(conjunction, bounds, rows)
        inner, outer = inner - removed.outer, outer - removed.inner
    return TileSpans(inner, _rest(term, earlier, outer - inner, bounds, rows))


def _bounds_of(pattern: Pattern, rows: _Rows) -> _Bounds:
    """Bounds of one pattern: exact where rows agree, else the intersection (thin spans only) and union over each tile."""
    if rows.agree(pattern):
        shared = rows.spans_of_tiles(pattern)
        return _Bounds(shared, shared, exact=True)
    spans = rows.spans_of_rows(pattern)
    row, lo, hi = spans.listed()
    outer = Spans.gather(rows.tiles, spans.keys, rows.tile[row], lo, hi)
    if not spans.is_thin:
        return _Bounds(Spans.nothing(rows.tiles, spans.keys, lo.device), outer)
    zeros = torch.zeros(rows.tiles, dtype=torch.int64, device=lo.device)
    inner_lo = zeros.scatter_reduce(0, rows.tile, spans.lo, "amax", include_self=False)
    # An empty interval counts as ending at 0, so that the tile's intersection is empty.
    end = torch.where(spans.lo < spans.hi, spans.hi, 0)
    inner_hi = zeros.scatter_reduce(0, rows.tile, end, "amin", include_self=False)
    return _Bounds(Spans.thin(spans.keys, inner_lo, inner_hi), outer)


def _conjunction_bounds(part: Conjunction, bounds: Callable[[Pattern], _Bounds], rows: _Rows) -> _Bounds:
    inner = outer = Spans.everything(rows.tiles, rows.sizes.n_k, rows.i.device)
    for pattern in (*part.within, *part.labels):
        bound = bounds(pattern)
        inner, outer = inner & bound.inner, outer & bound.outer
    for pattern in part.without:
        bound = bounds(pattern)
        inner, outer = inner - bound.outer, outer - bound.inner
    return _Bounds(inner, outer)


def _rest(term: Term, earlier: list[Conjunction], zone: Spans, bounds: Callable[[Pattern], _Bounds], rows: _Rows) -> Spans:
    """The term's intervals inside `zone` (by tile), row by row."""
    if zone.is_empty():
        return Spans.nothing(rows.i.numel(), zone.keys, rows.i.device)
    row_zone = zone.repeated(rows.tile)

    def spans(pattern: Pattern) -> Spans:
        bound = bounds(pattern)
        return (bound.outer & zone).repeated(rows.tile) if bound.exact else rows.spans_of_rows(pattern)

    def conjunction(part: Conjunction) -> Spans:
        out = row_zone
        for pattern in (*part.within, *part.labels):
            out = out & spans(pattern)
        for pattern in part.without:
            out = out - spans(pattern)
        return out

    out = conjunction(term.parts[0])
    for part in term.parts[1:]:
        out = out | conjunction(part)
    for part in earlier:
        out = out - conjunction(part)
    return out
