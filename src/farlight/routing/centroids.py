"""Spherical k-means on tensors: nearest centroids, member sums over all ranks, moving-average updates, initialisation.

Tokens x are `(B, H_kv, N, D)` and centroids `(H, C, D)` with H a multiple of H_kv: the query heads of one group share their
keys, and each query head has its own centroids. Token masks are bool, broadcastable to `(B, H, N)`, True = real token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farlight.kernels.cpu.choose import can_choose
from farlight.kernels.cpu.labels import nearest_labels
from farlight.routing.base import row_chunks

__all__ = [
    "centroid_scores",
    "init_centroids",
    "member_sums",
    "nearest_centroid",
    "normalize",
    "squared_distance",
    "update_centroids",
]

# Token tensors, each with its mask of real tokens (None = all real).
MaskedTokens = Sequence[tuple[Tensor, Tensor | None]]


def normalize(x: Tensor) -> Tensor:
    """x / ‖x‖ over the last dimension; 0 stays 0."""
    return torch.nn.functional.normalize(x, dim=-1)


def centroid_scores(x: Tensor, centroids: Tensor) -> Tensor:
    """`(B, H, N, C)`: μ · x of every head, in x's dtype."""
    group = centroids.shape[0] // x.shape[1]
    batch, kv_heads, n, dim = x.shape
    table = centroids.to(x.dtype).reshape(kv_heads, -1, dim)
    scores = x @ table.transpose(-1, -2)  # (B, H_kv, N, group · C)
    return scores.view(batch, kv_heads, n, group, -1).transpose(2, 3).flatten(1, 2)


def nearest_centroid(x: Tensor, centroids: Tensor, mask: Tensor | None) -> Tensor:
    """`(B, H, N)` int64: argmax_c μ_c · x, the lowest index of equals; -1 for padding.

    The argmax does not depend on ‖x‖, so x is not normalised.
    """
    if can_choose(x):
        native: Tensor = nearest_labels(x, centroids, None if mask is None else mask[:, 0])
        return native
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    labels = torch.empty(x.shape[0], centroids.shape[0], x.shape[2], dtype=torch.int64, device=x.device)
    for rows in row_chunks(x.shape[2], x.shape[0] * centroids.shape[0] * centroids.shape[1]):
        labels[:, :, rows] = centroid_scores(x[:, :, rows], centroids).argmax(-1)
    return labels if mask is None else labels.masked_fill_(~mask, -1)


def member_sums(tokens: MaskedTokens, centroids: Tensor) -> Tensor:
    """`(H, C, D + 1)`: per centroid the sum of its members' unit vectors and, last, their number; all-reduced over ranks."""
    heads, count, dim = centroids.shape
    total = centroids.new_zeros(heads * count, dim + 1)
    first_row = torch.arange(heads, device=centroids.device).view(1, -1, 1) * count
    for x, mask in tokens:
        labels = nearest_centroid(x, centroids, mask)
        vectors = normalize(x).repeat_interleave(heads // x.shape[1], 1)
        is_real = labels >= 0
        ones = vectors.new_ones(*vectors.shape[:3], 1)
        total.index_add_(0, (first_row + labels)[is_real], torch.cat((vectors, ones), -1)[is_real].to(total.dtype))
    if _world_size() > 1:
        torch.distributed.all_reduce(total)
    return total.view(heads, count, dim + 1)


def update_centroids(centroids: Tensor, sums: Tensor, decay: float) -> Tensor:
    """normalize(decay · μ + (1 - decay) · mean of members), `(H, C, D)`; a centroid without members is unchanged.

    sums: `member_sums`, `(H, C, D + 1)`.
    """
    num_members = sums[..., -1:]
    mean = sums[..., :-1] / num_members.clamp(min=1)
    updated = normalize(decay * centroids + (1 - decay) * mean)
    return torch.where((num_members > 0) & (updated.norm(dim=-1, keepdim=True) > 0), updated, centroids)


def init_centroids(tokens: MaskedTokens, centroids: Tensor, seed: int) -> Tensor:
    """Distinct real tokens drawn at random for each head, as unit vectors `(H, C, D)`; broadcast from rank 0 to all ranks.

    With fewer tokens than centroids the remaining centroids are unchanged.
    """
    heads, count, _ = centroids.shape
    candidates = []
    for x, mask in tokens:
        vectors = normalize(x).repeat_interleave(heads // x.shape[1], 1).transpose(0, 1)  # (H, B, N, D)
        candidates.append(vectors.flatten(1, 2) if mask is None else vectors[:, mask.squeeze(1)])
    pool = torch.cat(candidates, 1)
    order = torch.rand(heads, pool.shape[1], generator=torch.Generator().manual_seed(seed), device="cpu").argsort(1)[:, :count]
    order = order.to(pool.device)
    out = centroids.clone()
    out[:, : order.shape[1]] = pool.gather(1, order.unsqueeze(-1).expand(-1, -1, pool.shape[2])).to(out.dtype)
    if _world_size() > 1:
        torch.distributed.broadcast(out, 0)
    return out


def squared_distance(x: Tensor, centroids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ ‖x / ‖x‖ - μ_label‖² over real tokens and heads, differentiable in x; the number of terms), two scalars."""
    heads, count, dim = centroids.shape
    vectors = normalize(x.to(torch.promote_types(x.dtype, torch.float32))).repeat_interleave(heads // x.shape[1], 1)
    first_row = torch.arange(heads, device=centroids.device).view(1, -1, 1) * count
    nearest = centroids.reshape(-1, dim).to(vectors.dtype)[first_row + labels.clamp(min=0)]
    is_real = labels >= 0
    return ((vectors - nearest).square().sum(-1) * is_real).sum(), is_real.sum()


def _world_size() -> int:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()
