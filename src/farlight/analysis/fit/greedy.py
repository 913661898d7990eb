"""Growing a pattern of distances and lighthouses, one unit at a time, always the one that keeps most per new link.

A unit is a run of distances (one distance in short texts) or a single key that everybody sees. Units overlap where a
distance meets a key, so what a unit would add is kept up to date: the overlaps of all runs with all candidate keys are
prefix sums over rows, computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from farlight.analysis.fit.profile import HeadProfile

__all__ = ["Grown", "Units", "grow"]

Array = np.ndarray[Any, Any]

# Runs of distances: single up to this many units, then wider the farther away, so that their number grows with log n.
_SINGLE = 1024


@dataclass(frozen=True)
class Grown:
    """A state on the way: distances (as ranges [from, to)), keys, and what they cost and keep together.

    States of one growth share its lists, which only become longer; a state is the beginning of them.
    """

    links: float
    kept: float
    _units: Units
    _runs: Sequence[int]
    _keys: Sequence[int]
    _taken: tuple[int, int]

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        edges = self._units.edges
        return tuple((int(edges[unit]), int(edges[unit + 1])) for unit in self._runs[: self._taken[0]])

    @property
    def keys(self) -> tuple[int, ...]:
        return tuple(int(self._units.keys[key]) for key in self._keys[: self._taken[1]])


class Units:
    """The units of one head: runs of distances and candidate keys, their gains, costs and overlaps (numpy, float64)."""

    def __init__(self, profile: HeadProfile) -> None:
        self.profile = profile
        low = 1 - profile.n_q - profile.q_offset  # the smallest distance j - i
        self.edges = _edges(low, profile.n_k - profile.q_offset)
        start, stop = self.edges[:-1] - low, self.edges[1:] - low
        self.gain, self.cost = (
            _between(np.concatenate(([0.0], np.cumsum(x.numpy()))), start, stop)
            for x in (profile.distance, profile.distance_links)
        )
        self.keys = profile.columns.numpy()
        self.key_gain, self.key_cost = profile.column.sum(0).numpy(), profile.column_links.sum(0).numpy()
        # Key c meets distance d in the row at position c - d: a run of distances is a run of rows.
        rows_from = np.clip(self.keys[None] - self.edges[1:, None] + 1 - profile.q_offset, 0, profile.n_q)
        rows_to = np.clip(self.keys[None] - self.edges[:-1, None] + 1 - profile.q_offset, 0, profile.n_q)
        self.shared_gain, self.shared_cost = (
            _overlap(x.numpy(), rows_from, rows_to) for x in (profile.column, profile.column_links)
        )

    def at(self, distance: int) -> int:
        """The unit that holds this distance."""
        return int(np.searchsorted(self.edges, distance, side="right")) - 1


def _edges(low: int, high: int) -> Array:
    """Edges of the runs that cover the distances low … high - 1."""
    if high - low <= 2 * _SINGLE:
        return np.arange(low, max(high, low) + 1)
    out = [0]
    while out[-1] < max(high, -low):
        out.append(out[-1] + max(1, out[-1] // 16))
    right = np.array([edge for edge in out if 0 <= edge < high] + [max(high, 0)])
    left = np.array([1 - edge for edge in out if 0 < edge and 1 - edge > low and 1 - edge <= 0])
    edges = np.concatenate((left[::-1], right, [low]))
    kept: Array = np.unique(edges[(edges >= low) & (edges <= high)])
    return kept


def _between(total: Array, start: Array, stop: Array) -> Array:
    inside: Array = total[stop] - total[start]
    return inside


def _overlap(column: Array, rows_from: Array, rows_to: Array) -> Array:
    total = np.concatenate((np.zeros((1, column.shape[1])), np.cumsum(column, 0)))
    which = np.arange(column.shape[1])[None]
    return np.asarray(total[rows_to, which] - total[rows_from, which])


def grow(
    units: Units, queues: Sequence[Sequence[int]], *, start: Sequence[int] = (), unlock: bool = False, most: float = 1.0
) -> Iterator[Grown]:
    """The states of greedy growth, cheapest first, the empty one (or `start`, units taken for granted) included.

    `queues` are lists of units; of each the next ones may be taken, in order, the best number of them at once. With
    `unlock`, the other queues open when the first one has been touched. Growth ends when `most` of all rows' probability is
    kept, or nothing adds anything.
    """
    rows = max(1, units.profile.n_q)
    gain, cost = units.gain.copy(), units.cost.copy()
    key_gain, key_cost = units.key_gain.copy(), units.key_cost.copy()
    waiting = [np.asarray(list(queue), dtype=np.int64) for queue in queues]
    singles = len(waiting) > 8
    free = np.zeros(gain.size, dtype=bool)
    if singles:
        free[np.concatenate(waiting)] = True
    taken_runs: list[int] = []
    taken: set[int] = set()
    taken_keys: list[int] = []
    links = kept = 0.0

    def take_run(unit: int) -> None:
        nonlocal links, kept, key_gain, key_cost
        if unit in taken:  # a queue may run over what was taken for granted
            return
        taken.add(unit)
        links, kept = links + cost[unit], kept + gain[unit]
        key_gain -= units.shared_gain[unit]
        key_cost -= units.shared_cost[unit]
        gain[unit] = cost[unit] = 0.0
        free[unit] = False
        taken_runs.append(unit)

    for unit in start:
        take_run(unit)
    yield _state(units, links, kept / rows, taken_runs, taken_keys)
    key_free = key_cost > 0
    while kept < most * rows - 1e-9:
        best, choice = 0.0, ("", 0, 0)
        open_keys = key_free & (key_cost > 0.5 / max(1, rows))
        if open_keys.any():
            price = np.where(open_keys, key_gain / np.maximum(key_cost, 1e-300), -1.0)
            place = int(price.argmax())
            best, choice = float(price[place]), ("key", place, 0)
        if singles:
            price = np.where(free & (cost > 0), gain / np.maximum(cost, 1e-300), -1.0)
            place = int(price.argmax())
            if price[place] > best:
                best, choice = float(price[place]), ("single", place, 0)
        else:
            for number, queue in enumerate(waiting):
                if not queue.size or (unlock and number and waiting[0].size == len(queues[0])):
                    continue
                total_cost = np.cumsum(cost[queue])
                price = np.cumsum(gain[queue]) / np.maximum(total_cost, 1e-300)
                price[total_cost <= 0] = 0.0
                place = int(price.argmax())
                if price[place] > best:
                    best, choice = float(price[place]), ("queue", number, place + 1)
        what, place, count = choice
        if best <= 1e-12:
            return
        if what == "key":
            links, kept = links + key_cost[place], kept + key_gain[place]
            gain -= units.shared_gain[:, place]
            cost -= units.shared_cost[:, place]
            gain[taken_runs] = cost[taken_runs] = 0.0
            key_free[place] = False
            taken_keys.append(place)
        elif what == "single":
            take_run(place)
        else:
            for unit in waiting[place][:count]:
                take_run(int(unit))
            waiting[place] = waiting[place][count:]
        yield _state(units, links, kept / rows, taken_runs, taken_keys)


def _state(units: Units, links: float, kept: float, runs: list[int], keys: list[int]) -> Grown:
    return Grown(float(links), float(kept), units, runs, keys, (len(runs), len(keys)))


def row_shares(profile: HeadProfile, grown: Grown) -> torch.Tensor:
    """`(n_q,)`: what each row keeps, where the profile knows every pair."""
    assert profile.block == 1
    low = 1 - profile.n_q - profile.q_offset
    by_distance = torch.zeros(profile.n_q + profile.n_k - 1, dtype=torch.bool, device="cpu")
    for start, stop in grown.runs:
        by_distance[start - low : stop - low] = True
    # Row r sees the distances from n_q - 1 - r on: one row back is one place on.
    mask = by_distance.unfold(0, profile.n_k, 1).flip(0)
    mask[:, list(grown.keys)] = True
    return (profile.cells * mask).sum(1)
