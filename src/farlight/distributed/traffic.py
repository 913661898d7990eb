"""Bytes of every collective of one attention, for all ranks: the split sizes that are handed over, and what is predicted.

Forward: `direct` (keys, values and queries to the ranks that need them), `spread` (broadcast ones), `results` and `reduced`
(partial outputs back). Backward: `direct` (gradients and statistics of the moved queries), `spread`, `results` and `reduced`
(gradients of keys, values and queries back).

A broadcast is a scatter of equal chunks and one all-gather. What all ranks computed for a broadcast row is split over the
ranks by units (row of one head), added there in rank order, and sent on to its owner. So an owner of global tokens sends and
receives about as much as every other rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farlight.distributed.exchange import ClassExchange, Exchange, Moves

__all__ = ["Traffic", "TravelWidths", "backward_traffic", "bounds_of", "forward_traffic", "overlaps"]

Array = NDArray[np.int64]


@dataclass(frozen=True)
class TravelWidths:
    """head_dim of keys and of values, bytes of an element, and of a number in which sums are kept."""

    key: int
    value: int
    element: int
    total: int


@dataclass(frozen=True)
class Traffic:
    """Bytes from rank to rank, `(world, world)`, of each all-to-all; an all-gather gathers `chunk` bytes of each rank.

    scatter: owners of broadcast data to the holders of its chunks. reduce, collect: partial results of broadcast data to the
    rank that adds them, and the sums to the owner.
    """

    direct: Array
    scatter: Array
    chunk: int
    results: Array
    reduce: Array
    collect: Array

    def sent(self) -> Array:
        """`(world,)`: bytes that each rank hands over, those to itself not counted."""
        return self._total(1)

    def received(self) -> Array:
        """`(world,)`: bytes that each rank gets from others."""
        return self._total(0)

    def _total(self, axis: int) -> Array:
        out = np.full(len(self.direct), self.chunk * (len(self.direct) - 1), dtype=np.int64)
        for matrix in (self.direct, self.scatter, self.results, self.reduce, self.collect):
            out += matrix.sum(axis) - np.diagonal(matrix)
        return out


def forward_traffic(exchange: Exchange, widths: TravelWidths) -> Traffic:
    """Keys, values and queries out; outputs and lse of moved queries back."""
    element, group = widths.element, exchange.problem.group
    key, row = (widths.key + widths.value) * element, group * widths.key * element
    result = group * (widths.value * element + widths.total)
    return _traffic(exchange, key, row, 0, result, 0, group * (widths.value + 1) * widths.total)


def backward_traffic(exchange: Exchange, widths: TravelWidths) -> Traffic:
    """dout, lse and delta of moved queries out; dk, dv and dq back."""
    element, group = widths.element, exchange.problem.group
    both = widths.key + widths.value
    row, result = group * (widths.value * element + 2 * widths.total), group * widths.key * element
    return _traffic(exchange, 0, row, both * element, result, both * widths.total, group * widths.key * widths.total)


def _traffic(exchange: Exchange, key: int, row: int, key_back: int, row_back: int, key_sum: int, row_sum: int) -> Traffic:
    """The bytes per key and row of one key head: on the way out, back, and as a sum."""
    world = exchange.problem.world
    direct, results = np.zeros((2, world, world), dtype=np.int64)
    spread = np.zeros(world, dtype=np.int64)
    reduce, collect = np.zeros((2, world, world), dtype=np.int64)
    for moved in exchange.classes:
        heads = len(moved.heads.rows)
        for moves, everyone, out, back in _keys_and_rows(moved, key, row, key_back, row_back):
            count = _direct_counts(moves, everyone, world)
            direct += heads * out * count
            results += heads * back * count.T
    for is_rows, back, total in ((False, key_back, key_sum), (True, row_back, row_sum)):
        owned = owned_units(exchange, is_rows)
        spread += (row if is_rows else key) * owned
        if back:
            units = bounds_of(owned)
            slices = unit_slices(int(units[-1]), world)
            reduce += back * np.broadcast_to(np.diff(slices), (world, world))
            collect += total * overlaps(slices, units)
    chunk = -(-int(spread.sum()) // world)
    scatter = overlaps(bounds_of(spread), chunk * np.arange(world + 1))
    return Traffic(direct, scatter, chunk, results, reduce, collect)


def _keys_and_rows(
    moved: ClassExchange, key: int, row: int, key_back: int, row_back: int
) -> tuple[tuple[Moves, Array, int, int], tuple[Moves, Array, int, int]]:
    return (moved.keys, moved.everyone_keys, key, key_back), (moved.rows, moved.everyone_rows, row, row_back)


def _direct_counts(moves: Moves, everyone: Array, world: int) -> Array:
    """`(world, world)`: keys or rows from rank to rank that are not broadcast."""
    count = np.zeros((world, world), dtype=np.int64)
    length = moves.hi - moves.lo - (np.searchsorted(everyone, moves.hi) - np.searchsorted(everyone, moves.lo))
    np.add.at(count, (moves.source, moves.target), length)
    return count


def owned_units(exchange: Exchange, is_rows: bool) -> Array:
    """`(world,)`: broadcast keys or rows that each rank owns, counted once per key head."""
    layout = exchange.problem.queries if is_rows else exchange.problem.keys
    total = np.zeros(layout.world, dtype=np.int64)
    for moved in exchange.classes:
        everyone = moved.everyone_rows if is_rows else moved.everyone_keys
        total += len(moved.heads.rows) * np.bincount(layout.owner_of(everyone), minlength=layout.world)
    return total


def unit_slices(units: int, world: int) -> Array:
    """`(world + 1,)`: the bounds of the units that each rank adds up."""
    return units * np.arange(world + 1) // world


def bounds_of(lengths: Array) -> Array:
    """`(n + 1,)`: where runs of these lengths begin and end, one after another."""
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)


def overlaps(a: Array, b: Array) -> Array:
    """`(len(a) - 1, len(b) - 1)`: the common length of every interval of a and every interval of b, each given by its
    bounds.
    """
    common = np.minimum(a[1:, None], b[None, 1:]) - np.maximum(a[:-1, None], b[None, :-1])
    return np.asarray(np.maximum(common, 0), dtype=np.int64)
