"""From the drafts of pieces to their tables: layers gathered chunk by chunk, long tiles cut into parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from farlight.plan.tables import Layer, Piece
from farlight.plan.tiling import MaskStore, runs_of, with_whole

if TYPE_CHECKING:
    from farlight.plan.build import Layout, TileShape

__all__ = ["Draft", "split_long_tiles"]


@dataclass
class DraftLayer:
    """A layer before its masks have final numbers: runs by (variant, tile), sorted; points by place."""

    variation: Tensor
    entry_base: Tensor
    place_base: Tensor
    tiles: int
    keys: Tensor | None
    seen: Tensor  # (variants, n_q) int8: the row sees something here
    point_count: Tensor  # (places,) int32
    tile: list[Tensor] = field(default_factory=list)
    lo: list[Tensor] = field(default_factory=list)
    hi: list[Tensor] = field(default_factory=list)
    mask: list[Tensor] = field(default_factory=list)
    point_key: list[Tensor] = field(default_factory=list)

    def count_points(self, place: Tensor) -> None:
        """Note points of these places; they come in order of place, so that counts say where each begins."""
        self.point_count.index_add_(0, place, torch.ones_like(place, dtype=torch.int32))


@dataclass
class Draft:
    """A piece in the making."""

    variation: Tensor
    rows: Tensor | None
    row_first: Tensor
    first: Tensor
    start: Tensor
    count: Tensor
    layers: list[DraftLayer] = field(default_factory=list)

    def add(self, layout: Layout, store: MaskStore, shape: TileShape) -> tuple[int, int]:
        """Lay out one more term; the pairs and the visited pairs, over batch and heads."""
        variants, natural = layout.variants, self.rows is None
        n_q, every = layout.sizes.n_q, torch.arange(variants)
        tiles, places = self.start.numel(), int(self.row_first[-1])
        layer = DraftLayer(
            variation=layout.variation,
            entry_base=every * tiles if natural else self.first[:-1],
            place_base=every * n_q if natural else torch.zeros_like(every),
            tiles=tiles * (variants if natural else 1),
            keys=None if layout.keys is None else layout.keys.slots,
            seen=torch.zeros(variants, n_q, dtype=torch.int8),
            point_count=torch.zeros(places * (variants if natural else 1), dtype=torch.int32),
        )
        self.layers.append(layer)
        times = layout.times()
        pairs = visited = 0
        for t0, variant, row, tile_of, slot in layout.chunks(shape.tile):
            count = torch.bincount(tile_of)
            place = row + variant * n_q if natural else self.start[t0] + torch.arange(row.numel())
            if layout.term.points:
                at, key = layout.points(variant, row)
                layer.count_points(place[at])
                layer.point_key.append(key.int())
                layer.seen[variant[at], row[at]] = 1
                here = int(times[variant[at]].sum())
                pairs, visited = pairs + here, visited + here
                continue
            coarse = layout.coarse(variant, row, tile_of)
            spans = layout.spans(variant, row) if coarse is None else coarse.rest
            runs = runs_of(spans, tile_of, slot, count, store, gather=shape.gather, longest=shape.longest)
            in_row = spans.per_row()
            if coarse is not None:
                runs = with_whole(runs, coarse.whole, count)
                in_row += coarse.whole.per_row()[tile_of]
            layer.seen[variant, row] = (in_row > 0).to(torch.int8)
            layer.tile.append((runs.tile + t0).int())
            layer.lo.append(runs.lo.int())
            layer.hi.append(runs.hi.int())
            layer.mask.append(runs.mask.int())
            layer.count_points(place[runs.point_row])
            key = runs.point_slot if layer.keys is None else layer.keys[runs.point_slot]
            layer.point_key.append(key.int())
            of_tile = torch.zeros_like(count).scatter_(0, tile_of, variant)
            pairs += int((in_row * times[variant]).sum())
            visited += int(((runs.hi - runs.lo) * count[runs.tile] * times[of_tile[runs.tile]]).sum())
            visited += int(times[variant[runs.point_row]].sum())
        return pairs, visited


def _joined(chunks: list[Tensor]) -> Tensor:
    """The chunks as one tensor; the list is emptied, so that at most one layer is held twice."""
    out = torch.cat(chunks) if chunks else torch.zeros(0, dtype=torch.int32)
    chunks.clear()
    return out


def indptr_of(counts: Tensor) -> Tensor:
    out = torch.zeros(counts.numel() + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=out[1:])
    return out


def split_long_tiles(draft: Draft, final: Tensor, longest: int) -> Piece:
    """The piece's tables. A tile with more than `longest` slots to visit becomes several entries, its runs dealt out."""
    tiles = draft.start.numel()
    columns = []
    parts = torch.ones(tiles, dtype=torch.int64)
    for layer in draft.layers:
        tile, lo, hi, mask = (_joined(column) for column in (layer.tile, layer.lo, layer.hi, layer.mask))
        lo, hi = lo.long(), hi.long()
        if bool((hi - lo > longest).any()):
            tile, lo, hi, mask = _cut_whole_runs(tile, lo, hi, mask, longest)
        width = torch.zeros(layer.tiles, dtype=torch.int64).index_add_(0, tile.long(), hi - lo)
        wanted = torch.div(width + longest - 1, longest, rounding_mode="floor").clamp(min=1)
        parts = torch.maximum(parts, wanted.view(-1, tiles).amax(0) if layer.tiles else parts)
        columns.append((tile.long(), lo, hi, mask, width))
    entry = indptr_of(parts)
    of_entry = torch.arange(tiles).repeat_interleave(parts)
    part = torch.arange(of_entry.numel()) - entry[of_entry]
    layers = []
    for layer, (tile, lo, hi, mask, width) in zip(draft.layers, columns, strict=True):
        # The part of a run: by how many slots of its tile come before it.
        before = (hi - lo).cumsum(0) - (hi - lo) - (width.cumsum(0) - width)[tile]
        local = tile % tiles if tiles else tile
        of_part = torch.minimum(torch.div(before, longest, rounding_mode="floor"), parts[local] - 1)
        copies = layer.tiles // tiles if tiles else 0
        place = torch.div(tile, max(1, tiles), rounding_mode="floor") * entry[-1] + entry[local] + of_part
        counts = torch.bincount(place, minlength=copies * int(entry[-1]))
        mask = torch.where(mask >= 0, final[mask.clamp(min=0).long()] if final.numel() else mask, mask)
        point_keys = _joined(layer.point_key)
        has_points = point_keys.numel() > 0
        base = (
            torch.arange(layer.entry_base.numel()) * entry[-1] if copies > 1 or draft.rows is None else entry[layer.entry_base]
        )
        layers.append(
            Layer(
                variant=layer.variation.int(),
                entry_base=base,
                place_base=layer.place_base,
                indptr=indptr_of(counts),
                lo=lo.int(),
                hi=hi.int(),
                mask=mask.int(),
                keys=None if layer.keys is None else layer.keys.int(),
                point_indptr=indptr_of(layer.point_count) if has_points else None,
                point_keys=point_keys if has_points else None,
            )
        )
    return Piece(
        variant=draft.variation.int(),
        rows=None if draft.rows is None else draft.rows.int(),
        row_first=draft.row_first,
        first=entry[draft.first],
        start=draft.start[of_entry].int(),
        count=draft.count[of_entry].int(),
        part=part.int(),
        parts=parts[of_entry].int(),
        layers=tuple(layers),
    )


def _cut_whole_runs(tile: Tensor, lo: Tensor, hi: Tensor, mask: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs without a mask cut to at most `longest` slots (a mask is bound to its run's ends, so masked runs stay)."""
    times = torch.where(mask < 0, torch.div(hi - lo + longest - 1, longest, rounding_mode="floor"), 1)
    which = torch.arange(tile.numel()).repeat_interleave(times)
    step = torch.arange(which.numel()) - (times.cumsum(0) - times)[which]
    cut = times[which] > 1
    start = torch.where(cut, lo[which] + step * longest, lo[which])
    stop = torch.where(cut, torch.minimum(hi[which], start + longest), hi[which])
    return tile[which], start, stop, mask[which]
