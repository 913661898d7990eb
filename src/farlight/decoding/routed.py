"""Decoding where content chooses: every key is kept, since any may be chosen, and blocks of keys are kept in summary.

A router that scores blocks by their means or bounds reads the summaries, then only the keys of the blocks it takes; a step
costs N / block scores instead of N. Other routers read all keys, as they would without a cache.
"""

from __future__ import annotations

import copy
import operator

import torch
from torch import Tensor

from farlight.attention import attention
from farlight.decoding.kept_attention import attend_kept
from farlight.errors import ArgumentError
from farlight.patterns.expression import Pattern, Sizes
from farlight.routing import Router, TopBlocks
from farlight.routing.base import Choice, Joined, read

__all__ = ["Routed"]

# From this many queries on a prompt goes through the planner.
_PROMPT = 64
_SIGNS = {"|": operator.or_, "&": operator.and_, "-": lambda a, b: a & ~b}


class Routed:
    """A router with the summaries that its parts need of the keys so far."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self._summaries = {leaf: Summary(leaf) for leaf in router.modules() if isinstance(leaf, TopBlocks)}
        for leaf in self._summaries:
            if not leaf.causal or leaf.query_block != 1:
                raise ArgumentError(
                    f"KVCache: TopBlocks({leaf.extra_repr()}) decides for blocks of queries or looks ahead, but decoding has "
                    "one query at a time; use causal=True and query_block=1."
                )

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for summary in self._summaries.values() for part in summary.parts)

    def append(self, k: Tensor) -> None:
        """`k` `(B, H_kv, N, D)`: every key so far, in order."""
        for summary in self._summaries.values():
            summary.extend(k)

    def select(self, items: Tensor) -> Routed:
        """The same for these batch items."""
        return self._with({leaf: summary.select(items) for leaf, summary in self._summaries.items()})

    def cut(self, length: int) -> Routed:
        """The same for the first `length` keys."""
        return self._with({leaf: summary.cut(length) for leaf, summary in self._summaries.items()})

    def _with(self, summaries: dict[TopBlocks, Summary]) -> Routed:
        new = copy.copy(self)
        new._summaries = summaries
        return new

    def answer(self, q: Tensor, k: Tensor, v: Tensor, scale: float, return_lse: bool) -> tuple[Tensor, Tensor | None]:
        """(out, lse or None) of the newest queries over every key, as `fl.attention` under `router(q, k)` gives them."""
        if q.shape[2] >= _PROMPT:
            found = attention(q, k, v, self.router(q, k), scale=scale, return_lse=return_lse)
            return found if isinstance(found, tuple) else (found, None)
        mask = self._mask(self.router, q, k)
        mask = mask.expand(torch.broadcast_shapes(mask.shape, (1, 1, q.shape[2], k.shape[2])))
        return attend_kept(q, k, v, mask, scale=scale, return_lse=return_lse)

    def _mask(self, part: Router | Pattern, q: Tensor, k: Tensor) -> Tensor:
        """Who sees what, broadcastable to `(B, H, n_q, N)`."""
        if isinstance(part, Joined):
            both: Tensor = _SIGNS[part.sign](self._mask(part.left, q, k), self._mask(part.right, q, k))
            return both
        n_q, n_k = q.shape[2], k.shape[2]
        i = torch.arange(n_k - n_q, n_k, device=q.device).view(1, 1, -1, 1)
        j = torch.arange(n_k, device=q.device).view(1, 1, 1, -1)
        if isinstance(part, TopBlocks):
            # The keys are not read here, so they need not be of the kind that routers compute in.
            given = Choice(q.to(torch.promote_types(q.dtype, torch.float32)), k, None, None)
            listed, blocks = part.listed(given, self._summaries[part].view()), -(-n_k // part.block)
            member = torch.zeros(*listed.shape[:3], blocks + 1, dtype=torch.bool, device=q.device)
            member.scatter_(3, torch.where(listed < 0, blocks, listed), True)
            return member[..., :blocks].repeat_interleave(part.block, 3)[..., :n_k] & (j <= i)
        pattern = part if isinstance(part, Pattern) else part.choose(read(q, k))
        sizes = Sizes(n_q, n_k, n_k - n_q, q.shape[0], q.shape[1])
        pattern.check(sizes)
        b = torch.arange(sizes.batch if pattern.varies_over_batch else 1, device=q.device).view(-1, 1, 1, 1)
        h = torch.arange(sizes.heads if pattern.varies_over_heads else 1, device=q.device).view(1, -1, 1, 1)
        return pattern._allows(sizes, b, h, i, j)


class Summary:
    """What one router needs of each block of keys that is complete; the last, growing block is never scored."""

    def __init__(self, router: TopBlocks) -> None:
        self.router, self.parts, self.count = router, [], 0  # type: tuple[TopBlocks, list[Tensor], int]

    def view(self) -> list[Tensor]:
        return [part[:, :, : self.count] for part in self.parts]

    def select(self, items: Tensor) -> Summary:
        new = copy.copy(self)
        new.parts = [part.index_select(0, items) for part in self.parts]
        return new

    def cut(self, length: int) -> Summary:
        new = copy.copy(self)
        new.count = min(self.count, length // self.router.block)
        return new

    def extend(self, k: Tensor) -> None:
        block = self.router.block
        complete = k.shape[2] // block
        if complete == self.count and self.parts:
            return
        kind = torch.promote_types(k.dtype, torch.float32)
        new = self.router.summary(k[:, :, self.count * block : complete * block].to(kind))
        if not self.parts or complete > self.parts[0].shape[2]:
            room = complete + complete // 8 + 8
            grown = [part.new_zeros(*part.shape[:2], room, part.shape[3]) for part in new]
            for part, old in zip(grown, self.parts, strict=False):
                part[:, :, : self.count] = old[:, :, : self.count]
            self.parts = grown
        for part, more in zip(self.parts, new, strict=True):
            part[:, :, self.count : complete] = more
        self.count = complete
