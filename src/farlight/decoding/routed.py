"""Decoding under a router: every key is kept, since any may be chosen later, and block summaries of keys are kept beside them.

`TopBlocks` scores the stored summaries and reads only the keys of the selected blocks: N / block scores a step instead of N. On
a CPU scores, selection and attention are one native call, also where `|`, `&` and `-` join them with constant patterns.
Other routers score every key at every step, as without a cache.
"""

from __future__ import annotations

import copy
import operator

import torch
from torch import Tensor

from farlight.attention import attention
from farlight.decoding.kept_attention import attend_kept
from farlight.decoding.native_router import RouterProgram, router_program
from farlight.decoding.store import KeyStore
from farlight.decoding.summaries import BlockSummaries
from farlight.decoding.terms import DecodeTerms
from farlight.errors import ArgumentError
from farlight.patterns.expression import Pattern, Sizes
from farlight.routing import Router, TopBlocks
from farlight.routing.base import CombinedRouter, RouterInput, check_inputs

__all__ = ["RouterState"]

# Number of queries from which on a chunk is planned and attended by `fl.attention` instead of a dense mask.
_PLANNED_QUERIES = 64
_MASK_OPERATORS = {"|": operator.or_, "&": operator.and_, "-": lambda a, b: a & ~b}


class RouterState:
    """A router, and the summaries of complete key blocks for each `TopBlocks` in it.

    Raises ArgumentError for a `TopBlocks` that is not causal or has query_block > 1.
    """

    def __init__(self, router: Router) -> None:
        self.router = router
        self._summaries = {module: BlockSummaries(module) for module in router.modules() if isinstance(module, TopBlocks)}
        self._program: RouterProgram | None = router_program(router)
        for module in self._summaries:
            module.require_summaries("KVCache")
            if not module.causal or module.query_block != 1:
                raise ArgumentError(
                    f"KVCache: TopBlocks({module.extra_repr()}) decides for blocks of queries or looks ahead, but decoding has "
                    "one query at a time; use causal=True and query_block=1."
                )

    @property
    def nbytes(self) -> int:
        return sum(summary.nbytes for summary in self._summaries.values())

    def native_arguments(self, head_dim: int) -> tuple[object, ...] | None:
        """The arguments of `Decoder.set_router`; None where the router has no native form."""
        if self._program is None:
            return None
        return self._program.arguments(self._summaries, head_dim)

    def set_length(self, length: int) -> None:
        """After a native append, which has summarised the blocks that became complete."""
        for summary in self._summaries.values():
            summary.count = length // summary.router.block

    def append(self, store: KeyStore, dtype: torch.dtype) -> None:
        """Summarise the blocks that have become complete; slot s of the store holds position s. dtype: of the appended keys."""
        for summary in self._summaries.values():
            summary.extend(store, torch.promote_types(dtype, torch.float32))

    def fork(self) -> RouterState:
        """A state of its own."""
        return self._with({module: summary.fork() for module, summary in self._summaries.items()})

    def select(self, items: Tensor) -> RouterState:
        """The state of these batch items."""
        return self._with({module: summary.select(items) for module, summary in self._summaries.items()})

    def truncated(self, length: int) -> RouterState:
        """The state of the first `length` keys."""
        return self._with({module: summary.truncated(length) for module, summary in self._summaries.items()})

    def _with(self, summaries: dict[TopBlocks, BlockSummaries]) -> RouterState:
        new = copy.copy(self)
        new._summaries = summaries
        return new

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, return_lse: bool, terms: DecodeTerms | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(out, lse or None) of the newest queries, as `fl.attention(q, k, v, router(q, k))` gives them.

        q `(B, H, n_q, D)`; k, v `(B, H_kv, N, D)`, every key so far, by position.
        """
        dtype, q = q.dtype, q.to(k.dtype)
        if q.shape[2] >= _PLANNED_QUERIES:
            score, sinks = (None, None) if terms is None else (terms.score, terms.sinks)
            result = attention(q, k, v, self.router(q, k), scale=scale, score=score, sinks=sinks, return_lse=return_lse)
            out, lse = result if isinstance(result, tuple) else (result, None)
        else:
            mask = self._mask(self.router, q, k)
            mask = mask.expand(torch.broadcast_shapes(mask.shape, (1, 1, q.shape[2], k.shape[2])))
            j = torch.arange(k.shape[2], device=q.device)
            kept_terms = None if terms is None else terms.at(j[-q.shape[2] :].view(1, 1, -1, 1), j.view(1, 1, 1, -1))
            out, lse = attend_kept(q, k, v, mask, scale=scale, return_lse=return_lse, terms=kept_terms)
        return out.to(dtype), lse

    def _mask(self, part: Router | Pattern, q: Tensor, k: Tensor) -> Tensor:
        """The pairs that `part` allows, bool, broadcastable to `(B, H, n_q, N)`."""
        if isinstance(part, CombinedRouter):
            left, right = self._mask(part.left, q, k), self._mask(part.right, q, k)
            combined: Tensor = _MASK_OPERATORS[part.symbol](left, right)
            return combined
        n_q, n_k = q.shape[2], k.shape[2]
        i = torch.arange(n_k - n_q, n_k, device=q.device).view(1, 1, -1, 1)
        j = torch.arange(n_k, device=q.device).view(1, 1, 1, -1)
        if isinstance(part, TopBlocks):
            # `select_blocks` reads k's shape only, so k is not converted to float32.
            inputs = RouterInput(q.to(torch.promote_types(q.dtype, torch.float32)), k, None, None)
            indices, num_blocks = part.select_blocks(inputs, self._summaries[part].complete()), -(-n_k // part.block)
            selected = torch.zeros(*indices.shape[:3], num_blocks + 1, dtype=torch.bool, device=q.device)
            selected.scatter_(3, torch.where(indices < 0, num_blocks, indices), True)  # pads go to the extra last column
            return selected[..., :num_blocks].repeat_interleave(part.block, 3)[..., :n_k] & (j <= i)
        pattern = part if isinstance(part, Pattern) else part.choose(check_inputs(q, k))
        sizes = Sizes(n_q, n_k, n_k - n_q, q.shape[0], q.shape[1])
        pattern.check(sizes)
        b = torch.arange(sizes.batch if pattern.varies_over_batch else 1, device=q.device).view(-1, 1, 1, 1)
        h = torch.arange(sizes.heads if pattern.varies_over_heads else 1, device=q.device).view(1, -1, 1, 1)
        return pattern._allows(sizes, b, h, i, j)
