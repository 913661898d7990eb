"""The links of one batch item and head as stretches of keys, row by row: what every walk, sum and picture reads.

A *stretch* is a run `[lo, hi)` of slots that a row sees. Slots are keys as they stand, or keys in another order (tokens
sorted by residue for a stride, by label for a cluster), the same orders that plans use: there a row's keys are few
stretches, here they are read without tiles. Links are never listed one by one: a row that sees a million keys is one
stretch. `LazyLinks` works rows out when they are asked for; `Links` holds all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from farlight.analysis.graph.sizes import sizes_of
from farlight.errors import ArgumentError, show
from farlight.patterns.expression import Pattern
from farlight.patterns.spans import Spans
from farlight.plan.layout import Layout
from farlight.plan.normal_form import terms_of

__all__ = ["Array", "LazyLinks", "Links", "Order", "Stretches", "ranges"]

Array = np.ndarray[Any, Any]

_MOST_STRETCHES = 1 << 26
_STRETCHES_AT_ONCE = 1 << 20
_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, eq=False)
class Stretches:
    """Stretches of some rows in one order of keys: row number `at[x]` of those asked about sees slots `lo[x] … hi[x] - 1`.

    `at` is sorted; slot s is the key `slots[s]`, or s itself when `slots` is None. No link comes up twice, neither here nor
    in another order.
    """

    slots: Array | None
    at: Array
    lo: Array
    hi: Array

    def keys(self) -> tuple[Array, Array]:
        """Every single link as (at, key); the cost is their number."""
        slot = ranges(self.lo, self.hi)
        return np.repeat(self.at, self.hi - self.lo), slot if self.slots is None else self.slots[slot]


def ranges(lo: Array, hi: Array) -> Array:
    """`lo[0] … hi[0] - 1, lo[1] … hi[1] - 1, …` in one array.

    >>> ranges(np.array([3, 10]), np.array([5, 13])).tolist()
    [3, 4, 10, 11, 12]
    """
    length = hi - lo
    end = np.cumsum(length)
    total = int(end[-1]) if end.size else 0
    out: Array = np.arange(total) + np.repeat(lo - (end - length), length)
    return out


class LazyLinks:
    """Links worked out row by row when asked for: what a walk from one token needs."""

    def __init__(self, pattern: Pattern, n: int, batch: int = 0, head: int = 0) -> None:
        self.sizes = sizes_of(pattern, n, batch, head)
        self.n = self.sizes.n_k
        self.pattern, self.batch, self.head = pattern, int(batch), int(head)
        self._layouts = [self._with_members(Layout(term, self.sizes, 32)) for term in terms_of(pattern, self.sizes)]

    def _with_members(self, layout: Layout) -> tuple[Layout, int, Array | None, Array | None]:
        """(layout, its variant here, whether each row takes part or None for all, the order of keys or None)."""
        table = layout.variation
        variant = int(table[self.batch if table.shape[0] > 1 else 0, self.head if table.shape[1] > 1 else 0])
        member = None
        if layout.order.rows is not None:
            first, last = layout.order.row_first[variant : variant + 2].tolist()
            member = np.zeros(self.n, dtype=bool)
            member[layout.order.rows[first:last].numpy()] = True
        # Points are keys as they stand, also where their term has labels.
        slots = None if layout.keys is None or layout.term.points else layout.keys.slots.numpy()
        return layout, variant, member, slots

    def stretches(self, rows: Array) -> list[Stretches]:
        """What these rows see, one `Stretches` for each order of keys."""
        as_they_stand: list[tuple[torch.Tensor, ...]] = []
        out = []
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            for layout, variant, member, slots in self._layouts:
                place = np.arange(rows.size) if member is None else np.flatnonzero(member[rows])
                if not place.size:
                    continue
                row = torch.from_numpy(rows[place].astype(np.int64))
                same = torch.full_like(row, variant)
                if layout.term.points:
                    at, lo = layout.points(same, row)
                    hi = lo + 1
                else:
                    at, lo, hi = layout.spans(same, row).listed()
                at = torch.from_numpy(place)[at]
                if slots is None:
                    as_they_stand.append((at, lo, hi))
                elif at.numel():
                    out.append(Stretches(slots, at.numpy(), lo.numpy(), hi.numpy()))
            if as_they_stand:
                columns = (torch.cat(column) for column in zip(*as_they_stand, strict=True))
                at, lo, hi = Spans.gather(rows.size, self.n, *columns).listed()
                if at.numel():
                    out.insert(0, Stretches(None, at.numpy(), lo.numpy(), hi.numpy()))
        return out

    def all(self) -> Links:
        """Every row's stretches, worked out some thousand rows at a time. Raises ArgumentError where they are too many."""
        found: dict[int, tuple[Array | None, list[tuple[Array, ...]]]] = {}
        total = done = 0
        step = min(8192, _ROWS_AT_ONCE)
        while done < self.n:
            rows = np.arange(done, min(done + step, self.n))
            for part in self.stretches(rows):
                _, chunks = found.setdefault(id(part.slots), (part.slots, []))
                chunks.append((part.at + done, part.lo.astype(np.int32), part.hi.astype(np.int32)))
                total += part.at.size
            done += rows.size
            expected = total * self.n // done
            if expected > _MOST_STRETCHES:
                raise ArgumentError(
                    f"n = {self.n}: {show(self.pattern)} shows its rows about {expected:,} separate stretches of keys, "
                    f"more than the {_MOST_STRETCHES:,} held at once; ask about fewer tokens, or fewer single keys for each."
                )
            step = min(_ROWS_AT_ONCE, max(256, _STRETCHES_AT_ONCE * done // max(1, total)))
        orders = tuple(Order.of(self.n, slots, chunks) for slots, chunks in found.values())
        return Links(self.n, orders)


@dataclass(frozen=True, eq=False)
class Order:
    """One order of keys: row r sees the slots `lo[x] … hi[x] - 1` for x from `first[r]` to before `first[r + 1]`."""

    slots: Array | None
    first: Array  # (n + 1,) int64
    lo: Array  # (stretches,) int32
    hi: Array

    @staticmethod
    def of(n: int, slots: Array | None, chunks: list[tuple[Array, ...]]) -> Order:
        row, lo, hi = (np.concatenate(column) for column in zip(*chunks, strict=True))
        first = np.zeros(n + 1, dtype=np.int64)
        np.cumsum(np.bincount(row, minlength=n), out=first[1:])
        if slots is not None:
            # The table holds the orders of all heads one after the other; this head's is one piece of it.
            start, stop = int(lo.min()), int(hi.max())
            slots, lo, hi = slots[start:stop].astype(np.int32), lo - start, hi - start
        return Order(slots, first, lo, hi)

    @cached_property
    def size(self) -> int:
        """Number of slots."""
        return self.first.size - 1 if self.slots is None else self.slots.size

    @cached_property
    def row(self) -> Array:
        """(stretches,) int32: the row of each stretch."""
        return np.repeat(np.arange(self.first.size - 1, dtype=np.int32), np.diff(self.first))

    def of_rows(self, rows: Array) -> Stretches:
        first, last = self.first[rows], self.first[rows + 1]
        index = ranges(first, last)
        at = np.repeat(np.arange(rows.size), last - first)
        return Stretches(self.slots, at, self.lo[index].astype(np.int64), self.hi[index].astype(np.int64))

    def slot_of(self, n: int) -> Array:
        """(n,): the slot of each key, -1 when it has none."""
        if self.slots is None:
            return np.arange(n)
        slot = np.full(n, -1, dtype=np.int64)
        slot[self.slots] = np.arange(self.slots.size)
        return slot


@dataclass(frozen=True, eq=False)
class Links:
    """All links of one batch item and head."""

    n: int
    orders: tuple[Order, ...]

    @staticmethod
    def of(pattern: Pattern, n: int, batch: int = 0, head: int = 0) -> Links:
        """
        >>> import farlight as fl
        >>> links = Links.of(fl.window(1) | fl.global_tokens([0]), 5)
        >>> links.degree.tolist(), links.count
        ([4, 2, 3, 3, 2], 19)
        """
        return LazyLinks(pattern, n, batch, head).all()

    def stretches(self, rows: Array) -> list[Stretches]:
        return [part for part in (order.of_rows(rows) for order in self.orders) if part.at.size]

    @cached_property
    def selfs(self) -> Array:
        """(n,) bool: the token sees itself."""
        out = np.zeros(self.n, dtype=bool)
        for order in self.orders:
            own = order.slot_of(self.n)[order.row]
            out[order.row[(order.lo <= own) & (own < order.hi)]] = True
        return out

    @cached_property
    def degree(self) -> Array:
        """(n,) int64: how many other tokens each token hears directly."""
        return self.hear(np.ones(self.n)).round().astype(np.int64)

    @cached_property
    def listeners(self) -> Array:
        """(n,) int64: how many other tokens hear each token directly."""
        return self.tell(np.ones(self.n)).round().astype(np.int64)

    @cached_property
    def count(self) -> int:
        """Number of links, those of a token to itself included."""
        return int(self.degree.sum() + self.selfs.sum())

    @cached_property
    def looks_ahead(self) -> bool:
        """Whether some token sees a later one."""
        for order in self.orders:
            # Slots of one label are sorted by position, so the last slot of a stretch is its last key.
            last = order.hi - 1 if order.slots is None else order.slots[order.hi - 1]
            if bool((last > order.row).any()):
                return True
        return False

    def hear(self, values: Array) -> Array:
        """`y[i] = Σ_j values[j]` over the links from j to i, j ≠ i: prefix sums, one difference for each stretch."""
        out = np.where(self.selfs, -values, 0.0)
        for order in self.orders:
            total = np.zeros(order.size + 1)
            np.cumsum(values if order.slots is None else values[order.slots], out=total[1:])
            here = total.take(order.hi)
            here -= total.take(order.lo)
            out += np.bincount(order.row, weights=here, minlength=self.n)
        return out

    def tell(self, values: Array) -> Array:
        """`y[j] = Σ_i values[i]` over the links from j to i, i ≠ j: the transpose of `hear`, by sums of differences."""
        out = np.where(self.selfs, -values, 0.0)
        for order in self.orders:
            here = values.take(order.row)
            step = np.bincount(order.lo, weights=here, minlength=order.size + 1)
            step -= np.bincount(order.hi, weights=here, minlength=order.size + 1)
            total = np.cumsum(step)[: order.size]
            if order.slots is None:
                out += total
            else:
                out[order.slots] += total
        return out
