"""Attention probabilities for `output_attentions=True`: a dense matrix, for the analysis of short texts.

Farlight's attention never materialises it. It is computed separately, from the same pattern, scale, score terms and sinks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from farlight.errors import UnsupportedError
from farlight.patterns.expression import Pattern, Sizes
from farlight.score import Score, lower

__all__ = ["MAX_TOKENS", "check_length", "probabilities", "wants_probabilities"]

# Queries or keys up to which the matrix is materialised: 64 MiB for each head in float32.
MAX_TOKENS = 4096


def wants_probabilities(module: nn.Module, output_attentions: Any) -> bool:
    """Whether probabilities are to be returned: the argument, or where it is None the configuration's value."""
    if output_attentions is None:
        output_attentions = getattr(getattr(module, "config", None), "output_attentions", False)
    return bool(output_attentions)


def check_length(module: nn.Module, n_q: int, n_k: int) -> None:
    """Raise UnsupportedError where the matrix would be too large to form."""
    if max(n_q, n_k) > MAX_TOKENS:
        raise UnsupportedError(
            f"output_attentions=True needs the attention probabilities of {type(module).__name__} for {n_q} queries and "
            f"{n_k} keys, which farlight forms up to {MAX_TOKENS} tokens only; pass a shorter text, or leave the option out."
        )


def probabilities(
    q: Tensor,
    k: Tensor,
    pattern: Pattern | Sequence[tuple[Pattern, float]],
    scale: float | None,
    q_offset: int | None = None,
    sinks: Tensor | None = None,
    score: Score | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) over the allowed pairs, `(B, H, n_q, n_k)` in q's dtype, dropout left out.

    `q` `(B, H, n_q, D)`, `k` `(B, H_kv, n_k, D)`, `sinks` `(H,)` logits that join each row's softmax, `score` terms on the
    scores as in `fl.attention`. Of a list of disjoint patterns with weights, a pair counts as often as its weight says. A row
    that sees nothing is 0.
    """
    (batch, heads, n_q, head_dim), n_k = q.shape, k.shape[2]
    k = k.repeat_interleave(heads // k.shape[1], 1)
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).mT * (head_dim**-0.5 if scale is None else scale)
    offset = n_k - n_q if q_offset is None else q_offset
    terms = lower(score, None, Sizes(n_q, n_k, offset, batch, heads), q.device, q.dtype)
    if terms is not None:
        scores, bias = terms.capped(scores), terms.bias(n_q, n_k, offset)
        scores = scores if bias is None else scores + bias
    allowed = torch.zeros((), dtype=torch.bool, device=q.device)
    for part, weight in [(pattern, 1.0)] if isinstance(pattern, Pattern) else pattern:
        pairs = part.dense(n_q, n_k, batch=batch, heads=heads, q_offset=q_offset, device=q.device)
        allowed = allowed | pairs
        if weight != 1.0:
            scores = torch.where(pairs, scores + math.log(weight), scores)
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(dtype).reshape(1, -1, 1, 1).expand(batch, -1, n_q, 1)), 3)
    # softmax of a row of -inf is NaN, and its gradient too.
    has_keys = (scores > -torch.inf).any(3, keepdim=True)
    weights = scores.masked_fill(~has_keys, 0.0).softmax(3)[..., :n_k]
    return weights.masked_fill(~allowed, 0.0).to(q.dtype)
