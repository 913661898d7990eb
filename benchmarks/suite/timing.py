"""Seconds of calls that are compared: timed in turn, A B A B …, so that a machine that drifts slows down both sides."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Contender", "Timing", "interleaved", "matmul", "matmul_flops", "seconds_of"]

_MATMUL = 2048
# Seconds of a repeat below which the clock, and threads that fell asleep, would be seen.
_SHORTEST = 0.02
# Seconds up to which a call is made once more, untimed, before each repeat. What stood in between may have taken half a minute:
# caches hold other things, and memory that lay free for seconds is slow to get again (measured: 150 ms for 200 MB).
_COLD = 4.0


@dataclass(frozen=True)
class Contender:
    """A call to be timed beside others.

    `most`: the maximum of repeats, for calls that take long. `warm`: call once before, untimed (where the first call plans
    or compiles, this is what keeps it out). `before`: run before each repeat, untimed. `loops`: calls in one repeat; None lets
    short calls be repeated for 20 ms (where there are several repeats).
    """

    name: str
    call: Callable[[], Any]
    most: int = 1_000_000
    warm: bool = True
    before: Callable[[], Any] | None = None
    loops: int | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, the fastest and the slowest of the repeats; `first` is the untimed first call.

    `error` says why there is nothing to time; the seconds are then NaN.
    """

    seconds: float = math.nan
    low: float = math.nan
    high: float = math.nan
    repeats: int = 0
    first: float | None = None
    error: str | None = None

    def row(self) -> dict[str, Any]:
        """The columns of a table of measurements."""
        if self.error is not None:
            return {"error": self.error}
        fields = {"seconds": self.seconds, "low": self.low, "high": self.high, "repeats": self.repeats}
        return fields if self.first is None else {**fields, "first_seconds": self.first}


def interleaved(contenders: Sequence[Contender], *, repeats: int = 5, budget: float = 60.0) -> dict[str, Timing]:
    """Time all contenders in turn, round after round, until `repeats` rounds or `budget` seconds are over (one at least).

    One that raises is left out of the later rounds, and its Timing says what it raised.
    """
    start = time.perf_counter()
    first: dict[str, float] = {}
    spent: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    errors: dict[str, str] = {}
    loops = {contender.name: contender.loops or 1 for contender in contenders}
    for contender in contenders:
        if contender.warm:
            _time(contender, 1, first, errors)
            if repeats > 1 and contender.loops is None and first.get(contender.name, 9.0) < 0.5:
                again: dict[str, float] = {}  # the first call may have planned
                _time(contender, 1, again, errors)
                loops[contender.name] = min(1000, 1 + int(_SHORTEST / again.get(contender.name, _SHORTEST)))
    for turn in range(repeats):
        if turn and time.perf_counter() - start > budget:
            break
        for contender in contenders:
            if contender.name in errors or turn >= contender.most:
                continue
            once: dict[str, float] = {}
            last = spent[contender.name][-1] if spent[contender.name] else first.get(contender.name, math.inf)
            _time(contender, loops[contender.name], once, errors, warm=contender.loops is None and last < _COLD)
            spent[contender.name] += once.values()
    result = {}
    for name, seconds in spent.items():
        if name in errors:
            result[name] = Timing(error=errors[name])
        else:
            result[name] = Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds), first.get(name))
    return result


def _time(contender: Contender, loops: int, into: dict[str, float], errors: dict[str, str], *, warm: bool = False) -> None:
    if contender.before is not None:
        contender.before()
    try:
        gc.disable()
        if warm:
            contender.call()
        start = time.perf_counter()
        for _ in range(loops):
            contender.call()
        _synchronise()
        into[contender.name] = (time.perf_counter() - start) / loops
    # Refusals of farlight, torch and compilers are RuntimeErrors or ValueErrors, and become part of a table.
    except (RuntimeError, ValueError, MemoryError) as error:
        errors[contender.name] = f"{type(error).__name__}: {error}"
    finally:
        gc.enable()


def seconds_of(call: Callable[[], Any], *, repeats: int = 5, budget: float = 20.0) -> float:
    """Median seconds of a call alone, after one to warm up."""
    return interleaved([Contender("", call)], repeats=repeats, budget=budget)[""].seconds


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul(dtype: torch.dtype, size: int = _MATMUL, device: str = "cpu") -> Contender:
    """A square matrix product: the ceiling for attention's own products, timed among the contenders it is compared with."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return Contender("matmul", lambda: a @ b)


def matmul_flops(size: int = _MATMUL) -> int:
    return 2 * size**3
