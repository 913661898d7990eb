"""Stratified sampling of tokens, and confidence margins of means estimated from the sample.

The text is cut into S equal strata and one token is drawn from each, so that every token is equally likely and no region is
missed. A margin has two parts:

- sampling error: Student's t quantile times the standard error, with the variance taken from successive differences (half
  the mean squared difference of neighbouring draws). A trend along the text then does not count as variance.
- rare tokens: a kind of token with share p of the text is missed by all S draws with probability (1 - p)^S. At 95 %
  confidence a missed kind has p below 3 / S (the "rule of three"; ln(1 / (1 - confidence)) / S in general), and may shift the
  mean by p times the possible range.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from farlight.analysis.graph.links import Array
from farlight.errors import ArgumentError, show

__all__ = ["check_confidence", "margin_of_mean", "max_missed_share", "stratified_deviation", "stratified_sample", "t_quantile"]


def check_confidence(confidence: float) -> float:
    """`confidence` as a float. Raises ArgumentError unless it lies strictly between 0 and 1."""
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence = {show(confidence)}: it must be a probability between 0 and 1, such as 0.95.")
    return float(confidence)


def stratified_sample(population: int, count: int, rng: np.random.Generator) -> Array:
    """`(count,)` sorted int64 numbers below `population`, one from each of `count` equal strata; all when count allows.

    >>> stratified_sample(10, 10, np.random.default_rng(0)).tolist() == list(range(10))
    True
    """
    if count >= population:
        return np.arange(population)
    drawn = np.floor((np.arange(count) + rng.random(count)) * (population / count)).astype(np.int64)
    return np.minimum(drawn, population - 1)


def t_quantile(confidence: float, freedom: int) -> float:
    """Two-sided quantile of Student's t, from the normal one (Cornish-Fisher expansion, good for freedom >= 10)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    v = max(1, freedom)
    return z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)


def stratified_deviation(values: Array) -> float:
    """Standard deviation within strata, from successive differences of values in the order of their strata.

    >>> stratified_deviation(np.array([5.0, 5.0, 5.0])), round(stratified_deviation(np.array([0.0, 2.0, 0.0, 2.0])), 3)
    (0.0, 1.414)
    """
    return float(np.sqrt((np.diff(values) ** 2).mean() / 2)) if values.size > 1 else math.inf


def max_missed_share(confidence: float, draws: int) -> float:
    """The largest share of the text that `draws` draws miss altogether with probability 1 - confidence."""
    return min(1.0, -math.log(1 - confidence) / max(1, draws))


def margin_of_mean(values: Array, population: int, confidence: float, value_range: float) -> float:
    """Half the width of the confidence interval of a mean over `population`, from sampled values in the order of their strata.

    `value_range`: how far from the mean the value of a missed kind of token may lie. 0 when everything was sampled.
    """
    draws = values.size
    if draws >= population:
        return 0.0
    unsampled = 1 - draws / population
    error = t_quantile(confidence, draws // 2) * stratified_deviation(values) * math.sqrt(unsampled / draws)
    return error + max_missed_share(confidence, draws) * unsampled * value_range
