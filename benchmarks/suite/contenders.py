"""Who is compared: the inputs, farlight's backends as the registry lists them, and torch's dense attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from farlight.attention import attention
from farlight.errors import UnsupportedError
from farlight.kernels import registry
from farlight.kernels.backend import Request
from farlight.patterns.expression import Pattern, Sizes
from suite.timing import Contender

__all__ = [
    "BACKWARD_FLOPS",
    "DENSE",
    "FORWARD_FLOPS",
    "automatic",
    "best_backend",
    "dense",
    "inputs",
    "ours",
    "refusal",
    "sparse",
]

DENSE = "dense SDPA"
# Operations for each pair and each head dimension: two products forward, five more backward.
FORWARD_FLOPS, BACKWARD_FLOPS = 4, 14

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
# The largest share of the matrix product's rate that dense attention is expected to miss, and seconds for its repeats.
_DENSE_SHARE, _DENSE_SECONDS, _DENSE_REPEATS = 0.4, 30.0, 3


def inputs(n: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `(1, heads, n, head_dim)`. Heads repeat each other: drawing a million tokens for each would take longer than
    the attention, and no kernel can tell.
    """
    drawn = min(n, 2**16)

    def one() -> Tensor:
        base = torch.randn(drawn, head_dim).to(dtype)
        out = torch.empty(1, heads, n, head_dim, dtype=dtype)
        for start in range(0, n, drawn):
            out[:, :, start : start + drawn] = base[: n - start]
        return out

    return one(), one(), one()


def refusal(backend: str, pattern: Pattern, n: int, heads: int, head_dim: int, dtype: torch.dtype, grads: bool) -> str | None:
    """Why a backend cannot serve, in the registry's words; None when it can."""
    return "; ".join(registry.reasons(backend, _request(pattern, n, heads, head_dim, dtype, grads))) or None


def automatic(pattern: Pattern, n: int, heads: int, head_dim: int, dtype: torch.dtype) -> str:
    """What "auto" takes."""
    return registry.select(_request(pattern, n, heads, head_dim, dtype, False)).backend.name


def _request(pattern: Pattern, n: int, heads: int, head_dim: int, dtype: torch.dtype, grads: bool) -> Request:
    return Request(pattern, Sizes.of(n, heads=heads), heads, head_dim, head_dim, dtype, torch.device("cpu"), grads)


def sparse() -> tuple[str, ...]:
    """The backends that execute a plan, best first."""
    return registry.plan_backends()


def best_backend(pattern: Pattern, n: int, heads: int, head_dim: int, dtype: torch.dtype, grads: bool = False) -> str:
    """The first sparse backend that can serve."""
    for name in registry.plan_backends():
        if refusal(name, pattern, n, heads, head_dim, dtype, grads) is None:
            return name
    raise UnsupportedError(f"no sparse backend can run {pattern!r} at {n} tokens in {dtype} here; see farlight doctor.")


def once(call: Call, q: Tensor, k: Tensor, v: Tensor, grads: bool) -> Callable[[], Any]:
    """One pass to be timed: forward alone without autograd, or forward and backward from a gradient that lies ready."""
    if not grads:

        def forward() -> Tensor:
            with torch.no_grad():
                return call(q, k, v)

        return forward
    q, k, v = (x.detach().requires_grad_(True) for x in (q, k, v))
    arriving = torch.ones_like(q)

    def both() -> tuple[Tensor, ...]:
        out = call(q, k, v)
        return out, *torch.autograd.grad(out, (q, k, v), arriving)

    return both


def ours(backend: str, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, grads: bool = False, name: str = "") -> Contender:
    """farlight under a pattern, by one backend (or "auto")."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v, pattern, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return Contender(name or f"farlight {backend}", once(call, q, k, v, grads))


def dense(q: Tensor, k: Tensor, v: Tensor, grads: bool, matmul_gflops: float) -> tuple[Contender, float]:
    """torch's dense attention over all pairs, with as many repeats as take half a minute; and its expected seconds."""
    expected = dense_seconds(q, grads, matmul_gflops)
    most = max(1, min(_DENSE_REPEATS if expected > 1 else 1_000_000, int(_DENSE_SECONDS / expected)))
    return Contender(DENSE, once(scaled_dot_product_attention, q, k, v, grads), most, warm=expected < 5), expected


def dense_seconds(q: Tensor, grads: bool, matmul_gflops: float) -> float:
    """About how long dense attention takes, on the safe side."""
    _, heads, n, head_dim = q.shape
    return (BACKWARD_FLOPS if grads else FORWARD_FLOPS) * head_dim * heads * n * n / (_DENSE_SHARE * matmul_gflops * 1e9)
