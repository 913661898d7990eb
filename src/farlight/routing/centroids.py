"""The arithmetic of spherical k-means: unit vectors, nearest centroids, sums of members over ranks, moving averages.

Tokens are `(B, H_kv, N, D)` and centroids `(H, C, D)` with H a multiple of H_kv: a group of query heads shares its keys but
each head has centroids of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farlight.routing.base import stretches

__all__ = ["by_centroid", "first_centroids", "members_sum", "moved", "nearest", "squared_distance", "unit"]

Tokens = Sequence[tuple[Tensor, Tensor | None]]


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖; 0 stays 0."""
    return torch.nn.functional.normalize(x, dim=-1)


def by_centroid(x: Tensor, centroids: Tensor) -> Tensor:
    """`(B, H, N, C)`: μ · x for every head, in x's type."""
    group = centroids.shape[0] // x.shape[1]
    batch, kv_heads, n, dim = x.shape
    table = centroids.to(x.dtype).reshape(kv_heads, -1, dim)
    scores = x @ table.transpose(-1, -2)  # (B, H_kv, N, group · C)
    return scores.view(batch, kv_heads, n, group, -1).transpose(2, 3).flatten(1, 2)


def nearest(x: Tensor, centroids: Tensor, real: Tensor | None) -> Tensor:
    """`(B, H, N)`: the centroid of largest μ · x, the first of equals; -1 where the token is not real.

    The length of x does not matter for the largest, so nothing is divided.
    """
    labels = torch.empty(x.shape[0], centroids.shape[0], x.shape[2], dtype=torch.int64, device=x.device)
    for part in stretches(x.shape[2], x.shape[0] * centroids.shape[0] * centroids.shape[1]):
        labels[:, :, part] = by_centroid(x[:, :, part], centroids).argmax(-1)
    return labels if real is None else labels.masked_fill_(~real, -1)


def members_sum(tokens: Tokens, centroids: Tensor) -> Tensor:
    """`(H, C, D + 1)`: for each centroid the sum of its members' unit vectors and their number, over all ranks."""
    heads, count, dim = centroids.shape
    total = centroids.new_zeros(heads * count, dim + 1)
    base = torch.arange(heads, device=centroids.device).view(1, -1, 1) * count
    for x, real in tokens:
        labels = nearest(x, centroids, real)
        vectors = unit(x).repeat_interleave(heads // x.shape[1], 1)
        kept = labels >= 0
        ones = vectors.new_ones(*vectors.shape[:3], 1)
        total.index_add_(0, (base + labels)[kept], torch.cat((vectors, ones), -1)[kept].to(total.dtype))
    if _world() > 1:
        torch.distributed.all_reduce(total)
    return total.view(heads, count, dim + 1)


def moved(centroids: Tensor, total: Tensor, decay: float) -> Tensor:
    """The centroids drawn to the mean of their members, on the unit sphere; one without members stays."""
    number = total[..., -1:]
    mean = total[..., :-1] / number.clamp(min=1)
    drawn = unit(decay * centroids + (1 - decay) * mean)
    return torch.where((number > 0) & (drawn.norm(dim=-1, keepdim=True) > 0), drawn, centroids)


def first_centroids(tokens: Tokens, centroids: Tensor, seed: int) -> Tensor:
    """Distinct real tokens drawn for each head, as unit vectors; all ranks take those of rank 0.

    Where there are fewer tokens than centroids the rest stay where they were.
    """
    heads, count, _ = centroids.shape
    pool = []
    for x, real in tokens:
        vectors = unit(x).repeat_interleave(heads // x.shape[1], 1).transpose(0, 1)  # (H, B, N, D)
        pool.append(vectors.flatten(1, 2) if real is None else vectors[:, real.squeeze(1)])
    every = torch.cat(pool, 1)
    order = torch.rand(heads, every.shape[1], generator=torch.Generator().manual_seed(seed), device="cpu").argsort(1)[:, :count]
    order = order.to(every.device)
    out = centroids.clone()
    out[:, : order.shape[1]] = every.gather(1, order.unsqueeze(-1).expand(-1, -1, every.shape[2])).to(out.dtype)
    if _world() > 1:
        torch.distributed.broadcast(out, 0)
    return out


def squared_distance(x: Tensor, centroids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of ‖x / ‖x‖ - μ‖² over real tokens and heads, differentiable in x, and their number."""
    heads, count, dim = centroids.shape
    vectors = unit(x.to(torch.promote_types(x.dtype, torch.float32))).repeat_interleave(heads // x.shape[1], 1)
    base = torch.arange(heads, device=centroids.device).view(1, -1, 1) * count
    chosen = centroids.reshape(-1, dim).to(vectors.dtype)[base + labels.clamp(min=0)]
    real = labels >= 0
    return ((vectors - chosen).square().sum(-1) * real).sum(), real.sum()


def _world() -> int:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()
