"""From which length on does each pattern beat dense attention?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from farlight.errors import FarlightError
from farlight.patterns.expression import Sizes
from suite.contenders import DENSE, automatic, best_backend, inputs, ours
from suite.gallery import gallery
from suite.settings import Box, Settings, name_of
from suite.timing import Contender, Timing, interleaved

__all__ = ["breakeven_rows", "first_win"]

Row = dict[str, Any]
_CLEARLY = 1.5


def breakeven_rows(settings: Settings, box: Box) -> Iterator[Row]:
    """For each pattern and dtype, forward: how many times as fast as dense attention the best sparse backend and "auto" are at
    each short length, and from which of these lengths on they win. Causal patterns meet causal dense attention. Lengths after
    two clear wins are not measured.
    """
    names = [(one.name, one.causal) for one in gallery(settings.short_lengths[-1], settings.heads)]
    for dtype in settings.types():
        for at, (name, causal) in enumerate(names):
            about = {
                "pattern": name,
                "dtype": name_of(dtype),
                "pass": "forward",
                "against": f"{DENSE}{', causal' if causal else ''}",
            }
            why = box.refusal(2.0)
            if why is not None:
                yield {**about, "skipped": why}
                continue
            sides: dict[str, dict[int, tuple[Timing, Timing]]] = {}
            misfits: dict[str, str] = {}
            chosen: dict[str, str] = {}
            clear = 0
            for n in settings.short_lengths:
                if clear == 2:
                    break
                try:
                    timings, backend, auto = _at_length(at, n, settings, dtype)
                except FarlightError as error:  # the pattern needs more tokens than there are
                    misfits[str(n)] = str(error)
                    continue
                chosen[str(n)] = auto
                slowest = 0.0
                for side in (backend, "auto"):
                    sides.setdefault(side, {})[n] = (timings[f"farlight {side}"], timings[DENSE])
                    slowest = max(slowest, timings[f"farlight {side}"].seconds)
                clear = clear + 1 if timings[DENSE].seconds > _CLEARLY * slowest else 0
            if not sides:
                yield {**about, "skipped": next(iter(misfits.values()), "there is no length to measure")}
            for side, measured in sides.items():
                row = {**about, "backend": side, **_row(measured)}
                if side == "auto":
                    row["auto_takes"] = chosen
                yield {**row, "misfits": misfits} if misfits else row


def _at_length(at: int, n: int, settings: Settings, dtype: torch.dtype) -> tuple[dict[str, Timing], str, str]:
    """The timings at one length, the sparse backend among them, and what "auto" takes."""
    heads, dim = settings.heads, settings.head_dim
    shown = list(gallery(n, heads))[at]
    q, k, v = inputs(n, heads, dim, dtype)
    shown.pattern.check(Sizes.of(n, heads=heads))
    auto = automatic(shown.pattern, n, heads, dim, dtype)
    backend = best_backend(shown.pattern, n, heads, dim, dtype)
    full = Contender(DENSE, lambda: scaled_dot_product_attention(q, k, v, is_causal=shown.causal))
    sides = [full, ours(backend, shown.pattern, q, k, v), ours("auto", shown.pattern, q, k, v)]
    with torch.no_grad():
        return interleaved(sides, repeats=settings.repeats, budget=2.0), backend, auto


def _row(measured: dict[int, tuple[Timing, Timing]]) -> Row:
    good = {n: pair for n, pair in measured.items() if pair[0].error is None and pair[1].error is None}
    times = {n: full.seconds / mine.seconds for n, (mine, full) in good.items()}
    row: Row = {"breakeven": first_win(times), "times_dense": {str(n): ratio for n, ratio in times.items()}}
    row["seconds"] = {str(n): [mine.seconds, mine.low, mine.high] for n, (mine, _) in good.items()}
    row["dense_seconds"] = {str(n): [full.seconds, full.low, full.high] for n, (_, full) in good.items()}
    return row


def first_win(times: dict[int, float]) -> int | None:
    """The smallest length from which on every measured ratio is at least 1; None when the longest one still loses.

    >>> first_win({128: 0.5, 256: 1.1, 512: 0.9, 1024: 1.5, 2048: 3.0})
    1024
    """
    found = None
    for n in sorted(times, reverse=True):
        if times[n] < 1:
            break
        found = n
    return found
