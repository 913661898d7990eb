"""Allocation of one budget of links over many heads: a greedy walk on the concave hulls of their options.

Each head h offers options (links, value). The problem, maximise Σ w_h · value_h subject to Σ links_h <= budget with one option
per head, is a multiple-choice knapsack. Its Lagrangian relaxation decouples the heads: at price λ per link a head takes the
option that maximises w_h · value - λ · links, and such options lie on the upper concave hull of its points. So:

  1. `concave` reduces each head to its hull, whose slopes (value per link) fall.
  2. A heap holds the next hull segment of every head, by w_h · slope. The steepest segment is taken until the target is met:
     with S segments in all, O(S log H). This is λ lowered continuously (water-filling): at the end all heads have paid the same
     λ.
  3. The relaxation is exact except for the segment at which the budget ends, so the result is within one segment of one head of
     the optimum. Two repairs use the options off the hull: the last segment is replaced by the cheapest option that suffices
     (`keep`), or the rest of the budget is spent on the best-priced options that still fit (`links`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from farlight.errors import ArgumentError

__all__ = ["Option", "allocate", "concave"]

# Smallest gain of value worth a step once the budget no longer pays for the steepest segment.
_MIN_GAIN = 1e-4


@dataclass(frozen=True)
class Option:
    """One candidate for one head.

    Attributes:
        links: pairs in one text; for routers, a mean over texts.
        kept: share of full attention probability that a row keeps, mean over rows and texts.
        value: the objective, `kept` or a function of it (see `candidates.row_value`).
        make: builds the pattern, or returns a router's expression; called only for the chosen option.
        family: the name of the candidate family.
    """

    links: float
    kept: float
    value: float
    make: Callable[[], object]
    family: str = ""


def concave(options: Sequence[Option]) -> list[Option]:
    """The options on the upper concave hull, in rising order of links and value, beginning with the fewest links.

    >>> points = [(0, 0.0), (4, 0.3), (4, 0.5), (8, 0.6), (12, 0.9), (20, 0.9)]
    >>> [option.links for option in concave([Option(l, v, v, object) for l, v in points])]
    [0, 4, 12]
    """
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.links, -option.value)):
        if hull and option.value <= hull[-1].value:
            continue
        if hull and option.links == hull[-1].links:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) < _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(low: Option, high: Option) -> float:
    return (high.value - low.value) / (high.links - low.links)


def allocate(
    heads: Sequence[Sequence[Option]],
    *,
    keep: float | None = None,
    links: float | None = None,
    weights: Sequence[float] | None = None,
) -> list[Option]:
    """One option per head: the fewest links whose mean `kept` reaches `keep`, or the largest value within `links` in all.

    Args:
        heads: the options of each head.
        keep: target of the mean of `kept` over heads. One of keep and links.
        links: budget, summed over heads.
        weights: `w_h`, factor on the values of each head; None means 1.

    The weighted sum of values is within one hull segment of one head of the optimum. Raises ArgumentError when `links` is below
    the cheapest options, or when no choice reaches `keep`.
    """
    weights = [1.0] * len(heads) if weights is None else list(weights)
    hulls = [concave(options) for options in heads]
    spent = sum(hull[0].links for hull in hulls)
    if links is not None and spent > links * (1 + 1e-9) + 1e-9:
        raise ArgumentError(
            f"{links:,.0f} links are allowed, but the cheapest candidates take {spent:,.0f}; allow more, or give cheaper ones."
        )
    chosen, last, kept, spent = _walk(hulls, weights, keep, links)
    if keep is not None:
        if kept < keep * len(heads) - 1e-9:
            raise ArgumentError(
                f"keep = {keep}: the candidates keep at most {kept / max(1, len(heads)):.4f}; ask for less, or give wider ones."
            )
        return _cheaper_last_step(heads, chosen, last, keep * len(heads) - kept)
    return _spend_the_rest(heads, chosen, weights, (links if links is not None else spent) * (1 + 1e-9) - spent)


def _walk(
    hulls: Sequence[Sequence[Option]], weights: Sequence[float], keep: float | None, links: float | None
) -> tuple[list[Option], int, float, float]:
    """Step 2: (chosen options, head of the last step or -1, Σ kept, Σ links)."""
    index = [0] * len(hulls)
    spent = sum(hull[0].links for hull in hulls)
    kept = sum(hull[0].kept for hull in hulls)
    segments = [(-weights[head] * _slope(hull[0], hull[1]), head) for head, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(segments)
    last, exhausted = -1, False
    while segments and (keep is None or kept < keep * len(hulls) - 1e-9):
        _, head = heapq.heappop(segments)
        current, following = hulls[head][index[head]], hulls[head][index[head] + 1]
        if links is not None and spent + following.links - current.links > links * (1 + 1e-9):
            exhausted = True
            continue  # over budget; a cheaper segment of another head may still fit
        if exhausted and following.value - current.value < _MIN_GAIN:
            continue
        index[head] += 1
        last = head
        spent += following.links - current.links
        kept += following.kept - current.kept
        if index[head] + 1 < len(hulls[head]):
            heapq.heappush(segments, (-weights[head] * _slope(following, hulls[head][index[head] + 1]), head))
    return [hull[point] for hull, point in zip(hulls, index, strict=True)], last, kept, spent


def _cheaper_last_step(heads: Sequence[Sequence[Option]], chosen: list[Option], last: int, shortfall: float) -> list[Option]:
    """Replace the option of head `last`, whose segment overshot, by the cheapest that still reaches the target.

    `shortfall` is the target minus what is kept, so negative or 0.
    """
    if last >= 0:
        needed = chosen[last].kept + shortfall
        enough = [option for option in heads[last] if option.kept >= needed - 1e-9 and option.links < chosen[last].links]
        chosen[last] = min(enough, key=lambda option: option.links, default=chosen[last])
    return chosen


def _spend_the_rest(
    heads: Sequence[Sequence[Option]], chosen: list[Option], weights: Sequence[float], left: float
) -> list[Option]:
    """Exchange options, best price first, while the `left` links pay for one; options off the hull included."""
    while True:
        best_price, best = 0.0, None
        for head, options in enumerate(heads):
            current = chosen[head]
            for option in options:
                cost = option.links - current.links
                gain = weights[head] * (option.value - current.value)
                if gain > _MIN_GAIN * weights[head] and cost <= left and (cost <= 0 or gain / cost > best_price):
                    best_price, best = (gain / cost if cost > 0 else float("inf")), (head, option)
        if best is None:
            return chosen
        head, option = best
        left -= option.links - chosen[head].links
        chosen[head] = option
