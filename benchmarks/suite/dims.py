"""One pattern, several head dimensions: is the rate that of 64?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from farlight.planning import plan
from suite.contenders import BACKWARD_FLOPS, FORWARD_FLOPS, best_backend, inputs, ours
from suite.settings import Box, Settings, name_of
from suite.timing import interleaved, matmul, matmul_flops

__all__ = ["dims_rows"]


def dims_rows(settings: Settings, box: Box) -> Iterator[dict[str, Any]]:
    """For each head dimension, dtype and pass: useful GFLOP/s, its share of the matrix product, and of the rate at the usual
    head dimension timed in turn with it.
    """
    n, heads, usual, pattern = settings.tokens, settings.heads, settings.head_dim, settings.chosen()
    pairs = plan(pattern, n, heads=heads).pairs
    for dtype in settings.types():
        product = matmul(dtype, settings.matmul_size)
        base = inputs(n, heads, usual, dtype)
        for dim in (usual, *(dim for dim in settings.dims if dim != usual)):
            qkv = base if dim == usual else inputs(n, heads, dim, dtype)
            for grads in (False, True):
                about = {"head_dim": dim, "dtype": name_of(dtype), "pass": "forward + backward" if grads else "forward"}
                why = box.refusal(9.0 if grads else 4.0)
                if why is not None:
                    yield {**about, "skipped": why}
                    continue
                backend = best_backend(pattern, n, heads, dim, dtype, grads)
                contenders = [ours(backend, pattern, *qkv, grads, name="mine"), product]
                if dim != usual:
                    contenders.insert(0, ours(backend, pattern, *base, grads, name="usual"))
                timings = interleaved(contenders, repeats=settings.repeats, budget=9.0 if grads else 5.0)
                mine = timings["mine"]
                row = {**about, "backend": backend, **mine.row()}
                if mine.error is None and timings.get("usual", mine).error is None:
                    flops = (BACKWARD_FLOPS if grads else FORWARD_FLOPS) * pairs
                    rate = flops * dim / mine.seconds / 1e9
                    usual_rate = flops * usual / timings.get("usual", mine).seconds / 1e9
                    ceiling = matmul_flops(settings.matmul_size) / timings["matmul"].seconds / 1e9
                    row |= {"useful_gflops": rate, "of_matmul": rate / ceiling, "rate_of_usual": rate / usual_rate}
                yield row
