"""`meets`: tokens with several labels, such as rounds of hashing or lists of blocks, planned without visiting pairs.

"Equal labels in some round" is a union of clusterings, one per round, but the same pair may be equal in several rounds. A
planner that unites overlapping clusterings must find and remove the repeated pairs. `meets` instead rewrites itself as
clusterings that are *disjoint by construction*, each planned as dense blocks after a sort by label:

* Rounds. A pair first meets in round r when label r agrees and the labels of every earlier round s differ. Two b-bit labels
  differ exactly when, for one bit position t, their bits above t agree and bit t differs. Fixing t for every earlier round
  gives b^r disjoint cases, and each is one clustering: the label is the concatenation of label r, and per round s of the
  leading bits down to t (with bit t of the key inverted).
* Lists. With one label per key, a query's labels are the set of clusters that it reads. Sorted and without repeats, column r
  of the lists is one clustering, and columns are disjoint since a key has one label.
"""

from __future__ import annotations

import functools
import itertools
import operator
from typing import Any

import torch
from torch import Tensor

from farlight.errors import PatternError
from farlight.patterns.arguments import check_leading, query_base, read_table
from farlight.patterns.deferred import is_unreadable
from farlight.patterns.expression import Pattern, Sizes
from farlight.patterns.positional import full
from farlight.patterns.spans import Spans
from farlight.patterns.tables import TablePattern, clusters, leading, table_rows
from farlight.ragged import expand_ranges

__all__ = ["meets"]

# A round with more cases, or labels that do not fit into int64, is planned as one clustering that overlaps earlier ones.
_MOST_TERMS = 48
_MOST_BITS = 60


class meets(TablePattern):
    """Equal labels in some round r: `query_labels[…, i, r] == key_labels[…, j, r] >= 0`.

    Labels are `(B, H, N, rounds)` integers, -1 = none. Keys with one label, `(B, H, N, 1)`, serve all rounds: the query's
    labels are then the list of clusters that it attends to. Equal as a set to
    `clusters(q[…, 0], k[…, 0]) | clusters(q[…, 1], k[…, 1]) | …`.

    >>> from farlight.routing import meets
    >>> meets([[0, 5], [0, 6], [1, 6]]).dense(3).int()[0, 0].tolist()
    [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    """

    _query_argument = "meets: query_labels"

    def __init__(self, query_labels: Any, key_labels: Any = None) -> None:
        query = read_table("meets: query_labels", query_labels, 4, dtype=torch.int64).clamp_(min=-1)
        if key_labels is None:
            self._set_tables(query, text="meets($0)")
            return
        key = read_table("meets: key_labels", key_labels, 4, dtype=torch.int64).clamp_(min=-1)
        if key.shape[3] not in (1, query.shape[3]):
            raise PatternError(
                f"meets: queries have labels of {query.shape[3]} rounds, keys of {key.shape[3]}; "
                "give keys as many, or one for all."
            )
        self._set_tables(query, key, text="meets($0, $1)")

    @property
    def _is_list(self) -> bool:
        """Whether keys have one label, so that a query's labels are a list of clusters."""
        return self._tables[-1].shape[3] == 1

    def check(self, sizes: Sizes) -> None:
        for name, table in zip(("query_labels", "key_labels"), self._tables, strict=False):
            check_leading(f"meets: {name}", table, sizes)
        query_base("meets: query_labels", self._tables[0].shape[2], sizes)
        keys = self._tables[-1].shape[2]
        if keys != sizes.n_k:
            raise PatternError(f"meets: labels of {keys} keys, but there are {sizes.n_k} keys; give one row for each.")

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row, inside = self._query_row(sizes, i)
        query, key = self._tables[0].to(i.device), self._tables[-1].to(i.device)
        query_index = (*leading(query, b, h), row.clamp(0, query.shape[2] - 1))
        key_index = (*leading(key, b, h), j)
        out = torch.zeros((), dtype=torch.bool, device=i.device)
        for r in range(query.shape[3]):
            label = query[..., r][query_index]
            out = out | ((label == key[..., 0 if self._is_list else r][key_index]) & (label >= 0))
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
            labels = [(q, k) for q, k in list_clusterings(query, key) if bool((q >= 0).any())]
        else:
            labels = [pair for r in range(rounds) for pair in first_meeting_clusterings(query, key, r)]
        # `full() &` keeps the complement in one piece: the planner negates this pattern whole, not clustering by clustering.
        return full() & functools.reduce(operator.or_, (clusters(q, k) for q, k in labels))

    def _clusterings(self) -> list[tuple[Tensor, Tensor]] | None:
        query, key = self._tables[0], self._tables[-1]
        if not query.shape[3]:
            return None
        if self._is_list:
            return list_clusterings(query, key)
        if query.device.type != "cpu" or is_unreadable(query):
            return None  # the number of clusterings of rounds depends on the largest label, which would have to be read
        rounds = [first_meeting_clusterings(query, key, r) for r in range(query.shape[3])]
        # One clustering of a later round is the fallback, which shares pairs with earlier rounds.
        is_disjoint = all(len(clusterings) > 1 for clusterings in rounds[1:])
        return [pair for clusterings in rounds for pair in clusterings] if is_disjoint else None

    def _num_labels(self) -> int:
        return max((int(table.max()) + 1 for table in self._tables if table.numel()), default=1)

    def _label_runs(self) -> tuple[Tensor, Tensor, Tensor]:
        """(code, first, stop): the runs of consecutive keys with one label, sorted by code.

        code = (batch, head, round) · number of labels + label; the run holds the keys first … stop - 1.
        """
        labels = self._tables[-1].cpu().transpose(2, 3)
        n = labels.shape[3]
        lines = labels.reshape(-1, n)
        starts = torch.ones_like(lines, dtype=torch.bool)
        starts[:, 1:] = lines[:, 1:] != lines[:, :-1]
        line, first = starts.nonzero(as_tuple=True)
        # A run ends where the next one of its line begins, the last one of a line at n.
        stop = torch.cat((first[1:], first.new_tensor([n])[: first.numel()]))
        stop = torch.where(stop > first, stop, n)
        label = lines[line, first]
        valid = label >= 0
        code, order = torch.sort((line * self._num_labels() + label)[valid], stable=True)
        return code, first[valid][order], stop[valid][order]

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        row, inside = self._query_row(sizes, i)
        label = table_rows(self._tables[0], b, h, row)
        owner, r = ((label >= 0) & inside[:, None]).nonzero(as_tuple=True)
        key = self._tables[-1]
        key_b, key_h = leading(key, b, h)
        key_round = torch.zeros_like(r) if self._is_list else r
        line = (key_b[owner] * key.shape[1] + key_h[owner]) * key.shape[3] + key_round
        code, first, stop = (table.to(i.device) for table in self._cached("label_runs", self._label_runs))
        wanted = line * self._num_labels() + label[owner, r]
        entry, run = expand_ranges(torch.searchsorted(code, wanted), torch.searchsorted(code, wanted, right=True))
        return Spans.gather(i.numel(), sizes.n_k, owner[entry], first[run], stop[run])


def list_clusterings(query: Tensor, key: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Disjoint clusterings of lists: (query, key) labels `(B, H, N)`, one per column of the sorted lists without repeats."""
    ordered = query.sort(-1).values
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    ordered = ordered.masked_fill(repeated, -1)
    return [(ordered[..., r], key[..., 0]) for r in range(ordered.shape[3])]


def first_meeting_clusterings(query: Tensor, key: Tensor, r: int) -> list[tuple[Tensor, Tensor]]:
    """Disjoint clusterings of the pairs that agree in round r and in no earlier round (see the module's docstring).

    Each is a pair of labels `(B, H, N)`. Falls back to the one clustering of round r where there would be too many.
    """
    query_label, key_label = query[..., r], key[..., r]
    if not r or not query.numel() or not key.numel():
        return [(query_label, key_label)]
    # A token without a label in an earlier round differs from all others there: a reserved label for queries, one for keys.
    num_labels = max(int(table.max()) + 1 for table in (query, key)) + 2 * int(min(query.min(), key.min()) < 0)
    bits = max(1, (num_labels - 1).bit_length())
    if bits**r > _MOST_TERMS or bits * (r + 1) > _MOST_BITS:
        return [(query_label, key_label)]
    out = []
    for shifts in itertools.product(range(bits - 1, -1, -1), repeat=r):
        q_code, k_code = query_label, key_label
        for earlier, shift in enumerate(shifts):
            q, k = query[..., earlier], key[..., earlier]
            q, k = torch.where(q < 0, num_labels - 2, q), torch.where(k < 0, num_labels - 1, k)
            q_code, k_code = (q_code << bits) + (q >> shift), (k_code << bits) + ((k >> shift) ^ 1)
        out.append((torch.where(query_label < 0, -1, q_code), torch.where(key_label < 0, -1, k_code)))
    return out
