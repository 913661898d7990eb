"""Terms made of blocks, a tile at a time: rows that agree are asked once, and one by one only where they may differ.

The rows of a tile see the same blocks. So each pattern of the term is bounded for whole tiles from both sides: keys that
*all* rows of the tile see, keys that *some* row sees. Both bounds pass through the term's unions, intersections and
differences. What all rows see is a whole run. What only some see (the edge of a window, the diagonal of a causal pattern) is
a small rest, for which rows are asked one by one. A layout of blocks is so planned by its blocks, not by its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.patterns.expression import Atom, Pattern, Sizes
from farlight.patterns.spans import Spans
from farlight.plan.normal_form import Conjunction, Term

__all__ = ["Coarse", "coarse"]


@dataclass(frozen=True)
class Coarse:
    """What all rows of each tile see (`whole`, by tile), and what single rows see besides (`rest`, by row)."""

    whole: Spans
    rest: Spans


@dataclass(frozen=True)
class _Bounds:
    """By tile: the keys that all its rows see, and those that some row may see. `exact`: rows agree, both are the truth."""

    all: Spans
    some: Spans
    exact: bool = False


@dataclass(frozen=True)
class _Rows:
    """The rows of some tiles: the position of each, its (batch, head), its tile; and the first and last row of each tile."""

    sizes: Sizes
    b: Tensor
    h: Tensor
    i: Tensor
    tile_of: Tensor
    first: Tensor
    last: Tensor

    @property
    def tiles(self) -> int:
        return self.first.numel()

    def agree(self, pattern: Pattern) -> bool:
        """Whether the rows of every tile see the same keys of this pattern."""
        if not isinstance(pattern, Atom):
            return False
        return bool(pattern._rows_equal(self.sizes, self.i[self.first], self.i[self.last]).all())

    def of_tiles(self, pattern: Pattern) -> Spans:
        """The keys that the first row of each tile sees."""
        return pattern._spans(self.sizes, self.b[self.first], self.h[self.first], self.i[self.first])

    def of_rows(self, pattern: Pattern) -> Spans:
        return pattern._spans(self.sizes, self.b, self.h, self.i)


def coarse(term: Term, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, tile_of: Tensor) -> Coarse | None:
    """The term's links, by tile as far as rows agree; None where that would save nothing.

    b, h, i, tile_of: batch item, head, position and tile of each row, sorted by tile.
    """
    if term.labels or term.points or term.hard or any(part.rest for part in term.parts):
        return None
    count = torch.bincount(tile_of)
    last = count.cumsum(0) - 1
    rows = _Rows(sizes, b, h, i, tile_of, last - count + 1, last)
    own = [pattern for part in term.parts for pattern in (*part.within, *part.without)]
    if not any(rows.agree(pattern) and not rows.of_tiles(pattern).is_thin for pattern in own):
        return None
    earlier = [part for one in term.earlier for part in one.parts]
    seen: dict[Pattern, _Bounds] = {}  # by pattern, since a term names some of them more than once

    def bounds(pattern: Pattern) -> _Bounds:
        if pattern not in seen:
            seen[pattern] = _bounds_of(pattern, rows)
        return seen[pattern]

    found = [_conjunction(part, bounds, rows) for part in term.parts]
    all_see, some_see = found[0].all, found[0].some
    for one in found[1:]:
        all_see, some_see = all_see | one.all, some_see | one.some
    for part in earlier:
        one = _conjunction(part, bounds, rows)
        all_see, some_see = all_see - one.some, some_see - one.all
    return Coarse(all_see, _rest(term, earlier, some_see - all_see, bounds, rows))


def _bounds_of(pattern: Pattern, rows: _Rows) -> _Bounds:
    if rows.agree(pattern):
        same = rows.of_tiles(pattern)
        return _Bounds(same, same, exact=True)
    spans = rows.of_rows(pattern)
    row, lo, hi = spans.listed()
    some = Spans.gather(rows.tiles, spans.keys, rows.tile_of[row], lo, hi)
    if not spans.is_thin:
        return _Bounds(Spans.nothing(rows.tiles, spans.keys, lo.device), some)
    least = torch.zeros(rows.tiles, dtype=torch.int64, device=lo.device)
    from_ = least.scatter_reduce(0, rows.tile_of, spans.lo, "amax", include_self=False)
    # A row that sees nothing ends before it begins, and so empties the tile's interval.
    stop = torch.where(spans.lo < spans.hi, spans.hi, 0)
    until = least.scatter_reduce(0, rows.tile_of, stop, "amin", include_self=False)
    return _Bounds(Spans.thin(spans.keys, from_, until), some)


def _conjunction(part: Conjunction, bounds: Callable[[Pattern], _Bounds], rows: _Rows) -> _Bounds:
    within = [bounds(pattern) for pattern in (*part.within, *part.labels)]
    keys = rows.sizes.n_k
    all_see = some_see = Spans.everything(rows.tiles, keys, rows.i.device)
    for one in within:
        all_see, some_see = all_see & one.all, some_see & one.some
    for pattern in part.without:
        one = bounds(pattern)
        all_see, some_see = all_see - one.some, some_see - one.all
    return _Bounds(all_see, some_see)


def _rest(term: Term, earlier: list[Conjunction], zone: Spans, bounds: Callable[[Pattern], _Bounds], rows: _Rows) -> Spans:
    """The term's links inside `zone` (by tile), row by row."""
    if zone.is_empty():
        return Spans.nothing(rows.i.numel(), zone.keys, rows.i.device)
    inside = zone.repeated(rows.tile_of)

    def spans(pattern: Pattern) -> Spans:
        known = bounds(pattern)
        return (known.some & zone).repeated(rows.tile_of) if known.exact else rows.of_rows(pattern)

    def conjunction(part: Conjunction) -> Spans:
        out = inside
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
