"""Routing by blocks: score every block of keys by a summary, look at the best (MoBA, Quest, Twilight)."""

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
from farlight.routing.base import Choice, Router, stretches
from farlight.routing.budget import Amount
from farlight.routing.pooling import block_bounds, block_mean, block_sizes

__all__ = ["TopBlocks"]

_SCORES = ("mean", "minmax")
_LONGEST_LIST = 48


class TopBlocks(Router):
    """The blocks of keys with the largest score for each block of queries.

    A block of `query_block` queries is represented by one vector q̄ (below); key block c, of n_c real keys, scores

        "mean":    q̄ · mean of its keys                                            (MoBA)
        "minmax":  Σ_d max(q̄_d · least_d, q̄_d · most_d)  >=  q̄ · k for all its keys  (Quest: a bound that misses no key)

    and these are taken: `count` blocks; a `share` of the visible ones, rounded up; or the smallest set that holds `mass` of
    the estimated probability, `softmax_c(scale · score + log n_c)` over the scored blocks, so that easy rows pay less.

    * not causal: q̄ is the mean of the block's real queries, every block with a real key is visible, and `query_block=None`
      means `block`.
    * causal: visible are the blocks that end before the query block begins, which are scored, and those that it lies in,
      which are always taken without a look (their means would contain the future) and count as taken for count and
      share (whether or not the text has reached them);
      keys after the query are dropped. `query_block=None` means 1; for larger blocks the *first* real query decides for its
      block, since the others lie in its future, and the queries must begin at a multiple of query_block.

    Lu et al. 2025, "MoBA", arXiv:2502.13189; Tang et al. 2024, "Quest", arXiv:2406.10774; Lin et al. 2025, "Twilight",
    arXiv:2502.02770. The scores are those of one head of queries on its own key head; nothing is shared in a group.

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
        self.amount = Amount.read("TopBlocks", count, share, mass)
        self.block, self.causal, self.scale = whole("TopBlocks: block", block, 1), bool(causal), scale
        if query_block is None:
            query_block = 1 if causal else self.block
        self.query_block = whole("TopBlocks: query_block", query_block, 1)
        if score not in _SCORES:
            raise ArgumentError(f"TopBlocks: score = {show(score)} is unknown; use one of {', '.join(map(repr, _SCORES))}.")
        self.score = score

    def extra_repr(self) -> str:
        flag = ", causal=True" if self.causal else ""
        return f"{self.amount}, block={self.block}, query_block={self.query_block}{flag}, score={self.score!r}"

    def choose(self, given: Choice) -> Pattern:
        first, queries, alive = self._represent(given)
        indices = self._indices(given, first, queries, alive, self.summary(given.k, given.key_real))
        pattern = listed_blocks(indices, given, first, self.block, self.query_block)
        if self.causal:
            pattern = pattern & past()
        return pattern if given.key_real is None else pattern & padding(given.key_real)

    def summary(self, k: Tensor, real: Tensor | None = None) -> list[Tensor]:
        """What the score needs of each block of keys, `(B, H_kv, blocks, D)` each: its mean, or its least and most."""
        return [block_mean(k, self.block, real)] if self.score == "mean" else list(block_bounds(k, self.block, real))

    def listed(self, given: Choice, summary: list[Tensor]) -> Tensor:
        """`(B, H, n_q, most)`: the key blocks of each query, -1 pads, when the summary is known (query_block = 1 only).

        The keys themselves are not read. The summary may lack the blocks that queries lie in, which are never scored.
        """
        missing = -(-given.n_k // self.block) - summary[0].shape[2]
        padded = [torch.nn.functional.pad(part, (0, 0, 0, missing)) for part in summary]
        return self._indices(given, given.offset, given.q, given.query_real, padded)

    def _represent(self, given: Choice) -> tuple[int, Tensor, Tensor | None]:
        """Where the first block of queries begins, `(B, H, U, D)` one vector for each block, and `(B, U)` whether it has a
        real query (None = each has).
        """
        size, offset, real = self.query_block, given.offset, given.query_real
        # Blocks are counted from position 0, or from the first query where queries are no part of the keys' text.
        first = offset // size * size if offset >= 0 else offset
        if size == 1:
            return first, given.q, real
        if self.causal and first != offset:
            raise ArgumentError(
                f"TopBlocks(query_block={size}, causal=True): the first query stands at position {offset}, inside a block, "
                f"whose choice belongs to the query at {first}; pass queries from there on, or use query_block=1."
            )
        if real is None:
            real = torch.ones(1, given.n_q, dtype=torch.bool, device=given.q.device)
        before = offset - first
        ends = (before, -(before + given.n_q) % size)
        q, real = torch.nn.functional.pad(given.q, (0, 0, *ends)), torch.nn.functional.pad(real, ends)
        by_block = real.view(real.shape[0], -1, size)
        if not self.causal:
            return first, block_mean(q, size, real), by_block.any(-1)
        chief = by_block.int().argmax(-1)[:, None, :, None, None].expand(*q.shape[:2], -1, 1, q.shape[3])
        return first, q.view(*q.shape[:2], -1, size, q.shape[3]).gather(3, chief).squeeze(3), by_block.any(-1)

    def _indices(self, given: Choice, first: int, queries: Tensor, alive: Tensor | None, summary: list[Tensor]) -> Tensor:
        """`(B, H, U, most)`: the key blocks of each block of queries, -1 pads."""
        device, block = queries.device, self.block
        group = given.heads // given.kv_heads
        sizes = block_sizes(given.n_k, block, given.key_real, device)
        summary = [part.repeat_interleave(group, 1) for part in summary]
        blocks = torch.arange(sizes.shape[1], device=device)
        scale = queries.shape[-1] ** -0.5 if self.scale is None else self.scale
        found = []
        for part in stretches(queries.shape[2], queries.shape[0] * given.heads * max(1, blocks.numel())):
            q = queries[:, :, part]
            if self.score == "mean":
                scores = q @ summary[0].transpose(-1, -2)
            else:
                least, most = (edge.transpose(-1, -2) for edge in summary)
                scores = q.clamp(min=0) @ most + q.clamp(max=0) @ least
            if self.amount.mass is not None:
                scores = scores * scale + sizes.clamp(min=1).to(scores.dtype).log()[:, None, None]
            start = first + torch.arange(part.start, part.stop, device=device)[:, None] * self.query_block
            some = (sizes > 0)[:, None, None]
            if alive is not None:
                some = some & alive[:, None, part, None]
            scored, forced, counted = some.expand(scores.shape), None, None
            if self.causal:
                before = (blocks + 1) * block <= start
                own = (blocks * block < start + self.query_block) & ~before
                scored, forced = some & before, (some & own).expand(scores.shape)
                # Counted by position: the same whether or not the text has reached them yet.
                last, first_own = (
                    (start + more).clamp(min=0).div(block, rounding_mode="floor") for more in (self.query_block - 1, 0)
                )
                counted = (last - first_own + 1).squeeze(1)
            # As many as a query block that begins at the end of a block lies in.
            own_blocks = (self.query_block + block - 2) // block + 1
            found.append(self.amount.take(scores.masked_fill(~scored, float("-inf")), forced, counted, own_blocks))
        most_taken = max((part.shape[-1] for part in found), default=0)
        parts = [torch.nn.functional.pad(part, (0, most_taken - part.shape[-1]), value=-1) for part in found]
        return torch.cat(parts, 2) if parts else torch.full((*queries.shape[:3], 0), -1, device=device)


def listed_blocks(indices: Tensor, given: Choice, first: int, block: int, query_block: int) -> Pattern:
    """The pattern of lists of key blocks, for the blocks of queries that begin at position `first`."""
    if query_block == 1:
        if 0 < indices.shape[3] <= _LONGEST_LIST:
            # Rows sorted by the block they look at: dense tiles, where neighbours that look elsewhere would share few keys.
            of_key = torch.div(torch.arange(given.n_k, device=indices.device), block, rounding_mode="floor")
            return meets(indices, of_key[:, None])
        return chosen_blocks(indices, block=block, query_block=1)
    if given.offset < 0:
        each = indices.repeat_interleave(query_block, 2)[:, :, : given.n_q]
        return chosen_blocks(each, block=block, query_block=1)
    # One list for each block of positions; those before the first query are empty.
    padded = torch.nn.functional.pad(indices, (0, 0, first // query_block, 0), value=-1)
    return chosen_blocks(padded, block=block, query_block=query_block)
