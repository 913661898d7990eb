"""Scatter-or of row bitsets to runs of slots: `out[s]` = OR of `bits[row]` over the runs `[lo, hi)` that contain slot s.

A sum over runs would be a difference of prefix sums; OR has no inverse, so a sparse table is used. A run of length L with
2^k <= L < 2^(k+1) is the union of two overlapping runs of length 2^k: `[lo, lo + 2^k)` and `[hi - 2^k, hi)`. The forward
pass of `RunScatter.scatter`:

1. Level k holds one bitset per start position p, meaning `[p, p + 2^k)`. Each run writes its bits at two positions of its
   level.
2. From the top level down, the bitset of `[p, p + 2^k)` is or-ed into its halves at level k - 1. Level 0 is the result.

Levels end at k = 8. Runs that contain a whole aligned block of 256 slots are also scattered over block numbers by a nested
`RunScatter`, whose result enters at the top level. The cost is two writes per run and nine passes over the slots, whatever
the lengths of the runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from farlight.analysis.graph.bits import or_rows
from farlight.analysis.graph.links import Array

__all__ = ["RunScatter"]

_TOP_LEVEL = 8
_BLOCK = 1 << _TOP_LEVEL
# Rows gathered at once where several runs write to one position.
_MAX_WRITES = 1 << 22


@dataclass(frozen=True, eq=False)
class _LevelWrites:
    """The writes of one level, grouped by position: the OR of the bits of rows `row[start[x]:start[x + 1]]` goes to
    `place[x]`; places are distinct and sorted.
    """

    row: Array
    start: Array
    place: Array

    @staticmethod
    def of(row: Array, place: Array) -> _LevelWrites:
        """Group single writes (row, place)."""
        if place.size and not bool((place[1:] >= place[:-1]).all()):
            order = np.argsort(place, kind="stable")
            row, place = row[order], place[order]
        is_first = np.ones(place.size, dtype=bool)
        is_first[1:] = place[1:] != place[:-1]
        start = np.flatnonzero(is_first)
        return _LevelWrites(row.astype(np.int32), start, place[start].astype(np.int32))

    def write(self, bits: Array, table: Array) -> None:
        """Or the rows' bits into the level's table."""
        if self.start.size == self.row.size:
            if self.row.size:
                or_rows(table, self.place, bits.take(self.row, axis=0))
            return
        group = 0
        while group < self.start.size:
            # Bounds the gathered copy; the rows of one place stay in one chunk.
            group_end = int(np.searchsorted(self.start, self.start[group] + _MAX_WRITES))
            begin, end = self.start[group], self.start[group_end] if group_end < self.start.size else self.row.size
            gathered = bits.take(self.row[begin:end], axis=0)
            united = np.bitwise_or.reduceat(gathered, self.start[group:group_end] - begin, axis=0)
            or_rows(table, self.place[group:group_end], united)
            group = group_end


class RunScatter:
    """Runs prepared for repeated scatters: run x gives the bits of `row[x]` to the slots `lo[x] … hi[x] - 1` of `size`.

    `work` is the cost of one scatter in words touched, per word of bits.

    >>> runs = RunScatter(np.array([0, 1]), np.array([1, 3]), np.array([4, 6]), 6)
    >>> runs.scatter(np.array([[1], [2]], dtype=np.uint64)).ravel().tolist()
    [0, 1, 1, 3, 2, 2]
    """

    def __init__(self, row: Array, lo: Array, hi: Array, size: int) -> None:
        self.size = size
        length = hi - lo
        # frexp gives the exponent e with length < 2^e: floor(log2(length)) = e - 1.
        level = np.frexp(length.astype(np.float64))[1] - 1 if length.size else np.zeros(0, dtype=np.int32)
        np.minimum(level, _TOP_LEVEL, out=level)
        self.levels: dict[int, _LevelWrites] = {}
        for k in range(int(level.max()) + 1 if level.size else 0):
            runs = np.flatnonzero(level == k)
            if not runs.size:
                continue
            rows, left, right = row[runs], lo[runs], hi[runs] - (1 << k)
            # A run of length 2^k exactly has one position, not two.
            has_two = right > left
            self.levels[k] = _LevelWrites.of(np.concatenate((rows, rows[has_two])), np.concatenate((left, right[has_two])))
        self.blocks: RunScatter | None = None
        if _TOP_LEVEL in self.levels:
            first, last = -(-lo // _BLOCK), hi // _BLOCK
            has_block = last > first
            if bool(has_block.any()):
                self.blocks = RunScatter(row[has_block], first[has_block], last[has_block], size // _BLOCK)
        self.work = sum(writes.row.size for writes in self.levels.values())
        self.work += size * (max(self.levels, default=0) + 1) + (self.blocks.work if self.blocks else 0)

    def scatter(self, bits: Array) -> Array:
        """`(size, W)` uint64: for each slot the OR of the bits of the rows whose runs contain it; `bits` is `(rows, W)`."""
        words = bits.shape[1]
        table = np.zeros((0, words), dtype=np.uint64)
        for k in range(max(self.levels, default=0), -1, -1):
            above, table = table, np.zeros((self.size - (1 << k) + 1, words), dtype=np.uint64)
            if above.shape[0]:
                table[: above.shape[0]] = above
                table[1 << k : (1 << k) + above.shape[0]] |= above
            elif self.blocks is not None:
                table[::_BLOCK] |= self.blocks.scatter(bits)
            if k in self.levels:
                self.levels[k].write(bits, table)
        return table
