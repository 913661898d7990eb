"""Causal routers of a language model's shape: choosing, planning and attending apart, beside full causal attention; memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import farlight as fl
from farlight.analysis.memory import peak_memory
from farlight.plan.cache import plans
from farlight.routing import LSH, KMeans, Router, TopBlocks
from suite.fresh import FreshError, fresh_rows
from suite.settings import Box, Settings, name_of
from suite.timing import Contender, Timing, interleaved

__all__ = ["content_memory_rows", "content_rows", "long_content_rows", "router_memory"]

Row = dict[str, Any]
FULL, SDPA = "causal()", "causal SDPA"
_HEADS, _KV_HEADS, _DIM = 9, 3, 64
_BACKEND = "cpu"
# Expected seconds at 16 384 tokens on two cores: of full causal attention, SDPA included; and of one router, all parts.
_FULL_SECONDS, _ROUTER_SECONDS, _WITH_BACKWARD = 4.0, 0.5, 3.5


def content_rows(settings: Settings, box: Box, *, dtype: torch.dtype, grads: bool, parts: tuple[int, ...]) -> Iterator[Row]:
    """9 query heads on 3 key heads of 64, random vectors, causal; each router beside `window(32, 0)` and 4 sinks, at these
    parts of the suite's length (8 = an eighth). All contenders of a length are timed in turn.
    """
    for n in (settings.tokens // part for part in parts):
        yield from _rows(n, dtype, grads, settings, box, repeats=settings.repeats, full=True, sdpa=True)


def long_content_rows(settings: Settings, box: Box, *, dtype: torch.dtype, factor: int) -> Iterator[Row]:
    """The same forward, once, at a multiple of the suite's length; full causal attention up to four times it."""
    yield from _rows(factor * settings.tokens, dtype, False, settings, box, repeats=1, full=factor <= 4, sdpa=False)


def _routers(n: int, q: Tensor, k: Tensor) -> dict[str, Router]:
    """Routers by name; centroids are fitted here, before any clock runs."""
    near = fl.window(32, 0) | fl.seen_by_all(range(4)) & fl.causal()
    count = max(2, n // 512)
    clusters = KMeans(_HEADS, _DIM, count, causal=True).fit(q, k, steps=2).eval()
    recent = KMeans(_HEADS, _DIM, count, causal=True, per_cluster=256).eval()
    recent.centroids.copy_(clusters.centroids)
    return {
        "TopBlocks(16, 64, query_block=64)": TopBlocks(16, 64, 64, causal=True) | near,
        "TopBlocks(64, 8, query_block=16, score='softmax')": TopBlocks(64, 8, 16, causal=True, score="softmax") | near,
        "TopBlocks(120, 8, query_block=16, score='softmax')": TopBlocks(120, 8, 16, causal=True, score="softmax") | near,
        "TopBlocks(32, 16, query_block=1)": TopBlocks(32, 16, 1, causal=True) | near,
        f"KMeans({count} clusters)": clusters | near,
        f"KMeans({count} clusters), the 256 most recent": recent | near,
        f"LSH({count} buckets)": LSH(count, causal=True) | near,
    }


def _rows(
    n: int, dtype: torch.dtype, grads: bool, settings: Settings, box: Box, *, repeats: int, full: bool, sdpa: bool
) -> Iterator[Row]:
    about = {"tokens": n, "dtype": name_of(dtype), "pass": "forward + backward" if grads else "forward"}
    scale = min(repeats, 3) * (_WITH_BACKWARD if grads else 1.0) * n / 16_384
    why = box.refusal(scale * (_ROUTER_SECONDS * 7 + (_FULL_SECONDS * n / 16_384 if full else 0.0)))
    if why is not None:
        yield {**about, "skipped": why}
        return
    torch.manual_seed(0)
    q = torch.randn(1, _HEADS, n, _DIM, dtype=dtype, requires_grad=grads)
    k, v = (torch.randn(1, _KV_HEADS, n, _DIM, dtype=dtype, requires_grad=grads) for _ in range(2))

    def step(attend: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            out = attend()
            return torch.autograd.grad(out.sum(), (q, k, v)) if grads else out

        return call

    contenders: list[Contender] = []
    if full:
        causal = fl.plan(fl.causal(), n, heads=_HEADS, backend=_BACKEND)
        contenders.append(Contender(FULL, step(lambda: fl.attention(q, k, v, causal)), warm=repeats > 1))
    if sdpa:
        dense = torch.nn.functional.scaled_dot_product_attention
        contenders.append(Contender(SDPA, step(lambda: dense(q, k, v, is_causal=True, enable_gqa=True))))
    made = {}
    for name, router in _routers(n, q.detach(), k.detach()).items():
        made[name] = fl.plan(router(q, k), n, heads=_HEADS, backend=_BACKEND)
        contenders += _contenders(name, router, made[name], (q, k, v), step, repeats)
    timings = interleaved(contenders, repeats=repeats, budget=75.0)
    for name, plan in made.items():
        yield {**about, "pattern": name, **_columns(name, plan, timings)}


def _contenders(
    name: str, router: Router, plan: fl.Plan, qkv: tuple[Tensor, ...], step: Callable[..., Any], repeats: int
) -> list[Contender]:
    """Choosing; attending under a plan made before; and both together with planning."""
    q, k, v = qkv

    # Plans of choices belong to their patterns: each call plans its own.
    return [
        Contender(f"choose {name}", lambda: router(q, k), warm=repeats > 1),
        Contender(f"attend {name}", step(lambda: fl.attention(q, k, v, plan)), warm=repeats > 1),
        Contender(f"together {name}", step(lambda: fl.attention(q, k, v, router, backend=_BACKEND)), warm=repeats > 1),
    ]


def _columns(name: str, plan: fl.Plan, timings: dict[str, Timing]) -> Row:
    """The figures of one router. Planning is what remains of the whole call."""
    timed = {part: timings[f"{part} {name}"] for part in ("choose", "attend", "together")}
    timed |= {part: timings[part] for part in (FULL, SDPA) if part in timings}
    errors = [f"{part}: {timing.error}" for part, timing in timed.items() if timing.error is not None]
    if errors:
        return {"error": "; ".join(errors)}
    choose, attend, together = (timed[part].seconds for part in ("choose", "attend", "together"))
    full, sdpa = (timed[part].seconds if part in timed else None for part in (FULL, SDPA))
    return {
        "density": plan.pairs / (_HEADS * fl.causal().count(plan.sizes.n_q)),
        "waste": plan.waste,
        "choose_seconds": choose,
        "plan_seconds": max(0.0, together - choose - attend),
        "attend_seconds": attend,
        "seconds": together,
        "low": timed["together"].low,
        "high": timed["together"].high,
        "repeats": timed["together"].repeats,
        "full_seconds": full,
        "sdpa_seconds": sdpa,
        "times_full": None if full is None else full / together,
        "of_attending": together / attend,
    }


def content_memory_rows(settings: Settings, box: Box) -> Iterator[Row]:
    """Peak memory of a forward pass beyond q, k, v and out, as a share of these four, each in a process of its own."""
    names = list(_routers(64, *(torch.randn(1, heads, 64, _DIM) for heads in (_HEADS, _KV_HEADS))))
    for place in range(len(names)):
        for dtype in settings.dtypes:
            about = {"measure": "memory", "tokens": settings.tokens, "dtype": dtype}
            why = box.refusal(6.0)
            if why is not None:
                yield {**about, "skipped": why}
                continue
            arguments: Row = {"place": place, "tokens": settings.tokens, "dtype": dtype}
            if not settings.memory:
                yield {**about, **next(router_memory(**arguments))}
                continue
            try:
                yield {**about, **next(fresh_rows("suite.content:router_memory", arguments, limit=box.left))}
            except FreshError as error:
                yield {**about, "error": str(error)}


def router_memory(place: int, tokens: int, dtype: str) -> Iterator[Row]:
    """One row of `content_memory_rows`: the router at this place of the list."""
    q = torch.randn(1, _HEADS, tokens, _DIM, dtype=getattr(torch, dtype))
    k, v = (torch.randn(1, _KV_HEADS, tokens, _DIM, dtype=q.dtype) for _ in range(2))
    name, router = list(_routers(tokens, q, k).items())[place]
    few = min(tokens, 512)  # sets up what a process sets up once: code, thread pools
    fl.attention(q[:, :, :few], k[:, :, :few], v[:, :, :few], router, backend=_BACKEND)
    plans.clear()
    with peak_memory() as peak:
        out = fl.attention(q, k, v, router, backend=_BACKEND)
    size = out.nbytes + q.nbytes + k.nbytes + v.nbytes
    yield {"pattern": name, "extra_memory": max(0, peak.bytes - out.nbytes) / size, "memory_method": peak.method}
