"""Drawing tokens, and how far an estimate made from them may be from the truth.

Tokens are drawn one from each of S equal stretches of the text, so every token is drawn with the same probability and no
region is missed. The variance is that of neighbouring draws (half the mean squared difference of successive ones: what
differs smoothly along the text is no uncertainty, and what remains is counted in full), with Student's quantile. To it comes
what a kind of token too rare to be drawn could hide: something that S independent draws never met has, at 95 % confidence, a
share below 3 / S of the text (the "rule of three"; ln(1 / (1 - confidence)) / S in general).
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from farlight.analysis.graph.links import Array
from farlight.errors import ArgumentError, show

__all__ = ["check_confidence", "deviation", "draw", "margin_of_mean", "quantile", "unseen"]


def check_confidence(confidence: float) -> float:
    """A probability strictly between 0 and 1."""
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence = {show(confidence)}: it must be a probability between 0 and 1, such as 0.95.")
    return float(confidence)


def draw(population: int, count: int, rng: np.random.Generator) -> Array:
    """`count` numbers below `population`, sorted, one from each of `count` equal stretches; all of them when count allows.

    >>> draw(10, 10, np.random.default_rng(0)).tolist() == list(range(10))
    True
    """
    if count >= population:
        return np.arange(population)
    at = np.floor((np.arange(count) + rng.random(count)) * (population / count)).astype(np.int64)
    return np.minimum(at, population - 1)


def quantile(confidence: float, freedom: int) -> float:
    """Two-sided quantile of Student's t, from the normal one (Cornish and Fisher's expansion, good for freedom >= 10)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    v = max(1, freedom)
    return z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)


def deviation(values: Array) -> float:
    """Standard deviation of values drawn one from each stretch, in their order, within stretches.

    >>> deviation(np.array([5.0, 5.0, 5.0])), round(deviation(np.array([0.0, 2.0, 0.0, 2.0])), 3)
    (0.0, 1.414)
    """
    return float(np.sqrt((np.diff(values) ** 2).mean() / 2)) if values.size > 1 else math.inf


def unseen(confidence: float, draws: int) -> float:
    """The largest share of the text that so many draws may have missed altogether."""
    return min(1.0, -math.log(1 - confidence) / max(1, draws))


def margin_of_mean(values: Array, population: int, confidence: float, spread: float) -> float:
    """Half the width of the confidence interval of a mean over `population`, from values of tokens drawn, in their order.

    `spread` is how far from the mean a value that was never drawn might lie. 0 when everything was drawn.
    """
    draws = values.size
    if draws >= population:
        return 0.0
    rest = 1 - draws / population
    error = quantile(confidence, draws // 2) * deviation(values) * math.sqrt(rest / draws)
    return error + unseen(confidence, draws) * rest * spread
