"""Sorted key intervals, row by row: the arithmetic in which patterns are united, intersected and subtracted.

A `Spans` says, for each of `rows` query rows, which keys it sees, as disjoint half-open intervals. Everything is a sweep
over sorted end points, so the cost is that of sorting the intervals; n² never appears. Nothing here knows what a pattern
or a tensor of queries is.

A *thin* `Spans` has at most one interval in each row and keeps one (lo, hi) pair per row, empty when lo >= hi. Windows,
causality and runs of global tokens are thin, and so are their intersections: for those no sorting happens at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Spans"]


@dataclass(frozen=True)
class Spans:
    """Intervals `[lo, hi)` of keys, sorted by row and then by lo, disjoint and not touching within a row.

    `row` is None for a thin `Spans`, where entry r of lo and hi belongs to row r. All tensors are int64.
    """

    rows: int
    keys: int
    row: Tensor | None
    lo: Tensor
    hi: Tensor

    @staticmethod
    def thin(keys: int, lo: Tensor, hi: Tensor) -> Spans:
        """One interval per row, clipped to `[0, keys)`."""
        return Spans(lo.numel(), keys, None, lo.clamp(min=0), hi.clamp(max=keys))

    @staticmethod
    def everything(rows: int, keys: int, device: torch.device) -> Spans:
        zero = torch.zeros(rows, dtype=torch.int64, device=device)
        return Spans(rows, keys, None, zero, zero + keys)

    @staticmethod
    def nothing(rows: int, keys: int, device: torch.device) -> Spans:
        zero = torch.zeros(rows, dtype=torch.int64, device=device)
        return Spans(rows, keys, None, zero, zero)

    @staticmethod
    def gather(rows: int, keys: int, row: Tensor, lo: Tensor, hi: Tensor) -> Spans:
        """Any intervals in any order, overlapping or not: sorted, clipped and joined."""
        lo, hi = lo.clamp(min=0), hi.clamp(max=keys)
        real = lo < hi
        if not bool(real.all()):
            row, lo, hi = row[real], lo[real], hi[real]
        if row.numel() == 0:
            return Spans.nothing(rows, keys, lo.device)
        # One number carries row and key: rows lie `width` apart, so that the intervals of two rows never touch.
        width = keys + 2
        start, order = torch.sort(row * width + lo)
        reach = torch.cummax((row * width + hi)[order], 0).values
        first = torch.ones_like(start, dtype=torch.bool)
        first[1:] = start[1:] > reach[:-1]
        last = torch.ones_like(first)
        last[:-1] = first[1:]
        start, stop = start[first], reach[last]
        row = torch.div(start, width, rounding_mode="floor")
        return Spans(rows, keys, row, start - row * width, stop - row * width)

    @staticmethod
    def from_table(keys: int, lo: Tensor, hi: Tensor) -> Spans:
        """Intervals as a `(rows, m)` table, empty where lo >= hi."""
        rows, m = lo.shape
        row = torch.arange(rows, device=lo.device).repeat_interleave(m)
        return Spans.gather(rows, keys, row, lo.reshape(-1), hi.reshape(-1))

    @staticmethod
    def from_mask(mask: Tensor) -> Spans:
        """The runs of True in a `(rows, keys)` bool tensor."""
        rows, keys = mask.shape
        edge = torch.zeros(rows, keys + 2, dtype=torch.int8, device=mask.device)
        edge[:, 1:-1] = mask
        step = edge.diff(dim=1)
        row, lo = (step == 1).nonzero(as_tuple=True)
        hi = (step == -1).nonzero(as_tuple=True)[1]
        return Spans(rows, keys, row, lo, hi)

    @property
    def is_thin(self) -> bool:
        return self.row is None

    def listed(self) -> tuple[Tensor, Tensor, Tensor]:
        """(row, lo, hi) of every interval that is not empty, sorted."""
        if self.row is not None:
            return self.row, self.lo, self.hi
        row = (self.lo < self.hi).nonzero().squeeze(1)
        return row, self.lo[row], self.hi[row]

    def only(self, kept: Tensor) -> Spans:
        """The intervals of the rows where `kept` (rows,) is True."""
        if self.row is None:
            return Spans(self.rows, self.keys, None, self.lo, torch.where(kept, self.hi, self.lo))
        pick = kept[self.row]
        return Spans(self.rows, self.keys, self.row[pick], self.lo[pick], self.hi[pick])

    def repeated(self, source: Tensor) -> Spans:
        """Row r of the result is row `source[r]` of these; `source` is sorted."""
        if self.row is None:
            return Spans(source.numel(), self.keys, None, self.lo[source], self.hi[source])
        times = torch.bincount(self.row, minlength=self.rows)
        count = times[source]
        row = torch.arange(source.numel(), device=source.device).repeat_interleave(count)
        # The intervals of a row stand together, from `times.cumsum(0) - times` on.
        skip = (times.cumsum(0) - times)[source] - (count.cumsum(0) - count)
        at = torch.arange(row.numel(), device=source.device) + skip[row]
        return Spans(source.numel(), self.keys, row, self.lo[at], self.hi[at])

    def scaled(self, block: int, keys: int) -> Spans:
        """Intervals of blocks of `block` keys as intervals of keys, of which there are `keys`."""
        return Spans(self.rows, keys, self.row, self.lo * block, (self.hi * block).clamp(max=keys))

    def count(self) -> int:
        """Number of (row, key) pairs."""
        return int((self.hi - self.lo).clamp(min=0).sum())

    def per_row(self) -> Tensor:
        """`(rows,)`: how many keys each row sees."""
        length = (self.hi - self.lo).clamp(min=0)
        if self.row is None:
            return length
        return torch.zeros(self.rows, dtype=torch.int64, device=length.device).index_add_(0, self.row, length)

    def is_empty(self) -> bool:
        return not bool((self.lo < self.hi).any())

    def __or__(self, other: Spans) -> Spans:
        if self.is_empty():
            return other
        if other.is_empty():
            return self
        a, b = self.listed(), other.listed()
        return Spans.gather(self.rows, self.keys, *(torch.cat(pair) for pair in zip(a, b, strict=True)))

    def __and__(self, other: Spans) -> Spans:
        if self.is_thin and other.is_thin:
            return Spans(self.rows, self.keys, None, torch.maximum(self.lo, other.lo), torch.minimum(self.hi, other.hi))
        return self._sweep(other, keep=3)

    def __sub__(self, other: Spans) -> Spans:
        if other.is_empty() or self.is_empty():
            return self
        if self.is_thin and other.is_thin:
            # The difference of two intervals stays one interval unless the second lies strictly inside the first.
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
        """Keep the stretches whose state is `keep`, where the state is (1 inside self) + (2 inside other)."""
        width = self.keys + 2
        points, steps = [], []
        for (row, lo, hi), weight in ((self.listed(), 1), (other.listed(), 2)):
            points += [row * width + lo, row * width + hi]
            steps += [torch.full_like(lo, weight), torch.full_like(lo, -weight)]
        point, order = torch.sort(torch.cat(points))
        state = torch.cat(steps)[order].cumsum(0)
        settled = torch.ones_like(point, dtype=torch.bool)
        settled[:-1] = point[1:] != point[:-1]
        point, on = point[settled], state[settled] == keep
        before = torch.zeros_like(on)
        before[1:] = on[:-1]
        start, stop = point[on & ~before], point[~on & before]
        row = torch.div(start, width, rounding_mode="floor")
        return Spans(self.rows, self.keys, row, start - row * width, stop - row * width)

    def expand(self) -> tuple[Tensor, Tensor]:
        """Every single pair as (row, key), sorted. The cost is the number of pairs."""
        row, lo, hi = self.listed()
        length = hi - lo
        which = torch.arange(row.numel(), device=row.device).repeat_interleave(length)
        offset = torch.arange(which.numel(), device=row.device) - (length.cumsum(0) - length)[which]
        return row[which], lo[which] + offset

    @staticmethod
    def from_pairs(rows: int, keys: int, row: Tensor, key: Tensor) -> Spans:
        """Single pairs in any order, repeated or not, joined to intervals."""
        return Spans.gather(rows, keys, row, key, key + 1)

    def mask(self) -> Tensor:
        """The `(rows, keys)` bool tensor that these intervals stand for (for people and for tests)."""
        out = torch.zeros(self.rows, self.keys, dtype=torch.bool, device=self.lo.device)
        out[self.expand()] = True
        return out
