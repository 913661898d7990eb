"""Cost of one attention layer under a pattern: links, seconds and peak memory, beside full attention on the same machine.

Links are counted exactly; sparse attention is measured. Full attention is measured up to `_FULL_FLOPS` and extrapolated by n²
for longer texts, where it would take hours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from farlight.analysis.memory import peak_memory
from farlight.errors import ArgumentError, PatternError, UnsupportedError
from farlight.patterns import causal, full
from farlight.patterns.algebra import looks_back
from farlight.patterns.expression import Pattern, Sizes
from farlight.plan.cache import plans
from farlight.routing.base import Router

__all__ = [
    "AttentionShape", "Cost", "Timing", "cost_at_length", "cost_in_passages", "full_seconds", "links_per_head", "mean_cost",
    "paired_seconds", "timed_length",
]  # fmt: skip

# Multiply-adds of one timed full attention: about a quarter of a second on two cores.
_FULL_FLOPS = 3e10
# Bytes of q, k, v and output of one layer at the timed length: beyond, a book would need more memory than a laptop has and
# minutes per pattern, and time is linear in the length by then.
_TIMED_BYTES = 2**30
# Seconds to spend on repeating a call at the timed length, and the number of repetitions that its median is taken of.
_REPEAT_SECONDS, _REPEATS = 10.0, 3
# Seconds that the first calls of a candidate's routers may take at the timed length. Choosing compares every query block with
# every key block, and a share or a mass of the keys grows with the text: such a call takes up to n² time.
_ROUTED_SECONDS = 10.0
# Score bytes that the reference backend may form; it forms all of them and is made for short texts.
_REFERENCE_BYTES = 2**31


@dataclass(frozen=True)
class AttentionShape:
    """Shapes of one attention layer: heads, head dims (of q and k; of v), dtype, device; `base` is the model's own mask."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    base: Pattern
    scale: float | None = None

    def random(self, n: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Random q `(batch, heads, n, head_dim)`, k, v; the time and memory of attention do not depend on their values."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        shapes = [(self.heads, self.head_dim), (self.kv_heads, self.head_dim), (self.kv_heads, self.value_dim)]
        q, k, v = (
            torch.randn(batch, heads, n, dim, dtype=self.dtype, device=self.device, generator=generator)
            for heads, dim in shapes
        )
        return q, k, v

    def restrict(self, pattern: Pattern) -> Pattern:
        """`pattern` within the model's own mask."""
        return pattern if self.base == full() else self.base & pattern


@dataclass(frozen=True)
class Timing:
    """Median seconds of `runs` calls, and `spread`: half the interquartile range of their seconds.

    >>> Timing.of([1.0, 2.0, 3.0, 10.0])
    Timing(seconds=2.5, spread=1.5, runs=4)
    """

    seconds: float
    spread: float = 0.0
    runs: int = 1

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """The timing of these calls."""
        if len(seconds) < 2:
            return cls(seconds[0])
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(statistics.median(seconds), (high - low) / 2, len(seconds))


@dataclass(frozen=True)
class Cost:
    """One attention layer over `tokens` tokens under a pattern or router.

    links, base_links: pairs per head and batch item under the pattern, and under the model's own mask.
    backend: the one that ran. predicted_speedup: sparse against full attention by the cost model (`farlight.explain`).
    seconds, spread: median of `runs` calls over the whole batch, and half their interquartile range; full_seconds, full_spread:
    the same for full attention, extrapolated for long texts. peak_bytes: resident memory beyond q, k and v, output included.
    plan_seconds: planning, once per pattern; for a router choice and planning, in every layer. why_not: why the pattern could
    not be measured; all other fields are then 0.
    """

    tokens: int
    links: float = 0.0
    base_links: float = 0.0
    backend: str = ""
    predicted_speedup: float = 0.0
    seconds: float = 0.0
    spread: float = 0.0
    runs: int = 0
    plan_seconds: float = 0.0
    full_seconds: float = 0.0
    full_spread: float = 0.0
    peak_bytes: int = 0
    peak_method: str = "unknown"
    why_not: str | None = None

    @property
    def measured_speedup(self) -> float:
        """Full attention's seconds over the pattern's."""
        return self.full_seconds / self.seconds if self.seconds else 0.0


def links_per_head(pattern: Pattern, n: int, heads: int, batch: int = 1) -> float:
    """Allowed pairs over n tokens, exact, mean over heads and batch items. Raises as `Pattern.count`."""
    heads, batch = heads if pattern.varies_over_heads else 1, batch if pattern.varies_over_batch else 1
    return pattern.count(n, batch=batch, heads=heads) / (heads * batch)


def cost_in_passages(
    shape: AttentionShape,
    pattern: Pattern | Router,
    tensors: tuple[Tensor, Tensor, Tensor],
    *,
    backend: str = "auto",
    least: float = 0.4,
) -> Cost:
    """Measure one layer on q, k, v of real passages, alternating with full attention for at least `least` seconds.

    For a router every repetition chooses and plans again, as every text does.
    """
    cost, run = _first_run(shape, pattern, tensors, backend)
    if run is None:
        return cost
    sparse, full = paired_seconds(run, _full_attention(shape, *tensors), least)
    cost = replace(cost, seconds=sparse.seconds, spread=sparse.spread, runs=sparse.runs)
    return replace(cost, full_seconds=full.seconds, full_spread=full.spread)


def cost_at_length(
    shape: AttentionShape,
    pattern: Pattern | Router,
    tensors: tuple[Tensor, Tensor, Tensor],
    full: Timing,
    *,
    backend: str = "auto",
    layers: int = 1,
) -> Cost:
    """Measure calls on q, k, v of a long text; `full` is the (extrapolated) time of full attention.

    The median of three calls after the first, of fewer where they would take more than ten seconds: a single call that takes
    that long is its own measurement. layers: how many layers are measured so, which share the ten seconds.
    """
    cost, run = _first_run(shape, pattern, tensors, backend)
    if run is None:
        return cost
    cost = replace(cost, full_seconds=full.seconds, full_spread=full.spread)
    seconds: list[float] = []
    while len(seconds) < _REPEATS and sum(seconds) + max([*seconds, cost.seconds]) < _REPEAT_SECONDS / layers:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    if not seconds:
        return replace(cost, runs=1)
    timing = Timing.of(seconds)
    # A repeated call of a router chooses and plans.
    plan_seconds = 0.0 if isinstance(pattern, Router) else cost.plan_seconds
    return replace(cost, seconds=timing.seconds, spread=timing.spread, runs=timing.runs, plan_seconds=plan_seconds)


def timed_length(shape: AttentionShape, n: int, routed: float = 0.0, passage: int = 1) -> int:
    """Tokens at which a text of n tokens is timed: n, or the largest power of two within `_TIMED_BYTES` and `_ROUTED_SECONDS`.

    routed: seconds that the routers of the slowest candidate take for one passage of `passage` tokens, expected to grow as n².
    """
    bytes_per_token = (shape.heads + shape.kv_heads) * (shape.head_dim + shape.value_dim) * shape.dtype.itemsize
    max_tokens = max(1, _TIMED_BYTES // bytes_per_token)
    if routed > 0.0:
        max_tokens = min(max_tokens, max(passage, int(passage * (_ROUTED_SECONDS / routed) ** 0.5)))
    return n if n <= max_tokens else 1 << (max_tokens.bit_length() - 1)


def mean_cost(costs: Sequence[Cost]) -> Cost:
    """Mean over layers; peak memory is the maximum. A layer that could not be measured is the result."""
    failed = next((cost for cost in costs if cost.why_not), None)
    if failed is not None or len(costs) == 1:
        return failed or costs[0]
    mean: dict[str, Any] = {
        name: statistics.fmean(getattr(cost, name) for cost in costs)
        for name in (
            *("links", "base_links", "predicted_speedup", "seconds", "spread", "plan_seconds"),
            *("full_seconds", "full_spread"),
        )
    }
    backends = " / ".join(dict.fromkeys(cost.backend for cost in costs))
    return replace(costs[0], **mean, backend=backends, peak_bytes=max(cost.peak_bytes for cost in costs))


def _first_run(
    shape: AttentionShape, pattern: Pattern | Router, tensors: tuple[Tensor, Tensor, Tensor], backend: str
) -> tuple[Cost, Callable[[], Any] | None]:
    """(cost of planning and the first call, the call for repetition); (a cost with `why_not`, None) where it cannot run."""
    import farlight
    from farlight.kernels import registry
    from farlight.kernels.backend import Request

    q, k, v = tensors
    n = q.shape[2]
    sizes = Sizes.of(n, batch=q.shape[0], heads=q.shape[1])

    def choose() -> Pattern:
        return shape.restrict(pattern(q, k) if isinstance(pattern, Router) else pattern)

    def attend(allowed: Pattern) -> Any:
        out = farlight.attention(q, k, v, allowed, scale=shape.scale, backend=backend)
        _wait(q)
        return out

    def repeat() -> Any:
        with torch.no_grad():
            if not isinstance(pattern, Router):
                return attend(choose())
            # The same q and k give the same choice, whose plan the cache has; every text's choice is planned for it alone.
            with plans.isolated():
                return attend(choose())

    score_bytes = 4 * sizes.batch * sizes.heads * n * n
    if backend == "reference" and score_bytes > _REFERENCE_BYTES:
        return Cost(n, why_not=f"the reference backend forms all scores, here {score_bytes / 2**30:,.0f} GiB"), None
    try:
        with peak_memory() as peak, torch.no_grad():
            start = time.perf_counter()
            # Also plans for the backend; attention then finds the plan in the cache.
            allowed = choose()
            selection = registry.select(Request(allowed, sizes, k.shape[1], q.shape[3], v.shape[3], q.dtype, q.device))
            planned = time.perf_counter()
            attend(allowed)
            end = time.perf_counter()
    except (ArgumentError, PatternError, UnsupportedError) as error:
        # A pattern with tables (chosen keys, say) fits one length only; a named backend may refuse this length.
        return Cost(n, why_not=str(error)), None
    cost = Cost(
        tokens=n,
        links=links_per_head(allowed, n, shape.heads, sizes.batch),
        base_links=links_per_head(shape.base, n, shape.heads),
        backend=selection.backend.name if backend == "auto" else backend,
        predicted_speedup=selection.speedup,
        seconds=end - planned,
        plan_seconds=planned - start,
        peak_bytes=peak.bytes,
        peak_method=peak.method,
    )
    return cost, repeat


def _full_attention(shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    """A call of torch's `scaled_dot_product_attention` under the model's own mask."""
    options: dict[str, Any] = {"scale": shape.scale, "enable_gqa": shape.heads != shape.kv_heads}
    n = q.shape[2]
    if shape.base == causal():
        options["is_causal"] = True
    elif shape.base._tables:
        # A mask with tables fits one length only; attention without it stands in, the same work for torch.
        options["is_causal"] = looks_back(shape.base)
    elif shape.base != full():
        options["attn_mask"] = shape.base.dense(n, batch=q.shape[0], heads=shape.heads, device=shape.device)

    def run() -> Any:
        with torch.no_grad():
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
            _wait(q)
            return out

    return run


def full_seconds(shape: AttentionShape, n: int) -> tuple[Timing, int]:
    """(time of torch's full attention over n tokens, tokens at which it was measured); scaled by n² where that is less."""
    max_tokens = int((_FULL_FLOPS / (4.0 * shape.head_dim * shape.heads)) ** 0.5)
    measured_at = n if n <= max_tokens else max(256, max_tokens // 256 * 256)
    run = _full_attention(shape, *shape.random(measured_at))
    timing, _ = paired_seconds(run, run, 0.3)
    scale = (n / measured_at) ** 2
    return Timing(timing.seconds * scale, timing.spread * scale, timing.runs), measured_at


def paired_seconds(first: Callable[[], Any], second: Callable[[], Any], least: float) -> tuple[Timing, Timing]:
    """(timing of `first`, of `second`), called alternately after one warm-up each until `least` seconds have passed.

    At least three calls each. Alternation spreads the load of other processes evenly over both.
    """
    times: tuple[list[float], list[float]] = ([], [])
    first()
    second()
    while len(times[0]) < 3 or sum(times[0]) + sum(times[1]) < least:
        for run, seconds in zip((first, second), times, strict=True):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return Timing.of(times[0]), Timing.of(times[1])


def _wait(tensor: Tensor) -> None:
    """Synchronise with the device of the tensor."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
