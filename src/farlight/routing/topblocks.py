"""`TopBlocks`: routing by the highest-scoring key blocks, each scored by a summary (MoBA, Quest, Twilight).

Per call: summarise the key blocks (mean or channel-wise bounds), score every summary with one vector per query block, select by
`Budget`, and turn the lists of block indices into `meets` (per-query lists) or `chosen_blocks` (lists per query block).
"""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.errors import ArgumentError, show
from farlight.kernels.cpu.choose import BUDGETS, SCORES, can_choose, choose_blocks
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern, Sizes
from farlight.patterns.multi_label import meets
from farlight.patterns.packing import padding
from farlight.patterns.positional import causal as past
from farlight.patterns.positional import full
from farlight.patterns.tables import chosen_blocks
from farlight.routing.base import Router, RouterInput, row_chunks
from farlight.routing.budget import Budget, concat_selections
from farlight.routing.pooling import block_bounds, block_mean, block_sizes
from farlight.routing.until_proven import ProvenChoice

__all__ = ["TopBlocks"]

_SCORES = ("mean", "minmax", "softmax")
_PER = ("head", "group")
# Longest per-query list that is planned as clusterings (`meets`); longer ones are planned as lists of runs.
_MAX_MEETS_LIST = 48


class TopBlocks(Router):
    """The key blocks with the largest score for each query block.

    A block of `query_block` queries is represented by one vector q̄ (below). Key block c, of n_c real keys, has the score

        "mean":     q̄ · mean of its keys                                                    (MoBA)
        "minmax":   Σ_d max(q̄_d · min_d, q̄_d · max_d)  >=  q̄ · k of each of its keys        (Quest: an upper bound)
        "softmax":  Σ_q softmax_c(scale · q · mean of its keys + log n_c), over the real queries q of the query block

    and a query block selects `count` key blocks; or ⌈share · visible⌉ of them; or the fewest that hold `mass` of the estimated
    probability `softmax_c(scale · score + log n_c)` over the scored blocks, so rows of concentrated attention select fewer.

    `lost=0.02` adds blocks until each row's missed share of softmax(scale · q kᵀ) is proven to be at most 0.02, or every block
    is seen. What the blocks left out can hold, Σ_c n_c exp(scale · "minmax" score), is compared with Σ exp(scale · q · k) of
    the keys seen, rounding included. Order: Σ_q softmax_c(scale · "minmax" score + log n_c) over the queries that choose
    together, largest first. Links that are united with the choice make the miss smaller still. The keys seen are scored once
    more for it; where the bounds are loose nearly everything is seen.

    * not causal: q̄ is the mean of the block's real queries; every block with a real key is visible; `query_block=None` means
      `block`.
    * causal: blocks that end before the query block begins are scored. Blocks that overlap the query block are always selected,
      unscored, since their summaries contain later keys; count and share include them, counted by position, whether or not the
      text has reached them. Keys after the query are removed. `query_block=None` means 1. A larger query block is represented
      by its first real query, since the others are in that query's future; the queries must then begin at a multiple of
      query_block. With "softmax" and `lost` all queries of the block choose together: a query attends to no later key, but
      which earlier blocks it reads depends on up to query_block - 1 later queries.

    Each query head scores the blocks of its own key head. per="head": the heads of a group choose separately; per="group":
    together, by the sum of their scores. scale: None means D^-½; only mass, lost and "softmax" depend on it. score: None means
    "mean", with `lost` "minmax", the only one that proves it. On the CPU native code
    scores and selects in one pass, without storing the scores of all blocks; ties go to the earlier block. Raises ArgumentError
    for arguments out of range and for causal queries that begin inside a query block.

    Lu et al. 2025, "MoBA", arXiv:2502.13189; Tang et al. 2024, "Quest", arXiv:2406.10774; Lin et al. 2025, "Twilight",
    arXiv:2502.02770.

    >>> import torch
    >>> from farlight.routing import TopBlocks
    >>> x = torch.tensor([[[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]]])
    >>> TopBlocks(1, 2)(x, x).dense(4).int()[0, 0].tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """

    reads_16_bits = True

    def __init__(
        self,
        count: int | None = None,
        block: int = 64,
        query_block: int | None = None,
        causal: bool = False,
        *,
        share: float | None = None,
        mass: float | None = None,
        lost: float | None = None,
        score: str | None = None,
        scale: float | None = None,
        per: str = "head",
    ) -> None:
        super().__init__()
        self.budget = Budget.checked("TopBlocks", count=count, share=share, mass=mass, lost=lost)
        self.block, self.causal, self.scale = whole("TopBlocks: block", block, 1), bool(causal), scale
        if query_block is None:
            query_block = 1 if causal else self.block
        self.query_block = whole("TopBlocks: query_block", query_block, 1)
        if score is None:
            score = "mean" if lost is None else "minmax"
        if score not in _SCORES:
            raise ArgumentError(f"TopBlocks: score = {show(score)} is unknown; use one of {', '.join(map(repr, _SCORES))}.")
        if lost is not None and score != "minmax":
            raise ArgumentError(
                f"TopBlocks: lost = {lost} with score = {score!r}: only bounds prove what is lost; leave score out, or choose "
                "by count, share or mass."
            )
        if per not in _PER:
            raise ArgumentError(f"TopBlocks: per = {show(per)} is unknown; use 'head' or 'group'.")
        self.score, self.per = score, per

    def extra_repr(self) -> str:
        flag = (", causal=True" if self.causal else "") + (", per='group'" if self.per == "group" else "")
        return f"{self.budget}, block={self.block}, query_block={self.query_block}{flag}, score={self.score!r}"

    def choose(self, inputs: RouterInput) -> Pattern:
        first = self._first(inputs)
        if self._takes_everything(inputs):
            return past() if self.causal else full()
        is_native = can_choose(inputs.q)
        inputs = inputs if is_native else inputs.widened()
        if is_native:
            indices = self._choose_native(inputs, first)
        elif self.budget.lost is not None:
            indices = self._select_proven(inputs, first)
        else:
            indices = self._select(inputs, first, self.summary(inputs.k, inputs.key_mask))
        return self.pattern_of_lists(indices, inputs, first)

    def products(self, sizes: Sizes) -> int:
        by_row = self.score == "softmax" or self.budget.lost is not None
        rows = sizes.n_q if by_row else -(-sizes.n_q // self.query_block)
        # Causal, a query scores the blocks before it, on average those of the middle query.
        keys = max(0, sizes.q_offset + sizes.n_q // 2) if self.causal else sizes.n_k
        bounds = 2 if self.score == "minmax" else 1
        return sizes.batch * sizes.heads * rows * -(-min(keys, sizes.n_k) // self.block) * bounds

    def _takes_everything(self, inputs: RouterInput) -> bool:
        """Whether the count reaches every block of the text, so that there is nothing to choose."""
        if self.budget.count is None or inputs.key_mask is not None or inputs.query_mask is not None:
            return False
        if torch.compiler.is_compiling():
            return False  # n_k may be a symbol: a comparison would be a guard. Every block is then listed
        # Causal, all blocks but the last may be scored. Forced ones are counted to the end of their query block, which may lie
        # behind the text.
        return self.budget.count >= -(-inputs.n_k // self.block) + (self._max_overlap(inputs) - 1 if self.causal else 0)

    def pattern_of_lists(self, indices: Tensor, inputs: RouterInput, first: int) -> Pattern:
        """The pattern of `_select`'s lists, whose first query block begins at position `first`; values are not read."""
        if self.per == "group":
            indices = indices.repeat_interleave(inputs.heads // inputs.kv_heads, 1)
        pattern = block_lists(indices, inputs, first, self.block, self.query_block)
        if self.causal:
            pattern = pattern & past()
        return pattern if inputs.key_mask is None else pattern & padding(inputs.key_mask)

    def _choose_native(self, inputs: RouterInput, first: int) -> Tensor:
        """`_select` by the native kernels, from the keys themselves."""
        budget, q = self.budget, inputs.q
        num_blocks, num_lists = -(-inputs.n_k // self.block), -(-(inputs.offset + inputs.n_q - first) // self.query_block)
        kind, value = next((name, x) for name, x in vars(budget).items() if x is not None)
        is_compiling, width = torch.compiler.is_compiling(), -1
        if kind == "count":  # each list is about as long: they are written once, into their table
            longest = max(int(value), self._max_overlap(inputs))
            width = torch.sym_min(longest, num_blocks) if is_compiling else min(longest, num_blocks)
        # Compiled, n_k may be a symbol: a comparison would be a guard.
        index_bytes = 8 if is_compiling else 2 if num_blocks < 2**15 else 4
        numbers = [self.block, self.query_block, inputs.offset, first, int(self.causal), int(self.per == "group")]
        codes = [SCORES.index(self.score), BUDGETS.index(kind)]
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        masks = inputs.query_mask, inputs.key_mask
        table = num_lists, width, index_bytes
        chosen: Tensor = choose_blocks(q, inputs.k, *masks, numbers + codes, float(value), float(scale), *table)
        return chosen

    def _max_overlap(self, inputs: RouterInput) -> int:
        """The key blocks that a query block can overlap: most when it begins at the end of a key block."""
        if inputs.offset >= 0 and (self.query_block % self.block == 0 or self.block % self.query_block == 0):
            return max(1, self.query_block // self.block)  # query blocks begin at multiples of their size
        return (self.query_block + self.block - 2) // self.block + 1

    def summary(self, k: Tensor, real: Tensor | None = None) -> list[Tensor]:
        """The block summaries that the score reads, each `(B, H_kv, blocks, D)`: [mean], or [min, max] for "minmax"."""
        return list(block_bounds(k, self.block, real)) if self.score == "minmax" else [block_mean(k, self.block, real)]

    def require_summaries(self, where: str) -> None:
        """Raise ArgumentError for the budget `lost`, which needs the keys themselves; `where`: what holds their summaries."""
        if self.budget.lost is not None:
            raise ArgumentError(
                f"{where}: TopBlocks({self.extra_repr()}) reads every key to prove what is lost, but only summaries of key "
                "blocks are known there; use count, share or mass."
            )

    def select_blocks(self, inputs: RouterInput, summary: list[Tensor]) -> Tensor:
        """`(B, H, n_q, m)` int64: the selected key blocks of each query, padded with -1, from known summaries (query_block =
        1).

        inputs.k is read for its shape only. Trailing blocks may be missing from the summary if they end before no query.
        """
        missing = -(-inputs.n_k // self.block) - summary[0].shape[2]
        padded = [torch.nn.functional.pad(table, (0, 0, 0, missing)) for table in summary]
        return self._select(inputs, inputs.offset, padded)

    def select_lists(self, inputs: RouterInput, summary: list[Tensor]) -> Tensor:
        """`(B, H, U, m)` int64: the selected key blocks of each query block, padded with -1, from known summaries. inputs.k is
        read for its shape only; with per="group" of key heads.
        """
        return self._select(inputs, self._first(inputs), summary)

    def _first(self, inputs: RouterInput) -> int:
        """The position of the first query block."""
        size, offset = self.query_block, inputs.offset
        # Blocks are aligned to position 0; to the first query where queries outnumber keys, so that it has no position in them.
        first = offset // size * size if offset >= 0 else offset
        if self.causal and first != offset and self.score != "softmax" and self.budget.lost is None:
            raise ArgumentError(
                f"TopBlocks(query_block={size}, causal=True): the first query stands at position {offset}, inside a block, "
                f"whose choice belongs to the query at {first}; pass queries from there on, or use query_block=1."
            )
        return first

    def _query_blocks(self, inputs: RouterInput, first: int) -> tuple[Tensor, Tensor]:
        """(rows of each query block `(B, H, U, query_block, D)`, their mask `(B or 1, U, query_block)`: the real queries)."""
        size, mask = self.query_block, inputs.query_mask
        if mask is None:
            mask = torch.ones(1, inputs.n_q, dtype=torch.bool, device=inputs.q.device)
        before = inputs.offset - first
        pads = (before, -(before + inputs.n_q) % size)
        q, mask = torch.nn.functional.pad(inputs.q, (0, 0, *pads)), torch.nn.functional.pad(mask, pads)
        return q.view(*q.shape[:2], -1, size, q.shape[3]), mask.view(mask.shape[0], -1, size)

    def _representatives(self, rows: Tensor, mask: Tensor) -> Tensor:
        """`(B, H, U, D)`: one vector per query block."""
        if not self.causal:
            counts = mask.sum(-1).clamp(min=1)[:, None, :, None].to(rows.dtype)
            return rows.masked_fill(~mask[:, None, ..., None], 0.0).sum(3) / counts
        first_real = mask.int().argmax(-1)[:, None, :, None, None].expand(*rows.shape[:3], 1, rows.shape[4])
        return rows.gather(3, first_real).squeeze(3)

    def _select(self, inputs: RouterInput, first: int, summary: list[Tensor]) -> Tensor:
        """`(B, H, U, m)` int64: the selected key blocks of each query block, padded with -1; with per="group" of key heads."""
        self.require_summaries("a choice from summaries")
        device, block = inputs.q.device, self.block
        sizes = block_sizes(inputs.n_k, block, inputs.key_mask, device)
        summary = [table.repeat_interleave(inputs.heads // inputs.kv_heads, 1) for table in summary]
        query_rows, query_mask = self._query_blocks(inputs, first)
        has_query, num_lists = query_mask.any(-1), query_mask.shape[1]
        scores_per_list = inputs.batch * inputs.heads * max(1, sizes.shape[1])
        chunks = []
        for rows in row_chunks(num_lists, scores_per_list * (self.query_block if self.score == "softmax" else 1)):
            start, scored, forced = self._scored(inputs, first, rows, sizes, has_query)
            num_forced = None
            if self.causal:
                # Counted by position, so that decoding, whose text ends inside a block, counts as the parallel pass does.
                last_block = (start + self.query_block - 1).clamp(min=0) // block
                num_forced = (last_block - start.clamp(min=0) // block + 1).squeeze(1)
            scores = self._scores(query_rows[:, :, rows], query_mask[:, rows], summary, sizes, scored, inputs.kv_heads)
            forced = None if forced is None else forced.expand(scores.shape)
            masked = scores.masked_fill(~scored, float("-inf"))
            chunks.append(self.budget.select(masked, forced, num_forced, self._max_overlap(inputs)))
        heads = inputs.kv_heads if self.per == "group" else inputs.heads
        empty = torch.full((inputs.batch, heads, num_lists, 0), -1, device=device)
        return concat_selections(chunks) if chunks else empty

    def _scored(
        self, inputs: RouterInput, first: int, rows: slice, sizes: Tensor, has_query: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(first positions `(u, 1)` of the query blocks `rows`, their scored and, causal, their forced blocks: `(B or 1, 1, u,
        blocks)` bool).
        """
        device, block = inputs.q.device, self.block
        start = first + torch.arange(rows.start, rows.stop, device=device)[:, None] * self.query_block
        visible = (sizes > 0)[:, None, None] & has_query[:, None, rows, None]
        if not self.causal:
            return start, visible, None
        key_block = torch.arange(sizes.shape[1], device=device)
        ended = (key_block + 1) * block <= start
        overlapping = (key_block * block < start + self.query_block) & ~ended
        return start, visible & ended, visible & overlapping

    def _select_proven(self, inputs: RouterInput, first: int) -> Tensor:
        """`_select` for the budget `lost`."""
        sizes = block_sizes(inputs.n_k, self.block, inputs.key_mask, inputs.q.device)
        query_rows, query_mask = self._query_blocks(inputs, first)
        num_lists, group = query_mask.shape[1], inputs.heads // inputs.kv_heads
        k, together = inputs.k, group if self.per == "group" else 1
        if self.per == "head":
            k = k.repeat_interleave(group, 1)
        scale = k.shape[-1] ** -0.5 if self.scale is None else self.scale
        proven = ProvenChoice(k, inputs.key_mask, self.block, scale, self.budget.lost or 0.0)
        # The rows of the heads that choose together stand one after the other.
        query_rows = query_rows.unflatten(1, (-1, together)).transpose(2, 3).flatten(3, 4)
        chunks = []
        for rows in row_chunks(num_lists, inputs.batch * inputs.heads * self.query_block * max(1, inputs.n_k)):
            start, scored, forced = self._scored(inputs, first, rows, sizes, query_mask.any(-1))
            positions = (start + torch.arange(self.query_block, device=k.device)).repeat(1, together) if self.causal else None
            mask = query_mask[:, None, rows].repeat(1, 1, 1, together)
            taken = proven.blocks(query_rows[:, :, rows], mask, positions, scored)
            taken = taken if forced is None else taken | forced
            index = torch.where(taken, torch.arange(taken.shape[-1], device=k.device), taken.shape[-1]).sort(-1).values
            width = int(taken.sum(-1).amax()) if taken.numel() else 0
            chunks.append(torch.where(index < taken.shape[-1], index, -1)[..., :width])
        empty = torch.full((inputs.batch, k.shape[1], num_lists, 0), -1, device=k.device)
        return concat_selections(chunks) if chunks else empty

    def _scores(
        self, rows: Tensor, mask: Tensor, summary: list[Tensor], sizes: Tensor, scored: Tensor, kv_heads: int
    ) -> Tensor:
        """`(B, H, lists, blocks)`: the block scores of the class, as logits where the budget is mass; per="group": summed over
        the heads of each key head.
        """
        log_sizes = sizes.clamp(min=1).to(rows.dtype).log()[:, None, None]
        scale = rows.shape[-1] ** -0.5 if self.scale is None else self.scale
        if self.score == "softmax":
            logits = (rows @ summary[0].transpose(-1, -2)[:, :, None]) * scale + log_sizes[:, :, None]
            shares = logits.masked_fill(~scored[..., None, :], float("-inf")).softmax(-1).nan_to_num(0.0)
            pooled = self._shared(shares.masked_fill(~mask[:, None, ..., None], 0.0).sum(3), kv_heads)
            return pooled.clamp(min=torch.finfo(pooled.dtype).tiny).log()
        queries = self._representatives(rows, mask)
        if self.score == "mean":
            scores = queries @ summary[0].transpose(-1, -2)
        else:
            lower, upper = (bound.transpose(-1, -2) for bound in summary)
            scores = queries.clamp(min=0) @ upper + queries.clamp(max=0) @ lower
        scores = self._shared(scores, kv_heads)
        return scores if self.budget.mass is None else scores * scale + log_sizes

    def _shared(self, scores: Tensor, kv_heads: int) -> Tensor:
        """The scores, summed over the query heads of each key head where these choose together."""
        return scores.unflatten(1, (kv_heads, -1)).sum(2) if self.per == "group" else scores


def block_lists(indices: Tensor, inputs: RouterInput, first: int, block: int, query_block: int) -> Pattern:
    """The pattern of lists of key blocks `(B, H, U, m)`, one for each query block; the first begins at position `first`."""
    if query_block == 1:
        if 0 < indices.shape[3] <= _MAX_MEETS_LIST and not can_choose(inputs.q):
            # `meets` is planned with rows sorted by key block: dense tiles, even where adjacent queries select other blocks.
            key_block = torch.arange(inputs.n_k, device=indices.device) // block
            return meets(indices, key_block[:, None])
        return chosen_blocks.owning(indices, block, 1)
    if inputs.offset < 0:
        by_query = indices.repeat_interleave(query_block, 2)[:, :, : inputs.n_q]
        return chosen_blocks.owning(by_query, block, 1)
    # `chosen_blocks` counts query blocks from position 0: empty lists for those before the first query.
    if torch.compiler.is_compiling() or first:  # compiled, `first` may be a symbol: a comparison would be a guard
        indices = torch.nn.functional.pad(indices, (0, 0, first // query_block, 0), value=-1)
    return chosen_blocks.owning(indices, block, query_block)
