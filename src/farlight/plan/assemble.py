"""Assembly of a piece: layers collected chunk by chunk, then written as CSR tables with long tiles split (split-K).

`PieceBuilder.add` appends one term as a layer: the runs and points of each chunk, with masks still numbered provisionally.
`PieceBuilder.finish` runs once all layers are known. A tile with more than `longest` slots in some layer becomes several
entries (parts); runs are assigned to parts by the number of slots of the tile that precede them. Unmasked runs longer than
`longest` are cut first. A masked run stays whole, since its mask is relative to its ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from farlight.plan.layout import RowOrder, TermLayout
from farlight.plan.tables import Layer, Piece, TileShape
from farlight.plan.tiling import MaskStore, add_unmasked, tile_runs
from farlight.ragged import exclusive_cumsum, expand_counts

__all__ = ["PieceBuilder"]


@dataclass
class _LayerBuilder:
    """The chunks of one layer. tiles: over all variants of the layer; the lists hold one int32 tensor per chunk.

    has_keys: (variants, n_q) bool, the row has a key in this layer; point_count: (places,) int32 points of each place.
    """

    variation: Tensor
    entry_base: Tensor
    place_base: Tensor
    tiles: int
    keys: Tensor | None
    has_keys: Tensor
    point_count: Tensor
    tile: list[Tensor] = field(default_factory=list)
    lo: list[Tensor] = field(default_factory=list)
    hi: list[Tensor] = field(default_factory=list)
    mask: list[Tensor] = field(default_factory=list)
    point_keys: list[Tensor] = field(default_factory=list)

    def add_points(self, place: Tensor, key: Tensor) -> None:
        """Append points, sorted by place."""
        self.point_count.index_add_(0, place, torch.ones_like(place, dtype=torch.int32))
        self.point_keys.append(key.int())

    def runs(self, longest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(tile, lo, hi, mask) of all runs, unmasked ones at most `longest` slots long; each chunk is freed once copied."""
        tile, lo, hi, mask = (_concatenated(column) for column in (self.tile, self.lo, self.hi, self.mask))
        tile, lo, hi = tile.long(), lo.long(), hi.long()
        if not bool((hi - lo > longest).any()):
            return tile, lo, hi, mask
        parts = torch.where(mask < 0, (hi - lo + longest - 1) // longest, 1)
        run, part = expand_counts(parts)
        is_cut = parts[run] > 1
        start = torch.where(is_cut, lo[run] + part * longest, lo[run])
        stop = torch.where(is_cut, torch.minimum(hi[run], start + longest), hi[run])
        return tile[run], start, stop, mask[run]


class PieceBuilder:
    """A piece under construction over one row order. variation: (B|1, H|1) int64, the variant of each (batch, head).

    pairs, visited: allowed and computed pairs of the layers added so far, over batch and heads.
    """

    def __init__(self, variation: Tensor, order: RowOrder) -> None:
        self.variation, self.order = variation, order
        self.layers: list[_LayerBuilder] = []
        self.pairs = self.visited = 0

    def add(self, layout: TermLayout, masks: MaskStore, shape: TileShape) -> None:
        """Append the term of `layout` as a layer; its row order is this piece's."""
        order, identity, n_q = self.order, self.order.rows is None, layout.sizes.n_q
        tiles, copies, variants = order.start.numel(), layout.variants if identity else 1, torch.arange(layout.variants)
        layer = _LayerBuilder(
            variation=layout.variation,
            entry_base=variants * tiles if identity else order.first[:-1],
            place_base=variants * n_q if identity else torch.zeros_like(variants),
            tiles=tiles * copies,
            keys=None if layout.keys is None else layout.keys.slots,
            has_keys=torch.zeros(layout.variants, n_q, dtype=torch.bool),
            point_count=torch.zeros(int(order.row_first[-1]) * copies, dtype=torch.int32),
        )
        self.layers.append(layer)
        multiplicity = layout.multiplicity()
        for chunk in layout.chunks():
            weight, row = multiplicity[chunk.variant], chunk.row
            place = row + chunk.variant * n_q if identity else order.start[chunk.first_tile] + torch.arange(row.numel())
            if layout.term.points:
                index, key = layout.points(chunk.variant, row)
                layer.add_points(place[index], key)
                layer.has_keys[chunk.variant[index], row[index]] = True
                links = int(weight[index].sum())
                self.pairs, self.visited = self.pairs + links, self.visited + links
                continue
            split = layout.tile_spans(chunk)
            spans = layout.spans(chunk.variant, row) if split is None else split.rest
            runs, degree = tile_runs(spans, chunk, masks, shape), spans.per_row()
            if split is not None:
                runs, degree = add_unmasked(runs, split.whole), degree + split.whole.per_row()[chunk.tile]
            layer.has_keys[chunk.variant, row] = degree > 0
            layer.tile.append((runs.tile + chunk.first_tile).int())
            layer.lo.append(runs.lo.int())
            layer.hi.append(runs.hi.int())
            layer.mask.append(runs.mask.int())
            layer.add_points(place[runs.point_row], runs.point_slot if layer.keys is None else layer.keys[runs.point_slot])
            first_row = exclusive_cumsum(chunk.count)
            area = (runs.hi - runs.lo) * chunk.count[runs.tile] * weight[first_row[runs.tile]]
            self.pairs += int((degree * weight).sum())
            self.visited += int(area.sum()) + int(weight[runs.point_row].sum())

    def finish(self, mask_number: Tensor, longest: int) -> Piece:
        """The piece's tables. mask_number: the final number of each provisional mask number, of `MaskStore.finish`."""
        order, tiles = self.order, self.order.start.numel()
        runs, parts = [], torch.ones(tiles, dtype=torch.int64)
        for layer in self.layers:
            tile, lo, hi, mask = layer.runs(longest)
            width = torch.zeros(layer.tiles, dtype=torch.int64).index_add_(0, tile, hi - lo)
            if layer.tiles:
                parts = torch.maximum(parts, ((width + longest - 1) // longest).view(-1, tiles).amax(0))
            runs.append((tile, lo, hi, mask, width))
        entry_base = _indptr(parts)
        tile_of_entry, part = expand_counts(parts)
        layers = []
        for layer, (tile, lo, hi, mask, width) in zip(self.layers, runs, strict=True):
            slots_before = exclusive_cumsum(hi - lo) - exclusive_cumsum(width)[tile]
            index = tile % max(1, tiles)
            part_of_run = torch.minimum(slots_before // longest, parts[index] - 1)
            entry = tile // max(1, tiles) * entry_base[-1] + entry_base[index] + part_of_run
            entries = (layer.tiles // tiles if tiles else 0) * int(entry_base[-1])
            # In identity order all variants share the piece's entries, and the layer's tables repeat them for each variant.
            bases = torch.arange(layer.entry_base.numel()) * entry_base[-1]
            point_keys = _concatenated(layer.point_keys)
            has_points = point_keys.numel() > 0
            layers.append(
                Layer(
                    variant=layer.variation.int(),
                    entry_base=bases if order.rows is None else entry_base[layer.entry_base],
                    place_base=layer.place_base,
                    indptr=_indptr(torch.bincount(entry, minlength=entries)),
                    lo=lo.int(),
                    hi=hi.int(),
                    mask=torch.where(mask >= 0, mask_number[mask.clamp(min=0).long()], -1).int() if len(mask_number) else mask,
                    keys=None if layer.keys is None else layer.keys.int(),
                    point_indptr=_indptr(layer.point_count) if has_points else None,
                    point_keys=point_keys if has_points else None,
                )
            )
        return Piece(
            variant=self.variation.int(),
            rows=None if order.rows is None else order.rows.int(),
            row_first=order.row_first,
            first=entry_base[order.first],
            start=order.start[tile_of_entry].int(),
            count=order.count[tile_of_entry].int(),
            part=part.int(),
            parts=parts[tile_of_entry].int(),
            layers=tuple(layers),
        )


def overlapping(pieces: Iterable[PieceBuilder], batch: int, heads: int, n_q: int) -> bool:
    """Whether some row has keys in two pieces."""
    pieces_of_row = torch.zeros(batch, heads, n_q, dtype=torch.int8)
    for piece in pieces:
        has_keys = torch.zeros(batch, heads, n_q, dtype=torch.bool)
        for layer in piece.layers:
            has_keys |= layer.has_keys[layer.variation]
        pieces_of_row += has_keys
    return bool((pieces_of_row > 1).any())


def _concatenated(chunks: list[Tensor]) -> Tensor:
    """The chunks as one int32 tensor. The list is emptied, so that at most one column is held twice."""
    out = torch.cat(chunks) if chunks else torch.zeros(0, dtype=torch.int32)
    chunks.clear()
    return out


def _indptr(counts: Tensor) -> Tensor:
    """(n + 1,) int64 CSR row pointers of n row lengths."""
    out = torch.zeros(counts.numel() + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=out[1:])
    return out
