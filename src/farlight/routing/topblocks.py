"""`TopBlocks`: routing by the highest-scoring key blocks, each scored by a summary (MoBA, Quest, Twilight).

Per call: summarise the key blocks (mean or channel-wise bounds), score every summary with one vector per query block, select by
`Budget`, and turn the lists of block indices into `meets` (per-query lists) or `chosen_blocks` (lists per query block).
"""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.errors import ArgumentError, show
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern
from farlight.patterns.multi_label import meets
from farlight.patterns.packing import padding
from farlight.patterns.positional import causal as past
from farlight.patterns.tables import chosen_blocks
from farlight.routing.base import Router, RouterInput, row_chunks
from farlight.routing.budget import Budget, concat_selections
from farlight.routing.pooling import block_bounds, block_mean, block_sizes

__all__ = ["TopBlocks"]

_SCORES = ("mean", "minmax")
# Longest per-query list that is planned as clusterings (`meets`); longer ones are planned as lists of runs.
_MAX_MEETS_LIST = 48


class TopBlocks(Router):
    """The key blocks with the largest score for each query block.

    A block of `query_block` queries is represented by one vector q̄ (below). Key block c, of n_c real keys, has the score

        "mean":    q̄ · mean of its keys                                                     (MoBA)
        "minmax":  Σ_d max(q̄_d · min_d, q̄_d · max_d)  >=  q̄ · k of each of its keys         (Quest: an upper bound)

    and a query block selects `count` key blocks; or ⌈share · visible⌉ of them; or the fewest that hold `mass` of the estimated
    probability `softmax_c(scale · score + log n_c)` over the scored blocks, so rows of concentrated attention select fewer.

    * not causal: q̄ is the mean of the block's real queries; every block with a real key is visible; `query_block=None` means
      `block`.
    * causal: blocks that end before the query block begins are scored. Blocks that overlap the query block are always selected,
      unscored, since their summaries contain later keys; count and share include them, counted by position, whether or not the
      text has reached them. Keys after the query are removed. `query_block=None` means 1. A larger query block is represented
      by its first real query, since the others are in that query's future; the queries must then begin at a multiple of
      query_block.

    Each query head scores the blocks of its own key head; the heads of a group choose separately. scale: None means D^-½; only
    mass depends on it. Raises ArgumentError for arguments out of range and for causal queries that begin inside a query block.

    Lu et al. 2025, "MoBA", arXiv:2502.13189; Tang et al. 2024, "Quest", arXiv:2406.10774; Lin et al. 2025, "Twilight",
    arXiv:2502.02770.

    >>> import torch
    >>> from farlight.routing import TopBlocks
    >>> x = torch.tensor([[[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]]])
    >>> TopBlocks(1, 2)(x, x).dense(4).int()[0, 0].tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """

    def __init__(
        self,
        count: int | None = None,
        block: int = 64,
        query_block: int | None = None,
        causal: bool = False,
        *,
        share: float | None = None,
        mass: float | None = None,
        score: str = "mean",
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.budget = Budget.checked("TopBlocks", count, share, mass)
        self.block, self.causal, self.scale = whole("TopBlocks: block", block, 1), bool(causal), scale
        if query_block is None:
            query_block = 1 if causal else self.block
        self.query_block = whole("TopBlocks: query_block", query_block, 1)
        if score not in _SCORES:
            raise ArgumentError(f"TopBlocks: score = {show(score)} is unknown; use one of {', '.join(map(repr, _SCORES))}.")
        self.score = score

    def extra_repr(self) -> str:
        flag = ", causal=True" if self.causal else ""
        return f"{self.budget}, block={self.block}, query_block={self.query_block}{flag}, score={self.score!r}"

    def choose(self, inputs: RouterInput) -> Pattern:
        first, queries, is_real = self._query_vectors(inputs)
        indices = self._select(inputs, first, queries, is_real, self.summary(inputs.k, inputs.key_mask))
        pattern = block_lists(indices, inputs, first, self.block, self.query_block)
        if self.causal:
            pattern = pattern & past()
        return pattern if inputs.key_mask is None else pattern & padding(inputs.key_mask)

    def summary(self, k: Tensor, real: Tensor | None = None) -> list[Tensor]:
        """The block summaries that the score reads, each `(B, H_kv, blocks, D)`: [mean], or [min, max] for "minmax"."""
        return [block_mean(k, self.block, real)] if self.score == "mean" else list(block_bounds(k, self.block, real))

    def select_blocks(self, inputs: RouterInput, summary: list[Tensor]) -> Tensor:
        """`(B, H, n_q, m)` int64: the selected key blocks of each query, padded with -1, from known summaries (query_block =
        1).

        inputs.k is read for its shape only. Trailing blocks may be missing from the summary if they end before no query.
        """
        missing = -(-inputs.n_k // self.block) - summary[0].shape[2]
        padded = [torch.nn.functional.pad(table, (0, 0, 0, missing)) for table in summary]
        return self._select(inputs, inputs.offset, inputs.q, inputs.query_mask, padded)

    def _query_vectors(self, inputs: RouterInput) -> tuple[int, Tensor, Tensor | None]:
        """(position of the first query block, one vector per query block `(B, H, U, D)`, its mask `(B or 1, U)` or None = all).

        The mask is True where the query block has a real query.
        """
        size, offset, mask = self.query_block, inputs.offset, inputs.query_mask
        # Blocks are aligned to position 0; to the first query where queries outnumber keys, so that it has no position in them.
        first = offset // size * size if offset >= 0 else offset
        if size == 1:
            return first, inputs.q, mask
        if self.causal and first != offset:
            raise ArgumentError(
                f"TopBlocks(query_block={size}, causal=True): the first query stands at position {offset}, inside a block, "
                f"whose choice belongs to the query at {first}; pass queries from there on, or use query_block=1."
            )
        if mask is None:
            mask = torch.ones(1, inputs.n_q, dtype=torch.bool, device=inputs.q.device)
        before = offset - first
        pads = (before, -(before + inputs.n_q) % size)
        q, mask = torch.nn.functional.pad(inputs.q, (0, 0, *pads)), torch.nn.functional.pad(mask, pads)
        block_mask = mask.view(mask.shape[0], -1, size)
        if not self.causal:
            return first, block_mean(q, size, mask), block_mask.any(-1)
        first_real = block_mask.int().argmax(-1)[:, None, :, None, None].expand(*q.shape[:2], -1, 1, q.shape[3])
        vectors = q.view(*q.shape[:2], -1, size, q.shape[3]).gather(3, first_real).squeeze(3)
        return first, vectors, block_mask.any(-1)

    def _select(
        self, inputs: RouterInput, first: int, queries: Tensor, is_real: Tensor | None, summary: list[Tensor]
    ) -> Tensor:
        """`(B, H, U, m)` int64: the selected key blocks of each query block, padded with -1."""
        device, block = queries.device, self.block
        sizes = block_sizes(inputs.n_k, block, inputs.key_mask, device)
        summary = [table.repeat_interleave(inputs.heads // inputs.kv_heads, 1) for table in summary]
        # The key blocks that a query block can overlap: most when it begins at the end of a key block.
        max_overlap = (self.query_block + block - 2) // block + 1
        key_block = torch.arange(sizes.shape[1], device=device)
        chunks = []
        for rows in row_chunks(queries.shape[2], queries.shape[0] * inputs.heads * max(1, key_block.numel())):
            scores = self._scores(queries[:, :, rows], summary, sizes)
            visible = (sizes > 0)[:, None, None]
            if is_real is not None:
                visible = visible & is_real[:, None, rows, None]
            scored, forced, num_forced = visible.expand(scores.shape), None, None
            if self.causal:
                start = first + torch.arange(rows.start, rows.stop, device=device)[:, None] * self.query_block
                ended = (key_block + 1) * block <= start
                overlapping = (key_block * block < start + self.query_block) & ~ended
                scored, forced = visible & ended, (visible & overlapping).expand(scores.shape)
                # Counted by position, so that decoding, whose text ends inside a block, counts as the parallel pass does.
                last_block = (start + self.query_block - 1).clamp(min=0) // block
                num_forced = (last_block - start.clamp(min=0) // block + 1).squeeze(1)
            chunks.append(self.budget.select(scores.masked_fill(~scored, float("-inf")), forced, num_forced, max_overlap))
        return concat_selections(chunks) if chunks else torch.full((*queries.shape[:3], 0), -1, device=device)

    def _scores(self, queries: Tensor, summary: list[Tensor], sizes: Tensor) -> Tensor:
        """`(B, H, rows, blocks)`: the block scores of the class; for mass the logits scale · score + log n_c."""
        if self.score == "mean":
            scores = queries @ summary[0].transpose(-1, -2)
        else:
            lower, upper = (bound.transpose(-1, -2) for bound in summary)
            scores = queries.clamp(min=0) @ upper + queries.clamp(max=0) @ lower
        if self.budget.mass is None:
            return scores
        scale = queries.shape[-1] ** -0.5 if self.scale is None else self.scale
        return scores * scale + sizes.clamp(min=1).to(scores.dtype).log()[:, None, None]


def block_lists(indices: Tensor, inputs: RouterInput, first: int, block: int, query_block: int) -> Pattern:
    """The pattern of lists of key blocks `(B, H, U, m)`, one for each query block; the first begins at position `first`."""
    if query_block == 1:
        if 0 < indices.shape[3] <= _MAX_MEETS_LIST:
            # `meets` is planned with rows sorted by key block: dense tiles, even where adjacent queries select other blocks.
            key_block = torch.arange(inputs.n_k, device=indices.device) // block
            return meets(indices, key_block[:, None])
        return chosen_blocks(indices, block=block, query_block=1)
    if inputs.offset < 0:
        by_query = indices.repeat_interleave(query_block, 2)[:, :, : inputs.n_q]
        return chosen_blocks(by_query, block=block, query_block=1)
    # `chosen_blocks` counts query blocks from position 0: empty lists for those before the first query.
    padded = torch.nn.functional.pad(indices, (0, 0, first // query_block, 0), value=-1)
    return chosen_blocks(padded, block=block, query_block=query_block)
