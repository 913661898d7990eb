"""Bitsets of breadth-first searches: bit t of row x of an `(m, W)` uint64 table says that search t has reached token x.

W words hold up to 64·W searches; search t is bit t % 64 of word t // 64.
"""

from __future__ import annotations

import numpy as np

from farlight.analysis.graph.links import Array

__all__ = ["column_counts", "nonzero_rows", "one_hot_bits", "or_rows"]

# Tables of at most this many rows are counted bit by bit.
_SHORT_TABLE = 32


def one_hot_bits(searches: int) -> Array:
    """`(searches, ⌈searches / 64⌉)` uint64: row t has bit t set and no other."""
    out = np.zeros((searches, -(-searches // 64)), dtype=np.uint64)
    search = np.arange(searches)
    out[search, search // 64] = np.uint64(1) << (search % 64).astype(np.uint64)
    return out


def or_rows(table: Array, place: Array, bits: Array) -> None:
    """`table[place] |= bits` for distinct places; `bits` is overwritten.

    Each row is stored as one void scalar of 8·W bytes: numpy's indexed assignment of short rows is several times slower.
    """
    bits |= table.take(place, axis=0)
    row_dtype = np.dtype((np.void, 8 * table.shape[1]))
    table.view(row_dtype).reshape(-1)[place] = np.ascontiguousarray(bits).view(row_dtype).reshape(-1)


def nonzero_rows(bits: Array) -> Array:
    """Sorted indices of the rows with any bit set."""
    union = bits[:, 0]
    for word in range(1, bits.shape[1]):
        union = union | bits[:, word]
    return np.flatnonzero(union)


def column_counts(bits: Array) -> Array:
    """`(64·W,)` int64: the number of rows in which each bit is set.

    Bit-sliced addition: plane p holds bit p of 64 counters in one word, and the two halves of the table are added by a
    ripple-carry adder until few rows are left. That is a few word operations per word of input instead of 64.

    >>> column_counts(one_hot_bits(3)[[0, 2, 2, 2]])[:3].tolist()
    [1, 0, 3]
    """
    total = np.zeros(64 * bits.shape[1], dtype=np.int64)
    planes = [bits]
    while planes[0].shape[0] > _SHORT_TABLE:
        half = planes[0].shape[0] // 2
        if planes[0].shape[0] % 2:
            total += _sum_planes([plane[2 * half :] for plane in planes])
        carry: Array | None = None
        sums = []
        for plane in planes:
            a, b = plane[:half], plane[half : 2 * half]
            either = a ^ b
            if carry is None:
                sums.append(either)
                carry = a & b
            else:
                sums.append(either ^ carry)
                carry = (a & b) | (either & carry)
        assert carry is not None
        planes = [*sums, carry]
    return total + _sum_planes(planes)


def _sum_planes(planes: list[Array]) -> Array:
    """`(64·W,)` int64 sums over the rows of bit-sliced counters, plane p weighing 2^p."""
    total = np.zeros(64 * planes[0].shape[1], dtype=np.int64)
    shift = np.arange(64, dtype=np.uint64)
    for exponent, plane in enumerate(planes):
        bit_values = (plane[:, :, None] >> shift) & np.uint64(1)
        total += bit_values.sum(0, dtype=np.int64).reshape(-1) << exponent
    return total
