"""Peak memory of one call beyond what it is given and what it returns, each time in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from farlight.analysis.memory import peak_memory
from farlight.patterns import window
from farlight.patterns.expression import Pattern
from suite.contenders import DENSE, dense, inputs, ours
from suite.flex import FLEX, Flex, compiled_flex
from suite.fresh import FreshError, fresh_rows
from suite.settings import Settings, name_of

__all__ = ["extra_memory", "memory_columns"]

Row = dict[str, Any]


def memory_columns(contender: str, settings: Settings, dtype: torch.dtype, grads: bool, *, calls: int, limit: float) -> Row:
    """The columns `extra_memory…` of a table, or why there are none."""
    arguments = {
        "contender": contender,
        "pattern": settings.chosen().to_json(),
        "tokens": settings.tokens,
        "heads": settings.heads,
        "head_dim": settings.head_dim,
        "dtype": name_of(dtype),
        "grads": grads,
        "calls": calls,
    }
    try:
        return next(fresh_rows("suite.memory:extra_memory", arguments, limit=limit), {})
    except FreshError as error:
        return {"memory_error": str(error)}


def extra_memory(
    contender: str, pattern: str, tokens: int, heads: int, head_dim: int, dtype: str, grads: bool, calls: int
) -> Iterator[Row]:
    """`extra_memory`: growth of the resident memory at its peak, less the results (out, and dq, dk, dv), as a share of
    q + k + v + out, in the last call; `extra_memory_first` the same of the first, which plans or compiles.
    """
    kind = getattr(torch, dtype)
    shown = Pattern.from_json(pattern)
    call = _call(contender, shown, inputs(tokens, heads, head_dim, kind), grads)
    # What is loaded and set up once per process (code, thread pools, the matrix library's buffers) is nobody's extra memory.
    for name in {DENSE, contender} - {FLEX}:
        _call(name, window(8), inputs(min(tokens, 512), heads, head_dim, kind), grads)()
    one = heads * tokens * head_dim * torch.empty((), dtype=kind).element_size()
    shares = []
    for _ in range(calls):
        with peak_memory() as peak:
            kept = call()
        shares.append(max(0.0, peak.bytes - (4 if grads else 1) * one) / (4 * one))
        del kept
    yield {"extra_memory": shares[-1], "extra_memory_first": shares[0], "memory_method": peak.method}


def _call(contender: str, pattern: Pattern, qkv: tuple[Tensor, Tensor, Tensor], grads: bool) -> Callable[[], Any]:
    if contender == DENSE:
        return dense(*qkv, grads, matmul_gflops=1.0)[0].call
    if contender.startswith("farlight "):
        return ours(contender.removeprefix("farlight "), pattern, *qkv, grads).call
    made: list[Flex] = []

    def flex() -> Tensor:
        if not made:  # the mask and the compiler are part of what the first call needs
            made.append(compiled_flex(*qkv))
        return made[0].call()

    return flex
