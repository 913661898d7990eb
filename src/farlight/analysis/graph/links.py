"""The edges of one batch item and head in compressed form: per query row, runs of consecutive key slots.

A *run* `[lo, hi)` stands for the links to every slot in it. A slot is a key position, or a key's place in a permutation of
the keys (sorted by residue for a stride, by label for clusters): plans use the same permutations, because there the keys of a
row are a few runs. `KeyRuns` holds the runs of selected rows under one permutation, `RunTable` those of all rows in CSR
form; a pattern has one of them per permutation, and no link is in two. Memory and time follow the number of runs: a row that
sees a million consecutive keys is one run.

`LazyLinks` computes the runs of requested rows; `Links` holds all rows.
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
from farlight.plan.layout import TermLayout
from farlight.plan.normal_form import terms_of

__all__ = ["Array", "KeyRuns", "LazyLinks", "Links", "RunTable", "expand_ranges"]

Array = np.ndarray[Any, Any]

_MAX_RUNS = 1 << 26
# Target number of runs, and maximum number of rows, of a chunk of `LazyLinks.all`.
_CHUNK_RUNS = 1 << 20
_CHUNK_ROWS = 1 << 16


@dataclass(frozen=True, eq=False)
class KeyRuns:
    """Runs of selected rows under one permutation of the keys: the row `rows[row_index[x]]` sees slots `lo[x] … hi[x] - 1`.

    row_index: (runs,) int64, sorted; an index into the rows that were requested. lo, hi: (runs,) int64. slots: the key of
    each slot, or None where slot s is key s.
    """

    slots: Array | None
    row_index: Array
    lo: Array
    hi: Array

    def pairs(self) -> tuple[Array, Array]:
        """(row_index, key), one entry per link."""
        run, slot = expand_ranges(self.lo, self.hi)
        return self.row_index[run], slot if self.slots is None else self.slots[slot]


def expand_ranges(begin: Array, end: Array) -> tuple[Array, Array]:
    """(range index, integer) of every integer in `[begin[x], end[x])`, range by range.

    `farlight.ragged.expand_ranges` for numpy arrays: several times faster here, as most calls have few ranges.

    >>> [x.tolist() for x in expand_ranges(np.array([3, 10]), np.array([5, 13]))]
    [[0, 0, 1, 1, 1], [3, 4, 10, 11, 12]]
    """
    length = end - begin
    owner = np.repeat(np.arange(length.size), length)
    return owner, np.arange(owner.size) + np.repeat(begin - (np.cumsum(length) - length), length)


class LazyLinks:
    """Links whose runs are computed for the rows that are requested: what a search from a single token needs."""

    def __init__(self, pattern: Pattern, n: int, batch: int = 0, head: int = 0) -> None:
        self.sizes = sizes_of(pattern, n, batch, head)
        self.n = self.sizes.n_k
        self.pattern, self.batch, self.head = pattern, int(batch), int(head)
        self._layouts = [self._with_members(TermLayout(term, self.sizes, 32)) for term in terms_of(pattern, self.sizes)]

    def _with_members(self, layout: TermLayout) -> tuple[TermLayout, int, Array | None, Array | None]:
        """(layout, variant of this batch item and head, (n,) bool member rows or None for all, permutation of keys or None)."""
        table = layout.variation
        variant = int(table[self.batch if table.shape[0] > 1 else 0, self.head if table.shape[1] > 1 else 0])
        member = None
        if layout.order.rows is not None:
            first, last = layout.order.row_first[variant : variant + 2].tolist()
            member = np.zeros(self.n, dtype=bool)
            member[layout.order.rows[first:last].numpy()] = True
        # Single keys are stored as positions, also where their term has labels.
        slots = None if layout.keys is None or layout.term.points else layout.keys.slots.numpy()
        return layout, variant, member, slots

    def runs(self, rows: Array) -> list[KeyRuns]:
        """The runs of these rows, one `KeyRuns` per permutation of the keys; those without any run are left out."""
        natural_runs: list[tuple[torch.Tensor, ...]] = []
        out = []
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            for layout, variant, member, slots in self._layouts:
                selected = np.arange(rows.size) if member is None else np.flatnonzero(member[rows])
                if not selected.size:
                    continue
                row = torch.from_numpy(rows[selected].astype(np.int64))
                variants = torch.full_like(row, variant)
                if layout.term.points:
                    row_index, lo = layout.points(variants, row)
                    hi = lo + 1
                else:
                    row_index, lo, hi = layout.spans(variants, row).listed()
                row_index = torch.from_numpy(selected)[row_index]
                if slots is None:
                    natural_runs.append((row_index, lo, hi))
                elif row_index.numel():
                    out.append(KeyRuns(slots, row_index.numpy(), lo.numpy(), hi.numpy()))
            if natural_runs:
                columns = (torch.cat(column) for column in zip(*natural_runs, strict=True))
                row_index, lo, hi = Spans.gather(rows.size, self.n, *columns).listed()
                if row_index.numel():
                    out.insert(0, KeyRuns(None, row_index.numpy(), lo.numpy(), hi.numpy()))
        return out

    def all(self) -> Links:
        """The runs of all rows, computed chunk by chunk. Raises ArgumentError beyond `_MAX_RUNS` runs (1 GiB of tables)."""
        chunks: dict[int, tuple[Array | None, list[tuple[Array, ...]]]] = {}
        total = done = 0
        step = min(8192, _CHUNK_ROWS)
        while done < self.n:
            rows = np.arange(done, min(done + step, self.n))
            for part in self.runs(rows):
                _, columns = chunks.setdefault(id(part.slots), (part.slots, []))
                columns.append((part.row_index + done, part.lo.astype(np.int32), part.hi.astype(np.int32)))
                total += part.row_index.size
            done += rows.size
            expected = total * self.n // done
            if expected > _MAX_RUNS:
                raise ArgumentError(
                    f"n = {self.n}: {show(self.pattern)} has about {expected:,} runs of consecutive keys, more than the "
                    f"{_MAX_RUNS:,} that fit in memory; use a smaller n, or fewer single keys per query."
                )
            step = min(_CHUNK_ROWS, max(256, _CHUNK_RUNS * done // max(1, total)))
        return Links(self.n, tuple(RunTable.of(self.n, slots, columns) for slots, columns in chunks.values()))


@dataclass(frozen=True, eq=False)
class RunTable:
    """All rows' runs under one permutation of the keys, in CSR form: row r has runs `first[r] … first[r + 1] - 1`.

    slots: the key of each slot, or None where slot s is key s. first: (n + 1,) int64. lo, hi: (runs,) int32 slots.
    """

    slots: Array | None
    first: Array
    lo: Array
    hi: Array

    @staticmethod
    def of(n: int, slots: Array | None, chunks: list[tuple[Array, ...]]) -> RunTable:
        """From (row, lo, hi) columns in row order."""
        row, lo, hi = (np.concatenate(column) for column in zip(*chunks, strict=True))
        first = np.zeros(n + 1, dtype=np.int64)
        np.cumsum(np.bincount(row, minlength=n), out=first[1:])
        if slots is not None:
            # The plan's table has the permutations of all heads one after another; only this head's piece is kept.
            start, stop = int(lo.min()), int(hi.max())
            slots, lo, hi = slots[start:stop].astype(np.int32), lo - start, hi - start
        return RunTable(slots, first, lo, hi)

    @cached_property
    def size(self) -> int:
        """Number of slots."""
        return self.first.size - 1 if self.slots is None else self.slots.size

    @cached_property
    def row(self) -> Array:
        """(runs,) int32: the row of each run."""
        return np.repeat(np.arange(self.first.size - 1, dtype=np.int32), np.diff(self.first))

    def of_rows(self, rows: Array) -> KeyRuns:
        """The runs of these rows."""
        row_index, run = expand_ranges(self.first[rows], self.first[rows + 1])
        return KeyRuns(self.slots, row_index, self.lo[run].astype(np.int64), self.hi[run].astype(np.int64))

    def slot_of(self, n: int) -> Array:
        """(n,) int64: the slot of each key, -1 for a key without one."""
        if self.slots is None:
            return np.arange(n)
        slot = np.full(n, -1, dtype=np.int64)
        slot[self.slots] = np.arange(self.slots.size)
        return slot


@dataclass(frozen=True, eq=False)
class Links:
    """All links of one batch item and head: the boolean matrix M with `M[i, j]` set where the query at i sees the key at j."""

    n: int
    orders: tuple[RunTable, ...]

    @staticmethod
    def of(pattern: Pattern, n: int, batch: int = 0, head: int = 0) -> Links:
        """
        >>> import farlight as fl
        >>> links = Links.of(fl.window(1) | fl.global_tokens([0]), 5)
        >>> links.in_degree.tolist(), links.count
        ([4, 2, 3, 3, 2], 19)
        """
        return LazyLinks(pattern, n, batch, head).all()

    def runs(self, rows: Array) -> list[KeyRuns]:
        """The runs of these rows, one `KeyRuns` per permutation of the keys."""
        return [part for part in (order.of_rows(rows) for order in self.orders) if part.row_index.size]

    @property
    def num_runs(self) -> int:
        """Number of runs of all rows."""
        return sum(order.lo.size for order in self.orders)

    @cached_property
    def self_loops(self) -> Array:
        """(n,) bool: whether the token sees itself."""
        out = np.zeros(self.n, dtype=bool)
        for order in self.orders:
            self_slot = order.slot_of(self.n)[order.row]
            out[order.row[(order.lo <= self_slot) & (self_slot < order.hi)]] = True
        return out

    @cached_property
    def in_degree(self) -> Array:
        """(n,) int64: the number of other tokens that each token sees (its keys)."""
        return self.sum_over_keys(np.ones(self.n)).round().astype(np.int64)

    @cached_property
    def out_degree(self) -> Array:
        """(n,) int64: the number of other tokens that see each token (its queries)."""
        return self.sum_over_queries(np.ones(self.n)).round().astype(np.int64)

    @cached_property
    def count(self) -> int:
        """Number of links, self-loops included."""
        return int(self.in_degree.sum() + self.self_loops.sum())

    @cached_property
    def is_causal(self) -> bool:
        """Whether no token sees a later one."""
        for order in self.orders:
            # Slots of one label are sorted by position, so the last slot of a run is its largest key.
            last_key = order.hi - 1 if order.slots is None else order.slots[order.hi - 1]
            if bool((last_key > order.row).any()):
                return False
        return True

    def sum_over_keys(self, values: Array) -> Array:
        """`y[i] = Σ_{j ≠ i} M[i, j] · values[j]`, (n,) float64: per run one difference of two prefix sums."""
        out = np.where(self.self_loops, -values, 0.0)
        for order in self.orders:
            prefix = np.zeros(order.size + 1)
            np.cumsum(values if order.slots is None else values[order.slots], out=prefix[1:])
            run_sum = prefix.take(order.hi)
            run_sum -= prefix.take(order.lo)
            out += np.bincount(order.row, weights=run_sum, minlength=self.n)
        return out

    def sum_over_queries(self, values: Array) -> Array:
        """`y[j] = Σ_{i ≠ j} M[i, j] · values[i]`, (n,) float64: +value at each lo, -value at each hi, then a prefix sum."""
        out = np.where(self.self_loops, -values, 0.0)
        for order in self.orders:
            row_value = values.take(order.row)
            step = np.bincount(order.lo, weights=row_value, minlength=order.size + 1)
            step -= np.bincount(order.hi, weights=row_value, minlength=order.size + 1)
            slot_sum = np.cumsum(step)[: order.size]
            if order.slots is None:
                out += slot_sum
            else:
                out[order.slots] += slot_sum
        return out
