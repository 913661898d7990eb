"""FlexAttention under `torch.compile`, for window 256 + 64 global: what torch itself offers for such patterns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FLEX", "Flex", "backward_refusal", "compiled_flex"]

FLEX = "FlexAttention, compiled"


@dataclass(frozen=True)
class Flex:
    """A compiled call, with the seconds of its two preparations: the block mask, and the first call, which compiles."""

    call: Callable[[], Tensor]
    mask_seconds: float
    first_seconds: float


def _keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return ((i - j).abs() <= 256) | (i < 64) | (j < 64)


def compiled_flex(q: Tensor, k: Tensor, v: Tensor, score_mod: Callable[..., Tensor] | None = None) -> Flex:
    """Build the mask and compile, timed apart; `score_mod`: torch's function of a score. Raises what torch raises where it
    cannot.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = q.shape[2]
    # What was compiled before for other lengths would make this one general, or not fused at all: all scores in memory.
    torch._dynamo.reset()
    start = time.perf_counter()
    mask = create_block_mask(_keep, None, None, n, n, device="cpu")
    building = time.perf_counter() - start
    compiled = torch.compile(flex_attention)

    def call() -> Tensor:
        with torch.no_grad():
            out = compiled(q, k, v, score_mod=score_mod, block_mask=mask)
        assert isinstance(out, Tensor)
        return out

    start = time.perf_counter()
    call()
    return Flex(call, building, time.perf_counter() - start)


def backward_refusal(n: int, heads: int, head_dim: int, dtype: torch.dtype) -> str | None:
    """What torch says when inputs require gradients; None when it trains after all."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (torch.randn(1, heads, n, head_dim).to(dtype).requires_grad_(True) for _ in range(3))
    mask = create_block_mask(_keep, None, None, n, n, device="cpu")
    try:
        out = torch.compile(flex_attention)(q, k, v, block_mask=mask)
        assert isinstance(out, Tensor)
        out.sum().backward()
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        named = next((line for line in lines if "NotImplementedError" in line), None)
        return named or f"{type(error).__name__}: {lines[0] if lines else ''}"
    return None
