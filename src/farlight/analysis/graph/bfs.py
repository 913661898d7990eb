"""Backward breadth-first search from many target tokens at once, as bitsets.

A link is an edge key → query, and the search runs against it: from a target to its keys, to their keys, and so on. The tokens
at distance d of a target are those whose information reaches it after d layers and no sooner. 64 searches share one uint64
word (`graph/bits.py`): `reached[x]` holds the searches that have reached token x, and the frontier is a sorted list of
tokens, each with the bits of the searches that reached it in the last step.

As in direction-optimising BFS there are two step programs, chosen by the size of the frontier:

- sparse: the runs of the frontier's rows only; scatter into the union of those runs;
- dense: the runs of all rows, prepared once as `RunScatter` tables, when the frontier has more than a quarter of all runs.
"""

from __future__ import annotations

import numpy as np

from farlight.analysis.graph.bits import column_counts, nonzero_rows, one_hot_bits, or_rows
from farlight.analysis.graph.links import Array, KeyRuns, Links, expand_ranges
from farlight.analysis.graph.scatter import RunScatter

__all__ = ["BitsetBFS", "merge_runs", "words_per_batch"]

# Fixed cost of a step, in words: about fifty numpy calls.
_STEP_WORK = 100_000


def words_per_batch(n: int) -> int:
    """How many words of 64 searches run together: few enough that a `(n, W)` table stays in L2, at least 4."""
    return max(4, min(64, (1 << 18) // n))


class BitsetBFS:
    """Backward searches over one set of links. `work` counts the words touched: a machine-independent measure of time."""

    def __init__(self, links: Links) -> None:
        self.links = links
        self.work = 0
        self._dense_tables: list[RunScatter] | None = None

    def frontier_sizes(self, targets: Array, max_depth: int | None = None) -> list[Array]:
        """For distance 1, 2, …: the number of tokens at exactly that distance from each target, `(targets,)` int64 each.

        The target itself is at distance 0 and not counted. Ends with the last non-empty frontier, or after `max_depth`.

        >>> import farlight as fl
        >>> bfs = BitsetBFS(Links.of(fl.window(1), 5))
        >>> [sizes.tolist() for sizes in bfs.frontier_sizes(np.array([0, 2]))]
        [[1, 2], [1, 2], [1, 0], [1, 0]]
        """
        n = self.links.n
        bits = one_hot_bits(targets.size)
        reached = np.zeros((n, bits.shape[1]), dtype=np.uint64)
        frontier, bits = _unite_equal_keys(targets, bits)
        or_rows(reached, frontier, bits.copy())
        unreached = np.full(targets.size, n - 1, dtype=np.int64)
        out: list[Array] = []
        while frontier.size and unreached.any() and (max_depth is None or len(out) < max_depth):
            frontier_runs = sum(int((order.first[frontier + 1] - order.first[frontier]).sum()) for order in self.links.orders)
            step = self._dense_step if 4 * frontier_runs > self.links.num_runs else self._sparse_step
            frontier, bits = step(frontier, bits, reached)
            self.work += _STEP_WORK
            if frontier.size:
                out.append(column_counts(bits)[: targets.size])
                unreached -= out[-1]
        return out

    def _sparse_step(self, frontier: Array, bits: Array, reached: Array) -> tuple[Array, Array]:
        """The next frontier from the runs of the frontier's rows alone; updates `reached`."""
        parts: list[tuple[Array, Array]] = []
        for part in self.links.runs(frontier):
            slots, lo, hi = _compact_slots(part)
            scatter = RunScatter(part.row_index, lo, hi, slots.size)
            self.work += (scatter.work + 8 * part.row_index.size + 4 * slots.size) * bits.shape[1]
            new_bits = scatter.scatter(bits)
            keys = slots if part.slots is None else part.slots[slots]
            new_bits &= ~reached.take(keys, axis=0)
            is_new = nonzero_rows(new_bits)
            keys, new_bits = keys[is_new], new_bits.take(is_new, axis=0)
            or_rows(reached, keys, new_bits.copy())
            parts.append((keys, new_bits))
        if not parts:
            return np.zeros(0, dtype=np.int64), bits[:0]
        if len(parts) == 1:  # a permutation has each key once
            return parts[0]
        return _unite_equal_keys(np.concatenate([keys for keys, _ in parts]), np.concatenate([new for _, new in parts]))

    def _dense_step(self, frontier: Array, bits: Array, reached: Array) -> tuple[Array, Array]:
        """The next frontier from the prepared runs of all rows; updates `reached`."""
        if self._dense_tables is None:
            self._dense_tables = [RunScatter(order.row, order.lo, order.hi, order.size) for order in self.links.orders]
        frontier_bits = np.zeros_like(reached)
        or_rows(frontier_bits, frontier, bits.copy())
        key_bits: Array | None = None
        for order, scatter in zip(self.links.orders, self._dense_tables, strict=True):
            self.work += (scatter.work + 8 * self.links.n) * bits.shape[1]
            table = scatter.scatter(frontier_bits)
            if order.slots is not None:
                slot_bits, table = table, np.zeros_like(reached)
                or_rows(table, order.slots, slot_bits)
            key_bits = table if key_bits is None else np.bitwise_or(key_bits, table, out=key_bits)
        assert key_bits is not None
        key_bits &= ~reached
        reached |= key_bits
        is_new = nonzero_rows(key_bits)
        return (is_new, key_bits) if is_new.size == key_bits.shape[0] else (is_new, key_bits.take(is_new, axis=0))


def merge_runs(lo: Array, hi: Array) -> tuple[Array, Array, Array, Array]:
    """(start, stop, order, owner) of the union of runs: disjoint sorted runs `[start, stop)`, the permutation that sorts the
    inputs by lo, and the merged run of each sorted input.

    >>> [x.tolist() for x in merge_runs(np.array([7, 1, 2]), np.array([9, 3, 5]))]
    [[1, 7], [5, 9], [1, 2, 0], [0, 0, 1]]
    """
    order = np.argsort(lo, kind="stable")
    lo, max_hi = lo[order], np.maximum.accumulate(hi[order])
    is_first = np.ones(lo.size, dtype=bool)
    is_first[1:] = lo[1:] > max_hi[:-1]
    first = np.flatnonzero(is_first)
    return lo[first], max_hi[np.append(first[1:], lo.size) - 1], order, np.cumsum(is_first) - 1


def _compact_slots(part: KeyRuns) -> tuple[Array, Array, Array]:
    """(slots, lo, hi): the slots that any run contains, and the runs renumbered to places in that list."""
    start, stop, order, owner = merge_runs(part.lo, part.hi)
    offset = np.cumsum(stop - start) - stop
    shift = np.empty_like(part.lo)
    shift[order] = offset[owner]
    return expand_ranges(start, stop)[1], part.lo + shift, part.hi + shift


def _unite_equal_keys(keys: Array, bits: Array) -> tuple[Array, Array]:
    """Distinct sorted keys, each with the OR of the bits of its occurrences."""
    order = np.argsort(keys, kind="stable")
    keys, bits = keys[order], bits.take(order, axis=0)
    start = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: keys.size])
    if start.size == keys.size:
        return keys, bits
    return keys[start], np.bitwise_or.reduceat(bits, start, axis=0)
