"""A router whose unseen blocks are heard in summary, so that a model can run under `gist_attention` as under a pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.errors import ArgumentError
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern, Sizes
from farlight.patterns.uncovered import unseen
from farlight.routing.base import Choice, Router

__all__ = ["Gist", "heard_links"]


class Gist(Router):
    """Chooses what `inner` chooses, and asks for every block of `block` keys of which a query sees nothing to be heard in
    summary (`gist_attention`, one level). It must be the outermost router: what is joined to it is part of `inner`.

    Called by itself it answers with the pattern of what is seen; a model under `fl.hf.use_pattern` or `sparsify` hears the
    rest.

    >>> import torch, farlight as fl
    >>> from farlight.routing import Gist, TopBlocks
    >>> x = torch.randn(1, 1, 32, 4)
    >>> Gist(TopBlocks(1, 8), 8)(x, x).count(32)
    256
    """

    def __init__(self, inner: Router | Pattern, block: int) -> None:
        super().__init__()
        if not isinstance(inner, Router | Pattern):
            raise ArgumentError(f"gist: {type(inner).__name__} is neither a router nor a pattern; give what is to be seen.")
        if isinstance(inner, Gist):
            raise ArgumentError("gist: what it holds already asks for a gist; ask once.")
        self.inner, self.block = inner, whole("gist: block", block, 1)

    def extra_repr(self) -> str:
        return f"block={self.block}"

    def choose(self, given: Choice) -> Pattern:
        return self.inner.choose(given) if isinstance(self.inner, Router) else self.inner

    # Joined to something, the summaries would be forgotten.
    def __or__(self, other: Router | Pattern) -> Router:
        return Gist(_router(self.inner) | other, self.block)

    def __and__(self, other: Router | Pattern) -> Router:
        return Gist(_router(self.inner) & other, self.block)

    def __sub__(self, other: Router | Pattern) -> Router:
        return Gist(_router(self.inner) - other, self.block)


def _router(inner: Router | Pattern) -> Router:
    from farlight.routing.notation import always

    return inner if isinstance(inner, Router) else always(inner)


def heard_links(pattern: Pattern, block: int, sizes: Sizes, causal: bool) -> Tensor:
    """`(batch or 1, heads or 1)` int64: how many summaries all queries hear beside what `pattern` shows them."""
    cells = -(-sizes.n_k // block)
    if not cells:
        return torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    heard = unseen(pattern, block, sizes.n_k, 0, 1, causal)
    return heard.dense(sizes.n_q, cells, batch=sizes.batch, heads=sizes.heads, q_offset=sizes.q_offset).sum((-1, -2))
