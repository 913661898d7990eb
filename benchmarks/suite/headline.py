"""One pattern, all contenders: farlight's backends beside dense attention, FlexAttention and the matrix product."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from farlight.planning import plan
from suite.contenders import BACKWARD_FLOPS, DENSE, FORWARD_FLOPS, dense, inputs, ours, refusal, sparse
from suite.flex import FLEX, backward_refusal, compiled_flex
from suite.memory import memory_columns
from suite.settings import Box, Settings, name_of
from suite.timing import Contender, interleaved, matmul, matmul_flops, seconds_of

__all__ = ["headline_rows"]

Row = dict[str, Any]


def headline_rows(settings: Settings, box: Box) -> Iterator[Row]:
    """For each dtype and pass a row for each contender: seconds, useful GFLOP/s (4 · D a pair, 14 · D with backward), ratio to
    the matrix product and to dense attention, memory beyond the inputs and results.
    """
    for dtype in settings.types():
        qkv = inputs(settings.tokens, settings.heads, settings.head_dim, dtype)
        rate = matmul_flops(settings.matmul_size) / seconds_of(matmul(dtype, settings.matmul_size).call, repeats=3) / 1e9
        for grads in (False, True):
            yield from _group(settings, box, dtype, qkv, grads, rate)


def _group(
    settings: Settings, box: Box, dtype: torch.dtype, qkv: tuple[Tensor, Tensor, Tensor], grads: bool, rate: float
) -> Iterator[Row]:
    pattern, n, heads, dim = settings.chosen(), settings.tokens, settings.heads, settings.head_dim
    about = {"tokens": n, "dtype": name_of(dtype), "pass": "forward + backward" if grads else "forward"}
    contenders, extra = [], dict[str, Row]()
    full, expected = dense(*qkv, grads, rate)
    why = box.refusal(expected)
    if why is None:
        contenders.append(full)
    else:
        yield {"contender": DENSE, **about, "skipped": why}
    for backend in sparse():
        why = refusal(backend, pattern, n, heads, dim, dtype, grads)
        if why is None:
            mine = ours(backend, pattern, *qkv, grads)
            contenders.append(dataclasses.replace(mine, most=3) if backend == "torch" else mine)
        else:
            yield {"contender": f"farlight {backend}", **about, "skipped": why}
    why = _without_flex(settings) or box.refusal(60.0)
    if why is not None:
        yield {"contender": FLEX, **about, "skipped": why}
    elif grads:
        text = backward_refusal(256, heads, dim, dtype)
        yield {"contender": FLEX, **about, **({"error": text} if text else {"skipped": "it trains here, but is not timed"})}
    else:
        try:
            flex = compiled_flex(*qkv)
            contenders.append(Contender(FLEX, flex.call))
            extra[FLEX] = {"mask_seconds": flex.mask_seconds, "first_seconds": flex.first_seconds}
        except RuntimeError as error:
            yield {"contender": FLEX, **about, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    contenders.append(matmul(dtype, settings.matmul_size))
    # Most rounds are of those that the ratios are about: the others take long.
    timings = interleaved(contenders, repeats=2 * settings.repeats + 1, budget=max(45.0, box.left / 2))
    ceiling = matmul_flops(settings.matmul_size) / timings["matmul"].seconds / 1e9
    flops = (BACKWARD_FLOPS if grads else FORWARD_FLOPS) * dim * plan(pattern, n, heads=heads).pairs
    yield {"contender": "matmul", **about, **timings["matmul"].row(), "gflops": ceiling, "of_matmul": 1.0}
    for contender in contenders[:-1]:
        name, timing = contender.name, timings[contender.name]
        row = {"contender": name, **about, **timing.row(), **extra.get(name, {})}
        if timing.error is None:
            useful = flops / timing.seconds / 1e9
            row |= {"useful_gflops": useful, "of_matmul": useful / ceiling}
            if DENSE in timings and timings[DENSE].error is None:
                row["times_dense"] = timings[DENSE].seconds / timing.seconds
            if settings.memory:
                row |= _memory(name, settings, box, dtype, grads, timing.seconds)
        yield row


def _without_flex(settings: Settings) -> str | None:
    if not settings.flex:
        return "left out by the settings: compiling takes half a minute"
    return None if settings.pattern is None else "its mask function is written for window 256 + 64 global"


def _memory(name: str, settings: Settings, box: Box, dtype: torch.dtype, grads: bool, seconds: float) -> Row:
    calls = 1 if seconds > 3 else 2
    expected = calls * seconds + (45 if name == FLEX else 5)
    # Dense attention needs no extra memory to speak of: half a minute for its backward would say only that.
    why = f"not measured: it takes {expected:.0f} s" if seconds > 15 else box.refusal(expected)
    if why is not None:
        return {"memory_error": why}
    return memory_columns(name, settings, dtype, grads, calls=calls, limit=max(60.0, 4 * expected))
