"""Measuring, once on each machine, how fast its backends are: for choices between sparse and full attention that are close.

It takes less than half a second: what is not measured by then keeps the rates that come with farlight. The rates are kept in a
small file under the user's cache folder (`FARLIGHT_CACHE`, else `XDG_CACHE_HOME/farlight`, else `~/.cache/farlight`), named by
what they depend on. `FARLIGHT_CALIBRATE=0`, set before the first close choice, keeps to the rates that come with farlight, so
that a choice is the same everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from farlight.caching import cache_folder
from farlight.kernels import cpu
from farlight.kernels import torch_tiled as blocked
from farlight.kernels.cost import DEFAULT_RATES, Rates, rates_by_threads
from farlight.measurements import read_measurements, write_measurements
from farlight.patterns.expression import Sizes
from farlight.patterns.positional import window
from farlight.plan import plan_for

__all__ = ["cache_folder", "calibrated", "measure"]


def calibrated() -> Rates:
    """The rates of this machine for the present number of threads, measured at their first use."""
    if os.environ.get("FARLIGHT_CALIBRATE", "1") == "0":
        return DEFAULT_RATES
    threads = torch.get_num_threads()
    rates = rates_by_threads[threads] = _calibrated(threads)
    return rates


@functools.cache
def _calibrated(threads: int) -> Rates:
    path = cache_folder() / f"rates-{_fingerprint(threads)}.json"
    kept = _read(path)
    if kept is not None:
        return kept
    # A file that cannot be written costs the next process the same again.
    rates = measure()
    with contextlib.suppress(OSError):
        write_measurements(path, {_name(*key): pair for key, pair in rates.items()})
    return rates


def _fingerprint(threads: int) -> str:
    import farlight

    isa = cpu.isa() if cpu.unavailable() is None else "none"
    parts = (platform.node(), platform.machine(), platform.processor(), torch.__version__, farlight.__version__, isa, threads)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _name(backend: str, dtype: torch.dtype) -> str:
    return f"{backend} {str(dtype).removeprefix('torch.')}"


def _read(path: Path) -> Rates | None:
    """The rates that a file holds; None where it does not hold each of them and nothing else."""
    rows = read_measurements(path, columns=2)
    names = {_name(*key): key for key in DEFAULT_RATES}
    if rows is None or rows.keys() != names.keys():
        return None
    return {names[name]: (rate, fixed) for name, (rate, fixed) in rows.items()}


_BUDGET = 0.4  # seconds for all measurements together; the call under way when they are over ends it
_SAMPLED = 0.4  # the part of them that is for repeating calls; the rest is for plans and first calls
_SAMPLES = range(3, 40)  # repetitions of a call
_HEADS, _DIM = 4, 64
_LARGE, _TINY = 512, 8  # tokens
_CPU = torch.device("cpu")


class _Unmeasured(Exception):
    """The seconds for all measurements are over, or a rate cannot be told from them."""


class _Budget:
    """Times calls until its seconds are over."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def seconds(self, call: Callable[[], object]) -> float:
        """What a call takes. Raises _Unmeasured where it would begin too late."""
        start = time.perf_counter()
        if start >= self.end:
            raise _Unmeasured
        call()
        return time.perf_counter() - start

    def fastest(self, call: Callable[[], object], share: float) -> float:
        """The least that a call takes, of some that fit into a share of the seconds left."""
        self.seconds(call)  # on its way to the caches
        start = time.perf_counter()
        until = start + share * (self.end - start)
        best = math.inf
        for number in range(_SAMPLES.stop):
            if number >= _SAMPLES.start and time.perf_counter() + best >= until:
                break
            best = min(best, self.seconds(call))
        return best


def measure() -> Rates:
    """Time a large and a tiny call of each backend: their difference gives the rate, the tiny one the fixed price.

    The rates of a dtype are compared with each other: where not all of them can be measured, they stay as they were.
    """
    rates = dict(DEFAULT_RATES)
    near = window(128)
    kernels: dict[str, Any] = {"torch": blocked}
    if cpu.unavailable() is None:
        kernels["cpu"] = cpu
    budget = _Budget(_BUDGET)
    with torch.inference_mode(False), torch.no_grad(), contextlib.suppress(_Unmeasured):
        measurements = 2 * (len(kernels) + 1)
        for dtype in (torch.float32, torch.bfloat16):
            calls = {name: functools.partial(_sparse, kernel, near, dtype) for name, kernel in kernels.items()}
            calls |= {"dense": functools.partial(_dense, dtype)}
            measured: Rates = {}
            for name, call_of in calls.items():
                measured[name, dtype] = _rate(call_of, budget, _SAMPLED / measurements)
                measurements -= 1
            rates |= measured
    return rates


def _sparse(kernel: Any, near: Any, dtype: torch.dtype, n: int) -> tuple[Callable[[], Any], int]:
    plan = plan_for(near, Sizes.of(n, heads=_HEADS), kernel.SHAPE)
    q = _numbers(n, dtype)
    return lambda: kernel.forward(q, q, q, plan, scale=0.125, dropout=0.0, seed=0), plan.visited


def _dense(dtype: torch.dtype, n: int) -> tuple[Callable[[], Any], int]:
    q, mask = _numbers(n, dtype), torch.ones(n, n, dtype=torch.bool, device=_CPU)
    return lambda: scaled_dot_product_attention(q, q, q, attn_mask=mask), _HEADS * n * n


def _numbers(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Not of torch's default generator: a measurement must not change what a program draws."""
    generator = torch.Generator(_CPU).manual_seed(0)
    return torch.randn(1, _HEADS, n, _DIM, generator=generator, device=_CPU).to(dtype)


def _rate(call_of: Callable[[int], tuple[Callable[[], Any], int]], budget: _Budget, share: float) -> tuple[float, float]:
    seconds, work = [], []
    for n, part in ((_LARGE, share / 2), (_TINY, share / 2)):
        call, pairs = call_of(n)
        seconds.append(budget.fastest(call, part))
        work.append(4 * _DIM * pairs)
    if seconds[0] <= seconds[1]:
        raise _Unmeasured
    slope = (seconds[0] - seconds[1]) / (work[0] - work[1])
    return 1 / slope / 1e9, max(seconds[1] - slope * work[1], 1e-6)
