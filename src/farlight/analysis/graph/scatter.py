"""Giving the bits of rows to whole stretches of slots: `out[s] = OR of bits[row] over the stretches that hold s`.

Sums over a stretch are differences of prefix sums; "or" has no differences. What it has is that a stretch is the union of
two overlapping ones whose length is a power of two. So each stretch writes its bits twice, at the level of that power, and
the levels are then passed down: what is true of `[p, p + 2^k)` is true of both its halves. Stretches longer than 256 are
written to whole blocks of 256 slots as well, by the same rule among blocks. The cost is two writes for each stretch and
nine passes over the slots, whatever the stretches' lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from farlight.analysis.graph.bits import or_rows
from farlight.analysis.graph.links import Array

__all__ = ["Spread"]

_TOP = 8
_BLOCK = 1 << _TOP
_WRITES_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class _Writes:
    """At one level: the bits of rows `row[start[x]:start[x + 1]]`, united, belong at `place[x]`; places are distinct."""

    row: Array
    start: Array
    place: Array

    @staticmethod
    def of(row: Array, place: Array) -> _Writes:
        if place.size and not bool((place[1:] >= place[:-1]).all()):
            order = np.argsort(place, kind="stable")
            row, place = row[order], place[order]
        new = np.ones(place.size, dtype=bool)
        new[1:] = place[1:] != place[:-1]
        start = np.flatnonzero(new)
        return _Writes(row.astype(np.int32), start, place[start].astype(np.int32))

    def write(self, bits: Array, table: Array) -> None:
        if self.start.size == self.row.size:
            if self.row.size:
                or_rows(table, self.place, bits.take(self.row, axis=0))
            return
        at = 0
        while at < self.start.size:
            # Some million writes at a time; places with many rows stay in one piece.
            end = int(np.searchsorted(self.start, self.start[at] + _WRITES_AT_ONCE))
            begin, stop = self.start[at], self.start[end] if end < self.start.size else self.row.size
            read = bits.take(self.row[begin:stop], axis=0)
            or_rows(table, self.place[at:end], np.bitwise_or.reduceat(read, self.start[at:end] - begin, axis=0))
            at = end


class Spread:
    """Prepared stretches; `spread(bits)` may be asked many times.

    >>> give = Spread(np.array([0, 1]), np.array([1, 3]), np.array([4, 6]), 6)
    >>> give.spread(np.array([[1], [2]], dtype=np.uint64)).ravel().tolist()
    [0, 1, 1, 3, 2, 2]
    """

    def __init__(self, row: Array, lo: Array, hi: Array, size: int) -> None:
        self.size = size
        width = hi - lo
        level = np.frexp(width.astype(np.float64))[1] - 1 if width.size else np.zeros(0, dtype=np.int32)
        np.minimum(level, _TOP, out=level)
        self.levels: dict[int, _Writes] = {}
        for k in range(int(level.max()) + 1 if level.size else 0):
            pick = np.flatnonzero(level == k)
            if not pick.size:
                continue
            r, a, b = row[pick], lo[pick], hi[pick] - (1 << k)
            # A stretch of length 2^k is written once.
            two = b > a
            self.levels[k] = _Writes.of(np.concatenate((r, r[two])), np.concatenate((a, b[two])))
        self.blocks: Spread | None = None
        if _TOP in self.levels:
            first, last = -(-lo // _BLOCK), hi // _BLOCK
            long = last > first
            if bool(long.any()):
                self.blocks = Spread(row[long], first[long], last[long], size // _BLOCK)
        #: What one call costs, in words touched for each word of bits.
        self.work = sum(writes.row.size for writes in self.levels.values())
        self.work += size * (max(self.levels, default=0) + 1) + (self.blocks.work if self.blocks else 0)

    def spread(self, bits: Array) -> Array:
        """`(size, W)`: the bits that each slot was given by the rows of a `(rows, W)` table."""
        words = bits.shape[1]
        table = np.zeros((0, words), dtype=np.uint64)
        for k in range(max(self.levels, default=0), -1, -1):
            above, table = table, np.zeros((self.size - (1 << k) + 1, words), dtype=np.uint64)
            if above.shape[0]:
                table[: above.shape[0]] = above
                table[1 << k : (1 << k) + above.shape[0]] |= above
            elif self.blocks is not None:
                table[::_BLOCK] |= self.blocks.spread(bits)
            if k in self.levels:
                self.levels[k].write(bits, table)
        return table
