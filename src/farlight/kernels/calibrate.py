"""Measuring, once on each machine, how fast its backends are: for choices between sparse and full attention that are close.

It takes a fraction of a second and is kept in a small file under the user's cache folder (`FARLIGHT_CACHE`, else
`XDG_CACHE_HOME/farlight`, else `~/.cache/farlight`), named by what the figures depend on. `FARLIGHT_CALIBRATE=0` keeps to the
rates that come with farlight, so that a choice is the same everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from farlight.caching import cache_folder
from farlight.kernels import blocked, cpu
from farlight.kernels.cost import DEFAULT_RATES, Rates
from farlight.patterns.base import Sizes
from farlight.patterns.positional import window
from farlight.plan import plan_for

__all__ = ["cache_folder", "calibrated", "measure"]


def calibrated() -> Rates:
    """The rates of this machine for the present number of threads, measured the first time they are asked for."""
    if os.environ.get("FARLIGHT_CALIBRATE", "1") == "0":
        return DEFAULT_RATES
    return _calibrated(torch.get_num_threads())


@functools.cache
def _calibrated(threads: int) -> Rates:
    path = cache_folder() / f"rates-{_fingerprint(threads)}.json"
    try:
        return _read(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        # Not measured yet, or not readable: measure. A file that cannot be written costs the next process the same again.
        rates = measure()
        with contextlib.suppress(OSError):
            _write(path, rates)
        return rates


def _fingerprint(threads: int) -> str:
    import farlight

    isa = cpu.isa() if cpu.unavailable() is None else "none"
    parts = (platform.node(), platform.machine(), platform.processor(), torch.__version__, farlight.__version__, isa, threads)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _read(data: Any) -> Rates:
    rates = dict(DEFAULT_RATES)
    for name, (rate, fixed) in data.items():
        backend, dtype = name.split()
        rates[backend, getattr(torch, dtype)] = (float(rate), float(fixed))
    return rates


def _write(path: Path, rates: Rates) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {f"{backend} {str(dtype).removeprefix('torch.')}": pair for (backend, dtype), pair in rates.items()}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(data, file)
    os.replace(file.name, path)


def measure() -> Rates:
    """Time a large and a tiny call of each backend: their difference gives the rate, the tiny one the fixed price."""
    rates = dict(DEFAULT_RATES)
    near = window(128)
    kernels: dict[str, Any] = {"torch": blocked}
    if cpu.unavailable() is None:
        kernels["cpu"] = cpu
    with torch.inference_mode(False), torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            for name, kernel in kernels.items():
                rates[name, dtype] = _rate(functools.partial(_sparse, kernel, near, dtype), large=4096, tiny=8)
            rates["dense", dtype] = _rate(functools.partial(_dense, dtype), large=1024, tiny=8)
    return rates


_HEADS, _DIM = 4, 64
_CPU = torch.device("cpu")


def _sparse(kernel: Any, near: Any, dtype: torch.dtype, n: int) -> tuple[Callable[[], Any], int]:
    plan = plan_for(near, Sizes.of(n, heads=_HEADS), kernel.SHAPE)
    q = torch.randn(1, _HEADS, n, _DIM, dtype=dtype, device=_CPU)
    return lambda: kernel.forward(q, q, q, plan, scale=0.125, dropout=0.0, seed=0), plan.visited


def _dense(dtype: torch.dtype, n: int) -> tuple[Callable[[], Any], int]:
    q, mask = torch.randn(1, _HEADS, n, _DIM, dtype=dtype, device=_CPU), torch.ones(n, n, dtype=torch.bool, device=_CPU)
    return lambda: scaled_dot_product_attention(q, q, q, attn_mask=mask), _HEADS * n * n


def _rate(call_of: Callable[[int], tuple[Callable[[], Any], int]], *, large: int, tiny: int) -> tuple[float, float]:
    seconds = []
    work = []
    for n, loops in ((large, 1), (tiny, 40)):  # a tiny call alone would be timed on its way to the caches
        call, pairs = call_of(n)
        call()
        spent = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(loops):
                call()
            spent.append((time.perf_counter() - start) / loops)
        seconds.append(min(spent))
        work.append(4 * _DIM * pairs)
    slope = max(seconds[0] - seconds[1], 1e-9) / (work[0] - work[1])
    return 1 / slope / 1e9, max(seconds[1] - slope * work[1], 1e-6)
