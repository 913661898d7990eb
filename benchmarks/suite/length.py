"""One pattern, all lengths: where sparse attention starts to win, and what a million tokens cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from farlight.planning import plan
from suite.contenders import BACKWARD_FLOPS, DENSE, FORWARD_FLOPS, best_backend, dense, inputs, ours
from suite.machine import free_memory
from suite.settings import Box, Settings, name_of
from suite.timing import Timing, interleaved, matmul, matmul_flops

__all__ = ["length_rows"]

Row = dict[str, Any]


def length_rows(settings: Settings, box: Box) -> Iterator[Row]:
    """farlight and dense attention at each length, forward and forward + backward. Beyond `longest_dense` the dense time is
    predicted from the largest measured one by n², and says so.
    """
    for grads in (False, True):
        for dtype in settings.types():
            measured: tuple[int, Timing] | None = None
            last_seconds = 0.0
            for n in settings.lengths:
                about = {"tokens": n, "dtype": name_of(dtype), "pass": "forward + backward" if grads else "forward"}
                if grads and n > settings.longest_backward:
                    continue
                # Farlight is linear: four times the length, four times the time, and a call to warm up.
                why = _too_large(n, settings, dtype, grads) or box.refusal(8 * last_seconds)
                if why is not None:
                    yield {**about, "skipped": why}
                    continue
                row, timing, full = _row(n, settings, box, dtype, grads, measured)
                last_seconds = timing.seconds if timing.error is None else 0.0
                if full is not None:
                    measured = (n, full)
                yield {**about, **row}


def _row(
    n: int, settings: Settings, box: Box, dtype: torch.dtype, grads: bool, measured: tuple[int, Timing] | None
) -> tuple[Row, Timing, Timing | None]:
    pattern, heads, dim = settings.chosen(), settings.heads, settings.head_dim
    backend = best_backend(pattern, n, heads, dim, dtype, grads)
    qkv = inputs(n, heads, dim, dtype)
    product = matmul(dtype, settings.matmul_size)
    contenders = [ours(backend, pattern, *qkv, grads, name="farlight"), product]
    if n <= settings.longest_dense:
        ceiling = matmul_flops(settings.matmul_size) / interleaved([product], repeats=2)["matmul"].seconds / 1e9
        against, expected = dense(*qkv, grads, ceiling)
        if box.refusal(expected) is None:
            contenders.insert(1, against)
    # Two rounds are enough where a call takes seconds.
    timings = interleaved(contenders, repeats=settings.repeats, budget=10.0)
    mine, ceiling = timings["farlight"], matmul_flops(settings.matmul_size) / timings["matmul"].seconds / 1e9
    row: Row = {"backend": backend, **mine.row(), "matmul_gflops": ceiling}
    timing = timings.get(DENSE)
    full = timing if timing is not None and timing.error is None else None
    if mine.error is None:
        flops = (BACKWARD_FLOPS if grads else FORWARD_FLOPS) * dim * plan(pattern, n, heads=heads).pairs
        row |= {"useful_gflops": flops / mine.seconds / 1e9, "of_matmul": flops / mine.seconds / 1e9 / ceiling}
        if full is not None:
            row |= {f"dense_{name}": value for name, value in full.row().items() if name != "first_seconds"}
            row |= {"dense_predicted": False, "times_dense": full.seconds / mine.seconds}
        elif measured is not None:
            seconds = measured[1].seconds * (n / measured[0]) ** 2
            row |= {"dense_seconds": seconds, "dense_predicted": True, "dense_from": measured[0]}
            row["times_dense"] = seconds / mine.seconds
    return row, mine, full


def _too_large(n: int, settings: Settings, dtype: torch.dtype, grads: bool) -> str | None:
    element = torch.empty((), dtype=dtype).element_size()
    # q, k, v, out; with gradients also theirs; and a tenth for tables and the like.
    needed = int(1.1 * (8 if grads else 4) * settings.heads * n * settings.head_dim * element)
    free = free_memory()
    if needed <= free:
        return None
    return f"needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
