"""Several clusterings at once, as one pattern that is planned without asking pairs: rounds of hashing, lists of blocks."""

from __future__ import annotations

import functools
import itertools
import operator
from typing import Any

import torch
from torch import Tensor

from farlight.errors import PatternError
from farlight.patterns.arguments import check_leading, query_base, read_table
from farlight.patterns.expression import Pattern, Sizes
from farlight.patterns.positional import full
from farlight.patterns.spans import Spans
from farlight.patterns.tables import _Table, at, clusters, leading

__all__ = ["meets"]

# More terms than this are not worth their planning; rounds are then a plain union.
_MOST_TERMS = 48
_MOST_BITS = 60


class meets(_Table):
    """Tokens meet in some round: `query_labels[…, i, r] == key_labels[…, j, r]`, not negative, for some r.

    Integers `(B, H, N, rounds)`. Keys with one label serve all rounds: then the query's labels are a list of what it sees.
    Equal to `clusters(q[…, 0], k[…, 0]) | clusters(q[…, 1], k[…, 1]) | …`, but a pair that meets twice need not be looked for:

    * rounds: to meet in round r and to differ in round s is to agree in r and in the leading bits of label s and to differ in
      the next bit, for one of its bits. Each is a clustering by one number, and they are disjoint by construction.
    * lists: labels that ascend are disjoint round by round.

    >>> from farlight.routing import meets
    >>> meets([[0, 5], [0, 6], [1, 6]]).dense(3).int()[0, 0].tolist()
    [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    """

    def __init__(self, query_labels: Any, key_labels: Any = None) -> None:
        query = read_table("meets: query_labels", query_labels, 4, kind="int").clamp_(min=-1)
        if key_labels is None:
            self._take(query, text="meets($0)")
            return
        key = read_table("meets: key_labels", key_labels, 4, kind="int").clamp_(min=-1)
        if key.shape[3] not in (1, query.shape[3]):
            raise PatternError(
                f"meets: queries have labels of {query.shape[3]} rounds, keys of {key.shape[3]}; "
                "give keys as many, or one for all."
            )
        self._take(query, key, text="meets($0, $1)")

    @property
    def _is_list(self) -> bool:
        return self._tables[-1].shape[3] == 1

    def check(self, sizes: Sizes) -> None:
        for name, table in zip(("query_labels", "key_labels"), self._tables, strict=False):
            check_leading(f"meets: {name}", table, sizes)
        query_base("meets: query_labels", self._tables[0].shape[2], sizes)
        keys = self._tables[-1].shape[2]
        if keys != sizes.n_k:
            raise PatternError(f"meets: labels of {keys} keys, but there are {sizes.n_k} keys; give one row for each.")

    def _row(self, sizes: Sizes, i: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._tables[0].shape[2]
        row = i - query_base("meets: query_labels", rows, sizes)
        return row, (row >= 0) & (row < rows)

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row, inside = self._row(sizes, i)
        query, key = self._tables[0].to(i.device), self._tables[-1].to(i.device)
        q_at = (*leading(query, b, h), row.clamp(0, query.shape[2] - 1))
        k_at = (*leading(key, b, h), j)
        out = torch.zeros((), dtype=torch.bool, device=i.device)
        for r in range(query.shape[3]):
            mine = query[..., r][q_at]
            out = out | ((mine == key[..., 0 if self._is_list else r][k_at]) & (mine >= 0))
        return out & inside

    # ---- for plans ---------------------------------------------------------------------------------------------------
    def _spans_are_cheap(self, sizes: Sizes) -> bool:
        return self._is_list

    def _rewrite(self) -> Pattern:
        query, key = self._tables[0], self._tables[-1]
        rounds = query.shape[3]
        if not rounds:
            return self
        if self._is_list and rounds > 1:
            pairs = [(q, k) for q, k in ascending(query, key) if bool((q >= 0).any())]
        else:
            pairs = [pair for r in range(rounds) for pair in first_meeting(query, key, r)]
        # "everything and" keeps the complement in one piece: a planner denies this pattern whole, not round by round.
        return full() & functools.reduce(operator.or_, (clusters(q, k) for q, k in pairs))

    def _clusterings(self) -> list[tuple[Tensor, Tensor]] | None:
        # Rounds of many labels fall into as many clusterings as their largest label has bits: that would have to be read.
        return ascending(self._tables[0], self._tables[-1]) if self._is_list and self._tables[0].shape[3] else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_runs"}

    def _listed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Runs of neighbouring keys with one label, sorted by (batch, head, round, label): code, first and last + 1."""
        found: tuple[Tensor, Tensor, Tensor] | None = self.__dict__.get("_runs")
        if found is None:
            labels = self._tables[-1].cpu().transpose(2, 3)
            n = labels.shape[3]
            flat = labels.reshape(-1, n)
            new = torch.ones_like(flat, dtype=torch.bool)
            new[:, 1:] = flat[:, 1:] != flat[:, :-1]
            line, first = new.nonzero(as_tuple=True)
            last = torch.cat((first[1:], first.new_tensor([n])[: first.numel()]))
            last = torch.where(last > first, last, n)
            label = flat[line, first]
            code, order = torch.sort((line * self._labels_count() + label)[label >= 0], stable=True)
            found = code, first[label >= 0][order], last[label >= 0][order]
            self._set(_runs=found)
        return found

    def _labels_count(self) -> int:
        return max((int(table.max()) + 1 for table in self._tables if table.numel()), default=1)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        row, inside = self._row(sizes, i)
        mine = at(self._tables[0], b, h, row)
        of_row, r = ((mine >= 0) & inside[:, None]).nonzero(as_tuple=True)
        key = self._tables[-1]
        kb, kh = leading(key, b, h)
        line = (kb[of_row] * key.shape[1] + kh[of_row]) * key.shape[3] + (torch.zeros_like(r) if self._is_list else r)
        code, first, last = (table.to(i.device) for table in self._listed())
        wanted = line * self._labels_count() + mine[of_row, r]
        begin, end = torch.searchsorted(code, wanted), torch.searchsorted(code, wanted, right=True)
        count = end - begin
        which = torch.arange(count.numel(), device=i.device).repeat_interleave(count)
        run = begin[which] + torch.arange(which.numel(), device=i.device) - (count.cumsum(0) - count)[which]
        return Spans.gather(i.numel(), sizes.n_k, of_row[which], first[run], last[run])


def ascending(query: Tensor, key: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Clusterings of a list of labels, one for each place of the sorted list; a label that comes twice counts once."""
    ordered = query.sort(-1).values
    twice = torch.zeros_like(ordered, dtype=torch.bool)
    twice[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    ordered = ordered.masked_fill(twice, -1)
    return [(ordered[..., r], key[..., 0]) for r in range(ordered.shape[3])]


def first_meeting(query: Tensor, key: Tensor, r: int) -> list[tuple[Tensor, Tensor]]:
    """Clusterings that hold the pairs which meet in round r and in none before, each pair in one of them."""
    label = query[..., r], key[..., r]
    if not r or not query.numel() or not key.numel():
        return [label]
    # A token without a label in an earlier round differs from all there: each side has a number of its own for them.
    most = max(int(table.max()) + 1 for table in (query, key)) + 2 * int(min(query.min(), key.min()) < 0)
    bits = max(1, (most - 1).bit_length())
    if bits**r > _MOST_TERMS or bits * (r + 1) > _MOST_BITS:
        return [label]
    out = []
    for shifts in itertools.product(range(bits - 1, -1, -1), repeat=r):
        mine, theirs = label
        for earlier, shift in enumerate(shifts):
            q, k = (torch.where(x < 0, none, x) for x, none in ((query[..., earlier], most - 2), (key[..., earlier], most - 1)))
            mine, theirs = (mine << bits) + (q >> shift), (theirs << bits) + ((k >> shift) ^ 1)
        out.append((torch.where(label[0] < 0, -1, mine), torch.where(label[1] < 0, -1, theirs)))
    return out
