"""The full attention probabilities of a text, one tile of rows at a time: what every measure of loss is made from.

Forming them costs n² products whatever is asked of them, so they are formed once, in tiles of a fixed size, and whoever
asks (retention, lost links, profiles for fitting) reads each tile as it passes. Memory stays linear in the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.errors import ArgumentError
from farlight.patterns.expression import Pattern, Sizes

__all__ = ["Tile", "check_problem", "mix", "part_of", "sizes_of", "softmax", "tiles", "wide_type"]

# Scores of one tile, in elements: 8 MiB in float32. Some eight tensors of that size live at once.
_TILE = 1 << 21
# A pattern with fewer than one pair in so many is read pair by pair rather than by a mask.
_FEW = 8


@dataclass(frozen=True)
class Tile:
    """Rows `rows` of batch items `items` and query heads `heads` (key heads `group`).

    `full` is `(B', H', rows, n_k)`: softmax of `scores` (-inf where `base` does not allow) in float32 at least; `allowed` is
    what `base` allows, `(B' or 1, H' or 1, rows, n_k)`, None where that is everything.
    """

    rows: slice
    items: slice
    heads: slice
    group: slice
    scores: Tensor
    full: Tensor
    allowed: Tensor | None

    def seen(self, pattern: Pattern, sizes: Sizes) -> Tensor:
        """What `pattern` and `base` allow in this tile, `(B' or 1, H' or 1, rows, n_k)`."""
        mask = part_of(
            pattern.dense_rows(self.rows.start, self.rows.stop, sizes, device=self.full.device), self.items, self.heads
        )
        return mask if self.allowed is None else mask & self.allowed

    def kept(self, pattern: Pattern, base: Pattern | None, sizes: Sizes) -> tuple[Tensor, Tensor] | None:
        """(share of each row on what both allow, how many pairs), `(B', H', rows)` and `(B' or 1, H' or 1)`, read at those
        pairs alone; None where they are not few, or not easily listed.
        """
        both = pattern if base is None else base & pattern
        if both.varies_over_batch or both.varies_over_heads or not all(a._spans_are_cheap(sizes) for a in both.atoms()):
            return None
        both.check(sizes)
        device, keys = self.full.device, self.full.shape[3]
        i = torch.arange(self.rows.start, self.rows.stop, device=device) + sizes.q_offset
        row, lo, hi = both._spans(sizes, torch.zeros_like(i), torch.zeros_like(i), i).listed()
        length = hi - lo
        pairs = int(length.sum())
        if pairs * _FEW > i.numel() * keys:
            return None
        within = torch.arange(pairs, device=device) - (length.cumsum(0) - length).repeat_interleave(length)
        row = row.repeat_interleave(length)
        found = self.full.flatten(2)[..., row * keys + lo.repeat_interleave(length) + within]
        out = torch.zeros(self.full.shape[:3], dtype=torch.float64, device=device).index_add_(2, row, found.double())
        return out.to(self.full.dtype), torch.full((1, 1), pairs, device=device)


def wide_type(q: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def sizes_of(q: Tensor, k: Tensor, q_offset: int | None) -> Sizes:
    return Sizes.of(q.shape[2], k.shape[2], batch=max(1, q.shape[0]), heads=max(1, q.shape[1]), q_offset=q_offset)


def tiles(q: Tensor, k: Tensor, base: Pattern | None, scale: float | None, sizes: Sizes) -> Iterator[Tile]:
    """Every row of every head once. `base` is what full attention looks at (None = everything)."""
    factor, wide = q.shape[3] ** -0.5 if scale is None else scale, wide_type(q)
    for rows, items, group in _tiles(q, k):
        # Patterns and base answer for all heads; `part_of` cuts out those here.
        here = slice(group.start * q.shape[1] // k.shape[1], group.stop * q.shape[1] // k.shape[1])
        scores = _scores(q[items, here, rows], k[items, group], factor, wide)
        allowed = None
        if base is not None:
            allowed = part_of(base.dense_rows(rows.start, rows.stop, sizes, device=q.device), items, here)
            scores = scores.masked_fill_(~allowed, -torch.inf)
        yield Tile(rows, items, here, group, scores, softmax(scores), allowed)


def _tiles(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """(rows, batch items, key heads) such that a tile's scores stay within the budget.

    All heads go together while at least 32 rows fit, since a pattern shared by the heads is then evaluated once; a long
    text is taken one key head at a time.
    """
    batch, heads, n_q, _ = q.shape
    kv_heads, n_k = k.shape[1], max(1, k.shape[2])
    together = batch * heads * n_k * min(32, n_q) <= _TILE
    per_row = n_k * (batch * heads if together else heads // max(1, kv_heads))
    step = max(1, _TILE // max(1, per_row))
    for start in range(0, n_q, step):
        rows = slice(start, min(n_q, start + step))
        if together:
            if batch and heads:
                yield rows, slice(0, batch), slice(0, kv_heads)
            continue
        for item in range(batch):
            for group in range(kv_heads):
                yield rows, slice(item, item + 1), slice(group, group + 1)


def part_of(mask: Tensor, items: slice, heads: slice) -> Tensor:
    """The part of a `(B or 1, H or 1, rows, n_k)` mask that belongs to these batch items and heads; 1 stays 1."""
    mask = mask[items] if mask.shape[0] > 1 else mask
    return mask[:, heads] if mask.shape[1] > 1 else mask


def _scores(q: Tensor, k: Tensor, factor: float, wide: torch.dtype) -> Tensor:
    """`(B, H, rows, n_k)`: factor · q·kᵀ; query heads that share a key head are stacked: k is never repeated."""
    batch, heads, rows, dim = q.shape
    stacked = (q.to(wide) * factor).reshape(batch, k.shape[1], heads // k.shape[1] * rows, dim)
    return (stacked @ k.to(wide).transpose(-1, -2)).view(batch, heads, rows, -1)


def softmax(scores: Tensor) -> Tensor:
    """softmax over keys, in which a row that sees nothing is all zeros."""
    top = (
        scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
        if scores.shape[-1]
        else scores.sum(-1, keepdim=True)
    )
    weight = torch.exp(scores - top)
    return weight.div_(weight.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny))


def mix(probability: Tensor, values: Tensor) -> Tensor:
    """probability · v with shared value heads, `(B, H, rows, D_v)`."""
    batch, heads, rows, keys = probability.shape
    stacked = probability.reshape(batch, values.shape[1], heads // values.shape[1] * rows, keys)
    return (stacked @ values).view(batch, heads, rows, -1)


def check_problem(q: Tensor, k: Tensor, v: Tensor | None, scale: float | None) -> None:
    """Raise ArgumentError when these tensors cannot be one attention problem."""
    tensors = [("q", q), ("k", k)] + ([] if v is None else [("v", v)])
    for name, tensor in tensors:
        if tensor.dim() != 4:
            raise ArgumentError(
                f"{name} has shape {tuple(tensor.shape)}: four dimensions (batch, heads, tokens, head_dim) are "
                f"needed; add the missing ones with {name}.unsqueeze(0)."
            )
        if not tensor.dtype.is_floating_point:
            raise ArgumentError(f"{name} has dtype {tensor.dtype}: a floating dtype is needed; pass {name}.float().")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ArgumentError(
                f"{name} is {tensor.dtype} on {tensor.device}, but q is {q.dtype} on {q.device}; pass {name}.to(q) so "
                "that they agree."
            )
        if tensor.shape[0] != q.shape[0]:
            raise ArgumentError(f"{name} has batch {tensor.shape[0]}, but q has {q.shape[0]}; they must agree.")
    if k.shape[3] != q.shape[3]:
        raise ArgumentError(f"k has head_dim {k.shape[3]}, but q has {q.shape[3]}; they must agree.")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ArgumentError(f"q has {q.shape[1]} heads and k has {k.shape[1]}; q's must be a multiple of k's.")
    if v is not None and v.shape[1:3] != k.shape[1:3]:
        raise ArgumentError(f"v has (heads, tokens) = {tuple(v.shape[1:3])}, but k has {tuple(k.shape[1:3])}; they must agree.")
    if scale is not None and scale != scale:
        raise ArgumentError("scale = nan: the factor on the scores must be a number; pass None for head_dim ** -0.5.")
