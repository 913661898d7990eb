"""From intervals of rows to runs of tiles: which stretches of keys a tile visits, how they are masked, what is gathered.

Given the intervals of the rows of some tiles, the union of each tile's intervals falls into *runs*. A run that all rows see
whole needs no mask. One in which each row has at most one interval is masked by its bounds. Elsewhere the run is cut into
stretches of BITS_KEYS keys, each whole, bounded or masked by bits. A run that holds few pairs is not worth visiting: its
pairs become points. All of it is sorting and prefix sums over the intervals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farlight.patterns.spans import Spans
from farlight.plan.tables import BITS, BITS_KEYS, BITS_WORDS, BOUNDS, EMPTY, Masks

__all__ = ["MaskStore", "Runs", "runs_of", "with_whole"]


@dataclass
class Runs:
    """The runs of some tiles, sorted by tile and key, and the pairs to gather. `point_row` counts rows as `Spans` does."""

    tile: Tensor
    lo: Tensor
    hi: Tensor
    mask: Tensor
    point_row: Tensor
    point_slot: Tensor
    pairs: int
    visited: int


class MaskStore:
    """Collects masks and keeps each distinct one once."""

    def __init__(self, tile: int, device: torch.device) -> None:
        self.tile, self.device = tile, device
        self.chunks: list[tuple[int, Tensor]] = []  # (kind, rows of core_lo, core_hi, data …)
        self.count = 0

    def add(self, kind: int, rows: Tensor) -> Tensor:
        """Numbers of these masks, given as int32 rows `core_lo, core_hi, data…`; equal rows get equal numbers."""
        distinct, number = unique_rows(rows)
        self.chunks.append((kind, distinct))
        self.count += distinct.shape[0]
        return number + (self.count - distinct.shape[0])

    def finish(self) -> tuple[Masks, Tensor]:
        """The distinct masks of all chunks, and for each number given out the final one."""
        final = torch.zeros(self.count, dtype=torch.int64, device=self.device)
        kinds, starts, cores, data = [], [], [], []
        offset = masks = 0
        for kind in (BOUNDS, BITS):
            numbers, rows, at = [], [], 0
            for chunk_kind, chunk in self.chunks:
                if chunk_kind == kind:
                    numbers.append(torch.arange(at, at + chunk.shape[0], device=self.device))
                    rows.append(chunk)
                at += chunk.shape[0]
            if not rows:
                continue
            distinct, number = unique_rows(torch.cat(rows))
            final[torch.cat(numbers)] = number + masks
            count, width = distinct.shape[0], distinct.shape[1] - 2
            kinds.append(torch.full((count,), kind, dtype=torch.int32, device=self.device))
            starts.append(torch.arange(count, device=self.device) * width + offset)
            cores.append(distinct[:, :2])
            data.append(distinct[:, 2:].reshape(-1))
            masks, offset = masks + count, offset + count * width
        empty = torch.zeros(0, dtype=torch.int32, device=self.device)
        core = torch.cat(cores) if cores else empty.view(0, 2)
        start = torch.cat(starts).int() if starts else empty
        kind_table = torch.cat(kinds) if kinds else empty
        return Masks(
            kind_table, start, core[:, 0].contiguous(), core[:, 1].contiguous(), torch.cat(data) if data else empty
        ), final


def unique_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of an int32 table and, for each row, the number of its equal.

    Rows are compared by a 64-bit hash and then in full; should two different rows ever share a hash, by sorting instead.
    """
    if rows.shape[0] == 0:
        return rows, torch.zeros(0, dtype=torch.int64, device=rows.device)
    generator = torch.Generator().manual_seed(0x5EED)
    weight = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator).to(rows.device)
    key = (rows.long() * weight).sum(1)
    values, number = torch.unique(key, return_inverse=True)
    first = torch.full((values.numel(),), rows.shape[0], dtype=torch.int64, device=rows.device)
    first.scatter_reduce_(0, number, torch.arange(rows.shape[0], device=rows.device), "amin")
    distinct = rows[first]
    if not torch.equal(distinct[number], rows):
        distinct, number = torch.unique(rows, dim=0, return_inverse=True)
    return distinct, number


def runs_of(
    spans: Spans, tile_of: Tensor, slot_of: Tensor, count: Tensor, store: MaskStore, *, gather: int, longest: int
) -> Runs:
    """The runs of tiles 0 … len(count) - 1.

    tile_of, slot_of: for each row of `spans` its tile and its place in it; count: rows of each tile. A run whose pairs are
    fewer than a `gather`-th of its area is gathered. A bounded run longer than `longest` gives its core as a run of its own,
    which can be split.
    """
    row, lo, hi = spans.listed()
    device = row.device
    if row.numel() == 0:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return Runs(none, none, none, none, none, none, 0, 0)
    width = spans.keys + 2
    # Intervals by tile and key; a run ends where no interval reaches on.
    start, order = torch.sort(tile_of[row] * width + lo)
    row, lo, hi = row[order], lo[order], hi[order]
    reach = torch.cummax(tile_of[row] * width + hi, 0).values
    first = torch.ones_like(start, dtype=torch.bool)
    first[1:] = start[1:] > reach[:-1]
    run = first.cumsum(0) - 1

    stretches = _Stretches.of(run, int(run[-1]) + 1, row, lo, hi, tile_of, count)
    if bool((stretches.hi - stretches.lo > longest).any()):
        stretches = stretches.with_cores_apart(longest, slot_of, store.tile, tile_of, count)
        run, row, lo, hi = stretches.which, stretches.row, stretches.row_lo, stretches.row_hi
    # Where a row has two intervals in one run, bounds cannot say it: cut the run into short stretches and look again.
    torn = stretches.torn(slot_of, store.tile) & ~stretches.sparse(gather)
    out = [stretches.emit(~torn, slot_of, store, gather)]
    if bool(torn.any()):
        pick = torn[run]
        out.append(
            _cut(stretches.lo[run[pick]], row[pick], lo[pick], hi[pick], tile_of, count).emit(None, slot_of, store, gather)
        )
    columns = [list(column) for column in zip(*out, strict=True)]
    all_tile, all_lo, all_hi, all_mask, point_row, point_slot = (torch.cat(column) for column in columns[:6])
    pairs, visited = (sum(column) for column in columns[6:])
    order = torch.argsort(all_tile * width + all_lo)
    all_tile, all_lo, all_hi, all_mask = _joined(all_tile[order], all_lo[order], all_hi[order], all_mask[order])
    all_points = point_row * width + point_slot
    all_points = torch.sort(all_points).values
    point = torch.div(all_points, width, rounding_mode="floor")
    return Runs(all_tile, all_lo, all_hi, all_mask, point, all_points - point * width, pairs, visited)


def with_whole(runs: Runs, whole: Spans, count: Tensor) -> Runs:
    """The runs together with stretches that all rows of a tile see; `whole` is by tile, `count` says how many rows each has."""
    tile, lo, hi = whole.listed()
    area = int(((hi - lo) * count[tile]).sum())
    columns = ((runs.tile, tile), (runs.lo, lo), (runs.hi, hi), (runs.mask, torch.full_like(tile, -1)))
    tile, lo, hi, mask = (torch.cat(pair) for pair in columns)
    order = torch.argsort(tile * (whole.keys + 2) + lo)
    tile, lo, hi, mask = _joined(tile[order], lo[order], hi[order], mask[order])
    return Runs(tile, lo, hi, mask, runs.point_row, runs.point_slot, runs.pairs + area, runs.visited + area)


def _joined(tile: Tensor, lo: Tensor, hi: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whole runs that touch become one."""
    first = torch.ones_like(tile, dtype=torch.bool)
    first[1:] = (tile[1:] != tile[:-1]) | (lo[1:] != hi[:-1]) | (mask[1:] >= 0) | (mask[:-1] >= 0)
    last = torch.ones_like(first)
    last[:-1] = first[1:]
    return tile[first], lo[first], hi[last], mask[first]


def _cut(base: Tensor, row: Tensor, lo: Tensor, hi: Tensor, tile_of: Tensor, count: Tensor) -> _Stretches:
    """The intervals cut at every BITS_KEYS keys, counted from their run's start `base`."""
    first = torch.div(lo - base, BITS_KEYS, rounding_mode="floor")
    last = torch.div(hi - 1 - base, BITS_KEYS, rounding_mode="floor")
    times = last - first + 1
    which = torch.arange(row.numel(), device=row.device).repeat_interleave(times)
    stretch = first[which] + torch.arange(which.numel(), device=row.device) - (times.cumsum(0) - times)[which]
    edge = base[which] + stretch * BITS_KEYS
    row, lo, hi = row[which], torch.maximum(lo[which], edge), torch.minimum(hi[which], edge + BITS_KEYS)
    # Number the stretches by (tile, start).
    tile = tile_of[row]
    key = tile * (int(edge.max()) + 1) + edge
    values, number = torch.unique(key, return_inverse=True)
    return _Stretches.of(number, values.numel(), row, lo, hi, tile_of, count)


@dataclass
class _Stretches:
    """Stretches of keys of single tiles: their extent, and the row intervals inside each (`which` = stretch of interval)."""

    tile: Tensor
    lo: Tensor
    hi: Tensor
    pairs: Tensor
    rows: Tensor
    which: Tensor
    row: Tensor
    row_lo: Tensor
    row_hi: Tensor

    @staticmethod
    def of(which: Tensor, number: int, row: Tensor, lo: Tensor, hi: Tensor, tile_of: Tensor, count: Tensor) -> _Stretches:
        device = row.device
        tile = torch.zeros(number, dtype=torch.int64, device=device).scatter_(0, which, tile_of[row])
        first = torch.full((number,), 2**62, dtype=torch.int64, device=device).scatter_reduce_(0, which, lo, "amin")
        last = torch.zeros(number, dtype=torch.int64, device=device).scatter_reduce_(0, which, hi, "amax")
        pairs = torch.zeros(number, dtype=torch.int64, device=device).scatter_add_(0, which, hi - lo)
        return _Stretches(tile, first, last, pairs, count[tile], which, row, lo, hi)

    @property
    def area(self) -> Tensor:
        return (self.hi - self.lo) * self.rows

    def sparse(self, gather: int) -> Tensor:
        return self.pairs * gather < self.area

    def torn(self, slot_of: Tensor, tile: int) -> Tensor:
        """Which stretches hold two intervals of one row."""
        key = self.which * tile + slot_of[self.row]
        times = torch.bincount(key, minlength=self.tile.numel() * tile)
        return (times > 1).view(-1, tile).any(1)

    def with_cores_apart(self, longest: int, slot_of: Tensor, tile: int, tile_of: Tensor, count: Tensor) -> _Stretches:
        """Long stretches with one interval in every row, cut in three: before, inside and after what every row sees."""
        core_lo = torch.zeros_like(self.lo).scatter_reduce_(0, self.which, self.row_lo, "amax")
        core_hi = torch.full_like(self.lo, 2**62).scatter_reduce_(0, self.which, self.row_hi, "amin")
        seen = torch.bincount(self.which, minlength=self.tile.numel())
        long = (self.hi - self.lo > longest) & (core_hi - core_lo > longest // 2) & (seen == self.rows)
        long &= ~self.torn(slot_of, tile)
        core_lo, core_hi = torch.where(long, core_lo, self.lo), torch.where(long, core_hi, self.hi)
        which = torch.cat((3 * self.which, 3 * self.which + 1, 3 * self.which + 2))
        at_lo, at_hi = core_lo[self.which], core_hi[self.which]
        lo = torch.cat((self.row_lo, torch.maximum(self.row_lo, at_lo), torch.maximum(self.row_lo, at_hi)))
        hi = torch.cat((torch.minimum(self.row_hi, at_lo), torch.minimum(self.row_hi, at_hi), self.row_hi))
        row = self.row.repeat(3)
        real = lo < hi
        which = torch.unique(which[real], return_inverse=True)[1]
        return _Stretches.of(which, int(which.max()) + 1, row[real], lo[real], hi[real], tile_of, count)

    def emit(self, take: Tensor | None, slot_of: Tensor, store: MaskStore, gather: int) -> tuple[Any, ...]:
        """(tile, lo, hi, mask, point_row, point_slot, pairs, visited) of the stretches to take."""
        taken = torch.ones_like(self.tile, dtype=torch.bool) if take is None else take
        gathered = taken & self.sparse(gather)
        whole = taken & ~gathered & (self.pairs == self.area)
        rest = taken & ~gathered & ~whole
        bits = rest & self.torn(slot_of, store.tile) if take is None else torch.zeros_like(rest)
        bounded = rest & ~bits
        mask = torch.full_like(self.tile, -1)
        if bool(bounded.any()):
            mask[bounded] = store.add(BOUNDS, self._bounds(bounded, slot_of, store.tile))
        if bool(bits.any()):
            mask[bits] = store.add(BITS, self._bits(bits, slot_of, store.tile))
        runs = whole | rest
        alone = gathered[self.which]
        points = Spans(0, 0, self.row[alone], self.row_lo[alone], self.row_hi[alone]).expand()
        pairs = int(self.pairs[taken].sum())
        visited = int(self.area[runs].sum()) + int(points[0].numel())
        return self.tile[runs], self.lo[runs], self.hi[runs], mask[runs], *points, pairs, visited

    def _bounds(self, pick: Tensor, slot_of: Tensor, tile: int) -> Tensor:
        """Mask rows of bounds: core_lo, core_hi, then (lo, hi) for each row of the tile."""
        number = pick.long().cumsum(0) - 1
        inside = pick[self.which]
        which, row = self.which[inside], self.row[inside]
        rows = torch.zeros(int(pick.sum()), 2 * tile + 2, dtype=torch.int32, device=row.device)
        rows[:, 2::2] = EMPTY
        at = number[which]
        rows[at, 2 + 2 * slot_of[row]] = (self.row_lo[inside] - self.lo[which]).int()
        rows[at, 3 + 2 * slot_of[row]] = (self.row_hi[inside] - self.hi[which]).int()
        real = torch.arange(tile, device=row.device) < self.rows[pick][:, None]
        rows[:, 0] = torch.where(real, rows[:, 2::2], 0).amax(1)
        rows[:, 1] = torch.where(real, rows[:, 3::2], 0).amin(1)
        return rows

    def _bits(self, pick: Tensor, slot_of: Tensor, tile: int) -> Tensor:
        """Mask rows of bits: an empty core, then BITS_WORDS words for each row of the tile."""
        number = pick.long().cumsum(0) - 1
        inside = pick[self.which]
        which = self.which[inside].repeat_interleave(self.row_hi[inside] - self.row_lo[inside])
        row, slot = Spans(0, 0, self.row[inside], self.row_lo[inside], self.row_hi[inside]).expand()
        column = slot - self.lo[which]
        word = (number[which] * tile + slot_of[row]) * BITS_WORDS + torch.div(column, 32, rounding_mode="floor")
        words = torch.zeros(int(pick.sum()) * tile * BITS_WORDS, dtype=torch.int64, device=row.device)
        words.index_add_(0, word, torch.ones_like(column) << (column % 32))
        rows = torch.zeros(int(pick.sum()), tile * BITS_WORDS + 2, dtype=torch.int32, device=row.device)
        rows[:, 0] = EMPTY
        rows[:, 2:] = torch.where(words >= 2**31, words - 2**32, words).int().view(-1, tile * BITS_WORDS)
        return rows
