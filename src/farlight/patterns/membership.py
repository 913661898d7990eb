"""Two primitives that routers need beside the common ones: rooms of which a token may have several keys, and one stretch of
keys for each query. Both are ordinary patterns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farlight.errors import PatternError
from farlight.patterns.arguments import check_leading, query_base, read_table
from farlight.patterns.expression import Sizes
from farlight.patterns.spans import Spans
from farlight.patterns.tables import _Table, at, leading

__all__ = ["between", "rooms"]

_BITS = 62


class rooms(_Table):
    """Tokens meet in any room that both belong to: some c has `query_members[…, i, c]` and `key_members[…, j, c]`.

    Bool tables `(B, H, N, rooms)`; keys share the queries' table unless they have their own. Where no token belongs to two
    rooms this is `clusters`, which is planned as dense blocks; here a row lists the keys of all its rooms, each once.
    Roy et al. 2021, "Routing Transformer", arXiv:2003.05997, with its top-k assignment.

    >>> import torch
    >>> from farlight.routing import rooms
    >>> members = torch.tensor([[True, False], [True, True], [False, True], [False, False]])
    >>> rooms(members).dense(4).int()[0, 0].tolist()
    [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """

    def __init__(self, query_members: Any, key_members: Any = None) -> None:
        query = read_table("rooms: query_members", query_members, 4, kind="bool")
        if key_members is None:
            self._take(query, text="rooms($0)")
            return
        key = read_table("rooms: key_members", key_members, 4, kind="bool")
        if key.shape[3] != query.shape[3]:
            raise PatternError(
                f"rooms: query_members names {query.shape[3]} rooms, key_members {key.shape[3]}; they must be the same rooms."
            )
        self._take(query, key, text="rooms($0, $1)")

    def check(self, sizes: Sizes) -> None:
        for name, table in zip(("query_members", "key_members"), self._tables, strict=False):
            check_leading(f"rooms: {name}", table, sizes)
        query_base("rooms: query_members", self._tables[0].shape[2], sizes)
        keys = self._tables[-1].shape[2]
        if keys != sizes.n_k:
            raise PatternError(f"rooms: members of {keys} keys, but there are {sizes.n_k} keys; give one row for each.")

    def _row(self, sizes: Sizes, i: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._tables[0].shape[2]
        row = i - query_base("rooms: query_members", rows, sizes)
        return row, (row >= 0) & (row < rows)

    def _words(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The members as bits: `(B|1, H|1, N, words)` int64 for queries and for keys."""
        found: tuple[Tensor, ...] | None = self.__dict__.get("_bits")
        if found is None:
            found = tuple(_as_bits(table) for table in self._tables)
            self._set(_bits=found)
        return found[0].to(device), found[-1].to(device)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in ("_bits", "_lists")}

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row, inside = self._row(sizes, i)
        query, key = self._words(i.device)
        q_at = (*leading(query, b, h), row.clamp(0, query.shape[2] - 1))
        k_at = (*leading(key, b, h), j)
        out = torch.zeros((), dtype=torch.bool, device=i.device)
        for word in range(query.shape[3]):
            out = out | ((query[..., word][q_at] & key[..., word][k_at]) != 0)
        return out & inside

    def _listed(self) -> tuple[Tensor, Tensor]:
        """For each (batch, head, room) where its keys begin, and the keys, sorted."""
        found: tuple[Tensor, Tensor] | None = self.__dict__.get("_lists")
        if found is None:
            members = self._tables[-1].cpu().transpose(2, 3)
            count = members.sum(3).reshape(-1)
            first = torch.cat((torch.zeros(1, dtype=torch.int64), count.cumsum(0)))
            found = first, members.reshape(-1, members.shape[3]).nonzero()[:, 1]
            self._set(_lists=found)
        return found

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        row, inside = self._row(sizes, i)
        mine = at(self._tables[0], b, h, row) & inside[:, None]
        of_row, room = mine.nonzero(as_tuple=True)
        first, keys = (table.to(i.device) for table in self._listed())
        table = self._tables[-1]
        kb, kh = leading(table, b, h)
        group = (kb[of_row] * table.shape[1] + kh[of_row]) * table.shape[3] + room
        count = first[group + 1] - first[group]
        which = torch.arange(group.numel(), device=i.device).repeat_interleave(count)
        step = torch.arange(which.numel(), device=i.device) - (count.cumsum(0) - count)[which]
        return Spans.from_pairs(i.numel(), sizes.n_k, of_row[which], keys[first[group[which]] + step])


def _as_bits(members: Tensor) -> Tensor:
    words = -(-max(1, members.shape[3]) // _BITS)
    padded = torch.nn.functional.pad(members.long(), (0, words * _BITS - members.shape[3]))
    return (padded.view(*members.shape[:3], words, _BITS) << torch.arange(_BITS, device=members.device)).sum(-1)


class between(_Table):
    """A query sees one stretch of keys: `starts[…, i] <= j < stops[…, i]`, integers `(B, H, N)`; no stops: to the end.

    >>> from farlight.routing import between
    >>> between([0, 0, 1], [1, 2, 3]).dense(3).int()[0, 0].tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    def __init__(self, starts: Any, stops: Any = None) -> None:
        first = read_table("between: starts", starts, 3, kind="int")
        if stops is None:
            self._take(first, text="between($0)")
            return
        self._take(first, read_table("between: stops", stops, 3, kind="int"), text="between($0, $1)")

    def check(self, sizes: Sizes) -> None:
        for name, table in zip(("starts", "stops"), self._tables, strict=False):
            check_leading(f"between: {name}", table, sizes)
            query_base(f"between: {name}", table.shape[2], sizes)

    def _edges(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        edges: list[Tensor] = []
        for table in self._tables:
            row = i - query_base("between", table.shape[2], sizes)
            inside = (row >= 0) & (row < table.shape[2])
            edges.append(torch.where(inside, at(table, b, h, row), 0 if edges else sizes.n_k))
        return edges[0], edges[1] if len(edges) > 1 else torch.full_like(edges[0], sizes.n_k)

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        start, stop = self._edges(sizes, b, h, i)
        return (j >= start) & (j < stop)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        return Spans.thin(sizes.n_k, *self._edges(sizes, b, h, i))
