"""The specification: dense attention by plain torch operations in float64, differentiated by autograd.

    S = scale · q kᵀ;   P = softmax(S over the allowed keys);   out = P v;   lse = log Σ exp(S over the allowed keys)

With score terms S is capped and biased (`ScoreTerms`), and a sink is one more allowed key of that score and value 0.

Inputs of every dtype are computed in float64 and results rounded once, gradients too: where keys share a large component, their
sum Σ dS k cancels, and float32 would lose most of dq. It costs n_q · n_k and exists to be read and to be compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.kernels.backend import Request
from farlight.patterns.hashing import dropout_keep
from farlight.score.lowered import ALL_TERMS, ScoreTerms

__all__ = ["BACKEND", "attend"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float,
    q_offset: int,
    dropout: float,
    seed: Tensor,
    terms: ScoreTerms | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) for `mask` `(B|1, H|1, n_q, n_k)`: out in q's dtype, the lse in float32, for float64 inputs in float64."""
    # Apple's GPUs have no float64.
    exact = torch.float32 if q.device.type == "mps" else torch.float64
    group = q.shape[1] // k.shape[1]
    keys, values = (x.to(exact).repeat_interleave(group, 1) for x in (k, v))
    scores = (q.to(exact) @ keys.transpose(-1, -2)) * scale
    sinks = None if terms is None else terms.sinks
    if terms is not None:
        scores, bias = terms.capped(scores), terms.bias(q.shape[2], k.shape[2], q_offset)
        scores = scores if bias is None else scores + bias.to(exact)
    # A row that sees nothing takes part as if it saw everything and is blanked at the end: no NaN, and no gradient.
    seeing = mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~(mask | ~seeing), float("-inf"))
    # Not exp(S - lse): where scores are large the lse has no digits left for the logarithm of their number.
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.sum(-1, keepdim=True)
    if sinks is not None:
        of_rows = sinks.to(exact)[:, None, None]
        # A row that sees nothing but its sink.
        top, scores = (
            torch.where(seeing, torch.maximum(top, of_rows.detach()), of_rows.detach()),
            torch.where(seeing, scores, float("-inf")),
        )
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total, seeing = total + torch.exp(of_rows - top), torch.ones_like(seeing)
    p = weights / total
    if dropout:
        keep = _kept(seed, dropout, scores, q_offset)
        p = p * keep.to(exact) / (1 - dropout or 1.0)  # of dropout 1 no link is kept
    out = torch.where(seeing, p @ values, 0.0)
    lse = torch.where(seeing, top + torch.log(total), float("-inf")).squeeze(-1)
    return out.to(q.dtype), lse.to(q.dtype if q.dtype == torch.float64 else torch.float32)


def _kept(seed: Tensor, dropout: float, scores: Tensor, q_offset: int) -> Tensor:
    b, h, i, j = (
        torch.arange(n, device=scores.device).view([-1 if d == dim else 1 for d in range(4)])
        for dim, n in enumerate(scores.shape)
    )
    return dropout_keep(seed.to(scores.device), dropout, b, h, i + q_offset, j)


class ReferenceBackend:
    """The specification as a mask backend."""

    name = "reference"
    score_terms = ALL_TERMS

    def reasons(self, request: Request) -> list[str]:
        """Empty: it serves every request."""
        return []

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        *,
        scale: float,
        q_offset: int,
        dropout: float,
        seed: Tensor,
        terms: ScoreTerms | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) under the mask."""
        return attend(q, k, v, mask, scale=scale, q_offset=q_offset, dropout=dropout, seed=seed, terms=terms)


BACKEND = ReferenceBackend()
