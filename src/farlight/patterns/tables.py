"""Primitives given as data: masks, block layouts, clusters, lists of key blocks and lists of keys. Routers produce these.

A table of queries has one row per query, or one per position of the sequence (as many as there are keys); with one per
position, query i reads row i. A table of keys has one entry per key. Leading dimensions (batch, head) may be 1 or missing.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from farlight.errors import PatternError
from farlight.patterns.arguments import check_leading, query_base, read_table, whole
from farlight.patterns.deferred import is_unreadable
from farlight.patterns.expression import Atom, Form, Labels, Sizes
from farlight.patterns.spans import Spans

__all__ = ["TablePattern", "blocks", "check_indices", "check_lists", "chosen_blocks", "chosen_keys", "clusters", "pairs"]


def leading(table: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Indices into the table's batch and head dimensions; a dimension of size 1 is broadcast."""
    return b if table.shape[0] > 1 else torch.zeros_like(b), h if table.shape[1] > 1 else torch.zeros_like(h)


def table_rows(table: Tensor, b: Tensor, h: Tensor, row: Tensor) -> Tensor:
    """`table[b, h, row]` on broadcast indices; rows outside the table are clamped into it."""
    table = table.to(row.device)
    return table[(*leading(table, b, h), row.clamp(0, table.shape[2] - 1))]


def in_list(table: Tensor, b: Tensor, h: Tensor, row: Tensor, value: Tensor) -> Tensor:
    """Elementwise: whether `value` is one of `table[b, h, row]` `(m,)`.

    A loop over the m entries, because broadcasting them would take m times the memory of the result.
    """
    out = torch.zeros((), dtype=torch.bool, device=row.device)
    table = table.to(row.device)
    index = (*leading(table, b, h), row.clamp(0, table.shape[2] - 1))
    for m in range(table.shape[3]):
        out = out | (table[..., m][index] == value)
    return out


def run_starts(*columns: Tensor) -> Tensor:
    """`(n,)` bool: True where an entry of some `(n,)` column differs from the one before it, and at entry 0."""
    starts = torch.ones_like(columns[0], dtype=torch.bool)
    for number, column in enumerate(columns):
        changed = column[1:] != column[:-1]
        starts[1:] = starts[1:] | changed if number else changed
    return starts


class TablePattern(Atom):
    """A primitive whose rule is `_tables`: one of queries first, then perhaps one of keys (else the same table serves both).

    Each table is `(B|1, H|1, rows, …)`. `_query_argument` names the table of queries in error messages.
    """

    _query_argument: ClassVar[str]

    def _set_tables(self, *tables: Tensor, text: str) -> None:
        self._set(
            text=text,
            tables=tables,
            varies_over_batch=any(table.shape[0] > 1 for table in tables),
            varies_over_heads=any(table.shape[1] > 1 for table in tables),
        )

    def _positions_per_row(self) -> int:
        """Query positions that share one row of the table of queries."""
        return 1

    def _query_row(self, sizes: Sizes, i: Tensor) -> tuple[Tensor, Tensor]:
        """(row, inside): the row of the table of queries for position i, and whether the table has that row."""
        num_rows, unit = self._tables[0].shape[2], self._positions_per_row()
        row = i - query_base(self._query_argument, num_rows, sizes, unit)
        row = row // unit if unit > 1 else row
        return row, (row >= 0) & (row < num_rows)


class pairs(TablePattern):
    """An arbitrary mask: `mask[…, i, j]`, bool `(N, N)`, `(H, N, N)` or `(B, H, N, N)`.

    >>> import farlight as fl, torch
    >>> fl.pairs(torch.eye(3, dtype=torch.bool)).count(3)
    3
    """

    _query_argument = "pairs: mask"

    def __init__(self, mask: Any) -> None:
        self._set_tables(read_table("pairs: mask", mask, 4, dtype=torch.bool), text="pairs($0)")

    def check(self, sizes: Sizes) -> None:
        mask = self._tables[0]
        check_leading("pairs: mask", mask, sizes)
        query_base("pairs: mask", mask.shape[2], sizes)
        if mask.shape[3] != sizes.n_k:
            raise PatternError(f"pairs: the mask has {mask.shape[3]} columns, but there are {sizes.n_k} keys; they must agree.")

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row, inside = self._query_row(sizes, i)
        mask = self._tables[0].to(i.device)
        return mask[(*leading(mask, b, h), row.clamp(0, mask.shape[2] - 1), j)] & inside

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        row, inside = self._query_row(sizes, i)
        return Spans.from_mask(table_rows(self._tables[0], b, h, row) & inside[:, None])


class blocks(TablePattern):
    """A block layout: `layout[…, i // block, j // block]`, bool, `(n, n)`, `(H, n, n)` or `(B, H, n, n)`.

    >>> import farlight as fl, torch
    >>> fl.blocks(torch.eye(2, dtype=torch.bool), 2).dense(4).int()[0, 0].tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """

    _query_argument = "blocks: layout"
    block: int

    def __init__(self, layout: Any, block: int) -> None:
        table = read_table("blocks: layout", layout, 4, dtype=torch.bool)
        block = whole("blocks: block", block, 1)
        self._set(block=block)
        self._set_tables(table, text=f"blocks($0, {block})")

    def _positions_per_row(self) -> int:
        return self.block

    def check(self, sizes: Sizes) -> None:
        layout = self._tables[0]
        check_leading("blocks: layout", layout, sizes)
        query_base("blocks: layout", layout.shape[2], sizes, self.block)
        num_blocks = -(-sizes.n_k // self.block)
        if layout.shape[3] != num_blocks:
            raise PatternError(
                f"blocks: the layout has {layout.shape[3]} columns, but {sizes.n_k} keys make {num_blocks} blocks of "
                f"{self.block}."
            )

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row, inside = self._query_row(sizes, i)
        layout = self._tables[0].to(i.device)
        return layout[(*leading(layout, b, h), row.clamp(0, layout.shape[2] - 1), j // self.block)] & inside

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        # Query positions of one layout row share its intervals: read each row once, in blocks, then repeat it.
        row, inside = self._query_row(sizes, i)
        first = run_starts(row, h, b)
        spans = Spans.from_mask(table_rows(self._tables[0], b[first], h[first], row[first]) & inside[first][:, None])
        return spans.repeated(first.cumsum(0) - 1).scaled(self.block, sizes.n_k)

    def _rows_equal(self, sizes: Sizes, first: Tensor, last: Tensor) -> Tensor:
        return self._query_row(sizes, first)[0] == self._query_row(sizes, last)[0]


class clusters(TablePattern):
    """Tokens attend within their cluster: the labels of query and key agree.

    Labels are `(B, H, N)` integers, -1 = in no cluster; `key_labels=None` means keys have the queries' labels. Roy et al.
    2021, "Routing Transformer", arXiv:2003.05997.

    >>> import farlight as fl
    >>> fl.clusters([0, 1, 0, -1]).dense(4).int()[0, 0].tolist()
    [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    """

    _query_argument = "clusters: query_labels"

    def __init__(self, query_labels: Any, key_labels: Any = None) -> None:
        query = read_table("clusters: query_labels", query_labels, 3, dtype=torch.int64)
        if key_labels is None:
            self._set_tables(query, text="clusters($0)")
            return
        key = read_table("clusters: key_labels", key_labels, 3, dtype=torch.int64)
        self._set_tables(query, key, text="clusters($0, $1)")

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
        row, inside = self._query_row(sizes, i)
        return torch.where(inside, table_rows(self._tables[0], b, h, row), -1).clamp(min=-1)

    def _key_label(self, b: Tensor, h: Tensor, j: Tensor) -> Tensor:
        return table_rows(self._tables[-1], b, h, j)

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        query = self._query_label(sizes, b, h, i)
        return (query == self._key_label(b, h, j)) & (query >= 0)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        j = torch.arange(sizes.n_k, device=i.device)
        return Spans.from_mask(self._allows(sizes, b[:, None], h[:, None], i[:, None], j[None, :]))

    def _labels(self, sizes: Sizes, b: Tensor, h: Tensor) -> Labels:
        i = torch.arange(sizes.n_q, device=b.device) + sizes.q_offset
        j = torch.arange(sizes.n_k, device=b.device)
        query = self._query_label(sizes, b[:, None], h[:, None], i[None, :])
        key = self._key_label(b[:, None], h[:, None], j[None, :]).clamp(min=-1)
        return Labels(query.expand(b.numel(), -1), key.expand(b.numel(), -1))


class chosen_blocks(TablePattern):
    """Listed key blocks for each query block: j // block is in `indices[b, h, i // query_block]`.

    `indices` is `(B, H, query blocks, m)` integers; -1 pads the list; a block listed twice counts once. `query_block=None`
    means query blocks of the size of key blocks. The lists of a router may be kept in 16 or 32 bits (`owning`).

    >>> import farlight as fl
    >>> fl.chosen_blocks([[[[0, -1], [0, 1]]]], block=2).dense(4).int()[0, 0].tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """

    _query_argument = "chosen_blocks: indices"
    block: int
    query_block: int

    def __init__(self, indices: Any, *, block: int, query_block: int | None = None) -> None:
        table = read_table("chosen_blocks: indices", indices, 4, dtype=torch.int64)
        block = whole("chosen_blocks: block", block, 1)
        self._set_lists(table, block, block if query_block is None else whole("chosen_blocks: query_block", query_block, 1))

    @classmethod
    def owning(cls, table: Tensor, block: int, query_block: int) -> chosen_blocks:
        """The pattern of a table `(B, H, query blocks, m)`, int16, int32 or int64, that nobody else writes to: it is copied
        only where it could not outlive the call, in inference mode and in compiled programs.
        """
        if torch.compiler.is_compiling() or table.is_inference():
            return cls(table, block=block, query_block=query_block)
        pattern = cls.__new__(cls)
        pattern._set_lists(table, block, query_block)
        return pattern

    def _set_lists(self, table: Tensor, block: int, query_block: int) -> None:
        self._set(block=block, query_block=query_block)
        option = f", query_block={query_block}" if query_block != block else ""
        self._set_tables(table, text=f"chosen_blocks($0, block={block}{option})")

    def _positions_per_row(self) -> int:
        return self.query_block

    def check(self, sizes: Sizes) -> None:
        check_lists("chosen_blocks: indices", self._tables[0], sizes, self.query_block)
        if self._tables[0].numel() and not is_unreadable(self._tables[0]):
            least, largest = (int(edge) for edge in self._tables[0].aminmax())
            check_indices("chosen_blocks: indices", least, largest, -(-sizes.n_k // self.block), "key blocks")

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row, inside = self._query_row(sizes, i)
        return in_list(self._tables[0], b, h, row, j // self.block) & inside

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        # As in `blocks`: each list is read once, in blocks, and repeated for the rows of its query block.
        row, inside = self._query_row(sizes, i)
        first = run_starts(row, h, b)
        index = table_rows(self._tables[0], b[first], h[first], row[first]).long()
        valid = (index >= 0) & inside[first][:, None]
        spans = Spans.from_table(-(-sizes.n_k // self.block), index, index + valid)
        return spans.repeated(first.cumsum(0) - 1).scaled(self.block, sizes.n_k)

    def _rows_equal(self, sizes: Sizes, first: Tensor, last: Tensor) -> Tensor:
        return self._query_row(sizes, first)[0] == self._query_row(sizes, last)[0]


class chosen_keys(TablePattern):
    """Listed keys for each query: j is in `indices[b, h, i]`, `(B, H, N, m)` integers; -1 pads the list.

    A key listed twice counts once.

    >>> import farlight as fl
    >>> fl.chosen_keys([[0, 2], [1, -1]]).dense(2, 3).int()[0, 0].tolist()
    [[1, 0, 1], [0, 1, 0]]
    """

    _query_argument = "chosen_keys: indices"

    def __init__(self, indices: Any) -> None:
        self._set_tables(read_table("chosen_keys: indices", indices, 4, dtype=torch.int64), text="chosen_keys($0)")

    def check(self, sizes: Sizes) -> None:
        check_lists("chosen_keys: indices", self._tables[0], sizes, 1)
        if self._tables[0].numel() and not is_unreadable(self._tables[0]):
            least, largest = (int(edge) for edge in self._tables[0].aminmax())
            check_indices("chosen_keys: indices", least, largest, sizes.n_k, "keys")

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row, inside = self._query_row(sizes, i)
        return in_list(self._tables[0], b, h, row, j) & inside

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        row, inside = self._query_row(sizes, i)
        key = table_rows(self._tables[0], b, h, row)
        return Spans.from_table(sizes.n_k, key, key + ((key >= 0) & inside[:, None]))


def check_lists(what: str, table: Tensor, sizes: Sizes, unit: int) -> None:
    """Raise PatternError unless the shape of a table of lists fits; its values are not read. `unit`: positions per row."""
    check_leading(what, table, sizes)
    query_base(what, table.shape[2], sizes, unit)


def check_indices(what: str, least: int, largest: int, limit: int, things: str) -> None:
    """Raise PatternError unless the indices of a table, of which these are the extremes, lie in `-1 … limit - 1`."""
    if not (-1 <= least and largest < limit):
        wrong = least if least < -1 else largest
        raise PatternError(f"{what}: {wrong} is not one of the {limit} {things}; use 0 … {limit - 1}, or -1 for none.")
