"""Transposed plan tables (CSC): per block of key slots the runs that touch it, for dk/dv passes over key blocks.

Each run is listed in every key block that it overlaps, in the order of tiles, and each point under its key. One worker
accumulates a whole key block, so that no atomics are needed. The tables hold run and place numbers only; ranges and masks are
read from the plan. Construction is one expansion and one stable sort per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.plan.tables import Layer, Piece, Plan
from farlight.ragged import expand_counts, expand_ranges

__all__ = ["Transposed", "TransposedLayer", "transpose"]


@dataclass(frozen=True, eq=False)
class TransposedLayer:
    """One layer by key blocks.

    blocks: key blocks of each variant; of all slots together when the layer has its own key order, whose slots belong to one
    variant each. indptr: (variants · blocks + 1,) or (blocks + 1,) int64; run, tile: (items,) int32, the run and the tile of
    the layer that it belongs to. point_indptr: (variants · n_k + 1,) int64, point_place: (points,) int32, the place of each
    point's row in the piece's row order; both None without points.
    """

    blocks: int
    indptr: Tensor
    run: Tensor
    tile: Tensor
    point_indptr: Tensor | None
    point_place: Tensor | None


@dataclass(frozen=True, eq=False)
class Transposed:
    """The transposed tables of a plan for key blocks of `block` slots; `layers[p][l]` is of `plan.pieces[p].layers[l]`."""

    block: int
    layers: tuple[tuple[TransposedLayer, ...], ...]


def transpose(plan: Plan, block: int) -> Transposed:
    """The transposed tables of a plan; see `Plan.transposed`, which caches them."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        layers = (tuple(_transpose_layer(plan, piece, layer, block) for layer in piece.layers) for piece in plan.pieces)
        return Transposed(block, tuple(layers))


def _transpose_layer(plan: Plan, piece: Piece, layer: Layer, block: int) -> TransposedLayer:
    variants = layer.entry_base.numel()
    slots = plan.n_k if layer.keys is None else layer.keys.numel()
    blocks = -(-slots // block)
    lo, hi = layer.lo.long(), layer.hi.long()
    tile_of_run, _ = expand_counts(layer.indptr.diff())
    run, bucket = expand_ranges(lo // block, (hi - 1) // block + 1)
    buckets = blocks
    if layer.keys is None:
        # Slots are keys, common to all variants: each variant has its own blocks.
        bucket += (torch.searchsorted(layer.entry_base, tile_of_run[run], right=True) - 1) * blocks
        buckets *= variants
    order = torch.argsort(bucket, stable=True)
    point_indptr = point_place = None
    if layer.point_indptr is not None and layer.point_keys is not None:
        place, _ = expand_counts(layer.point_indptr.diff())
        # In identity order the places of each variant follow one another in the layer's tables, else in the piece's.
        first_place = layer.place_base if piece.rows is None else piece.row_first[:-1]
        variant = torch.searchsorted(first_place, place, right=True) - 1
        key = variant * plan.n_k + layer.point_keys.long()
        by_key = torch.argsort(key, stable=True)
        point_indptr = _indptr(key, first_place.numel() * plan.n_k)
        point_place = (place - layer.place_base[variant] if piece.rows is None else place)[by_key].int()
    return TransposedLayer(
        blocks=blocks,
        indptr=_indptr(bucket, buckets),
        run=run[order].int(),
        tile=tile_of_run[run][order].int(),
        point_indptr=point_indptr,
        point_place=point_place,
    )


def _indptr(bucket: Tensor, count: int) -> Tensor:
    """(count + 1,) int64 CSR row pointers of items sorted by bucket."""
    return torch.cat((torch.zeros(1, dtype=torch.int64), torch.bincount(bucket, minlength=count).cumsum(0)))
