"""Attention sinks after the kernel: a sink is one more key of a given score and value 0, which only rescales a row.

    lse' = log(exp(lse) + exp(sink));   out' = out · exp(lse - lse')

Backward kernels recompute P = exp(S - lse') and Δ = Σ dO ∘ out' - dlse, so that what they are given is all they need.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gradient_of_delta", "sink_gradient", "with_sinks"]


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """(out', lse') of a kernel's out `(B, H, n_q, D)`, which is written into, and lse `(B, H, n_q)`; sinks `(H,)`."""
    of_rows = sinks.to(lse.dtype)[:, None]
    out.mul_(torch.sigmoid(lse - of_rows).unsqueeze(-1))
    return out, torch.logaddexp(lse, of_rows)


def sink_gradient(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor, sinks: Tensor) -> Tensor:
    """The gradient `(H,)`: -Σ exp(sink - lse) · (Σ dO ∘ out - dlse) over batch and rows; out and lse with the sinks."""
    return gradient_of_delta(torch.linalg.vecdot(dout.to(lse.dtype), out.to(lse.dtype)) - dlse, lse, sinks)


def gradient_of_delta(delta: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """The same from delta = Σ dO ∘ out - dlse, `(B, H, n_q)`."""
    grads = torch.exp(sinks.to(lse.dtype)[:, None] - lse) * delta
    total: Tensor = -grads.sum((0, 2)).to(sinks.dtype)
    return total
