"""The families of patterns among which a head may choose, each as a list of options from cheap to complete.

Fixed families are grown from a head's profile. Where content decides there is nothing to grow: routers are given as
expressions, each is one option, and what it costs and keeps is measured (`measured.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch

from farlight.analysis.fit.frontier import Option, concave
from farlight.analysis.fit.greedy import Grown, Units, grow, row_shares
from farlight.analysis.fit.profile import HeadProfile
from farlight.errors import ArgumentError, show
from farlight.patterns import blocks, full, offsets, pairs, seen_by_all, strided, window
from farlight.patterns.expression import Pattern
from farlight.routing.notation import read_router

__all__ = ["CONTENT", "DEFAULT", "FIXED", "fixed_options", "row_value", "sorted_out", "topblocks"]

# Budgets at which a sorted list of cells is offered.
_POINTS = 256
_DILATIONS = (2, 4, 8, 16, 32, 64)
_STRIDES = (2, 4, 8, 16, 32, 64, 128)


def row_value(kept: torch.Tensor, even: bool) -> torch.Tensor:
    """What a row's share is worth: itself, or with `even` 1 - (1 - kept)², so that rows that keep little count more."""
    return 1 - (1 - kept.clamp(max=1.0)).square() if even else kept


def fixed_options(profile: HeadProfile, families: Sequence[str], even: bool) -> list[Option]:
    """The options of one head in these families, and `full()` where there is one; of no families, none."""
    if not families:
        return []
    units = Units(profile)
    kept = float(profile.distance.sum()) / max(1, profile.n_q)
    options = [Option(float(profile.distance_links.sum()), kept, kept, full, "full")]
    for family in families:
        options += FIXED[family](profile, units, even)
    return options


def _options(
    states: Iterable[Grown], make: Callable[[Grown], Pattern], profile: HeadProfile, even: bool, family: str
) -> list[Option]:
    """Greedy states as options; only those on the hull, whose value is then taken row by row."""
    rough = concave([Option(state.links, state.kept, state.kept, partial(make, state), family) for state in states])
    if not even:
        return rough
    out = []
    for option in rough:
        state: Grown = option.make.args[-1]  # type: ignore[attr-defined]
        shares = row_shares(profile, state) if profile.block == 1 else torch.tensor([state.kept], device="cpu")
        out.append(Option(option.links, option.kept, row_value(shares, True).mean().item(), option.make, family))
    return out


def _joined(parts: Sequence[Pattern]) -> Pattern:
    if not parts:
        return offsets([])
    out = parts[0]
    for part in parts[1:]:
        out = out | part
    return out


def _lighthouses(state: Grown) -> list[Pattern]:
    return [seen_by_all(sorted(state.keys))] if state.keys else []


def _window(state: Grown) -> Pattern:
    near = [window(-min(a for a, _ in state.runs), max(b for _, b in state.runs) - 1)] if state.runs else []
    return _joined(near + _lighthouses(state))


def _offsets(state: Grown) -> Pattern:
    """Distances as a window where they hang together around 0, and a list for the rest."""
    distances = sorted({d for a, b in state.runs for d in range(a, b)})
    left = right = 0
    held = set(distances)
    if 0 in held:
        while -left - 1 in held:
            left += 1
        while right + 1 in held:
            right += 1
        distances = [d for d in distances if not -left <= d <= right]
        near: list[Pattern] = [window(left, right)]
    else:
        near = []
    return _joined(near + ([offsets(distances)] if distances else []) + _lighthouses(state))


def _sides(units: Units, step: int = 1) -> list[list[int]]:
    """Units to the left (distance 0 first) and to the right, every `step`-th distance."""
    low, high = int(units.edges[0]), int(units.edges[-1])
    zero = units.at(0) if low <= 0 < high else None
    if step == 1:
        last = units.edges.size - 1
        middle = zero if zero is not None else (0 if low > 0 else last)
        return [list(range(middle, -1, -1)), list(range(middle + 1, last))]
    left = [units.at(d) for d in range(0, low - 1, -step)] if high > 0 else []
    return [left, [units.at(d) for d in range(step, high, step)]]


def _window_family(profile: HeadProfile, units: Units, even: bool) -> list[Option]:
    return _options(grow(units, _sides(units), unlock=True), _window, profile, even, "window")


def _dilated(step: int, state: Grown) -> Pattern:
    near = []
    if state.runs:
        distances = [a for a, _ in state.runs]
        near = [window(-min(distances) // step, max(distances) // step, dilation=step)]
    return _joined(near + _lighthouses(state))


def _dilated_family(profile: HeadProfile, units: Units, even: bool) -> list[Option]:
    if np.diff(units.edges).max(initial=1) > 1:  # in long texts far distances come in runs
        return []
    out: list[Option] = []
    for step in _DILATIONS:
        if 2 * step < profile.n_k:
            out += _options(grow(units, _sides(units, step), unlock=True), partial(_dilated, step), profile, even, "dilated")
    return out


def _strided(step: int, state: Grown) -> Pattern:
    # The stride's own distances stand first; what follows is the window, whose multiples of the stride cost nothing.
    rest = [run for run in state.runs if run[0] % step]
    near = []
    if rest:
        lowest, highest = min(a for a, _ in rest), max(a for a, _ in rest)
        near = [window(max(0, -lowest), max(0, highest))]
    return _joined([strided(step), *near, *_lighthouses(state)])


def _strided_family(profile: HeadProfile, units: Units, even: bool) -> list[Option]:
    if np.diff(units.edges).max(initial=1) > 1:
        return []
    low, high = int(units.edges[0]), int(units.edges[-1])
    out: list[Option] = []
    for step in _STRIDES:
        if 2 * step < profile.n_k:
            multiples = [units.at(d) for d in range(low + (-low) % step, high, step)]
            states = grow(units, _sides(units), start=multiples)
            out += _options(states, partial(_strided, step), profile, even, "strided")
    return out


def _offsets_family(profile: HeadProfile, units: Units, even: bool) -> list[Option]:
    return _options(grow(units, [[unit] for unit in range(units.edges.size - 1)]), _offsets, profile, even, "offsets")


def _cells(profile: HeadProfile, block: int, even: bool, family: str) -> list[Option]:
    """Every cell of a grid on its own: the dearest ones are taken first, each row of cells valued by what it already has."""
    if block % profile.block:
        return []
    gain, cost = _coarse(profile.cells, block // profile.block), _coarse(profile.cell_links, block // profile.block)
    rows_in = torch.full((gain.shape[0], 1), float(block), device="cpu")
    rows_in[-1] = profile.n_q - (gain.shape[0] - 1) * block
    share = gain / rows_in  # what a cell adds to the mean share of its rows
    order = (share / cost.clamp(min=1e-12)).sort(dim=1, descending=True, stable=True).indices
    ordered = share.gather(1, order)
    after = ordered.cumsum(1)
    worth = (row_value(after, even) - row_value(after - ordered, even)) * rows_in
    price = (worth / cost.gather(1, order).clamp(min=1e-12)).flatten()
    rank = price.sort(descending=True, stable=True).indices
    links = cost.gather(1, order).flatten()[rank].cumsum(0)
    kept = (ordered * rows_in).flatten()[rank].cumsum(0) / max(1, profile.n_q)
    value = worth.flatten()[rank].cumsum(0) / max(1, profile.n_q)
    flat = torch.arange(order.shape[0], device="cpu")[:, None] * order.shape[1] + order
    flat = flat.flatten()[rank]
    points = np.geomspace(1, rank.numel(), min(_POINTS, rank.numel())) if rank.numel() else np.zeros(0)
    counts = np.unique(points.round().astype(int))

    def make(count: int) -> Pattern:
        layout = torch.zeros(gain.numel(), dtype=torch.bool, device="cpu")
        layout[flat[:count]] = True
        return pairs(layout.view(gain.shape)) if block == 1 else blocks(layout.view(gain.shape), block)

    return [Option(0.0, 0.0, 0.0, partial(offsets, []), family)] + [
        Option(links[n - 1].item(), kept[n - 1].item(), value[n - 1].item(), partial(make, int(n)), family) for n in counts
    ]


def _coarse(x: torch.Tensor, factor: int) -> torch.Tensor:
    if factor == 1:
        return x
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x, (0, -columns % factor, 0, -rows % factor))
    summed: torch.Tensor = padded.unflatten(1, (-1, factor)).sum(2).unflatten(0, (-1, factor)).sum(1)
    return summed


def _blocks_family(profile: HeadProfile, units: Units, even: bool) -> list[Option]:
    return _cells(profile, max(8, profile.block), even, "blocks")


def _pairs_family(profile: HeadProfile, units: Units, even: bool) -> list[Option]:
    return _cells(profile, 1, even, "pairs")


FIXED: dict[str, Callable[[HeadProfile, Units, bool], list[Option]]] = {
    "window": _window_family,
    "dilated": _dilated_family,
    "strided": _strided_family,
    "offsets": _offsets_family,
    "blocks": _blocks_family,
    "pairs": _pairs_family,
}

# What a head may choose from when nothing is said. "pairs" and "blocks" hold for one length only, and "pairs" follows chance
# where few texts were seen, so they are asked for by name.
DEFAULT = ("window", "dilated", "strided", "offsets")

CONTENT = ("topblocks",)


def sorted_out(candidates: Sequence[str | Pattern] | None, causal: bool) -> tuple[list[str], list[str]]:
    """(fixed families, expressions of patterns and routers) of what a user gave. Raises ArgumentError and PatternError."""
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
            expressions += topblocks(causal)
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


def topblocks(causal: bool) -> list[str]:
    """The family "topblocks": small blocks of keys that each query chooses, beside its neighbours and the ends of the text."""
    flag = ", causal=True" if causal else ""
    beside = "window(2, 0) | seen_by_all([0])" if causal else "window(2) | seen_by_all([0, -1])"
    amounts = [f"share={share}" for share in (0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.36)]
    amounts += [f"mass={mass}" for mass in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)]
    return [beside] + [f"topblocks({amount}, block=4, query_block=1{flag}) | {beside}" for amount in amounts]
