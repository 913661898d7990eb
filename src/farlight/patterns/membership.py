"""Primitives of routers: overlapping clusters (`rooms`) and one key interval per query (`between`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farlight.errors import PatternError
from farlight.patterns.arguments import check_leading, query_base, read_table
from farlight.patterns.expression import Sizes
from farlight.patterns.spans import Spans
from farlight.patterns.tables import TablePattern, leading, table_rows
from farlight.ragged import expand_ranges

__all__ = ["between", "rooms"]

_WORD_BITS = 62  # clusters per int64 word


class rooms(TablePattern):
    """Overlapping clusters ("rooms"): some c has both `query_members[…, i, c]` and `key_members[…, j, c]`.

    Bool tables `(B, H, N, clusters)`; `key_members=None` means keys have the queries' table. If no token is in two clusters
    this equals `clusters`, which is planned as dense blocks; `rooms` is planned from the union of the key lists of a row's
    clusters. Roy et al. 2021, "Routing Transformer", arXiv:2003.05997, with its top-k assignment.

    >>> import torch
    >>> from farlight.routing import rooms
    >>> members = torch.tensor([[True, False], [True, True], [False, True], [False, False]])
    >>> rooms(members).dense(4).int()[0, 0].tolist()
    [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """

    _query_argument = "rooms: query_members"

    def __init__(self, query_members: Any, key_members: Any = None) -> None:
        query = read_table("rooms: query_members", query_members, 4, dtype=torch.bool)
        if key_members is None:
            self._set_tables(query, text="rooms($0)")
            return
        key = read_table("rooms: key_members", key_members, 4, dtype=torch.bool)
        if key.shape[3] != query.shape[3]:
            raise PatternError(
                f"rooms: query_members names {query.shape[3]} rooms, key_members {key.shape[3]}; they must be the same rooms."
            )
        self._set_tables(query, key, text="rooms($0, $1)")

    def check(self, sizes: Sizes) -> None:
        for name, table in zip(("query_members", "key_members"), self._tables, strict=False):
            check_leading(f"rooms: {name}", table, sizes)
        query_base("rooms: query_members", self._tables[0].shape[2], sizes)
        keys = self._tables[-1].shape[2]
        if keys != sizes.n_k:
            raise PatternError(f"rooms: members of {keys} keys, but there are {sizes.n_k} keys; give one row for each.")

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        # Memberships as bit words: two tokens share a cluster when the AND of one of their words is not 0.
        row, inside = self._query_row(sizes, i)
        words = self._cached("words", lambda: tuple(_as_words(table) for table in self._tables))
        query, key = words[0].to(i.device), words[-1].to(i.device)
        query_index = (*leading(query, b, h), row.clamp(0, query.shape[2] - 1))
        key_index = (*leading(key, b, h), j)
        out = torch.zeros((), dtype=torch.bool, device=i.device)
        for word in range(query.shape[3]):
            out = out | ((query[..., word][query_index] & key[..., word][key_index]) != 0)
        return out & inside

    def _key_lists(self) -> tuple[Tensor, Tensor]:
        """(first, keys): the sorted keys of every (batch, head, cluster); those of list c are keys[first[c]:first[c + 1]]."""
        members = self._tables[-1].cpu().transpose(2, 3)
        first = torch.nn.functional.pad(members.sum(3).reshape(-1).cumsum(0), (1, 0))
        return first, members.reshape(-1, members.shape[3]).nonzero()[:, 1]

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        row, inside = self._query_row(sizes, i)
        # One entry per (row, cluster of that row), then one per key of that cluster.
        owner, cluster = (table_rows(self._tables[0], b, h, row) & inside[:, None]).nonzero(as_tuple=True)
        first, keys = (table.to(i.device) for table in self._cached("key_lists", self._key_lists))
        key_table = self._tables[-1]
        key_b, key_h = leading(key_table, b, h)
        list_id = (key_b[owner] * key_table.shape[1] + key_h[owner]) * key_table.shape[3] + cluster
        entry, position = expand_ranges(first[list_id], first[list_id + 1])
        return Spans.from_pairs(i.numel(), sizes.n_k, owner[entry], keys[position])


def _as_words(members: Tensor) -> Tensor:
    """`(…, clusters)` bool packed into `(…, words)` int64, 62 clusters per word."""
    words = -(-max(1, members.shape[3]) // _WORD_BITS)
    padded = torch.nn.functional.pad(members.long(), (0, words * _WORD_BITS - members.shape[3]))
    shifts = torch.arange(_WORD_BITS, device=members.device)
    return (padded.view(*members.shape[:3], words, _WORD_BITS) << shifts).sum(-1)


class between(TablePattern):
    """One key interval per query: `starts[…, i] <= j < stops[…, i]`, integers `(B, H, N)`; `stops=None` means n_k.

    >>> from farlight.routing import between
    >>> between([0, 0, 1], [1, 2, 3]).dense(3).int()[0, 0].tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    def __init__(self, starts: Any, stops: Any = None) -> None:
        first = read_table("between: starts", starts, 3, dtype=torch.int64)
        if stops is None:
            self._set_tables(first, text="between($0)")
            return
        self._set_tables(first, read_table("between: stops", stops, 3, dtype=torch.int64), text="between($0, $1)")

    def check(self, sizes: Sizes) -> None:
        for name, table in zip(("starts", "stops"), self._tables, strict=False):
            check_leading(f"between: {name}", table, sizes)
            query_base(f"between: {name}", table.shape[2], sizes)

    def _edges(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        """(start, stop) of each query; empty for queries outside the tables."""
        edges: list[Tensor] = []
        for table, outside in zip(self._tables, (sizes.n_k, 0), strict=False):
            row = i - query_base("between", table.shape[2], sizes)
            inside = (row >= 0) & (row < table.shape[2])
            edges.append(torch.where(inside, table_rows(table, b, h, row), outside))
        return edges[0], edges[1] if len(edges) > 1 else torch.full_like(edges[0], sizes.n_k)

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        start, stop = self._edges(sizes, b, h, i)
        return (j >= start) & (j < stop)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        return Spans.thin(sizes.n_k, *self._edges(sizes, b, h, i))
