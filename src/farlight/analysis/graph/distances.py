"""How many layers lie between two tokens, over all of them: every target's walk, or those of tokens drawn.

Walks go backwards from targets. The mean over ordered pairs of tokens is a mean over targets, so that all targets give it
exactly. Where all would cost too much, some *sure* targets are walked for certain (the ends of the text and the tokens with
the most keys, which differ most from the rest) and others are drawn; the mean of hops is then a ratio of two totals (hops
over pairs), whose margin follows from the residuals of the ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from farlight.analysis.graph.bfs import Walker, words_for
from farlight.analysis.graph.links import Array, Links
from farlight.analysis.graph.sampling import deviation, draw, quantile, unseen

__all__ = ["Hops", "survey"]

# What may be spent on walks, in words touched: 2e8 a second on one core of 2023.
_WORK = 3_000_000_000
_PILOT = 64
_SURE = 16


@dataclass(frozen=True, eq=False)
class Hops:
    """What the walks found.

    targets: (T,) positions; the first `sure` were not drawn. reached: (T,) how many others each target ever hears of;
    total: (T,) the sum of their hops. share: (hops,) of reachable ordered pairs at hop 1, 2, …; farthest: the largest hop.
    cumulative: (layers + 1, T) how many tokens, itself included, a target has heard of after 0, 1, … layers (for as many
    layers as were asked for).
    """

    n: int
    exact: bool
    targets: Array
    sure: int
    reached: Array
    total: Array
    share: Array
    cumulative: Array
    work: int

    @property
    def farthest(self) -> int:
        return int(self.share.size)

    def mean(self, confidence: float) -> tuple[float, float]:
        """Average hops over ordered reachable pairs, and the margin."""
        pairs, hops = self._sum(self.reached), self._sum(self.total)
        if pairs <= 0:
            return math.nan, 0.0
        mean = hops / pairs
        each = self.total[self.reached > 0] / self.reached[self.reached > 0]
        # A kind of target that was never drawn may lie one hop outside of all that was seen.
        spread = 1 + float(each.max() - each.min())
        return mean, self._margin(self.total - mean * self.reached, pairs, confidence, spread)

    def unreachable(self, confidence: float) -> tuple[float, float]:
        """Share of ordered pairs (j, i), j ≠ i, in which i never hears of j, and the margin."""
        every = self.n * (self.n - 1)
        if not every:
            return 0.0, 0.0
        share = 1 - self._sum(self.reached) / every
        expected = self.n - 1 - self.reached
        return max(0.0, share), self._margin(expected - expected[self.sure :].mean(), every, confidence, 1.0)

    def _weights(self) -> Array:
        drawn = self.targets.size - self.sure
        weight = np.ones(self.targets.size)
        if drawn:
            weight[self.sure :] = (self.n - self.sure) / drawn
        return weight

    def _sum(self, values: Array) -> float:
        """The total over all targets."""
        return float((values * self._weights()).sum())

    def _margin(self, residual: Array, denominator: float, confidence: float, spread: float) -> float:
        if self.exact:
            return 0.0
        drawn, rest = self.targets.size - self.sure, self.n - self.sure
        left = max(0.0, 1 - drawn / rest)
        error = deviation(residual[self.sure :]) * rest * math.sqrt(left / drawn) / denominator
        error *= quantile(confidence, drawn // 2)
        return error + unseen(confidence, drawn) * left * spread


def survey(links: Links, *, targets: int | None = None, layers: int = 0, most_hops: int | None = None, seed: int = 0) -> Hops:
    """Walk from all targets where that is affordable, else from as many as are; or from `targets` of them, when given.

    `layers`: keep each target's numbers for so many layers; `most_hops`: go no further than this.
    """
    n, walker = links.n, Walker(links)
    take = _Ledger(layers)
    if targets is None and n <= 1024:
        targets = n
    if targets is None:
        sure, drawn = _choose(links, _PILOT, seed)
        pilot = _Ledger(layers)
        pilot.add(walker.counts(np.concatenate((sure, drawn)), most_hops), sure.size + drawn.size, sure.size)
        affordable = int(_WORK * (sure.size + drawn.size) // max(1, walker.work))
        targets = n if 2 * affordable >= n else affordable
        if targets <= sure.size + drawn.size:
            return pilot.hops(n, False, np.concatenate((sure, drawn)), sure.size, walker.work)
    exact = targets >= n
    sure, drawn = (np.zeros(0, dtype=np.int64), np.arange(n)) if exact else _choose(links, targets, seed)
    chosen = np.concatenate((sure, drawn))
    step = 64 * words_for(n)
    for at in range(0, chosen.size, step):
        batch = chosen[at : at + step]
        take.add(walker.counts(batch, most_hops), batch.size, min(batch.size, max(0, sure.size - at)))
    return take.hops(n, exact, chosen, sure.size, walker.work)


def _choose(links: Links, count: int, seed: int) -> tuple[Array, Array]:
    """(sure targets, targets drawn from the others): the ends and the tokens that see most, then one of each stretch."""
    n = links.n
    most = np.argpartition(links.degree, n - _SURE)[n - _SURE :] if n > _SURE else np.arange(n)
    sure = np.unique(np.concatenate((most, [0, n - 1])))
    if 2 * sure.size > count:
        sure = np.unique(np.array([0, n - 1]))
    others = np.setdiff1d(np.arange(n), sure, assume_unique=True)
    drawn = others[draw(others.size, max(2, count - sure.size), np.random.default_rng(seed))]
    return sure, drawn


class _Ledger:
    """Adds up what batches of walks found."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.reached: list[Array] = []
        self.total: list[Array] = []
        self.cumulative: list[Array] = []
        self.histogram = np.zeros((2, 0))  # sure, drawn

    def add(self, counts: list[Array], walks: int, sure: int) -> None:
        reached, total = np.zeros(walks, dtype=np.int64), np.zeros(walks, dtype=np.int64)
        kept = np.ones((self.layers + 1, walks), dtype=np.int64)
        histogram = np.zeros((2, max(len(counts), self.histogram.shape[1])))
        histogram[:, : self.histogram.shape[1]] = self.histogram
        for hop, new in enumerate(counts, 1):
            reached += new
            total += hop * new
            kept[hop:] += new
            histogram[:, hop - 1] += new[:sure].sum(), new[sure:].sum()
        self.histogram = histogram
        self.reached.append(reached)
        self.total.append(total)
        self.cumulative.append(kept)

    def hops(self, n: int, exact: bool, targets: Array, sure: int, work: int) -> Hops:
        drawn = targets.size - sure
        weight = (n - sure) / drawn if drawn else 0.0
        histogram = self.histogram[0] + weight * self.histogram[1]
        share = histogram / histogram.sum() if histogram.size else histogram
        joined = (np.concatenate(parts, axis=-1) for parts in (self.reached, self.total, self.cumulative))
        reached, total, cumulative = joined
        return Hops(n, exact, targets, sure, reached, total, share, cumulative, work)
