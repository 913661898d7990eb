"""`Gist`: a router that also requests block summaries of uncovered keys, so that a model can run under `gist_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.errors import ArgumentError
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern, Sizes
from farlight.patterns.uncovered import unseen
from farlight.routing.base import ConstantRouter, Router, RouterInput

__all__ = ["Gist", "count_summaries"]


class Gist(Router):
    """`inner`, plus a block summary for every block of `block` keys of which a query sees nothing (`gist_attention`, one
    level).

    As a router it returns the pattern of `inner`. `fl.hf.use_pattern` and `fl.hf.sparsify` recognise the class and run the
    layer by `gist_attention`. It stays outermost: `gist | other` is `Gist(inner | other)`, likewise `&` and `-`. Raises
    ArgumentError for an inner Gist.

    >>> import torch, farlight as fl
    >>> from farlight.routing import Gist, TopBlocks
    >>> x = torch.randn(1, 1, 32, 4)
    >>> Gist(TopBlocks(1, 8), 8)(x, x).count(32)
    256
    """

    reads_16_bits = True

    def __init__(self, inner: Router | Pattern, block: int) -> None:
        super().__init__()
        if not isinstance(inner, Router | Pattern):
            raise ArgumentError(f"gist: {type(inner).__name__} is neither a router nor a pattern; give what is to be seen.")
        if isinstance(inner, Gist):
            raise ArgumentError("gist: the inner router is a gist already; wrap it once.")
        self.inner, self.block = inner, whole("gist: block", block, 1)

    def extra_repr(self) -> str:
        return f"block={self.block}"

    def products(self, sizes: Sizes) -> int:
        return self.inner.products(sizes) if isinstance(self.inner, Router) else 0

    def choose(self, inputs: RouterInput) -> Pattern:
        return self.inner.chosen(inputs) if isinstance(self.inner, Router) else self.inner

    # A CombinedRouter around a Gist would hide the class, and with it the summaries, from the code that recognises it.
    def __or__(self, other: Router | Pattern) -> Router:
        return Gist(self._inner_router() | other, self.block)

    def __and__(self, other: Router | Pattern) -> Router:
        return Gist(self._inner_router() & other, self.block)

    def __sub__(self, other: Router | Pattern) -> Router:
        return Gist(self._inner_router() - other, self.block)

    def _inner_router(self) -> Router:
        return self.inner if isinstance(self.inner, Router) else ConstantRouter(self.inner)


def count_summaries(pattern: Pattern, block: int, sizes: Sizes, causal: bool) -> Tensor:
    """`(batch or 1, heads or 1)` int64: links from queries to block summaries under `gist_attention` with one level."""
    num_blocks = -(-sizes.n_k // block)
    if not num_blocks:
        return torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    uncovered = unseen(pattern, block, sizes.n_k, 0, 1, causal)
    mask = uncovered.dense(sizes.n_q, num_blocks, batch=sizes.batch, heads=sizes.heads, q_offset=sizes.q_offset)
    return mask.sum((-1, -2))
