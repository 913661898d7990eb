"""Routing by single keys: the largest scores of each row; and lists of keys or blocks that come from elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.errors import ArgumentError
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern
from farlight.patterns.positional import causal as past
from farlight.patterns.tables import chosen_blocks, chosen_keys
from farlight.routing.base import Choice, Router, stretches
from farlight.routing.budget import Amount

__all__ = ["TopKeys", "from_indices"]


class TopKeys(Router):
    """The keys with the largest q · k for each query: `count` of them, a `share` of the visible, or the smallest set that
    holds `mass` of softmax(scale · q · k).

    Every pair is scored, so the choice costs n² products (in stretches of rows: memory is that of the lists). That is worth
    it with small scoring vectors: `TopKeys(2048, causal=True)(q_index, k_index)` with a few channels, as DeepSeek's indexer
    does, or to learn what the best pattern of a size could keep. `causal=True`: visible are the keys j <= i.

    Gupta et al. 2021, "Memory-efficient Transformers via Top-k Attention", arXiv:2106.06899; DeepSeek-AI 2025,
    "DeepSeek-V3.2", arXiv:2512.02556 (lightning indexer); Lin et al. 2025, "Twilight", arXiv:2502.02770 (mass).

    >>> import torch
    >>> from farlight.routing import TopKeys
    >>> x = torch.tensor([[[[1.0], [3.0], [2.0]]]])
    >>> TopKeys(1, causal=True)(x, x).dense(3).int()[0, 0].tolist()
    [[1, 0, 0], [0, 1, 0], [0, 1, 0]]
    """

    def __init__(
        self,
        count: int | None = None,
        causal: bool = False,
        *,
        share: float | None = None,
        mass: float | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.amount = Amount.read("TopKeys", count, share, mass)
        self.causal, self.scale = bool(causal), scale

    def extra_repr(self) -> str:
        return f"{self.amount}" + (", causal=True" if self.causal else "")

    def choose(self, given: Choice) -> Pattern:
        group = given.heads // given.kv_heads
        scale = given.q.shape[-1] ** -0.5 if self.scale is None else self.scale
        keys = torch.arange(given.n_k, device=given.k.device)
        found = []
        for part in stretches(given.n_q, given.batch * given.heads * max(1, given.n_k)):
            q = given.q[:, :, part].unflatten(1, (given.kv_heads, group))
            scores = (q @ given.k.transpose(-1, -2).unsqueeze(2)).flatten(1, 2)
            if self.amount.mass is not None:
                scores = scores * scale
            if given.key_real is not None:
                scores = scores.masked_fill(~given.key_real[:, None, None], float("-inf"))
            if given.query_real is not None:
                scores = scores.masked_fill(~given.query_real[:, None, part, None], float("-inf"))
            if self.causal:
                place = given.offset + torch.arange(part.start, part.stop, device=keys.device)
                scores = scores.masked_fill(keys > place[:, None], float("-inf"))
            found.append(self.amount.take(scores))
        most = max((part.shape[-1] for part in found), default=0)
        parts = [torch.nn.functional.pad(part, (0, most - part.shape[-1]), value=-1) for part in found]
        return chosen_keys(torch.cat(parts, 2) if parts else torch.full((given.batch, given.heads, 0, 0), -1, device="cpu"))


def from_indices(indices: Tensor, *, block: int | None = None, query_block: int = 1, causal: bool = False) -> Pattern:
    """Keys, or with `block` blocks of keys, that were chosen elsewhere: a learned indexer, a serving engine, a file.

    Args:
        indices: integers `(B, rows, m)` for all heads (as Hugging Face's `indices=`) or `(B, H, rows, m)`; any negative number
            is none. Rows are queries, or blocks of `query_block` queries where blocks of keys are listed.
        causal: drop keys after the query; an indexer may fill its list with keys that the query cannot see yet.

    >>> import torch
    >>> from farlight.routing import from_indices
    >>> from_indices(torch.tensor([[[0, 2], [1, -7], [2, 0]]]), causal=True).dense(3).int()[0, 0].tolist()
    [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    """
    if not isinstance(indices, Tensor) or indices.dtype.is_floating_point or indices.dtype == torch.bool:
        found = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise ArgumentError(f"from_indices: indices are {found}; pass an integer tensor (B, rows, m) or (B, H, rows, m).")
    if indices.dim() not in (3, 4):
        raise ArgumentError(f"from_indices: indices have shape {tuple(indices.shape)}; pass (B, rows, m) or (B, H, rows, m).")
    table = (indices if indices.dim() == 4 else indices[:, None]).clamp(min=-1)
    if block is None:
        if whole("from_indices: query_block", query_block, 1) != 1:
            raise ArgumentError(
                f"from_indices: query_block = {query_block} without block: single keys are listed row by row; give block."
            )
        pattern: Pattern = chosen_keys(table)
    else:
        pattern = chosen_blocks(table, block=block, query_block=query_block)
    return pattern & past() if causal else pattern
