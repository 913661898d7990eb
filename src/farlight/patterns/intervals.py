"""Key intervals listed row by row: the primitive of edges, graphs, and the masks of other libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farlight.errors import PatternError
from farlight.patterns.arguments import check_leading, query_base, read_table, whole
from farlight.patterns.deferred import is_unreadable
from farlight.patterns.expression import Sizes
from farlight.patterns.spans import Spans
from farlight.patterns.tables import TablePattern, table_rows
from farlight.ragged import exclusive_cumsum, expand_ranges

__all__ = ["intervals", "of_spans"]


class intervals(TablePattern):
    """Listed key intervals of each query: j lies in one of `runs[begin … end - 1]`, `[begin, end) = rows[b, h, i]`.

    `rows` is `(B|1, H|1, N, 2)` integers, a range of `runs` for each query; `runs` is `(M, 2)` integers, half-open intervals of
    keys `[first, last)`, sorted and disjoint within a row; `keys` is the number of keys. `fl.from_edges` and its relatives
    make this pattern; memory is that of the intervals.

    >>> from farlight.patterns.intervals import intervals
    >>> intervals([[0, 1], [1, 3]], [[1, 3], [0, 1], [2, 3]], 3).dense(2, 3).int()[0, 0].tolist()
    [[0, 1, 1], [1, 0, 1]]
    """

    _query_argument = "intervals: rows"
    keys: int

    def __init__(self, rows: Any, runs: Any, keys: int) -> None:
        table, ends = (
            read_table(f"intervals: {name}", x, 4, dtype=torch.int64) for name, x in (("rows", rows), ("runs", runs))
        )
        if table.shape[3] != 2 or ends.shape[3] != 2 or ends.shape[0] != 1 or ends.shape[1] != 1:
            raise PatternError(
                f"intervals: rows of shape {tuple(table.shape)} and runs of shape {tuple(ends.shape)}; give (B, H, N, 2) and "
                "(M, 2)."
            )
        keys = whole("intervals: keys", keys, 0)
        self._set(keys=keys)
        self._set_tables(table, ends, text=f"intervals($0, $1, {keys})")

    def check(self, sizes: Sizes) -> None:
        check_leading("intervals: rows", self._tables[0], sizes)
        query_base("intervals: rows", self._tables[0].shape[2], sizes)
        if sizes.n_k != self.keys:
            raise PatternError(f"intervals: they are over {self.keys} keys, but there are {sizes.n_k}; they must agree.")
        if not any(map(is_unreadable, self._tables)) and not self._cached("is sound", self._is_sound):
            raise PatternError(
                "intervals: each row needs a range of the runs, and its runs must be sorted, disjoint and within the keys; "
                "let fl.from_edges make them."
            )

    def _is_sound(self) -> bool:
        (begin, end), (first, last) = self._tables[0].flatten(0, 2).unbind(1), self._tables[1].flatten(0, 2).unbind(1)
        if not bool(((begin >= 0) & (begin <= end) & (end <= first.numel())).all()):
            return False
        if not bool(((first >= 0) & (first < last) & (last <= self.keys)).all()):
            return False
        _, index = expand_ranges(begin, (end - 1).clamp(min=0))  # every run of a row but its last
        return bool((last[index] <= first[index + 1]).all()) if index.numel() else True

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row, inside = self._query_row(sizes, i)
        runs = self._tables[1].to(j.device).flatten(0, 2)
        if not runs.numel() or not self._tables[0].numel():
            return torch.zeros((), dtype=torch.bool, device=j.device)
        begin, end = table_rows(self._tables[0], b, h, row).unbind(-1)
        # The number of the row's runs that begin at or before j, by bisection.
        low, high = torch.broadcast_tensors(begin, end, j)[:2]
        for _ in range(runs.shape[0].bit_length()):
            middle = (low + high) // 2
            before = (low < high) & (runs[middle.clamp(max=runs.shape[0] - 1), 0] <= j)
            low, high = torch.where(before, middle + 1, low), torch.where(before | (low >= high), high, middle)
        allowed: Tensor = inside & (low > begin) & (j < runs[(low - 1).clamp(min=0), 1])
        return allowed

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        row, inside = self._query_row(sizes, i)
        if not self._tables[0].numel():
            return Spans.nothing(i.numel(), sizes.n_k, i.device)
        begin, end = table_rows(self._tables[0], b, h, row).unbind(-1)
        owner, run = expand_ranges(begin, torch.where(inside, end, begin))
        first, last = self._tables[1].to(i.device).flatten(0, 2)[run].unbind(1)
        return Spans.gather(i.numel(), sizes.n_k, owner, first, last)


def of_spans(parts: list[Spans], shape: tuple[int, int], keys: int) -> intervals:
    """The pattern of the parts' rows, part after part; those of a part are the rows of each (batch, head) in turn."""
    tables, runs, base = [], [], 0
    for part in parts:
        row, first, last = part.listed()
        counts = torch.bincount(row, minlength=part.rows)
        begin = exclusive_cumsum(counts) + base
        tables.append(torch.stack((begin, begin + counts), 1).view(*shape, -1, 2))
        runs.append(torch.stack((first, last), 1))
        base += row.numel()
    return intervals(torch.cat(tables, 2), torch.cat(runs), keys)
