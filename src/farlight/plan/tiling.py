"""Tiling: from the key intervals of rows to the runs, masks and points of their tiles.

1. *Interval sweep.* The intervals of a tile's rows are sorted by start; a running maximum of their ends separates them into
   connected *segments*, each the union of overlapping intervals.
2. *Core splitting.* A long segment of one interval per row is cut into the stretch common to all rows and the two ragged
   ends, so that the common one needs no mask and can be split for load balance.
3. *Encoding.* A segment with few pairs for its area becomes points. A full one is a run without a mask. One with at most one
   interval per row is a run masked by row bounds (BOUNDS). Any other is cut every BITS_KEYS slots and encoded again, where two
   intervals of one row are masked by bits (BITS).
4. *Run coalescing.* Adjacent unmasked runs of a tile are merged.

Masks are deduplicated by hash (`MaskStore`). All steps are sorts, scatter reductions and prefix sums over the intervals.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from farlight.patterns.spans import Spans
from farlight.plan.layout import Chunk
from farlight.plan.tables import BITS, BITS_KEYS, BITS_WORDS, BOUNDS, EMPTY, Masks, TileShape
from farlight.ragged import expand_ranges

__all__ = ["MaskStore", "Runs", "add_unmasked", "tile_runs"]


@dataclass
class Runs:
    """Runs of the tiles of a chunk, sorted by (tile, lo), and gathered pairs, sorted by (row, slot). All int64.

    tile: counted from the chunk's first tile; [lo, hi): slots; mask: number in the MaskStore, -1 = none; point_row: index of
    the row in the chunk.
    """

    tile: Tensor
    lo: Tensor
    hi: Tensor
    mask: Tensor
    point_row: Tensor
    point_slot: Tensor


class MaskStore:
    """Masks of all chunks, each distinct one of a chunk stored once; `finish` deduplicates over all chunks."""

    def __init__(self) -> None:
        self._chunks: list[tuple[int, Tensor]] = []  # (kind, int32 rows: core_lo, core_hi, data …)
        self._count = 0

    def add(self, kind: int, rows: Tensor) -> Tensor:
        """(masks,) int64 provisional numbers of masks given as int32 rows `core_lo, core_hi, data …`."""
        distinct, number = unique_rows(rows)
        self._chunks.append((kind, distinct))
        self._count += distinct.shape[0]
        return number + (self._count - distinct.shape[0])

    def finish(self) -> tuple[Masks, Tensor]:
        """The distinct masks, and the final number of each provisional one."""
        final = torch.zeros(self._count, dtype=torch.int64, device="cpu")
        empty = torch.zeros(0, dtype=torch.int32, device="cpu")
        kinds, starts, cores, data = [empty], [empty], [empty.view(0, 2)], [empty]
        words = masks = 0
        for kind in (BOUNDS, BITS):
            numbers, rows, begin = [], [], 0
            for chunk_kind, chunk in self._chunks:
                if chunk_kind == kind:
                    numbers.append(torch.arange(begin, begin + chunk.shape[0], device="cpu"))
                    rows.append(chunk)
                begin += chunk.shape[0]
            if not rows:
                continue
            distinct, number = unique_rows(torch.cat(rows))
            final[torch.cat(numbers)] = number + masks
            count, width = distinct.shape[0], distinct.shape[1] - 2
            kinds.append(torch.full((count,), kind, dtype=torch.int32, device="cpu"))
            starts.append((torch.arange(count, device="cpu") * width + words).int())
            cores.append(distinct[:, :2])
            data.append(distinct[:, 2:].reshape(-1))
            masks, words = masks + count, words + count * width
        core_lo, core_hi = (column.contiguous() for column in torch.cat(cores).unbind(1))
        return Masks(torch.cat(kinds), torch.cat(starts), core_lo, core_hi, torch.cat(data)), final


def unique_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of an int32 table, and for each row the index of its equal among them.

    Rows are hashed to 64 bits by a random linear form and the result compared in full; on a collision the rows are sorted
    lexicographically instead.
    """
    if rows.shape[0] == 0:
        return rows, torch.zeros(0, dtype=torch.int64, device=rows.device)
    generator = torch.Generator().manual_seed(0x5EED)
    weight = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator).to(rows.device)
    values, number = torch.unique((rows.long() * weight).sum(1), return_inverse=True)
    first = torch.full((values.numel(),), rows.shape[0], dtype=torch.int64, device=rows.device)
    first.scatter_reduce_(0, number, torch.arange(rows.shape[0], device=rows.device), "amin")
    distinct = rows[first]
    if not torch.equal(distinct[number], rows):
        distinct, number = torch.unique(rows, dim=0, return_inverse=True)
    return distinct, number


def tile_runs(spans: Spans, chunk: Chunk, store: MaskStore, shape: TileShape) -> Runs:
    """The runs and points of a chunk's tiles from the intervals of its rows; `store` receives the masks."""
    row, lo, hi = spans.listed()
    if row.numel() == 0:
        empty = torch.zeros(0, dtype=torch.int64, device=row.device)
        return Runs(empty, empty, empty, empty, empty, empty)
    # One number carries tile and slot: tiles lie `width` apart, so that the intervals of two tiles never touch.
    width = spans.keys + 2
    start, order = torch.sort(chunk.tile[row] * width + lo)
    row, lo, hi = row[order], lo[order], hi[order]
    reach = torch.cummax(chunk.tile[row] * width + hi, 0).values
    is_first = torch.ones_like(start, dtype=torch.bool)
    is_first[1:] = start[1:] > reach[:-1]
    segments = _Segments.of(is_first.cumsum(0) - 1, row, lo, hi, chunk, shape)
    if bool((segments.hi - segments.lo > shape.longest).any()):
        segments = segments.split_cores()
    needs_bits = segments.has_double_rows & ~segments.is_sparse
    encoded = [segments.encode(~needs_bits, store)]
    if bool(needs_bits.any()):
        narrow = segments.cut(needs_bits)
        encoded.append(narrow.encode(torch.ones_like(narrow.lo, dtype=torch.bool), store))
    columns = ([getattr(runs, name) for runs in encoded] for name in ("tile", "lo", "hi", "mask", "point_row", "point_slot"))
    tile, lo, hi, mask, point_row, point_slot = (torch.cat(column) for column in columns)
    order = torch.argsort(tile * width + lo)
    point = torch.sort(point_row * width + point_slot).values
    runs = _coalesced(tile[order], lo[order], hi[order], mask[order])
    return Runs(*runs, point // width, point % width)


def add_unmasked(runs: Runs, whole: Spans) -> Runs:
    """The runs together with unmasked ones: `whole`, by tile, disjoint from them."""
    tile, lo, hi = whole.listed()
    pairs = ((runs.tile, tile), (runs.lo, lo), (runs.hi, hi), (runs.mask, torch.full_like(tile, -1)))
    tile, lo, hi, mask = (torch.cat(pair) for pair in pairs)
    order = torch.argsort(tile * (whole.keys + 2) + lo)
    return Runs(*_coalesced(tile[order], lo[order], hi[order], mask[order]), runs.point_row, runs.point_slot)


def _coalesced(tile: Tensor, lo: Tensor, hi: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorted runs with adjacent unmasked ones of a tile merged."""
    is_first = torch.ones_like(tile, dtype=torch.bool)
    is_first[1:] = (tile[1:] != tile[:-1]) | (lo[1:] != hi[:-1]) | (mask[1:] >= 0) | (mask[:-1] >= 0)
    is_last = torch.ones_like(is_first)
    is_last[:-1] = is_first[1:]
    return tile[is_first], lo[is_first], hi[is_last], mask[is_first]


@dataclass
class _Segments:
    """Ranges of slots of single tiles, with the row intervals inside each.

    tile, lo, hi, pairs, rows: (segments,) tile, range, allowed pairs, rows of the tile; segment, row, row_lo, row_hi:
    (intervals,) segment, row in the chunk and range of each row interval. All int64.
    """

    chunk: Chunk
    shape: TileShape
    tile: Tensor
    lo: Tensor
    hi: Tensor
    pairs: Tensor
    rows: Tensor
    segment: Tensor
    row: Tensor
    row_lo: Tensor
    row_hi: Tensor

    @staticmethod
    def of(segment: Tensor, row: Tensor, lo: Tensor, hi: Tensor, chunk: Chunk, shape: TileShape) -> _Segments:
        """Intervals grouped by their segment number, dense from 0."""
        count, device = int(segment.max()) + 1, row.device
        tile = torch.zeros(count, dtype=torch.int64, device=device).scatter_(0, segment, chunk.tile[row])
        first = torch.full((count,), 2**62, dtype=torch.int64, device=device).scatter_reduce_(0, segment, lo, "amin")
        last = torch.zeros(count, dtype=torch.int64, device=device).scatter_reduce_(0, segment, hi, "amax")
        pairs = torch.zeros(count, dtype=torch.int64, device=device).scatter_add_(0, segment, hi - lo)
        return _Segments(chunk, shape, tile, first, last, pairs, chunk.count[tile], segment, row, lo, hi)

    @property
    def area(self) -> Tensor:
        """(segments,): pairs that a run over the segment visits."""
        return (self.hi - self.lo) * self.rows

    @property
    def is_sparse(self) -> Tensor:
        """(segments,) bool: visiting the area costs more than gathering its pairs."""
        return self.pairs * self.shape.gather < self.area

    @cached_property
    def has_double_rows(self) -> Tensor:
        """(segments,) bool: some row has two intervals, which BOUNDS cannot encode."""
        tile = self.shape.tile
        cell = self.segment * tile + self.chunk.tile_row[self.row]
        intervals = torch.bincount(cell, minlength=self.tile.numel() * tile)
        return (intervals > 1).view(-1, tile).any(1)

    def split_cores(self) -> _Segments:
        """Long segments of one interval per row cut into the core that all rows share and the ranges before and after it.

        Unmasked runs can be split for load balance, masked ones cannot.
        """
        core_lo = torch.zeros_like(self.lo).scatter_reduce_(0, self.segment, self.row_lo, "amax")
        core_hi = torch.full_like(self.lo, 2**62).scatter_reduce_(0, self.segment, self.row_hi, "amin")
        intervals = torch.bincount(self.segment, minlength=self.tile.numel())
        longest = self.shape.longest
        cut = (self.hi - self.lo > longest) & (core_hi - core_lo > longest // 2) & (intervals == self.rows)
        cut &= ~self.has_double_rows
        core_lo = torch.where(cut, core_lo, self.lo)[self.segment]
        core_hi = torch.where(cut, core_hi, self.hi)[self.segment]
        segment = torch.cat((3 * self.segment, 3 * self.segment + 1, 3 * self.segment + 2))
        lo = torch.cat((self.row_lo, torch.maximum(self.row_lo, core_lo), torch.maximum(self.row_lo, core_hi)))
        hi = torch.cat((torch.minimum(self.row_hi, core_lo), torch.minimum(self.row_hi, core_hi), self.row_hi))
        row = self.row.repeat(3)
        nonempty = lo < hi
        segment = torch.unique(segment[nonempty], return_inverse=True)[1]
        return _Segments.of(segment, row[nonempty], lo[nonempty], hi[nonempty], self.chunk, self.shape)

    def cut(self, selected: Tensor) -> _Segments:
        """The selected segments cut every BITS_KEYS slots from their start."""
        inside = selected[self.segment]
        base = self.lo[self.segment[inside]]
        row, lo, hi = self.row[inside], self.row_lo[inside], self.row_hi[inside]
        source, block = expand_ranges((lo - base) // BITS_KEYS, (hi - 1 - base) // BITS_KEYS + 1)
        edge = base[source] + block * BITS_KEYS
        row, lo, hi = row[source], torch.maximum(lo[source], edge), torch.minimum(hi[source], edge + BITS_KEYS)
        segment = torch.unique(self.chunk.tile[row] * (int(edge.max()) + 1) + edge, return_inverse=True)[1]
        return _Segments.of(segment, row, lo, hi, self.chunk, self.shape)

    def encode(self, selected: Tensor, store: MaskStore) -> Runs:
        """The selected segments as points, unmasked runs, runs masked by bounds, or by bits where a row has two intervals."""
        gathered = selected & self.is_sparse
        runs = selected & ~gathered
        masked = runs & (self.pairs != self.area)
        bits = masked & self.has_double_rows
        bounded = masked & ~bits
        mask = torch.full_like(self.tile, -1)
        if bool(bounded.any()):
            mask[bounded] = store.add(BOUNDS, self._bound_masks(bounded))
        if bool(bits.any()):
            mask[bits] = store.add(BITS, self._bit_masks(bits))
        alone = gathered[self.segment]
        points = Spans(0, 0, self.row[alone], self.row_lo[alone], self.row_hi[alone]).expand()
        return Runs(self.tile[runs], self.lo[runs], self.hi[runs], mask[runs], *points)

    def _bound_masks(self, selected: Tensor) -> Tensor:
        """(masks, 2 + 2 · tile) int32: core_lo, core_hi, then lo, hi of each row relative to the segment's."""
        tile = self.shape.tile
        number = selected.long().cumsum(0) - 1
        inside = selected[self.segment]
        segment, row = self.segment[inside], self.row[inside]
        masks = torch.zeros(int(selected.sum()), 2 * tile + 2, dtype=torch.int32, device=row.device)
        masks[:, 2::2] = EMPTY
        tile_row = self.chunk.tile_row[row]
        masks[number[segment], 2 + 2 * tile_row] = (self.row_lo[inside] - self.lo[segment]).int()
        masks[number[segment], 3 + 2 * tile_row] = (self.row_hi[inside] - self.hi[segment]).int()
        is_row = torch.arange(tile, device=row.device) < self.rows[selected][:, None]
        masks[:, 0] = torch.where(is_row, masks[:, 2::2], 0).amax(1)
        masks[:, 1] = torch.where(is_row, masks[:, 3::2], 0).amin(1)
        return masks

    def _bit_masks(self, selected: Tensor) -> Tensor:
        """(masks, 2 + tile · BITS_WORDS) int32: an empty core, then the words of each row."""
        tile = self.shape.tile
        number = selected.long().cumsum(0) - 1
        inside = selected[self.segment]
        interval, slot = expand_ranges(self.row_lo[inside], self.row_hi[inside])
        segment, row = self.segment[inside][interval], self.row[inside][interval]
        column = slot - self.lo[segment]
        word = (number[segment] * tile + self.chunk.tile_row[row]) * BITS_WORDS + column // 32
        words = torch.zeros(int(selected.sum()) * tile * BITS_WORDS, dtype=torch.int64, device=row.device)
        words.index_add_(0, word, torch.ones_like(column) << (column % 32))
        masks = torch.zeros(int(selected.sum()), tile * BITS_WORDS + 2, dtype=torch.int32, device=row.device)
        masks[:, 0] = EMPTY
        masks[:, 2:] = torch.where(words >= 2**31, words - 2**32, words).int().view(-1, tile * BITS_WORDS)
        return masks
