"""Distances over ordered pairs of tokens: mean, histogram, reachability, from backward searches of all or sampled targets.

`graph/bfs.py` gives the number of tokens at each distance from a target; a mean over ordered pairs is a mean over targets.
Where all targets cost too much, the targets are two groups: *fixed* ones, searched with certainty because they differ most
from the rest (the ends of the text and the tokens with the most keys), and a stratified sample of the others. The mean
distance is then a ratio estimator (sum of distances over number of reachable pairs), its margin that of the residuals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from farlight.analysis.graph.bfs import BitsetBFS, words_per_batch
from farlight.analysis.graph.links import Array, Links
from farlight.analysis.graph.sampling import max_missed_share, stratified_deviation, stratified_sample, t_quantile

__all__ = ["DistanceSurvey", "survey"]

# Budget of all searches in words touched: 2e8 a second on one core of 2023.
_WORK = 3_000_000_000
_PILOT_TARGETS = 64
_FIXED_TARGETS = 16


@dataclass(frozen=True, eq=False)
class DistanceSurvey:
    """Distances from searches over T targets.

    targets: (T,) positions; the first `fixed` ones were not sampled. reached: (T,) tokens with a path to each target; total:
    (T,) the sum of their distances. histogram: (diameter,) share of the reachable ordered pairs at distance 1, 2, ….
    cumulative: (layers + 1, T) tokens within distance 0, 1, … of each target, itself included. work: words touched.
    """

    n: int
    exact: bool
    targets: Array
    fixed: int
    reached: Array
    total: Array
    histogram: Array
    cumulative: Array
    work: int

    @property
    def diameter(self) -> int:
        """The largest distance in any search: the diameter when `exact`, else a lower bound."""
        return int(self.histogram.size)

    def mean(self, confidence: float) -> tuple[float, float]:
        """(mean distance over ordered reachable pairs, margin)."""
        pairs, distances = self._sum(self.reached), self._sum(self.total)
        if pairs <= 0:
            return math.nan, 0.0
        mean = distances / pairs
        target_means = self.total[self.reached > 0] / self.reached[self.reached > 0]
        # A kind of target that was never sampled may lie one hop outside the range of the sampled ones.
        value_range = 1 + float(target_means.max() - target_means.min())
        return mean, self._margin(self.total - mean * self.reached, pairs, confidence, value_range)

    def unreachable(self, confidence: float) -> tuple[float, float]:
        """(share of ordered pairs j ≠ i without a path from j to i, margin)."""
        pairs = self.n * (self.n - 1)
        if not pairs:
            return 0.0, 0.0
        share = 1 - self._sum(self.reached) / pairs
        missing = self.n - 1 - self.reached
        return max(0.0, share), self._margin(missing - missing[self.fixed :].mean(), pairs, confidence, 1.0)

    def _sum(self, values: Array) -> float:
        """Estimated sum over all n targets: fixed targets weigh 1, sampled ones (n - fixed) / sampled."""
        weight = np.ones(self.targets.size)
        if self.targets.size > self.fixed:
            weight[self.fixed :] = (self.n - self.fixed) / (self.targets.size - self.fixed)
        return float((values * weight).sum())

    def _margin(self, residual: Array, denominator: float, confidence: float, value_range: float) -> float:
        """Half the width of the confidence interval of a ratio with these residuals per target."""
        if self.exact:
            return 0.0
        sampled, population = self.targets.size - self.fixed, self.n - self.fixed
        unsampled = max(0.0, 1 - sampled / population)
        deviation = stratified_deviation(residual[self.fixed :])
        error = deviation * population * math.sqrt(unsampled / sampled) / denominator
        error *= t_quantile(confidence, sampled // 2)
        return error + max_missed_share(confidence, sampled) * unsampled * value_range


def survey(
    links: Links, *, targets: int | None = None, layers: int = 0, max_depth: int | None = None, seed: int = 0
) -> DistanceSurvey:
    """Search from `targets` targets; None: from all where the budget allows it (always for n <= 1024), else as many as it does.

    `layers`: depth of the table `cumulative`; `max_depth`: distance at which every search stops. The affordable number of
    targets comes from a pilot of 64.
    """
    n, bfs = links.n, BitsetBFS(links)
    if targets is None and n <= 1024:
        targets = n
    if targets is None:
        fixed, sampled = _choose_targets(links, _PILOT_TARGETS, seed)
        pilot_targets = np.concatenate((fixed, sampled))
        pilot = _DistanceTotals(layers)
        pilot.add(bfs.frontier_sizes(pilot_targets, max_depth), pilot_targets.size, fixed.size)
        affordable = int(_WORK * pilot_targets.size // max(1, bfs.work))
        targets = n if 2 * affordable >= n else affordable
        if targets <= pilot_targets.size:
            return pilot.survey(n, False, pilot_targets, fixed.size, bfs.work)
    exact = targets >= n
    fixed, sampled = (np.zeros(0, dtype=np.int64), np.arange(n)) if exact else _choose_targets(links, targets, seed)
    all_targets = np.concatenate((fixed, sampled))
    totals = _DistanceTotals(layers)
    step = 64 * words_per_batch(n)
    for start in range(0, all_targets.size, step):
        batch = all_targets[start : start + step]
        totals.add(bfs.frontier_sizes(batch, max_depth), batch.size, min(batch.size, max(0, fixed.size - start)))
    return totals.survey(n, exact, all_targets, fixed.size, bfs.work)


def _choose_targets(links: Links, count: int, seed: int) -> tuple[Array, Array]:
    """(fixed targets, sampled targets): the ends and the tokens of largest in-degree, then one token per stratum."""
    n = links.n
    top = np.argpartition(links.in_degree, n - _FIXED_TARGETS)[n - _FIXED_TARGETS :] if n > _FIXED_TARGETS else np.arange(n)
    fixed = np.unique(np.concatenate((top, [0, n - 1])))
    if 2 * fixed.size > count:
        fixed = np.unique(np.array([0, n - 1]))
    others = np.setdiff1d(np.arange(n), fixed, assume_unique=True)
    sampled = others[stratified_sample(others.size, max(2, count - fixed.size), np.random.default_rng(seed))]
    return fixed, sampled


class _DistanceTotals:
    """Accumulates the frontier sizes of batches of searches."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.reached: list[Array] = []
        self.total: list[Array] = []
        self.cumulative: list[Array] = []
        self.pairs_at = np.zeros((2, 0))  # pairs by distance: of fixed targets, of sampled targets

    def add(self, sizes: list[Array], searches: int, fixed: int) -> None:
        """A batch of `searches` targets, the first `fixed` ones fixed; `sizes[d - 1]`: (searches,) tokens at distance d."""
        reached, total = np.zeros(searches, dtype=np.int64), np.zeros(searches, dtype=np.int64)
        cumulative = np.ones((self.layers + 1, searches), dtype=np.int64)
        pairs_at = np.zeros((2, max(len(sizes), self.pairs_at.shape[1])))
        pairs_at[:, : self.pairs_at.shape[1]] = self.pairs_at
        for distance, size in enumerate(sizes, 1):
            reached += size
            total += distance * size
            cumulative[distance:] += size
            pairs_at[:, distance - 1] += size[:fixed].sum(), size[fixed:].sum()
        self.pairs_at = pairs_at
        self.reached.append(reached)
        self.total.append(total)
        self.cumulative.append(cumulative)

    def survey(self, n: int, exact: bool, targets: Array, fixed: int, work: int) -> DistanceSurvey:
        """The totals of all batches, which had these targets in this order."""
        sampled = targets.size - fixed
        weight = (n - fixed) / sampled if sampled else 0.0
        pairs_at = self.pairs_at[0] + weight * self.pairs_at[1]
        histogram = pairs_at / pairs_at.sum() if pairs_at.size else pairs_at
        columns = (np.concatenate(parts, axis=-1) for parts in (self.reached, self.total, self.cumulative))
        reached, total, cumulative = columns
        return DistanceSurvey(n, exact, targets, fixed, reached, total, histogram, cumulative, work)
