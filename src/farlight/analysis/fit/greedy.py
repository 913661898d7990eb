"""Greedy growth of a pattern of distances and global keys: at each step the unit with the most kept mass per new link.

A *unit* is a run of distances j - i (a diagonal band of the attention matrix; one distance in short texts) or one key that
every query sees (a column, a global key). Unit u has a gain, the attention probability on its pairs, and a cost, the number of
its pairs that the base allows. A band and a column cross, so the pairs of a union must not be counted twice.

Data structures, all numpy float64, built once per head from its `HeadProfile`:
  * gain, cost `(U,)` of the bands: differences of prefix sums over distances;
  * key_gain, key_cost `(K,)` of the candidate keys: column sums;
  * shared_gain, shared_cost `(U, K)`, the pairs on which band u crosses column c: key c meets distance d in the row at position
    c - d, so a band meets a column in a range of rows, and its sum is a difference of prefix sums over rows.

One step: the marginal price gain / cost of every open unit is compared, the best unit is taken, and what it shares with each
unit of the other kind is subtracted from that unit's gain and cost. Bands do not cross bands, nor columns columns. So every
state's `links` and `kept` are those of the exact union. A step is O(U + K) with at most U + K steps; U is the number of
distances up to 2 * `_SINGLE_DISTANCES` and O(log n) beyond, K at most `profile.NUM_COLUMNS`.

Families restrict the order of growth by *queues*: of each queue only a prefix may be taken, and the length of the prefix with
the best price is taken at once (for a window: distances 0, -1, -2, …, where a cheap far distance may pay for near ones).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from farlight.analysis.fit.profile import HeadProfile

__all__ = ["GrowthState", "LinkUnits", "grow", "row_shares"]

Array = np.ndarray[Any, Any]

# Up to twice this many distances, each is a unit; beyond, runs widen with distance and their number grows with log n.
_SINGLE_DISTANCES = 1024
# With more queues than this, every queue is one unit and prices are compared as one vector.
_MAX_QUEUES = 8


@dataclass(frozen=True)
class GrowthState:
    """One state of a growth: the chosen units and their union's `links` and `kept` (mean share of a row).

    The states of one growth share its append-only lists of units; a state is a prefix of them.
    """

    links: float
    kept: float
    _units: LinkUnits
    _run_units: Sequence[int]
    _key_units: Sequence[int]
    _lengths: tuple[int, int]

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Runs of distances as ranges [start, stop), in the order taken."""
        edges = self._units.edges
        return tuple((int(edges[unit]), int(edges[unit + 1])) for unit in self._run_units[: self._lengths[0]])

    @property
    def keys(self) -> tuple[int, ...]:
        """Positions of the global keys, in the order taken."""
        return tuple(int(self._units.keys[key]) for key in self._key_units[: self._lengths[1]])


class LinkUnits:
    """The units of one head: edges of the runs of distances, candidate keys, their gains, costs and overlaps (float64).

    Run u covers the distances `edges[u] … edges[u + 1] - 1`; together the runs cover every distance of the text once.
    """

    def __init__(self, profile: HeadProfile) -> None:
        self.profile = profile
        lowest = 1 - profile.n_q - profile.q_offset  # the smallest distance j - i
        self.edges = _edges(lowest, profile.n_k - profile.q_offset)
        start, stop = self.edges[:-1] - lowest, self.edges[1:] - lowest
        self.gain, self.cost = (
            _range_sums(np.concatenate(([0.0], np.cumsum(x.numpy()))), start, stop)
            for x in (profile.distance, profile.distance_links)
        )
        self.keys = profile.columns.numpy()
        self.key_gain, self.key_cost = profile.column.sum(0).numpy(), profile.column_links.sum(0).numpy()
        rows_from = np.clip(self.keys[None] - self.edges[1:, None] + 1 - profile.q_offset, 0, profile.n_q)
        rows_to = np.clip(self.keys[None] - self.edges[:-1, None] + 1 - profile.q_offset, 0, profile.n_q)
        self.shared_gain, self.shared_cost = (
            _overlap(x.numpy(), rows_from, rows_to) for x in (profile.column, profile.column_links)
        )

    def index_of(self, distance: int) -> int:
        """The run that contains this distance."""
        return int(np.searchsorted(self.edges, distance, side="right")) - 1


def _edges(low: int, high: int) -> Array:
    """Rising edges of the runs that cover the distances low … high - 1.

    Single distances while there are at most 2 * `_SINGLE_DISTANCES`; otherwise the run at distance ±d is max(1, d // 16) wide.
    """
    if high - low <= 2 * _SINGLE_DISTANCES:
        return np.arange(low, max(high, low) + 1)
    magnitudes = [0]
    while magnitudes[-1] < max(high, -low):
        magnitudes.append(magnitudes[-1] + max(1, magnitudes[-1] // 16))
    right = np.array([d for d in magnitudes if 0 <= d < high] + [max(high, 0)])
    left = np.array([1 - d for d in magnitudes if 0 < d and 1 - d > low and 1 - d <= 0])
    edges = np.concatenate((left[::-1], right, [low]))
    inside: Array = np.unique(edges[(edges >= low) & (edges <= high)])
    return inside


def _range_sums(prefix: Array, start: Array, stop: Array) -> Array:
    """Sums over the ranges start … stop - 1, from exclusive prefix sums."""
    sums: Array = prefix[stop] - prefix[start]
    return sums


def _overlap(column: Array, rows_from: Array, rows_to: Array) -> Array:
    """`(U, K)`: the sum of column c `(n_q, K)` over the rows rows_from[u, c] … rows_to[u, c] - 1."""
    prefix = np.concatenate((np.zeros((1, column.shape[1])), np.cumsum(column, 0)))
    columns = np.arange(column.shape[1])[None]
    return np.asarray(prefix[rows_to, columns] - prefix[rows_from, columns])


def grow(
    units: LinkUnits, queues: Sequence[Sequence[int]], *, start: Sequence[int] = (), unlock: bool = False, target: float = 1.0
) -> Iterator[GrowthState]:
    """The states of greedy growth in rising order of links, beginning with the units `start` (none: the empty pattern).

    Args:
        units: the units of one head.
        queues: lists of runs; of each, prefixes may be taken. Candidate keys may be taken at any step.
        start: runs that every state contains, whatever they cost.
        unlock: the other queues open once a unit of the first one has been taken (a window grows from distance 0).
        target: growth ends when this mean share of a row is kept, or when no unit adds anything.
    """
    growth = _Growth(units, queues, unlock)
    for unit in start:
        growth.take_run(unit)
    yield growth.state()
    while growth.kept < target * growth.rows - 1e-9 and growth.step():
        yield growth.state()


class _Step(NamedTuple):
    """A possible step: its price (gain / cost), and the key, the single run, or the first `length` runs of queue `number`."""

    price: float
    source: Literal["key", "run", "queue"]
    number: int
    length: int = 1


class _Growth:
    """Mutable state of `grow`: marginal gains and costs of all units beside the units taken, and the totals of the latter."""

    def __init__(self, units: LinkUnits, queues: Sequence[Sequence[int]], unlock: bool) -> None:
        self.units, self.unlock = units, unlock
        self.rows = max(1, units.profile.n_q)
        self.gain, self.cost = units.gain.copy(), units.cost.copy()
        self.key_gain, self.key_cost = units.key_gain.copy(), units.key_cost.copy()
        self.queues = [np.asarray(list(queue), dtype=np.int64) for queue in queues]
        self.first_queue_size = self.queues[0].size if self.queues else 0
        self.single_runs = len(self.queues) > _MAX_QUEUES
        self.open_runs = np.zeros(self.gain.size, dtype=bool)
        if self.single_runs:
            self.open_runs[np.concatenate(self.queues)] = True
        self.open_keys = self.key_cost > 0
        self.run_units: list[int] = []
        self.key_units: list[int] = []
        self.taken_runs: set[int] = set()
        self.links = self.kept = 0.0

    def state(self) -> GrowthState:
        lengths = (len(self.run_units), len(self.key_units))
        kept = float(self.kept / self.rows)
        return GrowthState(float(self.links), kept, self.units, self.run_units, self.key_units, lengths)

    def step(self) -> bool:
        """Take the best open step; False when none adds anything."""
        steps = [*self._key_step(), *(self._run_step() if self.single_runs else self._queue_steps())]
        best = max(steps, key=lambda step: step.price, default=None)
        if best is None or best.price <= 1e-12:
            return False
        if best.source == "key":
            self._take_key(best.number)
        elif best.source == "run":
            self.take_run(best.number)
        else:
            for unit in self.queues[best.number][: best.length]:
                self.take_run(int(unit))
            self.queues[best.number] = self.queues[best.number][best.length :]
        return True

    def _key_step(self) -> Iterator[_Step]:
        # A key all of whose pairs are covered has cost 0 up to rounding.
        open_keys = self.open_keys & (self.key_cost > 0.5 / self.rows)
        if open_keys.any():
            price = np.where(open_keys, self.key_gain / np.maximum(self.key_cost, 1e-300), -1.0)
            key = int(price.argmax())
            yield _Step(float(price[key]), "key", key)

    def _run_step(self) -> Iterator[_Step]:
        price = np.where(self.open_runs & (self.cost > 0), self.gain / np.maximum(self.cost, 1e-300), -1.0)
        run = int(price.argmax())
        yield _Step(float(price[run]), "run", run)

    def _queue_steps(self) -> Iterator[_Step]:
        for index, queue in enumerate(self.queues):
            locked = self.unlock and index and self.queues[0].size == self.first_queue_size
            if not queue.size or locked:
                continue
            cost = np.cumsum(self.cost[queue])
            price = np.cumsum(self.gain[queue]) / np.maximum(cost, 1e-300)
            price[cost <= 0] = 0.0
            last = int(price.argmax())
            yield _Step(float(price[last]), "queue", index, last + 1)

    def take_run(self, unit: int) -> None:
        if unit in self.taken_runs:  # a queue may contain a unit of `start`
            return
        self.taken_runs.add(unit)
        self.run_units.append(unit)
        self.links, self.kept = self.links + self.cost[unit], self.kept + self.gain[unit]
        self.key_gain -= self.units.shared_gain[unit]
        self.key_cost -= self.units.shared_cost[unit]
        self.gain[unit] = self.cost[unit] = 0.0
        self.open_runs[unit] = False

    def _take_key(self, key: int) -> None:
        self.key_units.append(key)
        self.links, self.kept = self.links + self.key_cost[key], self.kept + self.key_gain[key]
        self.gain -= self.units.shared_gain[:, key]
        self.cost -= self.units.shared_cost[:, key]
        self.gain[self.run_units] = self.cost[self.run_units] = 0.0
        self.open_keys[key] = False


def row_shares(profile: HeadProfile, state: GrowthState) -> torch.Tensor:
    """`(n_q,)` float64: the share that each row keeps. Needs a profile by single pairs (`profile.block == 1`).

    A run of distances is a range of keys in each row, whose sum is a difference of two prefix sums: O(n_q · (runs + keys)).
    """
    assert profile.block == 1
    runs = _joined(state.runs)
    position = torch.arange(profile.n_q, device="cpu")[:, None] + profile.q_offset
    ends = torch.tensor(runs, device="cpu", dtype=torch.int64).view(-1, 2)
    first, stop = ((position + ends[:, side]).clamp(0, profile.n_k) for side in (0, 1))
    prefix = profile.prefix
    shares = (prefix.gather(1, stop) - prefix.gather(1, first)).sum(1)
    if state.keys:
        keys = torch.tensor(state.keys, device="cpu")
        distance = (keys - position)[..., None]
        in_runs = ((distance >= ends[:, 0]) & (distance < ends[:, 1])).any(-1)
        shares += profile.cells[:, keys].masked_fill(in_runs, 0.0).sum(1)
    return shares


def _joined(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges in rising order, adjoining ones joined."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(runs):
        if joined and joined[-1][1] >= start:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined
