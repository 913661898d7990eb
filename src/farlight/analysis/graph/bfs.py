"""Breadth-first walks from many tokens at once, backwards: what has each of them heard of after one more layer?

A token hears of its keys in one layer; so the set it has heard of grows by the keys of all tokens in the set. 64 walks
share one word. While the newest tokens are few only they and the stretches they see are touched; when they are many
everything is, by tables that are prepared once. A link is an edge key → query: the walk runs against it.
"""

from __future__ import annotations

import numpy as np

from farlight.analysis.graph.bits import column_counts, one_each, or_rows, rows_with_any
from farlight.analysis.graph.links import Array, Links, Stretches, ranges
from farlight.analysis.graph.scatter import Spread

__all__ = ["Walker", "words_for"]

# A step touches at least this much, whatever it finds: the price of some fifty calls.
_STEP = 100_000


def words_for(n: int) -> int:
    """How many words of 64 walks to take at once: enough to keep the tables in cache, at least 4."""
    return max(4, min(64, (1 << 18) // n))


class Walker:
    """Walks over one set of links. `work` counts the words touched: a measure of time that is the same on every machine."""

    def __init__(self, links: Links) -> None:
        self.links = links
        self.work = 0
        self._prepared: list[Spread] | None = None

    def counts(self, targets: Array, most_hops: int | None = None) -> list[Array]:
        """For hop 1, 2, …: how many tokens each target hears of after exactly so many layers, `(targets,)` int64.

        A target counts itself nowhere: it is at hop 0. Ends when nothing new is heard, or after `most_hops`.

        >>> import farlight as fl
        >>> walker = Walker(Links.of(fl.window(1), 5))
        >>> [counts.tolist() for counts in walker.counts(np.array([0, 2]))]
        [[1, 2], [1, 2], [1, 0], [1, 0]]
        """
        n = self.links.n
        bits = one_each(targets.size)
        known = np.zeros((n, bits.shape[1]), dtype=np.uint64)
        at, bits = _united(targets, bits)
        or_rows(known, at, bits.copy())
        remaining = np.full(targets.size, n - 1, dtype=np.int64)
        out: list[Array] = []
        while at.size and remaining.any() and (most_hops is None or len(out) < most_hops):
            stretches = sum(int((order.first[at + 1] - order.first[at]).sum()) for order in self.links.orders)
            if 4 * stretches > sum(order.lo.size for order in self.links.orders):
                at, bits = self._step_everywhere(at, bits, known)
            else:
                at, bits = self._step_there(at, bits, known)
            self.work += _STEP
            if at.size:
                out.append(column_counts(bits)[: targets.size])
                remaining -= out[-1]
        return out

    def _step_there(self, at: Array, bits: Array, known: Array) -> tuple[Array, Array]:
        """One layer, touching only what the rows `at` see."""
        found: list[tuple[Array, Array]] = []
        for part in self.links.stretches(at):
            slots, lo, hi, size = _packed(part)
            spread = Spread(part.at, lo, hi, size)
            self.work += (spread.work + 8 * part.at.size + 4 * size) * bits.shape[1]
            new = spread.spread(bits)
            keys = slots if part.slots is None else part.slots[slots]
            new &= ~known.take(keys, axis=0)
            some = rows_with_any(new)
            keys, new = keys[some], new.take(some, axis=0)
            or_rows(known, keys, new.copy())
            found.append((keys, new))
        if not found:
            return np.zeros(0, dtype=np.int64), bits[:0]
        if len(found) == 1:  # one order of keys has each key once
            return found[0]
        return _united(np.concatenate([keys for keys, _ in found]), np.concatenate([new for _, new in found]))

    def _step_everywhere(self, at: Array, bits: Array, known: Array) -> tuple[Array, Array]:
        """One layer by the prepared tables of all rows."""
        if self._prepared is None:
            self._prepared = [Spread(order.row, order.lo, order.hi, order.size) for order in self.links.orders]
        newest = np.zeros_like(known)
        or_rows(newest, at, bits.copy())
        heard: Array | None = None
        for order, spread in zip(self.links.orders, self._prepared, strict=True):
            self.work += (spread.work + 8 * self.links.n) * bits.shape[1]
            table = spread.spread(newest)
            if order.slots is not None:
                by_slot, table = table, np.zeros_like(known)
                or_rows(table, order.slots, by_slot)
            heard = table if heard is None else np.bitwise_or(heard, table, out=heard)
        assert heard is not None
        heard &= ~known
        known |= heard
        some = rows_with_any(heard)
        return (some, heard) if some.size == heard.shape[0] else (some, heard.take(some, axis=0))


def _packed(part: Stretches) -> tuple[Array, Array, Array, int]:
    """(slots in the union of the stretches, and each stretch's place among them, how many they are)."""
    order = np.argsort(part.lo, kind="stable")
    lo, hi = part.lo[order], part.hi[order]
    reach = np.maximum.accumulate(hi)
    first = np.ones(lo.size, dtype=bool)
    first[1:] = lo[1:] > reach[:-1]
    start, stop = lo[first], reach[np.append(np.flatnonzero(first)[1:], lo.size) - 1]
    before = np.cumsum(stop - start) - (stop - start)
    shift = np.empty_like(lo)
    shift[order] = (before - start)[np.cumsum(first) - 1]
    return ranges(start, stop), part.lo + shift, part.hi + shift, int((stop - start).sum())


def _united(keys: Array, bits: Array) -> tuple[Array, Array]:
    """Distinct keys, sorted, each with the union of its bits."""
    order = np.argsort(keys, kind="stable")
    keys, bits = keys[order], bits.take(order, axis=0)
    start = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: keys.size])
    if start.size == keys.size:
        return keys, bits
    return keys[start], np.bitwise_or.reduceat(bits, start, axis=0)
