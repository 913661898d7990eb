"""Plan validation: decoding of the tables to a dense mask, and the check of every invariant that kernels rely on.

`check` proves that every index in the tables is in range, so that kernels read them without bounds checks. `dense` proves
that no pair occurs twice. Both walk the tables as documented in `farlight.plan.tables`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.errors import PlanError
from farlight.plan.tables import BITS, BITS_KEYS, BITS_WORDS, BOUNDS, EMPTY, Layer, Piece, Plan

__all__ = ["check", "dense", "mask_of_run"]


def mask_of_run(plan: Plan, mask: int, lo: int, hi: int, count: int) -> Tensor:
    """`(count, hi - lo)` bool: which slots of a run [lo, hi) each of the tile's `count` rows sees; `mask`: its number or -1."""
    width = hi - lo
    if mask < 0:
        return torch.ones(count, width, dtype=torch.bool, device="cpu")
    masks, column = plan.masks, torch.arange(width, device="cpu")
    start = int(masks.start[mask])
    if int(masks.kind[mask]) == BOUNDS:
        bound = masks.data[start : start + 2 * plan.tile].view(-1, 2)[:count].long()
        return (column >= bound[:, :1]) & (column < width + bound[:, 1:])
    words = masks.data[start : start + plan.tile * BITS_WORDS].view(-1, BITS_WORDS)[:count].long()
    return (words[:, column // 32] >> (column % 32)) & 1 == 1


def dense(plan: Plan) -> Tensor:
    """`(B, H, n_q, n_k)` bool mask of the tables. Raises PlanError where a pair occurs twice."""
    sizes = plan.sizes
    covers = torch.zeros(sizes.batch, sizes.heads, sizes.n_q, sizes.n_k, dtype=torch.uint8, device="cpu")
    for piece in plan.pieces:
        for b in range(sizes.batch):
            for h in range(sizes.heads):
                _add_covers(plan, piece, b, h, covers[b, h])
    if bool((covers > 1).any()):
        b, h, i, j = (covers > 1).nonzero()[0].tolist()
        raise PlanError(f"the pair (row {i}, key {j}) of batch item {b}, head {h} is covered {int(covers[b, h, i, j])} times.")
    return covers.bool()


def _variant(table: Tensor, b: int, h: int) -> int:
    return int(table[b if table.shape[0] > 1 else 0, h if table.shape[1] > 1 else 0])


def _add_covers(plan: Plan, piece: Piece, b: int, h: int, covers: Tensor) -> None:
    """Add 1 to `covers` `(n_q, n_k)` for each pair of one piece, batch item and head."""
    v = _variant(piece.variant, b, h)
    for e in range(int(piece.first[v]), int(piece.first[v + 1])):
        start, count = int(piece.start[e]), int(piece.count[e])
        place = torch.arange(start, start + count, device="cpu")
        rows = place if piece.rows is None else piece.rows[place].long()
        for layer in piece.layers:
            w = _variant(layer.variant, b, h)
            t = int(layer.entry_base[w]) + e - int(piece.first[v])
            for r in range(int(layer.indptr[t]), int(layer.indptr[t + 1])):
                lo, hi = int(layer.lo[r]), int(layer.hi[r])
                keys = torch.arange(lo, hi, device="cpu") if layer.keys is None else layer.keys[lo:hi].long()
                allowed = mask_of_run(plan, int(layer.mask[r]), lo, hi, count)
                covers[rows[:, None], keys[None, :]] += allowed.to(torch.uint8)
            if layer.point_indptr is not None and layer.point_keys is not None and int(piece.part[e]) == 0:
                for s in range(count):
                    p = int(layer.place_base[w]) + start + s
                    keys = layer.point_keys[int(layer.point_indptr[p]) : int(layer.point_indptr[p + 1])].long()
                    covers[rows[s], keys] += 1


def check(plan: Plan) -> None:
    """Raise PlanError naming the first broken invariant and the piece and layer that it is in."""
    if not 1 <= plan.tile <= 1024:
        raise PlanError(f"tile = {plan.tile} rows is outside 1 … 1024.")
    _check_masks(plan)
    for p, piece in enumerate(plan.pieces):
        _check_piece(plan, piece, f"piece {p}")
        for n, layer in enumerate(piece.layers):
            _check_layer(plan, piece, layer, f"piece {p}, layer {n}")


def _need(condition: Tensor | bool, fault: str) -> None:
    if not (bool(condition.all()) if isinstance(condition, Tensor) else condition):
        raise PlanError(f"malformed plan: {fault}.")


def _check_masks(plan: Plan) -> None:
    masks = plan.masks
    size = torch.where(masks.kind == BOUNDS, 2 * plan.tile, plan.tile * BITS_WORDS)
    _need((masks.kind == BOUNDS) | (masks.kind == BITS), "a mask is neither of bounds nor of bits")
    _need((masks.start >= 0) & (masks.start + size <= masks.data.numel()), "a mask reaches outside the mask data")
    _need((masks.core_lo >= 0) & (masks.core_hi <= 0), "a mask's core reaches outside its run")
    for m in (masks.kind == BOUNDS).nonzero().squeeze(1).tolist():
        bound = masks.data[int(masks.start[m]) : int(masks.start[m]) + 2 * plan.tile].view(-1, 2)
        _need(
            (bound[:, 0] >= 0) & (bound[:, 0] <= EMPTY) & (bound[:, 1] <= 0),
            "the bounds of a mask reach outside its run",
        )


def _check_variants(plan: Plan, variant: Tensor, count: int, where: str) -> None:
    batch, heads = plan.sizes.batch, plan.sizes.heads
    _need(
        variant.dim() == 2 and variant.shape[0] in (1, batch) and variant.shape[1] in (1, heads),
        f"{where}: variant has the wrong shape",
    )
    _need((variant >= 0) & (variant < count), f"{where}: a variant does not exist")


def _check_pointers(indptr: Tensor, end: int, where: str) -> None:
    _need(indptr.numel() > 0 and int(indptr[0]) == 0 and int(indptr[-1]) == end, f"{where} does not run from 0 to {end}")
    _need(indptr[1:] >= indptr[:-1], f"{where} decreases")


def _check_piece(plan: Plan, piece: Piece, where: str) -> None:
    places = plan.n_q if piece.rows is None else piece.rows.numel()
    entries = piece.start.numel()
    _check_variants(plan, piece.variant, piece.first.numel() - 1, where)
    _check_pointers(piece.first, entries, f"{where}: first")
    _check_pointers(piece.row_first, places, f"{where}: row_first")
    _need(piece.rows is not None or piece.first.numel() == 2, f"{where}: an order that is not stored has one variant")
    if piece.rows is not None:
        _need((piece.rows >= 0) & (piece.rows < plan.n_q), f"{where}: a row does not exist")
    for name in ("count", "part", "parts"):
        _need(getattr(piece, name).numel() == entries, f"{where}: {name} has the wrong length")
    _need((piece.count >= 1) & (piece.count <= plan.tile), f"{where}: a tile has no row or too many")
    _need((piece.start >= 0) & (piece.start + piece.count <= places), f"{where}: a tile reaches outside the order")
    _need((piece.part >= 0) & (piece.part < piece.parts), f"{where}: a part is not below parts")
    first = torch.arange(entries, device="cpu") - piece.part
    same = (piece.start[first.clamp(min=0)] == piece.start) & (piece.parts[first.clamp(min=0)] == piece.parts)
    _need((first >= 0) & (first + piece.parts <= entries) & same, f"{where}: the parts of a tile do not stand together")
    owner = torch.searchsorted(piece.first, torch.arange(entries, device="cpu"), right=True) - 1
    inside = (piece.start >= piece.row_first[owner]) & (piece.start + piece.count <= piece.row_first[owner + 1])
    _need(inside, f"{where}: a tile holds rows of another variant")


def _check_layer(plan: Plan, piece: Piece, layer: Layer, where: str) -> None:
    variants = layer.entry_base.numel()
    _check_variants(plan, layer.variant, variants, where)
    _need(layer.place_base.numel() == variants, f"{where}: place_base has the wrong length")
    _check_pointers(layer.indptr, layer.lo.numel(), f"{where}: indptr")
    slots = plan.n_k if layer.keys is None else layer.keys.numel()
    _need(layer.hi.numel() == layer.lo.numel() == layer.mask.numel(), f"{where}: lo, hi and mask differ in length")
    _need(
        (layer.lo >= 0) & (layer.lo < layer.hi) & (layer.hi <= slots),
        f"{where}: a run is empty or reaches outside the keys",
    )
    _need((layer.mask >= -1) & (layer.mask < plan.masks.kind.numel()), f"{where}: a mask does not exist")
    if layer.mask.numel():
        bits = (
            (layer.mask >= 0) & (plan.masks.kind[layer.mask.clamp(min=0).long()] == BITS)
            if plan.masks.kind.numel()
            else layer.mask > 0
        )
        _need(~bits | (layer.hi - layer.lo <= BITS_KEYS), f"{where}: a run masked by bits is wider than {BITS_KEYS}")
    if layer.keys is not None:
        _need((layer.keys >= 0) & (layer.keys < plan.n_k), f"{where}: a key does not exist")
    _need(
        (layer.point_indptr is None) == (layer.point_keys is None),
        f"{where}: points have pointers without keys, or keys without",
    )
    # The tiles and places of every (batch, head) must lie inside the layer's tables.
    shape = torch.broadcast_shapes(piece.variant.shape, layer.variant.shape)
    v, w = piece.variant.expand(shape).reshape(-1).long(), layer.variant.expand(shape).reshape(-1).long()
    last = layer.entry_base[w] + piece.first[v + 1] - piece.first[v]
    _need(
        (layer.entry_base[w] >= 0) & (last < layer.indptr.numel()),
        f"{where}: the tiles of a variant reach outside indptr",
    )
    if layer.point_indptr is not None and layer.point_keys is not None:
        _check_pointers(layer.point_indptr, layer.point_keys.numel(), f"{where}: point_indptr")
        _need((layer.point_keys >= 0) & (layer.point_keys < plan.n_k), f"{where}: a gathered key does not exist")
        low, high = layer.place_base[w] + piece.row_first[v], layer.place_base[w] + piece.row_first[v + 1]
        _need(
            (low >= 0) & (high < layer.point_indptr.numel()),
            f"{where}: the places of a variant reach outside point_indptr",
        )
