"""Sets of up to 64·W walks as bits: row x of a `(m, W)` table of unsigned words says which walks know of x."""

from __future__ import annotations

import numpy as np

from farlight.analysis.graph.links import Array

__all__ = ["column_counts", "one_each", "or_rows", "rows_with_any"]

_FEW = 32


def one_each(walks: int) -> Array:
    """`(walks, ⌈walks / 64⌉)`: row t holds bit t alone."""
    out = np.zeros((walks, -(-walks // 64)), dtype=np.uint64)
    number = np.arange(walks)
    out[number, number // 64] = np.uint64(1) << (number % 64).astype(np.uint64)
    return out


def or_rows(table: Array, place: Array, bits: Array) -> None:
    """`table[place] |= bits` for distinct places (`bits` is used up).

    A row is written as one block of bytes: numpy's indexed assignment of short rows is several times slower.
    """
    bits |= table.take(place, axis=0)
    whole = np.dtype((np.void, 8 * table.shape[1]))
    table.view(whole).reshape(-1)[place] = np.ascontiguousarray(bits).view(whole).reshape(-1)


def rows_with_any(bits: Array) -> Array:
    """The rows that hold any bit, sorted."""
    joined = bits[:, 0]
    for word in range(1, bits.shape[1]):
        joined = joined | bits[:, word]
    return np.flatnonzero(joined)


def column_counts(bits: Array) -> Array:
    """`(64·W,)` int64: in how many rows each bit is set.

    Halves of the table are added to each other as binary numbers written across words (bit p of 64 counts in one word), so
    the cost is a few operations for each word instead of 64.

    >>> column_counts(one_each(3)[[0, 2, 2, 2]])[:3].tolist()
    [1, 0, 3]
    """
    total = np.zeros(64 * bits.shape[1], dtype=np.int64)
    planes = [bits]
    while planes[0].shape[0] > _FEW:
        half = planes[0].shape[0] // 2
        if planes[0].shape[0] % 2:
            total += _weighed([plane[2 * half :] for plane in planes])
        carry: Array | None = None
        added = []
        for plane in planes:
            a, b = plane[:half], plane[half : 2 * half]
            either = a ^ b
            if carry is None:
                added.append(either)
                carry = a & b
            else:
                added.append(either ^ carry)
                carry = (a & b) | (either & carry)
        assert carry is not None
        planes = [*added, carry]
    return total + _weighed(planes)


def _weighed(planes: list[Array]) -> Array:
    """Counts of a short table of numbers, plane p weighing 2^p."""
    total = np.zeros(64 * planes[0].shape[1], dtype=np.int64)
    shift = np.arange(64, dtype=np.uint64)
    for weight, plane in enumerate(planes):
        ones = (plane[:, :, None] >> shift) & np.uint64(1)
        total += ones.sum(0, dtype=np.int64).reshape(-1) << weight
    return total
