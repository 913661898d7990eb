"""All patterns at one length: does a harder pattern keep the useful rate of the plain window?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from farlight.errors import FarlightError
from farlight.plan.cache import plans
from farlight.planning import plan
from suite.contenders import BACKWARD_FLOPS, FORWARD_FLOPS, best_backend, inputs, ours
from suite.gallery import PLAIN, Shown, gallery
from suite.settings import Box, Settings, name_of
from suite.timing import interleaved, matmul, matmul_flops

__all__ = ["pattern_rows"]

Row = dict[str, Any]


def pattern_rows(settings: Settings, box: Box) -> Iterator[Row]:
    """For each pattern and dtype: useful GFLOP/s forward, and that rate and the time against the plain window's, timed in turn
    with it. Forward + backward in the first dtype only.
    """
    n, heads, dim = settings.tokens, settings.heads, settings.head_dim
    shown = list(gallery(n, heads))
    runs = [(dtype, False) for dtype in settings.types()] + [(settings.types()[0], True)]
    for dtype, grads in runs:
        qkv = inputs(n, heads, dim, dtype)
        for one in shown:
            about = {
                "pattern": one.name,
                "tokens": n,
                "dtype": name_of(dtype),
                "pass": "forward + backward" if grads else "forward",
            }
            why = one.misfit(n, heads) or box.refusal(2.0)
            if why is not None:
                yield {**about, "skipped": why}
                continue
            try:
                yield {**about, **_row(one, shown[0], settings, qkv, grads)}
            except FarlightError as error:
                yield {**about, "error": f"{type(error).__name__}: {error}"}


def _row(one: Shown, plain: Shown, settings: Settings, qkv: tuple[Tensor, Tensor, Tensor], grads: bool) -> Row:
    n, heads, dim = settings.tokens, settings.heads, settings.head_dim
    plans.clear()
    start = time.perf_counter()
    made = plan(one.pattern, n, heads=heads)
    planning = time.perf_counter() - start
    backend = best_backend(one.pattern, n, heads, dim, qkv[0].dtype, grads)
    product = matmul(qkv[0].dtype, settings.matmul_size)
    contenders = [ours(backend, one.pattern, *qkv, grads, name=one.name), product]
    if one.name != PLAIN:
        contenders.insert(0, ours(backend, plain.pattern, *qkv, grads, name=PLAIN))
    timings = interleaved(contenders, repeats=settings.repeats, budget=9.0 if grads else 4.0)
    mine, base = timings[one.name], timings[PLAIN]
    row: Row = {"backend": backend, **mine.row()}
    row |= {
        "density": made.pairs / (heads * n * n),
        "waste": made.waste,
        "plan_seconds": planning,
        "plan_mib": made.nbytes / 2**20,
    }
    if mine.error is None and base.error is None:
        flops = (BACKWARD_FLOPS if grads else FORWARD_FLOPS) * dim
        rate = flops * made.pairs / mine.seconds / 1e9
        window_rate = flops * plan(plain.pattern, n, heads=heads).pairs / base.seconds / 1e9
        ceiling = matmul_flops(settings.matmul_size) / timings["matmul"].seconds / 1e9
        row |= {"useful_gflops": rate, "of_matmul": rate / ceiling, "window_seconds": base.seconds}
        row |= {"rate_of_window": rate / window_rate, "time_of_window": mine.seconds / base.seconds}
    return row
