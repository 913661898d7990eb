"""Patterns that content chooses: what choosing, planning and attending cost, beside dense attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from farlight.patterns.expression import Pattern
from farlight.plan.cache import plans
from farlight.planning import plan
from farlight.routing import LSH, KMeans, Router, TopBlocks
from suite.contenders import DENSE, best_backend, dense, ours
from suite.settings import Box, Settings, name_of
from suite.timing import Contender, interleaved, matmul, matmul_flops, seconds_of

__all__ = ["routing_rows"]

Row = dict[str, Any]
ROUTE, ATTEND, FIRST = "route", "attend", "attend, not planned yet"


def routing_rows(settings: Settings, box: Box) -> Iterator[Row]:
    """For each router, in float32, forward and forward + backward: seconds to choose the links, to plan them (the first
    attention under a new choice less a later one), to attend; their sum against dense attention, all timed in turn.
    """
    n, heads, dim, dtype = settings.tokens, settings.heads, settings.head_dim, torch.float32
    # Heads that choose for themselves: inputs that repeat from head to head would be planned once for all of them.
    q, k, v = (torch.randn(1, heads, n, dim) for _ in range(3))
    rate = matmul_flops(settings.matmul_size) / seconds_of(matmul(dtype, settings.matmul_size).call, repeats=3) / 1e9
    for name, make in _routers(n, heads, dim).items():
        router = make(q, k)
        for grads in (False, True):
            about = {"pattern": name, "tokens": n, "dtype": name_of(dtype)}
            about["pass"] = "forward + backward" if grads else "forward"
            full, expected = dense(q, k, v, grads, rate)
            why = box.refusal(2 * expected)
            if why is not None:
                yield {**about, "skipped": why}
                continue
            yield {**about, **_row(router, full, (q, k, v), grads, settings.repeats)}


def _routers(n: int, heads: int, dim: int) -> dict[str, Callable[[Tensor, Tensor], Router]]:
    """Each is made, and where it has something to learn placed on the tokens, before any clock runs."""
    rooms, block = max(2, n // 512), 64 if n >= 1024 else 16

    def placed(router: KMeans) -> Callable[[Tensor, Tensor], Router]:
        return lambda q, k: router.fit(q, k).eval()

    return {
        f"KMeans({rooms} clusters)": placed(KMeans(heads, dim, rooms)),
        f"KMeans({rooms} clusters, causal, 256 recent)": placed(KMeans(heads, dim, rooms, per_cluster=256, causal=True)),
        f"LSH({rooms} buckets)": lambda q, k: LSH(rooms),
        f"TopBlocks(share=0.1, block={block})": lambda q, k: TopBlocks(share=0.1, block=block),
        f"TopBlocks(mass=0.5, block={block})": lambda q, k: TopBlocks(mass=0.5, block=block),
    }


def _row(router: Router, full: Contender, qkv: tuple[Tensor, Tensor, Tensor], grads: bool, repeats: int) -> Row:
    q, k, v = qkv
    heads, n, dim = q.shape[1:]
    backend = best_backend(router(q, k), n, heads, dim, q.dtype, grads)
    known = router(q, k)
    drawn: list[Pattern] = [known]

    def redraw() -> None:
        plans.clear()
        drawn[0] = router(q, k)

    def first_time() -> Any:
        return ours(backend, drawn[0], q, k, v, grads).call()

    contenders = [
        Contender(ROUTE, lambda: router(q, k)),
        Contender(FIRST, first_time, before=redraw, loops=1),
        # The plan made by the call just before is found again.
        ours(backend, known, q, k, v, grads, name=ATTEND),
        full,
    ]
    timings = interleaved(contenders, repeats=repeats, budget=20.0)
    errors = [f"{name}: {timing.error}" for name, timing in timings.items() if timing.error is not None]
    if errors:
        return {"error": "; ".join(errors)}
    route, attend, first, whole = (timings[name].seconds for name in (ROUTE, ATTEND, FIRST, DENSE))
    planning, made = max(0.0, first - attend), plan(known, n, heads=heads)
    total = route + planning + attend
    return {
        "backend": backend,
        "density": made.pairs / (heads * n * n),
        "waste": made.waste,
        "route_seconds": route,
        "plan_seconds": planning,
        "attend_seconds": attend,
        "seconds": total,
        "dense_seconds": whole,
        "times_dense": whole / total,
        "plan_of_saved": planning / (whole - attend) if whole > attend else None,
    }
