"""Patterns given as data: block layouts, masks, clusters, chosen blocks and chosen keys. Routers produce these.

Tables of queries have one row for each query, or one for each position of the text; tables of keys one entry for each key.
Leading dimensions (batch, head) may be 1 or missing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farlight.errors import PatternError
from farlight.patterns.arguments import check_leading, query_base, read_table, whole
from farlight.patterns.deferred import hidden
from farlight.patterns.expression import Atom, Form, Labels, Sizes
from farlight.patterns.spans import Spans

__all__ = ["blocks", "check_indices", "check_lists", "chosen_blocks", "chosen_keys", "clusters", "pairs"]


def leading(table: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Indices into the table's batch and head dimensions; a dimension of 1 serves all."""
    return b if table.shape[0] > 1 else torch.zeros_like(b), h if table.shape[1] > 1 else torch.zeros_like(h)


def at(table: Tensor, b: Tensor, h: Tensor, row: Tensor) -> Tensor:
    """`table[b, h, row]` on broadcast indices, rows clipped into the table."""
    table = table.to(row.device)
    return table[(*leading(table, b, h), row.clamp(0, table.shape[2] - 1))]


class _Table(Atom):
    def _take(self, *tables: Tensor, text: str) -> None:
        self._set(
            text=text,
            tables=tables,
            varies_over_batch=any(t.shape[0] > 1 for t in tables),
            varies_over_heads=any(t.shape[1] > 1 for t in tables),
        )


class pairs(_Table):
    """Any bool mask, taken as it is: `mask[…, i, j]`, with up to two leading dimensions (batch, head).

    >>> import farlight as fl, torch
    >>> fl.pairs(torch.eye(3, dtype=torch.bool)).count(3)
    3
    """

    def __init__(self, mask: Any) -> None:
        table = read_table("pairs: mask", mask, 4, kind="bool")
        self._take(table, text="pairs($0)")

    def check(self, sizes: Sizes) -> None:
        mask = self._tables[0]
        check_leading("pairs: mask", mask, sizes)
        query_base("pairs: mask", mask.shape[2], sizes)
        if mask.shape[3] != sizes.n_k:
            raise PatternError(f"pairs: the mask has {mask.shape[3]} columns, but there are {sizes.n_k} keys; they must agree.")

    def _row(self, sizes: Sizes, i: Tensor) -> tuple[Tensor, Tensor]:
        row = i - query_base("pairs: mask", self._tables[0].shape[2], sizes)
        return row, (row >= 0) & (row < self._tables[0].shape[2])

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row, inside = self._row(sizes, i)
        mask = self._tables[0].to(i.device)
        return mask[(*leading(mask, b, h), row.clamp(0, mask.shape[2] - 1), j)] & inside

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        row, inside = self._row(sizes, i)
        return Spans.from_mask(at(self._tables[0], b, h, row) & inside[:, None])


class blocks(_Table):
    """A layout of blocks: `layout[…, i // block, j // block]`, bool, `(n, n)`, `(H, n, n)` or `(B, H, n, n)`.

    >>> import farlight as fl, torch
    >>> fl.blocks(torch.eye(2, dtype=torch.bool), 2).dense(4).int()[0, 0].tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """

    def __init__(self, layout: Any, block: int) -> None:
        table = read_table("blocks: layout", layout, 4, kind="bool")
        block = whole("blocks: block", block, 1)
        self._set(block=block)
        self._take(table, text=f"blocks($0, {block})")

    block: int

    def check(self, sizes: Sizes) -> None:
        layout = self._tables[0]
        check_leading("blocks: layout", layout, sizes)
        query_base("blocks: layout", layout.shape[2], sizes, self.block)
        wanted = -(-sizes.n_k // self.block)
        if layout.shape[3] != wanted:
            raise PatternError(
                f"blocks: the layout has {layout.shape[3]} columns, but {sizes.n_k} keys make {wanted} blocks of {self.block}."
            )

    def _row(self, sizes: Sizes, i: Tensor) -> tuple[Tensor, Tensor]:
        base = query_base("blocks: layout", self._tables[0].shape[2], sizes, self.block)
        row = torch.div(i - base, self.block, rounding_mode="floor")
        return row, (row >= 0) & (row < self._tables[0].shape[2])

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row, inside = self._row(sizes, i)
        layout = self._tables[0].to(i.device)
        index = (
            *leading(layout, b, h),
            row.clamp(0, layout.shape[2] - 1),
            torch.div(j, self.block, rounding_mode="floor"),
        )
        return layout[index] & inside

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        row, inside = self._row(sizes, i)
        new = torch.ones_like(i, dtype=torch.bool)
        new[1:] = (row[1:] != row[:-1]) | (h[1:] != h[:-1]) | (b[1:] != b[:-1])
        runs = Spans.from_mask(at(self._tables[0], b[new], h[new], row[new]) & inside[new][:, None])
        return runs.repeated(new.cumsum(0) - 1).scaled(self.block, sizes.n_k)

    def _rows_agree(self, sizes: Sizes, first: Tensor, last: Tensor) -> Tensor:
        return self._row(sizes, first)[0] == self._row(sizes, last)[0]


class clusters(_Table):
    """Tokens meet in their room: the labels agree. `(B, H, N)` integers, -1 = in no cluster; keys share the queries' labels
    unless they have their own. Roy et al. 2021, "Routing Transformer", arXiv:2003.05997.

    >>> import farlight as fl
    >>> fl.clusters([0, 1, 0, -1]).dense(4).int()[0, 0].tolist()
    [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    """

    def __init__(self, query_labels: Any, key_labels: Any = None) -> None:
        query = read_table("clusters: query_labels", query_labels, 3, kind="int")
        if key_labels is None:
            self._take(query, text="clusters($0)")
            return
        key = read_table("clusters: key_labels", key_labels, 3, kind="int")
        self._take(query, key, text="clusters($0, $1)")

    def check(self, sizes: Sizes) -> None:
        for name, table in zip(("query_labels", "key_labels"), self._tables, strict=False):
            check_leading(f"clusters: {name}", table, sizes)
        query_base("clusters: query_labels", self._tables[0].shape[2], sizes)
        keys = self._tables[-1].shape[2]
        if keys != sizes.n_k:
            raise PatternError(f"clusters: {keys} key labels for {sizes.n_k} keys; give key_labels with one for each key.")

    def _form(self, sizes: Sizes) -> Form:
        return "labels"

    def _query_label(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Tensor:
        table = self._tables[0]
        row = i - query_base("clusters: query_labels", table.shape[2], sizes)
        return torch.where((row >= 0) & (row < table.shape[2]), at(table, b, h, row), -1).clamp(min=-1)

    def _key_label(self, b: Tensor, h: Tensor, j: Tensor) -> Tensor:
        return at(self._tables[-1], b, h, j)

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        query = self._query_label(sizes, b, h, i)
        return (query == self._key_label(b, h, j)) & (query >= 0)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        every = torch.arange(sizes.n_k, device=i.device)
        return Spans.from_mask(self._allows(sizes, b[:, None], h[:, None], i[:, None], every[None, :]))

    def _labels(self, sizes: Sizes, b: Tensor, h: Tensor) -> Labels:
        i = torch.arange(sizes.n_q, device=b.device) + sizes.q_offset
        j = torch.arange(sizes.n_k, device=b.device)
        key = self._key_label(b[:, None], h[:, None], j[None, :]).clamp(min=-1)
        return Labels(
            self._query_label(sizes, b[:, None], h[:, None], i[None, :]).expand(b.numel(), -1),
            key.expand(b.numel(), -1),
        )


class chosen_blocks(_Table):
    """The tokens of query block u see the key blocks listed for it: j // block is in `indices[b, h, i // query_block]`.

    `indices` is `(B, H, query blocks, m)` integers; -1 pads the list; a block named twice counts once. `query_block=None`
    means blocks of queries of the same size as blocks of keys.

    >>> import farlight as fl
    >>> fl.chosen_blocks([[[[0, -1], [0, 1]]]], block=2).dense(4).int()[0, 0].tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """

    def __init__(self, indices: Any, *, block: int, query_block: int | None = None) -> None:
        table = read_table("chosen_blocks: indices", indices, 4, kind="int")
        block = whole("chosen_blocks: block", block, 1)
        query_block = block if query_block is None else whole("chosen_blocks: query_block", query_block, 1)
        self._set(block=block, query_block=query_block)
        other = f", query_block={query_block}" if query_block != block else ""
        self._take(table, text=f"chosen_blocks($0, block={block}{other})")

    block: int
    query_block: int

    def check(self, sizes: Sizes) -> None:
        check_lists("chosen_blocks: indices", self._tables[0], sizes, self.query_block)
        if self._tables[0].numel() and not hidden(self._tables[0]):
            least, largest = (int(edge) for edge in self._tables[0].aminmax())
            check_indices("chosen_blocks: indices", least, largest, -(-sizes.n_k // self.block), "key blocks")

    def _row(self, sizes: Sizes, i: Tensor) -> tuple[Tensor, Tensor]:
        base = query_base("chosen_blocks: indices", self._tables[0].shape[2], sizes, self.query_block)
        row = torch.div(i - base, self.query_block, rounding_mode="floor")
        return row, (row >= 0) & (row < self._tables[0].shape[2])

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row, inside = self._row(sizes, i)
        return listed(self._tables[0], b, h, row, torch.div(j, self.block, rounding_mode="floor")) & inside

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        row, inside = self._row(sizes, i)
        new = torch.ones_like(i, dtype=torch.bool)
        new[1:] = (row[1:] != row[:-1]) | (h[1:] != h[:-1]) | (b[1:] != b[:-1])
        chosen = at(self._tables[0], b[new], h[new], row[new])
        real = (chosen >= 0) & inside[new][:, None]
        runs = Spans.from_table(-(-sizes.n_k // self.block), chosen, torch.where(real, chosen + 1, chosen))
        return runs.repeated(new.cumsum(0) - 1).scaled(self.block, sizes.n_k)

    def _rows_agree(self, sizes: Sizes, first: Tensor, last: Tensor) -> Tensor:
        return self._row(sizes, first)[0] == self._row(sizes, last)[0]


class chosen_keys(_Table):
    """A token sees the keys listed for it: j is in `indices[b, h, i]`, `(B, H, N, m)` integers; -1 pads the list.

    A key named twice counts once.

    >>> import farlight as fl
    >>> fl.chosen_keys([[0, 2], [1, -1]]).dense(2, 3).int()[0, 0].tolist()
    [[1, 0, 1], [0, 1, 0]]
    """

    def __init__(self, indices: Any) -> None:
        self._take(read_table("chosen_keys: indices", indices, 4, kind="int"), text="chosen_keys($0)")

    def check(self, sizes: Sizes) -> None:
        check_lists("chosen_keys: indices", self._tables[0], sizes, 1)
        if self._tables[0].numel() and not hidden(self._tables[0]):
            least, largest = (int(edge) for edge in self._tables[0].aminmax())
            check_indices("chosen_keys: indices", least, largest, sizes.n_k, "keys")

    def _row(self, sizes: Sizes, i: Tensor) -> tuple[Tensor, Tensor]:
        row = i - query_base("chosen_keys: indices", self._tables[0].shape[2], sizes)
        return row, (row >= 0) & (row < self._tables[0].shape[2])

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row, inside = self._row(sizes, i)
        return listed(self._tables[0], b, h, row, j) & inside

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        row, inside = self._row(sizes, i)
        keys = at(self._tables[0], b, h, row)
        return Spans.from_table(sizes.n_k, keys, keys + ((keys >= 0) & inside[:, None]))


def listed(table: Tensor, b: Tensor, h: Tensor, row: Tensor, value: Tensor) -> Tensor:
    """Elementwise: `value` is one of `table[b, h, row]`."""
    out = torch.zeros((), dtype=torch.bool, device=row.device)
    table = table.to(row.device)
    index = (*leading(table, b, h), row.clamp(0, table.shape[2] - 1))
    for m in range(table.shape[3]):
        out = out | (table[..., m][index] == value)
    return out


def check_lists(what: str, table: Tensor, sizes: Sizes, unit: int) -> None:
    """The shape of a table of lists; what stands in it is not looked at."""
    check_leading(what, table, sizes)
    query_base(what, table.shape[2], sizes, unit)


def check_indices(what: str, least: int, largest: int, limit: int, things: str) -> None:
    """The least and the largest number that a table lists."""
    if not (-1 <= least and largest < limit):
        wrong = least if least < -1 else largest
        raise PatternError(f"{what}: {wrong} is not one of the {limit} {things}; use 0 … {limit - 1}, or -1 for none.")
