"""What attention costs under a pattern: links, seconds and memory, beside full attention on the same machine.

Links are counted, sparse attention is measured. Full attention is measured where it is short enough, and predicted from
there for a long text, where it may take hours: its time grows with the square of the length.
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
from farlight.patterns.expression import Pattern, Sizes
from farlight.plan.cache import plans
from farlight.routing.base import Router

__all__ = [
    "Cost", "Layer", "cost_at_length", "cost_in_passages", "full_seconds", "links_per_head", "mean_cost", "timed_length",
]  # fmt: skip

# Multiplications spent on timing full attention once: about a quarter of a second on two cores.
_FULL_FLOPS = 3e10
# What q, k, v and the output of one layer may take where a long text is timed: beyond, a book would need more memory than a
# laptop has, and minutes for each pattern, to show the same straight line.
_TIMED_BYTES = 2**30
# Scores that the reference backend may form; it is made for short texts and forms all of them.
_REFERENCE_BYTES = 2**31


@dataclass(frozen=True)
class Layer:
    """The shape of one attention layer, and what the model itself allows."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    own: Pattern
    scale: float | None = None

    def random(self, n: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k, v for n tokens. Time and memory of attention do not depend on their values."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        shapes = [(self.heads, self.head_dim), (self.kv_heads, self.head_dim), (self.kv_heads, self.value_dim)]
        q, k, v = (
            torch.randn(batch, heads, n, dim, dtype=self.dtype, device=self.device, generator=generator)
            for heads, dim in shapes
        )
        return q, k, v


@dataclass(frozen=True)
class Cost:
    """One layer of attention over n tokens under a pattern.

    `links` and `own_links` are pairs per head and text, over `counted` tokens. `backend` is the one that ran;
    `predicted_speedup` is what `farlight.explain` expects of sparse against full attention. `seconds` and `peak_bytes` (beyond
    q, k, v; output included) are measured over a whole batch, `full_seconds` likewise or, for a long text, predicted.
    `why_not` says what kept a pattern from being measured; the rest is then zero. `plan_seconds` is what is done once for a
    pattern, and in every layer for a router, whose choice is part of it.
    """

    tokens: int
    counted: int
    links: float = 0.0
    own_links: float = 0.0
    backend: str = ""
    predicted_speedup: float = 0.0
    seconds: float = 0.0
    plan_seconds: float = 0.0
    full_seconds: float = 0.0
    peak_bytes: int = 0
    peak_method: str = "unknown"
    why_not: str | None = None

    @property
    def measured_speedup(self) -> float:
        return self.full_seconds / self.seconds if self.seconds else 0.0


def links_per_head(pattern: Pattern, n: int, heads: int, batch: int = 1) -> float:
    """Exact number of allowed pairs in a text of n tokens, averaged over the heads, and the texts of a batch."""
    heads, batch = heads if pattern.varies_over_heads else 1, batch if pattern.varies_over_batch else 1
    return pattern.count(n, batch=batch, heads=heads) / (heads * batch)


def cost_in_passages(
    layer: Layer,
    pattern: Pattern | Router,
    tensors: tuple[Tensor, Tensor, Tensor],
    *,
    backend: str = "auto",
    least: float = 0.4,
) -> Cost:
    """Measure one layer under `pattern`, a router's choice included, on these q, k, v, turn about with full attention for
    `least` seconds.
    """
    cost, run = _first_run(layer, pattern, tensors, backend)
    if run is None:
        return cost
    seconds, full = paired_seconds(run, _full_attention(layer, *tensors), least)
    return replace(cost, seconds=seconds, full_seconds=full)


def cost_at_length(
    layer: Layer,
    pattern: Pattern | Router,
    tensors: tuple[Tensor, Tensor, Tensor],
    full_seconds: float,
    *,
    backend: str = "auto",
    counted: int | None = None,
) -> Cost:
    """Measure one layer under `pattern` on these q, k, v, once; `full_seconds` is what full attention would take.

    The links of a pattern can be counted over another number of tokens, `counted`; a router's choice has that of q and k.
    """
    cost, _ = _first_run(layer, pattern, tensors, backend)
    cost = replace(cost, full_seconds=full_seconds)
    if counted is None or cost.why_not is not None:
        return cost
    assert isinstance(pattern, Pattern)
    both = pattern if layer.own == full() else layer.own & pattern
    try:
        links, own = (links_per_head(one, counted, layer.heads) for one in (both, layer.own))
    except (ArgumentError, PatternError) as error:
        return Cost(cost.tokens, counted, why_not=str(error))
    return replace(cost, counted=counted, links=links, own_links=own)


def timed_length(layer: Layer, n: int) -> int:
    """Where a text of n tokens is timed: n, or the largest power of two whose q, k, v and output stay within a gibibyte."""
    each = (layer.heads + layer.kv_heads) * (layer.head_dim + layer.value_dim) * layer.dtype.itemsize
    most = max(1, _TIMED_BYTES // each)
    return n if n <= most else 1 << (most.bit_length() - 1)


def mean_cost(costs: Sequence[Cost]) -> Cost:
    """The cost of a layer on average, where layers differ; memory is that of the largest."""
    stopped = next((cost for cost in costs if cost.why_not), None)
    if stopped is not None or len(costs) == 1:
        return stopped or costs[0]
    mean: dict[str, Any] = {
        name: statistics.fmean(getattr(cost, name) for cost in costs)
        for name in ("links", "own_links", "predicted_speedup", "seconds", "plan_seconds", "full_seconds")
    }
    backends = " / ".join(dict.fromkeys(cost.backend for cost in costs))
    return replace(costs[0], **mean, backend=backends, peak_bytes=max(cost.peak_bytes for cost in costs))


def _first_run(
    layer: Layer, pattern: Pattern | Router, tensors: tuple[Tensor, Tensor, Tensor], backend: str
) -> tuple[Cost, Callable[[], Any] | None]:
    """Plan and run once, watching memory; and the run, to be repeated. None where it cannot be run at this length."""
    import farlight
    from farlight.kernels import registry
    from farlight.kernels.backend import Request

    q, k, v = tensors
    n = q.shape[2]
    sizes = Sizes.of(n, batch=q.shape[0], heads=q.shape[1])

    def allowed() -> Pattern:
        found = pattern(q, k) if isinstance(pattern, Router) else pattern
        return found if layer.own == full() else layer.own & found

    def run(chosen: Pattern | None = None) -> Any:
        with torch.no_grad():
            if chosen is None:
                chosen = allowed()
                if isinstance(pattern, Router):
                    plans.clear()  # every text is chosen for, and planned, anew
            out = farlight.attention(q, k, v, chosen, scale=layer.scale, backend=backend)
            _wait(q)
            return out

    scores = 4 * sizes.batch * sizes.heads * n * n
    if backend == "reference" and scores > _REFERENCE_BYTES:
        return Cost(n, n, why_not=f"the reference backend forms all scores, here {scores / 2**30:,.0f} GiB"), None
    try:
        with peak_memory() as peak:
            began = time.perf_counter()
            # Plans for the backend's tiles, which the run then finds again.
            both = allowed()
            selection = registry.select(Request(both, sizes, k.shape[1], q.shape[3], q.dtype, q.device))
            planned = time.perf_counter()
            run(both)
            ended = time.perf_counter()
    except (ArgumentError, PatternError, UnsupportedError) as error:
        # A pattern with a table of its own, chosen keys say, fits one length only; a backend that was named may not
        # reach this far.
        return Cost(n, n, why_not=str(error)), None
    cost = Cost(
        tokens=n,
        counted=n,
        links=links_per_head(both, n, layer.heads, sizes.batch),
        own_links=links_per_head(layer.own, n, layer.heads),
        backend=selection.backend.name if backend == "auto" else backend,
        predicted_speedup=selection.speedup,
        seconds=ended - planned,
        plan_seconds=planned - began,
        peak_bytes=peak.bytes,
        peak_method=peak.method,
    )
    return cost, run


def _full_attention(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    """What the model itself would do: torch's own attention over everything that it allows."""
    options: dict[str, Any] = {"scale": layer.scale, "enable_gqa": layer.heads != layer.kv_heads}
    n = q.shape[2]
    if layer.own == causal():
        options["is_causal"] = True
    elif layer.own != full() and not layer.own._tables:
        # (With tables, a mask that fits one length only, attention without it stands in: the same work for torch.)
        options["attn_mask"] = layer.own.dense(n, batch=q.shape[0], heads=layer.heads, device=layer.device)

    def run() -> Any:
        with torch.no_grad():
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
            _wait(q)
            return out

    return run


def full_seconds(layer: Layer, n: int) -> tuple[float, int]:
    """(seconds, measured at): torch's full attention over n tokens, measured where it is quick and scaled by n²."""
    most = int((_FULL_FLOPS / (4.0 * layer.head_dim * layer.heads)) ** 0.5)
    at = n if n <= most else max(256, most // 256 * 256)
    run = _full_attention(layer, *layer.random(at))
    seconds, _ = paired_seconds(run, run, 0.3)
    return seconds * (n / at) ** 2, at


def paired_seconds(first: Callable[[], Any], second: Callable[[], Any], least: float) -> tuple[float, float]:
    """Medians of two pieces of work, run turn about, after one run of each to warm up, until `least` seconds have passed.

    Turn about, since a machine that others use as well is slow in spells, which then fall on both.
    """
    times: tuple[list[float], list[float]] = ([], [])
    first()
    second()
    while len(times[0]) < 3 or sum(times[0]) + sum(times[1]) < least:
        for run, held in zip((first, second), times, strict=True):
            began = time.perf_counter()
            run()
            held.append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def _wait(tensor: Tensor) -> None:
    """Let the device finish what it was given."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
