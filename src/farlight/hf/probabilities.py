"""Attention probabilities for `output_attentions=True`: formed densely, for analysis of short texts.

The attention itself never forms them. They are computed beside it, from the same pattern, scale and sinks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from farlight.errors import UnsupportedError
from farlight.patterns.expression import Pattern

__all__ = ["LONGEST", "check_length", "probabilities", "wants_probabilities"]

# Queries or keys up to which the matrix is formed: 64 MiB for each head in float32.
LONGEST = 4096


def wants_probabilities(module: nn.Module, given: Any) -> bool:
    """Whether `output_attentions` asks for them: the argument, or where it is missing the configuration."""
    wanted = getattr(getattr(module, "config", None), "output_attentions", False) if given is None else given
    return bool(wanted)


def check_length(module: nn.Module, n_q: int, n_k: int) -> None:
    """Raise UnsupportedError where the matrix would be too large to form."""
    if max(n_q, n_k) > LONGEST:
        raise UnsupportedError(
            f"output_attentions=True asks {type(module).__name__} for the attention probabilities of {n_q} queries and {n_k} "
            f"keys, which farlight forms up to {LONGEST} tokens only; pass a shorter text, or leave the option out."
        )


def probabilities(
    q: Tensor, k: Tensor, pattern: Pattern, scale: float | None, q_offset: int | None = None, sinks: Tensor | None = None
) -> Tensor:
    """`(B, H, n_q, n_k)` in q's dtype, dropout left out; a row that sees nothing is 0. Sinks take their share of each row."""
    (batch, heads, n_q, width), n_k = q.shape, k.shape[2]
    k = k.repeat_interleave(heads // k.shape[1], 1)
    kind = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(kind) @ k.to(kind).mT * (width**-0.5 if scale is None else scale)
    allowed = pattern.dense(n_q, n_k, batch=batch, heads=heads, q_offset=q_offset, device=q.device)
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(kind).reshape(1, -1, 1, 1).expand(batch, -1, n_q, 1)), 3)
    # A row of nothing but -inf would be NaN, and its gradient too.
    seen = (scores > -torch.inf).any(3, keepdim=True)
    share = scores.masked_fill(~seen, 0.0).softmax(3)[..., :n_k]
    return share.masked_fill(~allowed, 0.0).to(q.dtype)
