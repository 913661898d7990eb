"""`TopKeys`: routing by the highest-scoring keys of each row; `from_indices`: a pattern from index lists made elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.errors import ArgumentError
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern, Sizes
from farlight.patterns.positional import causal as past
from farlight.patterns.tables import chosen_blocks, chosen_keys
from farlight.routing.base import Router, RouterInput, row_chunks
from farlight.routing.budget import Budget, concat_selections
from farlight.score.lowered import lower
from farlight.score.terms import Score

__all__ = ["TopKeys", "from_indices"]


class TopKeys(Router):
    """The keys with the largest q_i · k_j of each query: `count` of them, a `share` of the visible ones, or the fewest that
    hold `mass` of softmax(scale · q_i · k_j). score: terms of `fl.score`, under which the keys are ranked.

    Every pair is scored, n_q · n_k · D multiply-adds, in chunks of rows: memory is that of the index lists. Use it with narrow
    scoring vectors, `TopKeys(2048, causal=True)(q_index, k_index)`, as DeepSeek's indexer does, or as the upper bound of what a
    pattern of a given size can keep. `causal=True`: the visible keys are j <= i. scale: None means D^-½; only mass
    and `score` depend on it.

    Raises ArgumentError unless exactly one of count, share and mass is given and in range.

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
        score: Score | None = None,
    ) -> None:
        super().__init__()
        self.budget = Budget.checked("TopKeys", count=count, share=share, mass=mass)
        self.causal, self.scale, self.score = bool(causal), scale, score

    def extra_repr(self) -> str:
        score = "" if self.score is None else f", score={self.score!r}"
        return f"{self.budget}" + (", causal=True" if self.causal else "") + score

    def choose(self, inputs: RouterInput) -> Pattern:
        group = inputs.heads // inputs.kv_heads
        scale = inputs.q.shape[-1] ** -0.5 if self.scale is None else self.scale
        key_position = torch.arange(inputs.n_k, device=inputs.k.device)
        sizes = Sizes(inputs.n_q, inputs.n_k, inputs.offset, inputs.batch, inputs.heads)
        terms = lower(self.score, None, sizes, inputs.q.device, inputs.q.dtype)
        chunks = []
        for rows in row_chunks(inputs.n_q, inputs.batch * inputs.heads * max(1, inputs.n_k)):
            q = inputs.q[:, :, rows].unflatten(1, (inputs.kv_heads, group))
            scores = (q @ inputs.k.transpose(-1, -2).unsqueeze(2)).flatten(1, 2)
            if self.budget.mass is not None or terms is not None:
                scores = scores * scale
            if terms is not None:
                scores = terms.under(scores, slice(None), slice(None), rows, key_position, inputs.offset)
            if inputs.key_mask is not None:
                scores = scores.masked_fill(~inputs.key_mask[:, None, None], float("-inf"))
            if inputs.query_mask is not None:
                scores = scores.masked_fill(~inputs.query_mask[:, None, rows, None], float("-inf"))
            if self.causal:
                query_position = inputs.offset + torch.arange(rows.start, rows.stop, device=key_position.device)
                scores = scores.masked_fill(key_position > query_position[:, None], float("-inf"))
            chunks.append(self.budget.select(scores))
        return chosen_keys(
            concat_selections(chunks) if chunks else torch.full((inputs.batch, inputs.heads, 0, 0), -1, device="cpu")
        )

    def products(self, sizes: Sizes) -> int:
        return sizes.batch * sizes.heads * sizes.n_q * sizes.n_k


def from_indices(indices: Tensor, *, block: int | None = None, query_block: int = 1, causal: bool = False) -> Pattern:
    """The pattern of given index lists of keys, or of key blocks: from a learned indexer, a serving engine, a file.

    Args:
        indices: integers `(B, rows, m)` for all heads (as Hugging Face's `indices=`) or `(B, H, rows, m)`; negative = no entry.
        block: None: indices are keys and each row is a query. Else: indices are blocks of `block` keys and each row is a block
            of `query_block` queries.
        causal: remove keys after the query; indexers pad the lists of early queries with later keys.

    Raises ArgumentError for indices of another dtype or shape, and for `query_block` without `block`.

    >>> import torch
    >>> from farlight.routing import from_indices
    >>> from_indices(torch.tensor([[[0, 2], [1, -7], [2, 0]]]), causal=True).dense(3).int()[0, 0].tolist()
    [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    """
    if not isinstance(indices, Tensor) or indices.dtype.is_floating_point or indices.dtype == torch.bool:
        actual = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise ArgumentError(f"from_indices: indices are {actual}; pass an integer tensor (B, rows, m) or (B, H, rows, m).")
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
