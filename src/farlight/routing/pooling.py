"""Blocks of keys in summary: means, channel-wise bounds, sizes. What routers score and what `gist_attention` listens to."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_bounds", "block_mean", "block_sizes"]


def _cut(x: Tensor, block: int, fill: float | bool) -> Tensor:
    """`(B, H, blocks, block, …)` of `(B, H, N, …)`, the last block filled up."""
    short = -x.shape[2] % block
    if short:
        x = torch.cat((x, x.new_full((*x.shape[:2], short, *x.shape[3:]), fill)), 2)
    return x.reshape(*x.shape[:2], x.shape[2] // block, block, *x.shape[3:])


def block_sizes(keys: int, block: int, real: Tensor | None, device: torch.device) -> Tensor:
    """`(B|1, blocks)` int64: how many real keys each block holds. `real` is `(B, N)` bool, or None."""
    mask = torch.ones(1, keys, dtype=torch.bool, device=device) if real is None else real
    return _cut(mask[:, None], block, False).sum(-1)[:, 0]


def block_mean(x: Tensor, block: int, real: Tensor | None = None) -> Tensor:
    """`(B, H, blocks, D)`: the mean of each block's real tokens (0 for a block without any); differentiable."""
    if real is not None:
        x = x.masked_fill(~real[:, None, :, None], 0.0)
    total = _cut(x, block, 0.0).sum(3)
    sizes = block_sizes(x.shape[2], block, real, x.device)
    return total / sizes.clamp(min=1)[:, None, :, None].to(x.dtype)


def block_bounds(x: Tensor, block: int, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(least, most), each `(B, H, blocks, D)`: the channel-wise bounds of each block's real tokens (0 for none)."""
    found = []
    for fill, reduce in ((float("inf"), torch.amin), (float("-inf"), torch.amax)):
        hidden = x if real is None else x.masked_fill(~real[:, None, :, None], fill)
        edge = reduce(_cut(hidden, block, fill), 3)
        found.append(edge.masked_fill(edge == fill, 0.0))
    return found[0], found[1]
