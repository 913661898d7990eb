"""How many links each head should get: many frontiers, one budget.

A head's candidates are points (links, value). Of these only the ones on the upper concave hull can be the best for some
price of a link; walking up all hulls together, always along the steepest step that is left, gives to flat heads what
local heads do not need. This is water-filling: when the walk stops, every head has been paid up to the same price.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from farlight.errors import ArgumentError

__all__ = ["Option", "allocate", "concave"]


# Once a budget no longer pays for what is wanted most, it is not spent on crumbs: less than this share of a head.
_LEAST = 1e-4


@dataclass(frozen=True)
class Option:
    """One candidate for one head.

    `links`: pairs in one text (a mean over texts where content decides); `kept`: mean share of full probability kept by a
    row; `value`: what is maximised, `kept` itself or a function of it. `make` builds the pattern, or gives the expression of
    a router; it is called for the option that is chosen. `family` names where it came from.
    """

    links: float
    kept: float
    value: float
    make: Callable[[], object]
    family: str = ""


def concave(options: Sequence[Option]) -> list[Option]:
    """Those on the upper concave hull from the cheapest option on, in rising order of links and value.

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
    """One option for each head: the fewest links whose mean `kept` reaches `keep`, or the most value within `links` in all.

    Of all choices that take no more links, none has a larger weighted sum of values than the hull allows; the choice here
    lies below that by less than one step of one head. Then what is left of the budget buys whatever still fits (with `keep`:
    the last step is exchanged for the cheapest option that suffices).

    Raises ArgumentError when `links` does not even pay for the cheapest options, or no choice reaches `keep`.
    """
    weights = [1.0] * len(heads) if weights is None else list(weights)
    hulls = [concave(options) for options in heads]
    at = [0] * len(heads)
    spent = sum(hull[0].links for hull in hulls)
    kept = sum(hull[0].kept for hull in hulls)
    if links is not None and spent > links * (1 + 1e-9) + 1e-9:
        raise ArgumentError(
            f"{links:,.0f} links are allowed, but the cheapest candidates take {spent:,.0f}; allow more, or give cheaper ones."
        )
    steps = [(-weights[head] * _slope(hull[0], hull[1]), head) for head, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    last, tight = -1, False
    while steps and (keep is None or kept < keep * len(heads) - 1e-9):
        _, head = heapq.heappop(steps)
        here, there = hulls[head][at[head]], hulls[head][at[head] + 1]
        if links is not None and spent + there.links - here.links > links * (1 + 1e-9):
            tight = True
            continue  # too dear; a cheaper step of another head may still fit
        if tight and there.value - here.value < _LEAST:
            continue
        at[head] += 1
        last = head
        spent += there.links - here.links
        kept += there.kept - here.kept
        if at[head] + 1 < len(hulls[head]):
            heapq.heappush(steps, (-weights[head] * _slope(there, hulls[head][at[head] + 1]), head))
    chosen = [hull[place] for hull, place in zip(hulls, at, strict=True)]
    if keep is not None:
        if kept < keep * len(heads) - 1e-9:
            raise ArgumentError(
                f"keep = {keep}: the candidates keep at most {kept / max(1, len(heads)):.4f}; ask for less, or give wider ones."
            )
        return _cheaper_last_step(heads, chosen, last, keep * len(heads) - kept)
    return _spend_the_rest(heads, chosen, weights, (links if links is not None else spent) * (1 + 1e-9) - spent)


def _cheaper_last_step(heads: Sequence[Sequence[Option]], chosen: list[Option], last: int, short: float) -> list[Option]:
    """The last step overshoots; the cheapest option of that head that still suffices takes its place."""
    if last >= 0:
        need = chosen[last].kept + short
        enough = [option for option in heads[last] if option.kept >= need - 1e-9 and option.links < chosen[last].links]
        chosen[last] = min(enough, key=lambda option: option.links, default=chosen[last])
    return chosen


def _spend_the_rest(
    heads: Sequence[Sequence[Option]], chosen: list[Option], weights: Sequence[float], left: float
) -> list[Option]:
    """Buy, best price first, what still fits, options beside the hull included."""
    while True:
        best, place = 0.0, None
        for head, options in enumerate(heads):
            now = chosen[head]
            for option in options:
                more = option.links - now.links
                gain = weights[head] * (option.value - now.value)
                if gain > _LEAST * weights[head] and more <= left and (more <= 0 or gain / more > best):
                    best, place = (gain / more if more > 0 else float("inf")), (head, option)
        if place is None:
            return chosen
        head, option = place
        left -= option.links - chosen[head].links
        chosen[head] = option
