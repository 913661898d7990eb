"""How long planning takes and how large plans are, as a text grows; and the waste of every preset at its paper's sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from farlight.analysis.memory import peak_memory
from farlight.patterns import global_tokens, random_keys, window
from farlight.patterns.expression import Sizes
from farlight.plan.build import TileShape, build, count_pairs
from suite.gallery import clusters_of, presets_shown
from suite.settings import Box, Settings

__all__ = ["planning_rows", "waste_rows"]


def planning_rows(settings: Settings, box: Box) -> Iterator[dict[str, Any]]:
    """Plan window 256 + 64 global + 3 random at n = 2^14 … 2^20 on one thread, nothing cached: seconds (the median of some
    repeats, of one where it takes a second), bytes, exact count.
    """
    pattern = window(256) | global_tokens(range(64)) | random_keys(3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        build(pattern, Sizes.of(4096), TileShape())
        low, high = settings.plan_exponents
        seconds = 0.0
        for exponent in range(low, high + 1):
            sizes = Sizes.of(2**exponent)
            why = box.refusal(4 * seconds)
            if why is not None:
                yield {"tokens": sizes.n_q, "skipped": why}
                continue
            # Watching memory takes time of its own, so that runs are timed apart from the one that is watched.
            with peak_memory() as peak:
                plan = build(pattern, sizes, TileShape())
            spent: list[float] = []
            while len(spent) < settings.repeats and sum(spent) < 1.0:
                start = time.perf_counter()
                plan = build(pattern, sizes, TileShape())
                spent.append(time.perf_counter() - start)
            seconds = statistics.median(spent)
            start = time.perf_counter()
            count = count_pairs(pattern, sizes)
            counting = time.perf_counter() - start
            yield {
                "tokens": sizes.n_q,
                "seconds": seconds,
                "repeats": len(spent),
                "us_per_token": seconds / sizes.n_q * 1e6,
                "plan_mib": plan.nbytes / 2**20,
                "peak_mib": peak.bytes / 2**20,
                "pairs": plan.pairs,
                "count": count,
                "count_seconds": counting,
                "waste": plan.waste,
            }
    finally:
        torch.set_num_threads(threads)


def waste_rows(settings: Settings, box: Box) -> Iterator[dict[str, Any]]:
    """Pairs visited for each pair wanted, for every preset at its paper's sizes."""
    n = settings.tokens
    for shown in (*presets_shown(), clusters_of(n, 512)):
        why = shown.misfit(n, 8) or box.refusal()
        if why is not None:
            yield {"pattern": shown.name, "tokens": n, "skipped": why}
            continue
        plan = build(shown.pattern, Sizes.of(n, heads=8), TileShape())
        density = plan.pairs / (8 * n * n)
        yield {"pattern": shown.name, "tokens": n, "density": density, "waste": plan.waste, "pieces": len(plan.pieces)}
