"""Candidate families: for each head a list of options from few links to many, from which `frontier.allocate` chooses.

Fixed families are derived from a head's profile:
  * window, dilated, strided, offsets: states of greedy growth (`greedy.grow`), each family with its own queues of distances,
    each joined with global keys where those have the better price;
  * blocks, pairs: cells of a grid. Cells are disjoint, so sorting them by price is optimal and no growth is needed.
Routers choose pairs by content: each is given as an expression, is one option, and is measured (`measurements.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from operator import or_

import numpy as np
import torch

from farlight.analysis.fit.frontier import Option, concave
from farlight.analysis.fit.greedy import GrowthState, LinkUnits, grow, row_shares
from farlight.analysis.fit.profile import HeadProfile
from farlight.errors import ArgumentError, show
from farlight.patterns import blocks, full, offsets, pairs, seen_by_all, strided, window
from farlight.patterns.expression import Pattern
from farlight.routing.notation import read_router

__all__ = ["CONTENT", "DEFAULT", "FIXED", "fixed_options", "parse_candidates", "row_value", "topblocks_expressions"]

# Options of a sorted list of cells, spaced geometrically in the number of cells.
_CELL_OPTIONS = 256
_DILATIONS = (2, 4, 8, 16, 32, 64)
_STRIDES = (2, 4, 8, 16, 32, 64, 128)


def row_value(kept: torch.Tensor, even: bool) -> torch.Tensor:
    """The value of a row's kept share: `kept`, or with `even` 1 - (1 - kept)², which favours rows that keep little."""
    return 1 - (1 - kept.clamp(max=1.0)).square() if even else kept


def fixed_options(profile: HeadProfile, families: Sequence[str], even: bool) -> list[Option]:
    """The options of one head in `families` (keys of `FIXED`), and `full()`; no families, no options."""
    if not families:
        return []
    units = LinkUnits(profile)
    kept = float(profile.distance.sum()) / max(1, profile.n_q) + profile.mean_sink
    options = [Option(float(profile.distance_links.sum()), kept, kept, full, "full")]
    for family in families:
        options += FIXED[family](profile, units, even)
    return options


# ---- families grown from distances and global keys -------------------------------------------------------------------
def _grown_options(
    states: Iterable[GrowthState], make: Callable[[GrowthState], Pattern], profile: HeadProfile, even: bool, family: str
) -> list[Option]:
    """The growth states on the concave hull as options.

    With `even`, a state's value is the mean of `row_value` over rows. It is computed for the hull by plain shares alone, since
    each takes O(n_q · n_k); and from the mean share where the profile does not know single pairs.
    """
    sink = profile.mean_sink
    hull = concave([Option(s.links, s.kept + sink, s.kept + sink, partial(make, s), family) for s in states])
    if not even:
        return hull
    options = []
    for option in hull:
        state: GrowthState = option.make.args[-1]  # type: ignore[attr-defined]
        shares = torch.tensor([option.kept], device="cpu")
        if profile.block == 1:
            shares = row_shares(profile, state) + profile.sink
        value = row_value(shares, True).mean().item()
        options.append(Option(option.links, option.kept, value, option.make, family))
    return options


def _union(parts: Sequence[Pattern]) -> Pattern:
    return reduce(or_, parts) if parts else offsets([])


def _global_keys(state: GrowthState) -> list[Pattern]:
    return [seen_by_all(sorted(state.keys))] if state.keys else []


def _window(state: GrowthState) -> Pattern:
    near = []
    if state.runs:
        near = [_clipped_window(min(start for start, _ in state.runs), max(stop for _, stop in state.runs) - 1)]
    return _union(near + _global_keys(state))


def _clipped_window(lowest: int, highest: int, dilation: int = 1) -> Pattern:
    """The window over the distances lowest … highest, extended to 0: where 0 lies outside, the text has no distance between."""
    return window(max(0, -lowest // dilation), max(0, highest // dilation), dilation=dilation)


def _offsets(state: GrowthState) -> Pattern:
    """The distances that are contiguous around 0 as a window, the others as a list."""
    distances = {d for start, stop in state.runs for d in range(start, stop)}
    parts: list[Pattern] = []
    if 0 in distances:
        left = right = 0
        while -left - 1 in distances:
            left += 1
        while right + 1 in distances:
            right += 1
        parts.append(window(left, right))
        distances -= set(range(-left, right + 1))
    if distances:
        parts.append(offsets(sorted(distances)))
    return _union(parts + _global_keys(state))


def _sides(units: LinkUnits, step: int = 1) -> list[list[int]]:
    """Two queues of units: distances 0, -step, -2·step, … and step, 2·step, …, as far as the text reaches."""
    low, high = int(units.edges[0]), int(units.edges[-1])
    if step == 1:
        runs = range(units.edges.size - 1)
        if not low <= 0 < high:  # all distances are on one side of 0: a single queue, nearest first
            return [list(runs if low > 0 else reversed(runs)), []]
        zero = units.index_of(0)
        return [list(reversed(runs[: zero + 1])), list(runs[zero + 1 :])]
    left, right = range(0, low - 1, -step), range(step, high, step)
    return [[units.index_of(d) for d in side if low <= d < high] for side in (left, right)]


def _has_single_distances(units: LinkUnits) -> bool:
    """False for long texts, where a unit is a run of distances and cannot be one multiple of a dilation or stride."""
    return int(np.diff(units.edges).max(initial=1)) == 1


def _window_family(profile: HeadProfile, units: LinkUnits, even: bool) -> list[Option]:
    return _grown_options(grow(units, _sides(units), unlock=True), _window, profile, even, "window")


def _dilated(dilation: int, state: GrowthState) -> Pattern:
    near = []
    if state.runs:
        distances = [distance for distance, _ in state.runs]
        near = [_clipped_window(min(distances), max(distances), dilation)]
    return _union(near + _global_keys(state))


def _dilated_family(profile: HeadProfile, units: LinkUnits, even: bool) -> list[Option]:
    if not _has_single_distances(units):
        return []
    options: list[Option] = []
    for dilation in _DILATIONS:
        if 2 * dilation < profile.n_k:
            states = grow(units, _sides(units, dilation), unlock=True)
            options += _grown_options(states, partial(_dilated, dilation), profile, even, "dilated")
    return options


def _strided(stride: int, state: GrowthState) -> Pattern:
    # Multiples of the stride are in every state; the other distances are the window's.
    others = [distance for distance, _ in state.runs if distance % stride]
    near = [_clipped_window(min(others), max(others))] if others else []
    return _union([strided(stride), *near, *_global_keys(state)])


def _strided_family(profile: HeadProfile, units: LinkUnits, even: bool) -> list[Option]:
    if not _has_single_distances(units):
        return []
    low, high = int(units.edges[0]), int(units.edges[-1])
    options: list[Option] = []
    for stride in _STRIDES:
        if 2 * stride < profile.n_k:
            multiples = [units.index_of(d) for d in range(low + (-low) % stride, high, stride)]
            states = grow(units, _sides(units), start=multiples)
            options += _grown_options(states, partial(_strided, stride), profile, even, "strided")
    return options


def _offsets_family(profile: HeadProfile, units: LinkUnits, even: bool) -> list[Option]:
    single_runs = [[unit] for unit in range(units.edges.size - 1)]
    return _grown_options(grow(units, single_runs), _offsets, profile, even, "offsets")


# ---- families of disjoint cells --------------------------------------------------------------------------------------
def _cell_options(profile: HeadProfile, block: int, even: bool, family: str) -> list[Option]:
    """Options of the best cells of `block` x `block` pairs: geometric counts of cells in falling order of price.

    Within a row of cells, cells are sorted by kept share per link. Each one's value is the increase of `row_value` from the
    share that the cells before it keep, taken from the mean share of the cell's rows. Then all cells are sorted by value per
    link; as `row_value` is concave, the order within a row is preserved.
    """
    if block % profile.block:
        return []
    gain, cost = (_sum_blocks(x, block // profile.block) for x in (profile.cells, profile.cell_links))
    rows = torch.full((gain.shape[0], 1), float(block), device="cpu")  # query rows of each row of cells
    rows[-1] = profile.n_q - (gain.shape[0] - 1) * block
    share = gain / rows
    sink = _sum_blocks(profile.sink[:, None], block)[:, :1] / rows  # every pattern keeps it
    by_row = (share / cost.clamp(min=1e-12)).sort(dim=1, descending=True, stable=True).indices
    share = share.gather(1, by_row)
    cost = cost.gather(1, by_row)
    after = share.cumsum(1)
    value = (row_value(sink + after, even) - row_value(sink + after - share, even)) * rows
    order = (value / cost.clamp(min=1e-12)).flatten().sort(descending=True, stable=True).indices

    links = cost.flatten()[order].cumsum(0)
    kept_total = profile.mean_sink + (share * rows).flatten()[order].cumsum(0) / max(1, profile.n_q)
    no_links = float((row_value(sink, even) * rows).sum()) / max(1, profile.n_q)
    value_total = no_links + value.flatten()[order].cumsum(0) / max(1, profile.n_q)
    cells = (torch.arange(by_row.shape[0], device="cpu")[:, None] * by_row.shape[1] + by_row).flatten()[order]
    points = np.geomspace(1, order.numel(), min(_CELL_OPTIONS, order.numel())) if order.numel() else np.zeros(0)
    counts = np.unique(points.round().astype(int))

    def make(count: int) -> Pattern:
        layout = torch.zeros(gain.numel(), dtype=torch.bool, device="cpu")
        layout[cells[:count]] = True
        return pairs(layout.view(gain.shape)) if block == 1 else blocks(layout.view(gain.shape), block)

    return [Option(0.0, profile.mean_sink, no_links, partial(offsets, []), family)] + [
        Option(links[n - 1].item(), kept_total[n - 1].item(), value_total[n - 1].item(), partial(make, int(n)), family)
        for n in counts
    ]


def _sum_blocks(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Sums over `factor` x `factor` elements of a matrix; zeros beyond its edges."""
    if factor == 1:
        return x
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x, (0, -columns % factor, 0, -rows % factor))
    summed: torch.Tensor = padded.unflatten(1, (-1, factor)).sum(2).unflatten(0, (-1, factor)).sum(1)
    return summed


def _blocks_family(profile: HeadProfile, units: LinkUnits, even: bool) -> list[Option]:
    return _cell_options(profile, max(8, profile.block), even, "blocks")


def _pairs_family(profile: HeadProfile, units: LinkUnits, even: bool) -> list[Option]:
    return _cell_options(profile, 1, even, "pairs")


FIXED: dict[str, Callable[[HeadProfile, LinkUnits, bool], list[Option]]] = {
    "window": _window_family,
    "dilated": _dilated_family,
    "strided": _strided_family,
    "offsets": _offsets_family,
    "blocks": _blocks_family,
    "pairs": _pairs_family,
}

# Families when `candidates` is None. "pairs" and "blocks" hold for one text length, and "pairs" overfits few texts, so both
# must be named.
DEFAULT = ("window", "dilated", "strided", "offsets")

CONTENT = ("topblocks",)


# ---- what a user passes as candidates --------------------------------------------------------------------------------
def parse_candidates(candidates: Sequence[str | Pattern] | None, causal: bool) -> tuple[list[str], list[str]]:
    """(names of fixed families, expressions of patterns and routers) of the argument `candidates` of `farlight.fit`.

    `causal`: the base is causal, so content families choose among past keys. Raises ArgumentError for what is no candidate and
    PatternError for an expression that cannot be read.
    """
    if candidates is None:
        return list(DEFAULT), []
    if isinstance(candidates, str | Pattern):
        candidates = [candidates]
    families: list[str] = []
    expressions: list[str] = []
    for candidate in candidates:
        if isinstance(candidate, Pattern):
            expressions.append(repr(candidate))
        elif not isinstance(candidate, str):
            raise ArgumentError(
                f"candidates: {type(candidate).__name__} is not a candidate; give a family ({', '.join((*FIXED, *CONTENT))}), "
                "a pattern, or the expression of a pattern or router, such as 'topblocks(share=0.1, block=8) | window(2)'."
            )
        elif candidate in FIXED:
            families.append(candidate)
        elif candidate in CONTENT:
            expressions += topblocks_expressions(causal)
        else:
            if candidate.isidentifier():
                raise ArgumentError(
                    f"candidates: there is no family {show(candidate)}; known are {', '.join((*FIXED, *CONTENT))}."
                )
            read_router(candidate)
            expressions.append(candidate)
    if not families and not expressions:
        raise ArgumentError("candidates is empty; give at least one, or None for " + ", ".join(DEFAULT) + ".")
    return families, expressions


def topblocks_expressions(causal: bool) -> list[str]:
    """Expressions of the family "topblocks": blocks of 4 keys chosen per query by share or mass, joined with near and end
    keys."""
    flag = ", causal=True" if causal else ""
    fixed = "window(2, 0) | seen_by_all([0])" if causal else "window(2) | seen_by_all([0, -1])"
    budgets = [f"share={share}" for share in (0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.36)]
    budgets += [f"mass={mass}" for mass in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)]
    return [fixed] + [f"topblocks({budget}, block=4, query_block=1{flag}) | {fixed}" for budget in budgets]
