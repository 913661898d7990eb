"""Block summaries of keys: means, channel-wise bounds and sizes per block of consecutive tokens.

`TopBlocks` scores blocks by them, `gist_attention` attends over them, `KVCache` keeps them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_bounds", "block_mean", "block_sizes"]


def _to_blocks(x: Tensor, block: int, fill: float | bool) -> Tensor:
    """`(B, H, N, …)` to `(B, H, ⌈N / block⌉, block, …)`; the last block is padded with `fill`."""
    padding = -x.shape[2] % block
    if padding:
        x = torch.cat((x, x.new_full((*x.shape[:2], padding, *x.shape[3:]), fill)), 2)
    return x.reshape(*x.shape[:2], x.shape[2] // block, block, *x.shape[3:])


def block_sizes(keys: int, block: int, real: Tensor | None, device: torch.device) -> Tensor:
    """`(B or 1, blocks)` int64: the number of real keys in each block. `real` is `(B, N)` bool, or None = all."""
    mask = torch.ones(1, keys, dtype=torch.bool, device=device) if real is None else real
    return _to_blocks(mask[:, None], block, False).sum(-1)[:, 0]


def block_mean(x: Tensor, block: int, real: Tensor | None = None) -> Tensor:
    """`(B, H, blocks, D)`: the mean of each block's real tokens (0 for a block without any); differentiable."""
    if real is not None:
        x = x.masked_fill(~real[:, None, :, None], 0.0)
    total = _to_blocks(x, block, 0.0).sum(3)
    sizes = block_sizes(x.shape[2], block, real, x.device)
    return total / sizes.clamp(min=1)[:, None, :, None].to(x.dtype)


def block_bounds(x: Tensor, block: int, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(min, max), each `(B, H, blocks, D)`: the channel-wise bounds of each block's real tokens (0 for a block without any)."""
    bounds = []
    for fill, reduce in ((float("inf"), torch.amin), (float("-inf"), torch.amax)):
        masked = x if real is None else x.masked_fill(~real[:, None, :, None], fill)
        bound = reduce(_to_blocks(masked, block, fill), 3)
        bounds.append(bound.masked_fill(bound == fill, 0.0))
    return bounds[0], bounds[1]
