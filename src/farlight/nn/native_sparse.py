"""Native sparse attention: a compressed, a block-selected and a sliding-window branch with learned gates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from farlight.attention import attention
from farlight.errors import ArgumentError
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern
from farlight.patterns.membership import between
from farlight.patterns.positional import causal, window
from farlight.patterns.tables import chosen_blocks
from farlight.routing.base import row_chunks
from farlight.routing.budget import Budget

__all__ = ["NativeSparseAttention"]


class NativeSparseAttention(nn.Module):
    """Causal self-attention with three branches and learned gates, `(B, N, embed_dim)` to the same.

        out_i = Σ over branches b of  sigmoid(w_b · x_i) · softmax-attention_b(q_i)

    * compressed: every `stride` tokens the next `compress` ones are pooled into one key and one value by a learned map
      (a segment; the map knows the places inside it); query i sees the segments that end at or before i.
    * chosen: the `count` blocks of `block` tokens whose segments got the most probability in the compressed branch, summed
      over the query heads of a group, so that a group reads the same blocks. The first block and the last two, counted
      from the query's own, are always among them and count as chosen. Query i sees the keys <= i of these blocks.
    * window: the query and the `window` tokens before it.

    The importance of block u is `Σ_c p_c · |segment c ∩ block u| / stride` (equation 9 of the paper, its offsets read as
    overlaps). The choice has no gradient; the scorer learns through the compressed branch, which uses the same probabilities.
    Each branch has its own keys and values.

    Positions are not encoded here: add them to x, or pass `rotate`, a function of (tensor `(B, H, N, D)`,
    positions `(N,)`) applied to queries and to the keys of the chosen and window branches.

    Yuan et al. 2025, "Native Sparse Attention", arXiv:2502.11089.

    >>> import torch, farlight.nn
    >>> layer = farlight.nn.NativeSparseAttention(32, 4, kv_heads=2, compress=8, stride=4, block=8, count=3, window=8)
    >>> layer(torch.randn(2, 50, 32)).shape
    torch.Size([2, 50, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kv_heads: int | None = None,
        compress: int = 32,
        stride: int = 16,
        block: int = 64,
        count: int = 16,
        window: int = 512,
        rotate: object = None,
    ) -> None:
        super().__init__()
        name = "NativeSparseAttention"
        self.heads = whole(f"{name}: num_heads", num_heads, 1)
        self.kv_heads = self.heads if kv_heads is None else whole(f"{name}: kv_heads", kv_heads, 1)
        if embed_dim % self.heads or self.heads % self.kv_heads:
            raise ArgumentError(
                f"{name}: embed_dim = {embed_dim}, num_heads = {self.heads}, kv_heads = {self.kv_heads}: "
                "each must divide the one before it."
            )
        self.compress, self.stride = whole(f"{name}: compress", compress, 1), whole(f"{name}: stride", stride, 1)
        self.block, self.count = whole(f"{name}: block", block, 1), whole(f"{name}: count", count, 1)
        self.window = whole(f"{name}: window", window, 0)
        if self.compress % self.stride or self.block % self.stride:
            raise ArgumentError(
                f"{name}: stride = {stride} must divide compress = {compress} and block = {block}, "
                "so that segments and blocks line up."
            )
        if rotate is not None and not callable(rotate):
            raise ArgumentError(f"{name}: rotate is {type(rotate).__name__}; pass a function of (tensor, positions), or None.")
        self.rotate = rotate
        self.head_dim = dim = embed_dim // self.heads
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        # Keys and values of the compressed, the chosen and the window branch.
        self.kv_proj = nn.Linear(embed_dim, 3 * 2 * self.kv_heads * dim, bias=False)
        self.gate_proj = nn.Linear(embed_dim, 3 * self.heads)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.place = nn.Parameter(torch.randn(2, self.compress, dim) * 0.02)
        self.pool_k, self.pool_v = (
            nn.Sequential(nn.Linear(self.compress * dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(2)
        )

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, compress={self.compress}, stride={self.stride}, "
            f"block={self.block}, count={self.count}, window={self.window}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, embed_dim)` to the same. Raises ArgumentError for another shape."""
        if x.dim() != 3 or x.shape[2] != self.q_proj.in_features:
            raise ArgumentError(
                f"NativeSparseAttention: x is {tuple(x.shape)}; (batch, tokens, {self.q_proj.in_features}) is needed."
            )
        batch, n, _ = x.shape
        q = self.q_proj(x).unflatten(2, (self.heads, self.head_dim)).transpose(1, 2)
        kv = self.kv_proj(x).unflatten(2, (3, 2, self.kv_heads, self.head_dim)).permute(2, 3, 0, 4, 1, 5)
        (k_all, v_all), (k_blocks, v_blocks), (k_window, v_window) = kv.unbind(0)
        k_segments, v_segments = self._pool_segments(k_all, 0, self.pool_k), self._pool_segments(v_all, 1, self.pool_v)
        compressed, lse = attention(q, k_segments, v_segments, self._compressed_pattern(n), q_offset=0, return_lse=True)
        selected = self._selected_blocks(q, k_segments, lse, n)
        if callable(self.rotate):
            positions = torch.arange(n, device=x.device)
            q, k_blocks, k_window = (self.rotate(part, positions) for part in (q, k_blocks, k_window))
        branches = [
            compressed,
            attention(q, k_blocks, v_blocks, selected),
            attention(q, k_window, v_window, window(self.window, 0)),
        ]
        gates = self.gate_proj(x).sigmoid().unflatten(2, (3, self.heads)).permute(2, 0, 3, 1)
        out = sum(gate.unsqueeze(-1) * branch for gate, branch in zip(gates, branches, strict=True))
        projected: Tensor = self.out_proj(out.transpose(1, 2).reshape(batch, n, -1))
        return projected

    if TYPE_CHECKING:
        __call__ = forward

    def _pool_segments(self, x: Tensor, which: int, pool: nn.Module) -> Tensor:
        """`(B, H_kv, segments, D)`: each complete segment of `compress` tokens as one; `which`: 0 = keys, 1 = values."""
        if x.shape[2] < self.compress:
            return x[:, :, :0]
        segments = x.unfold(2, self.compress, self.stride).transpose(-1, -2) + self.place[which]
        out: Tensor = pool(segments.flatten(-2))
        return out

    def _compressed_pattern(self, n: int) -> Pattern:
        """Query i sees the segments that end at or before i."""
        stops = ((torch.arange(n) + 1 - self.compress + self.stride) // self.stride).clamp(min=0)
        return between(torch.zeros(n, dtype=torch.int64), stops)

    @torch.no_grad()
    def _selected_blocks(self, q: Tensor, k: Tensor, lse: Tensor, n: int) -> Pattern:
        """The blocks of the chosen branch for each query, one choice for a group of query heads; `k` are the segments' keys."""
        batch, heads, _, dim = q.shape
        group, device = heads // self.kv_heads, q.device
        # A segment adds its probability to the blocks it overlaps, in proportion to the overlap, counted in strides.
        pieces = torch.arange(k.shape[2], device=device)[:, None] + torch.arange(self.compress // self.stride, device=device)
        block_of_piece = pieces // (self.block // self.stride)
        blocks = torch.arange(-(-n // self.block), device=device)
        overlap = (block_of_piece[:, :, None] == blocks).sum(1).to(q.dtype)
        ends = torch.arange(k.shape[2], device=device) * self.stride + self.compress - 1
        budget, selections = Budget(count=self.count), []
        for rows in row_chunks(n, batch * heads * max(1, k.shape[2])):
            positions = torch.arange(rows.start, rows.stop, device=device)[:, None]
            scores = (q[:, :, rows].unflatten(1, (self.kv_heads, group)) @ k.transpose(-1, -2).unsqueeze(2)) * dim**-0.5
            row_lse = lse[:, :, rows].unflatten(1, (self.kv_heads, group)).unsqueeze(-1).to(scores.dtype)
            p = torch.where(ends <= positions, (scores - row_lse).exp(), 0.0).sum(2)
            query_block = positions // self.block
            forced = ((blocks == 0) | (blocks >= query_block - 1)) & (blocks <= query_block)
            importance = (p @ overlap).masked_fill(forced | (blocks > query_block), float("-inf"))
            selections.append(budget.select(importance, forced.expand(importance.shape)))
        if not selections:
            return causal()
        width = max(selection.shape[-1] for selection in selections)
        padded = [torch.nn.functional.pad(selection, (0, width - selection.shape[-1]), value=-1) for selection in selections]
        indices = torch.cat(padded, 2).repeat_interleave(group, 1)
        return chosen_blocks(indices, block=self.block, query_block=1) & causal()
