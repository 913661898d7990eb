"""The plan from the keys' side, for backward passes that give each block of keys to one worker.

The forward tables say, tile by tile, which runs of keys are visited. Turned around they say, for each block of `block` key
slots, which runs touch it, in the order of tiles; the masks stay those of the runs. Nothing is computed anew: it is a sort.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.plan.tables import Layer, Piece, Plan

__all__ = ["Transposed", "TransposedLayer", "transpose"]


@dataclass(frozen=True, eq=False)
class TransposedLayer:
    """One layer by key blocks.

    blocks: how many blocks each variant has (all slots together when the layer has its own order of keys, whose slots
    belong to one variant each); indptr: (variants · blocks + 1,) or (blocks + 1,) int64; run, tile: (items,) int32, the run
    and the layer's tile number it belongs to; point_indptr: (variants · n_k + 1,) int64 or None; point_place: int32, the
    place in the piece's order of rows.
    """

    blocks: int
    indptr: Tensor
    run: Tensor
    tile: Tensor
    point_indptr: Tensor | None
    point_place: Tensor | None


@dataclass(frozen=True, eq=False)
class Transposed:
    """`layers[p][l]` belongs to `plan.pieces[p].layers[l]`."""

    block: int
    layers: tuple[tuple[TransposedLayer, ...], ...]


def transpose(plan: Plan, block: int) -> Transposed:
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        return Transposed(
            block, tuple(tuple(_layer(plan, piece, layer, block) for layer in piece.layers) for piece in plan.pieces)
        )


def _indptr(keys: Tensor, count: int) -> Tensor:
    return torch.cat((torch.zeros(1, dtype=torch.int64), torch.bincount(keys, minlength=count).cumsum(0)))


def _layer(plan: Plan, piece: Piece, layer: Layer, block: int) -> TransposedLayer:
    variants = layer.entry_base.numel()
    shared = layer.keys is None
    slots = plan.n_k if layer.keys is None else layer.keys.numel()
    blocks = -(-slots // block)
    lo, hi = layer.lo.long(), layer.hi.long()
    tile = torch.searchsorted(layer.indptr, torch.arange(lo.numel()), right=True) - 1
    first = torch.div(lo, block, rounding_mode="floor")
    times = torch.div(hi - 1, block, rounding_mode="floor") - first + 1
    run = torch.arange(lo.numel()).repeat_interleave(times)
    at = first[run] + torch.arange(run.numel()) - (times.cumsum(0) - times)[run]
    if shared:
        # Slots are keys, the same for every variant: each variant has blocks of its own.
        at = at + (torch.searchsorted(layer.entry_base, tile[run], right=True) - 1) * blocks
    order = torch.argsort(at, stable=True)
    points = places = None
    if layer.point_indptr is not None and layer.point_keys is not None:
        place = torch.arange(layer.point_indptr.numel() - 1).repeat_interleave(layer.point_indptr.diff())
        # In the natural order the variants' places follow one another in the layer's table; else they do in the piece's.
        ends = layer.place_base if piece.rows is None else piece.row_first[:-1]
        variant = torch.searchsorted(ends, place, right=True) - 1
        key = variant * plan.n_k + layer.point_keys.long()
        by_key = torch.argsort(key, stable=True)
        points = _indptr(key, ends.numel() * plan.n_k)
        places = (place - layer.place_base[variant] if piece.rows is None else place)[by_key].int()
    return TransposedLayer(
        blocks=blocks,
        indptr=_indptr(at, blocks * (variants if shared else 1)),
        run=run[order].int(),
        tile=tile[run][order].int(),
        point_indptr=points,
        point_place=places,
    )
