"""`Spans`: sorted, disjoint key intervals of each row, with union, intersection and difference.

Layout (compressed, like a CSR matrix of intervals): three flat int64 tensors `row`, `lo`, `hi`, sorted by row and then by lo.
Interval t allows the keys `lo[t] … hi[t] - 1` to row `row[t]`. Within a row intervals neither overlap nor touch.

A *thin* `Spans` has at most one interval per row: `row` is None and entry r of `lo` and `hi` is row r (empty when lo >= hi).
`window`, `causal` and consecutive global tokens are thin, and so are intersections of thin ones: elementwise max and min,
no sort.

Every other operation is a sweep over sorted end points, O(m log m) for m intervals. (row, key) is packed into the one int64
`row * (n_k + 2) + key`, so that one sort orders both and intervals of two rows never touch. Nothing of size n_q · n_k is
formed. This module knows neither patterns nor q, k, v.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.ragged import exclusive_cumsum, expand_ranges

__all__ = ["Spans"]


@dataclass(frozen=True)
class Spans:
    """Half-open key intervals `[lo, hi)` of `rows` rows over `keys` keys; see the module's docstring for the layout."""

    rows: int
    keys: int
    row: Tensor | None
    lo: Tensor
    hi: Tensor

    # ---- constructors ------------------------------------------------------------------------------------------------
    @staticmethod
    def thin(keys: int, lo: Tensor, hi: Tensor) -> Spans:
        """One interval per row, clipped to `[0, keys)`; lo, hi: `(rows,)`."""
        return Spans(lo.numel(), keys, None, lo.clamp(min=0), hi.clamp(max=keys))

    @staticmethod
    def everything(rows: int, keys: int, device: torch.device) -> Spans:
        """All keys in every row."""
        zero = torch.zeros(rows, dtype=torch.int64, device=device)
        return Spans(rows, keys, None, zero, zero + keys)

    @staticmethod
    def nothing(rows: int, keys: int, device: torch.device) -> Spans:
        """No key in any row."""
        zero = torch.zeros(rows, dtype=torch.int64, device=device)
        return Spans(rows, keys, None, zero, zero)

    @staticmethod
    def gather(rows: int, keys: int, row: Tensor, lo: Tensor, hi: Tensor) -> Spans:
        """Intervals in any order, overlapping or not, as `(m,)` tensors: clipped, sorted and merged."""
        lo, hi = lo.clamp(min=0), hi.clamp(max=keys)
        nonempty = lo < hi
        if not bool(nonempty.all()):
            row, lo, hi = row[nonempty], lo[nonempty], hi[nonempty]
        if row.numel() == 0:
            return Spans.nothing(rows, keys, lo.device)
        width = keys + 2
        start, order = torch.sort(row * width + lo)
        # An interval begins a merged one when it starts beyond the largest end before it.
        reach = torch.cummax((row * width + hi)[order], 0).values
        first = torch.ones_like(start, dtype=torch.bool)
        first[1:] = start[1:] > reach[:-1]
        last = torch.ones_like(first)
        last[:-1] = first[1:]
        return Spans._unpacked(rows, keys, start[first], reach[last])

    @staticmethod
    def _unpacked(rows: int, keys: int, start: Tensor, stop: Tensor) -> Spans:
        """The intervals between the packed end points `row * (keys + 2) + key`."""
        width = keys + 2
        row = start // width
        return Spans(rows, keys, row, start - row * width, stop - row * width)

    @staticmethod
    def from_table(keys: int, lo: Tensor, hi: Tensor) -> Spans:
        """m intervals per row in any order, as `(rows, m)` tables; empty where lo >= hi."""
        rows, m = lo.shape
        row = torch.arange(rows, device=lo.device).repeat_interleave(m)
        return Spans.gather(rows, keys, row, lo.reshape(-1), hi.reshape(-1))

    @staticmethod
    def from_pairs(rows: int, keys: int, row: Tensor, key: Tensor) -> Spans:
        """Single (row, key) pairs in any order, repeated or not, merged to intervals."""
        return Spans.gather(rows, keys, row, key, key + 1)

    @staticmethod
    def from_mask(mask: Tensor) -> Spans:
        """The runs of True in a `(rows, keys)` bool tensor."""
        rows, keys = mask.shape
        padded = torch.zeros(rows, keys + 2, dtype=torch.int8, device=mask.device)
        padded[:, 1:-1] = mask
        step = padded.diff(dim=1)
        row, lo = (step == 1).nonzero(as_tuple=True)
        hi = (step == -1).nonzero(as_tuple=True)[1]
        return Spans(rows, keys, row, lo, hi)

    # ---- reading -----------------------------------------------------------------------------------------------------
    @property
    def is_thin(self) -> bool:
        """Whether there is at most one interval per row, stored per row."""
        return self.row is None

    def is_empty(self) -> bool:
        """Whether no row has a key. Synchronises with the device."""
        return not bool((self.lo < self.hi).any())

    def listed(self) -> tuple[Tensor, Tensor, Tensor]:
        """(row, lo, hi), each `(m,)`: the m nonempty intervals, sorted by row and lo."""
        if self.row is not None:
            return self.row, self.lo, self.hi
        row = (self.lo < self.hi).nonzero().squeeze(1)
        return row, self.lo[row], self.hi[row]

    def count(self) -> int:
        """The number of (row, key) pairs."""
        return int((self.hi - self.lo).clamp(min=0).sum())

    def per_row(self) -> Tensor:
        """`(rows,)` int64: the number of keys of each row."""
        length = (self.hi - self.lo).clamp(min=0)
        if self.row is None:
            return length
        return torch.zeros(self.rows, dtype=torch.int64, device=length.device).index_add_(0, self.row, length)

    def expand(self) -> tuple[Tensor, Tensor]:
        """(row, key) of every pair, sorted; costs the number of pairs."""
        row, lo, hi = self.listed()
        interval, key = expand_ranges(lo, hi)
        return row[interval], key

    def mask(self) -> Tensor:
        """The `(rows, keys)` bool tensor of the pairs (for people and tests)."""
        out = torch.zeros(self.rows, self.keys, dtype=torch.bool, device=self.lo.device)
        out[self.expand()] = True
        return out

    # ---- selecting and scaling rows ----------------------------------------------------------------------------------
    def only(self, kept: Tensor) -> Spans:
        """The intervals of the rows where `kept` `(rows,)` bool is True; the other rows become empty."""
        if self.row is None:
            return Spans(self.rows, self.keys, None, self.lo, torch.where(kept, self.hi, self.lo))
        pick = kept[self.row]
        return Spans(self.rows, self.keys, self.row[pick], self.lo[pick], self.hi[pick])

    def repeated(self, source: Tensor) -> Spans:
        """Row r of the result is row `source[r]` of these; `source` is sorted."""
        if self.row is None:
            return Spans(source.numel(), self.keys, None, self.lo[source], self.hi[source])
        counts = torch.bincount(self.row, minlength=self.rows)
        first = exclusive_cumsum(counts)[source]
        row, interval = expand_ranges(first, first + counts[source])
        return Spans(source.numel(), self.keys, row, self.lo[interval], self.hi[interval])

    def scaled(self, block: int, keys: int) -> Spans:
        """Intervals of key blocks of `block` keys as intervals of keys, of which there are `keys`."""
        return Spans(self.rows, keys, self.row, self.lo * block, (self.hi * block).clamp(max=keys))

    # ---- set operations ----------------------------------------------------------------------------------------------
    def __or__(self, other: Spans) -> Spans:
        if self.is_empty():
            return other
        if other.is_empty():
            return self
        a, b = self.listed(), other.listed()
        return Spans.gather(self.rows, self.keys, *(torch.cat(columns) for columns in zip(a, b, strict=True)))

    def __and__(self, other: Spans) -> Spans:
        if self.is_thin and other.is_thin:
            return Spans(self.rows, self.keys, None, torch.maximum(self.lo, other.lo), torch.minimum(self.hi, other.hi))
        return self._sweep(other, keep=3)

    def __sub__(self, other: Spans) -> Spans:
        if other.is_empty() or self.is_empty():
            return self
        if self.is_thin and other.is_thin:
            # The difference of two intervals is one interval unless the second lies strictly inside the first.
            inside = (other.lo > self.lo) & (other.hi < self.hi) & (other.lo < other.hi)
            if not bool(inside.any()):
                overlap = (other.lo < self.hi) & (other.hi > self.lo) & (other.lo < other.hi)
                cut_left = overlap & (other.lo <= self.lo)
                lo = torch.where(cut_left, other.hi, self.lo)
                hi = torch.where(overlap & ~cut_left, other.lo, self.hi)
                return Spans(self.rows, self.keys, None, lo, hi)
        return self._sweep(other, keep=1)

    def __invert__(self) -> Spans:
        return Spans.everything(self.rows, self.keys, self.lo.device) - self

    def _sweep(self, other: Spans, keep: int) -> Spans:
        """The stretches of the key axis whose state is `keep`; state = (1 inside self) + (2 inside other).

        Every end point adds or subtracts its weight; the running sum over the sorted end points is the state behind each.
        """
        width = self.keys + 2
        endpoints, weights = [], []
        for (row, lo, hi), weight in ((self.listed(), 1), (other.listed(), 2)):
            endpoints += [row * width + lo, row * width + hi]
            weights += [torch.full_like(lo, weight), torch.full_like(lo, -weight)]
        endpoint, order = torch.sort(torch.cat(endpoints))
        state = torch.cat(weights)[order].cumsum(0)
        # Of equal end points only the last has the state behind all of them.
        settled = torch.ones_like(endpoint, dtype=torch.bool)
        settled[:-1] = endpoint[1:] != endpoint[:-1]
        endpoint, inside = endpoint[settled], state[settled] == keep
        inside_before = torch.zeros_like(inside)
        inside_before[1:] = inside[:-1]
        return Spans._unpacked(self.rows, self.keys, endpoint[inside & ~inside_before], endpoint[~inside & inside_before])
