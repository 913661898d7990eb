"""Kept share of attention and number of links by the sparse kernels: memory is linear in the length, no probability is formed.

The share that a row keeps is exp(lse - lse of full attention), with a model's sink in both. Its links are exp(lse) under
scores that are all 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from farlight.analysis.candidates_by_layer import pattern_for
from farlight.attention import attention
from farlight.hf.interface import Observation
from farlight.patterns.expression import Pattern
from farlight.patterns.positional import full
from farlight.planning import plan
from farlight.routing.base import ConstantRouter, Router

__all__ = ["Attended", "KernelShares", "kept_share"]

# Head_dim of the zero queries and keys that count links.
_COUNTING_DIM = 8


class Attended(NamedTuple):
    """out `(B, H, n_q, D_v)`, lse `(B, H, n_q)`, links `(B, H)` float64, of one pattern under the model's own mask."""

    pattern: Pattern
    out: Tensor
    lse: Tensor
    links: Tensor


class KernelShares:
    """Attends the observed calls of a model again, under full attention and under candidates.

    Links of patterns that no content decides are counted once for all layers and passages.
    """

    def __init__(self) -> None:
        self._counted: dict[Any, Tensor] = {}

    def full(self, call: Observation) -> Attended:
        """The model's own attention."""
        return self._attend(call, call.own, by_content=False)

    def under(self, call: Observation, choice: Pattern | Router | None) -> Attended | None:
        """Attention under `choice`; None where that allows every pair, so that it is the model's own."""
        pattern = pattern_for(choice, call.q.detach(), call.k.detach(), call.key_real)
        if pattern is None or isinstance(pattern, full):
            return None
        by_content = isinstance(choice, Router) and not isinstance(choice, ConstantRouter)
        return self._attend(call, pattern & call.own, by_content)

    def _attend(self, call: Observation, pattern: Pattern, by_content: bool) -> Attended:
        q, k, v = (x.detach() for x in (call.q, call.k, call.v))
        sizes = q.shape[2], k.shape[2]
        with torch.no_grad():
            made = plan(pattern, *sizes, batch=q.shape[0], heads=q.shape[1], q_offset=call.q_offset)
            options: dict[str, Any] = {"return_lse": True, "q_offset": call.q_offset}
            out, lse = attention(q, k, v, made, scale=call.scale, **call.terms, **options)
            key = (pattern, *q.shape[:2], *sizes, call.q_offset)
            links = None if by_content else self._counted.get(key)
            if links is None:
                zero_q, zero_k = (x.new_zeros(*x.shape[:3], _COUNTING_DIM) for x in (q, k))
                lse_of_zeros = attention(zero_q, zero_k, zero_k, made, **options)[1]
                links = lse_of_zeros.double().exp().round().sum(2).cpu()
            if not by_content:
                self._counted[key] = links
        return Attended(pattern, out, lse, links)


def kept_share(lse: Tensor, full_lse: Tensor) -> Tensor:
    """Mean over rows of exp(lse - full_lse), `(B, H)` float64; 0 for a row without links."""
    return torch.where(lse > -torch.inf, (lse - full_lse).double().exp(), 0.0).mean(2).cpu()
