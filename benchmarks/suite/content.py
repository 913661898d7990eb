"""Causal routers of a language model's shape: choosing, planning and attending apart, beside full causal attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import farlight as fl
from farlight.routing import Router, TopBlocks
from suite.contenders import best_backend
from suite.settings import Box, Settings, name_of
from suite.timing import Contender, interleaved

__all__ = ["content_rows"]

Row = dict[str, Any]
CHOOSE, ATTEND, TOGETHER, FULL, SDPA = "choose", "attend", "together", "causal()", "causal SDPA"
_HEADS, _KV_HEADS, _DIM = 9, 3, 64
# Seconds of the five contenders together at 16 384 tokens on two cores, forward; SDPA is left out beyond that length.
_SECONDS = 5.0


def content_rows(settings: Settings, box: Box) -> Iterator[Row]:
    """9 query heads on 3 key heads of 64, random vectors, causal; each router beside `window(32, 0)` and 4 sinks. Forward and
    forward + backward, float32 and bfloat16, up to four times the suite's length. Planning is what remains of the whole call.
    """
    lengths = [settings.tokens // 8, settings.tokens, 4 * settings.tokens]
    for n in lengths:
        for dtype in settings.types():
            q = torch.randn(1, _HEADS, n, _DIM, dtype=dtype)
            k, v = (torch.randn(1, _KV_HEADS, n, _DIM, dtype=dtype) for _ in range(2))
            for name, router in _routers().items():
                for grads in (False, True):
                    about = {"pattern": name, "tokens": n, "dtype": name_of(dtype)}
                    about["pass"] = "forward + backward" if grads else "forward"
                    relative = max(n / 16_384, 0.02) ** 2 * (4 if grads else 1)
                    why = box.refusal(settings.repeats * _SECONDS * relative)
                    yield {
                        **about,
                        **({"skipped": why} if why else _row(router, (q, k, v), grads, n <= settings.tokens, settings)),
                    }


def _routers() -> dict[str, Router]:
    near = fl.window(32, 0) | fl.seen_by_all(range(4)) & fl.causal()
    return {
        "TopBlocks(16, 64, query_block=64)": TopBlocks(16, 64, 64, causal=True) | near,
        "TopBlocks(64, 8, query_block=16, score='softmax')": TopBlocks(64, 8, 16, causal=True, score="softmax") | near,
        "TopBlocks(120, 8, query_block=16, score='softmax')": TopBlocks(120, 8, 16, causal=True, score="softmax") | near,
        "TopBlocks(32, 16), each query": TopBlocks(32, 16, 1, causal=True) | near,
    }


def _row(router: Router, qkv: tuple[Tensor, Tensor, Tensor], grads: bool, with_sdpa: bool, settings: Settings) -> Row:
    q, k, v = (x.detach().requires_grad_(grads) for x in qkv)
    pattern, n = router(q, k), q.shape[2]
    backend = best_backend(pattern, n, _HEADS, _DIM, q.dtype, grads)

    def step(attend: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            out = attend()
            return torch.autograd.grad(out.sum(), (q, k, v)) if grads else out

        return call

    contenders = [
        Contender(CHOOSE, lambda: router(q, k)),
        Contender(ATTEND, step(lambda: fl.attention(q, k, v, pattern, backend=backend))),
        Contender(TOGETHER, step(lambda: fl.attention(q, k, v, router, backend=backend))),
        Contender(FULL, step(lambda: fl.attention(q, k, v, fl.causal(), backend=backend))),
    ]
    if with_sdpa:
        sdpa = torch.nn.functional.scaled_dot_product_attention
        contenders.append(Contender(SDPA, step(lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True))))
    timings = interleaved(contenders, repeats=settings.repeats, budget=10.0)
    errors = [f"{name}: {timing.error}" for name, timing in timings.items() if timing.error is not None]
    if errors:
        return {"error": "; ".join(errors)}
    choose, attend, together, full = (timings[name].seconds for name in (CHOOSE, ATTEND, TOGETHER, FULL))
    plan = fl.plan(pattern, n, heads=_HEADS)
    return {
        "backend": backend,
        "density": plan.pairs / (_HEADS * fl.causal().count(n)),
        "waste": plan.waste,
        "choose_seconds": choose,
        "plan_seconds": max(0.0, together - choose - attend),
        "attend_seconds": attend,
        "seconds": together,
        "full_seconds": full,
        "sdpa_seconds": timings[SDPA].seconds if with_sdpa else None,
        "times_full": full / together,
        "of_attending": together / attend,
    }
