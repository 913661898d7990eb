"""Terms on the scores, sinks, and v narrower than k: what each costs beside the plain call; FlexAttention with a score_mod."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from farlight import score
from farlight.attention import attention
from farlight.patterns.expression import Pattern
from farlight.planning import plan
from suite.contenders import inputs
from suite.flex import FLEX, compiled_flex
from suite.settings import Box, Settings, name_of
from suite.timing import Contender, interleaved

__all__ = ["score_rows"]

PLAIN = "plain"
_WIDTHS, _WIDE_HEADS = (192, 128), 4
Row = dict[str, Any]


def score_rows(settings: Settings, box: Box) -> Iterator[Row]:
    """Seconds of every term and pass, and how many times those of the plain call timed in turn with it."""
    torch.manual_seed(0)
    pattern = settings.chosen()
    for dtype in settings.types():
        for grads in (False, True):
            about = {"dtype": name_of(dtype), "pass": "forward + backward" if grads else "forward"}
            why = box.refusal(20.0 if grads else 12.0)
            if why is not None:
                yield {**about, "term": "all", "skipped": why}
                continue
            yield from ({**about, **row} for row in _terms(settings, pattern, dtype, grads))
            yield {**about, **_latent(settings, pattern, dtype, grads)}
    if settings.flex:
        yield from _flex(settings, pattern, box)


def _terms(settings: Settings, pattern: Pattern, dtype: torch.dtype, grads: bool) -> Iterator[Row]:
    qkv = inputs(settings.tokens, settings.heads, settings.head_dim, dtype)
    calls = {
        name: Contender(name, _pass(pattern, qkv, grads, options), loops=1)
        for name, options in _options(settings.heads, grads).items()
    }
    timings = interleaved(list(calls.values()), repeats=settings.repeats + 2, budget=19.0 if grads else 10.0)
    plain = timings[PLAIN]
    for name, timing in timings.items():
        yield {"term": name, **timing.row(), **({} if timing.error else {"times_plain": timing.seconds / plain.seconds})}


def _options(heads: int, grads: bool) -> dict[str, dict[str, Any]]:
    """The arguments of each call; learned tables and sinks have gradients."""
    slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
    table, buckets, sinks = (torch.randn(*size, requires_grad=grads) for size in ((heads, 257), (32, heads), (heads,)))
    return {
        PLAIN: {},
        "alibi": {"score": score.alibi(slopes)},
        "relative": {"score": score.relative(table)},
        "t5": {"score": score.t5(buckets)},
        "softcap": {"score": score.softcap(50.0)},
        "sinks": {"sinks": sinks},
    }


def _pass(pattern: Pattern, qkv: tuple[Tensor, ...], grads: bool, options: dict[str, Any]) -> Callable[[], Any]:
    q, k, v = (x.detach().requires_grad_(grads) for x in qkv)
    learned = [x for x in (*getattr(options.get("score"), "tensors", ()), options.get("sinks")) if x is not None]
    wanted = [q, k, v, *(x for x in learned if x.requires_grad)]
    arriving = torch.ones(*q.shape[:3], v.shape[3], dtype=q.dtype)

    def call() -> Any:
        with torch.set_grad_enabled(grads):
            out = attention(q, k, v, pattern, **options)
        return torch.autograd.grad(out, wanted, arriving) if grads else out

    return call


def _latent(settings: Settings, pattern: Pattern, dtype: torch.dtype, grads: bool) -> Row:
    """Keys of 192 and values of 128 numbers against 128 and 128: useful operations each second."""
    wide, narrow = _WIDTHS if settings.name != "tiny" else (24, 16)
    n, heads = settings.tokens // 2, min(_WIDE_HEADS, settings.heads)
    q, k, v = inputs(n, heads, wide, dtype)
    sets = {"mixed": (q, k, v[..., :narrow].contiguous()), "equal": tuple(x[..., :narrow].contiguous() for x in (q, k, v))}
    contenders = [Contender(name, _pass(pattern, tensors, grads, {})) for name, tensors in sets.items()]
    timings = interleaved(contenders, repeats=settings.repeats + 2, budget=6.0)
    row: Row = {"term": f"head_dim {wide} / {narrow}", **timings["mixed"].row()}
    if any(timing.error for timing in timings.values()):
        return row
    # Products over q's width: one forward, three backward (scores again, dq, dk); over v's: one and two (dp, dv).
    of_keys, of_values = (4, 3) if grads else (1, 1)
    flops = {"mixed": of_keys * wide + of_values * narrow, "equal": (of_keys + of_values) * narrow}
    rates = {name: 2 * plan(pattern, n, heads=heads).pairs * flops[name] / timings[name].seconds for name in sets}
    return {**row, "useful_gflops": rates["mixed"] / 1e9, "rate_of_equal": rates["mixed"] / rates["equal"]}


def _flex(settings: Settings, pattern: Pattern, box: Box) -> Iterator[Row]:
    """Compiled FlexAttention with ALiBi as its score_mod, beside the same call here; float32, forward."""
    about = {"dtype": "float32", "pass": "forward", "term": f"alibi, {FLEX}"}
    why = box.refusal(20.0)
    if why is not None:
        yield {**about, "skipped": why}
        return
    qkv = inputs(settings.tokens, settings.heads, settings.head_dim, torch.float32)
    options = _options(settings.heads, False)["alibi"]
    (slopes,) = options["score"].tensors

    def alibi(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        biased: Tensor = s - slopes[h] * (i - j).abs()
        return biased

    farlight = _pass(pattern, qkv, False, options)
    try:
        flex = compiled_flex(*qkv, score_mod=alibi)
    except RuntimeError as error:  # as in `headline`: not every machine compiles it
        yield {**about, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        return
    difference = float((flex.call() - farlight()).abs().max())
    contenders = [Contender("flex", flex.call), Contender("farlight", farlight)]
    timings = interleaved(contenders, repeats=settings.repeats, budget=15.0)
    times = timings["flex"].seconds / timings["farlight"].seconds
    yield {**about, **timings["flex"].row(), "slower_than_farlight": times, "difference": difference}
