"""Launches: the work tables of one kernel call each, as the lowering leaves them for `launch`.

`lower_q` and `lower_kv` make them from a host plan, `routed_lower_q` and `routed_lower_kv` from a router's choice on the
device. Columns have the order of the constants of `jit/work_tables.py`:

    QueryLaunch.work  (Q_…)  batch, head, first row, rows, row within the tile, sorted; ranges of whole blocks, whole blocks of
                             sorted keys, masked blocks, points; partial
    KeyLaunch.work    (K_…)  batch, key head, first key, keys, partial
    KeyLaunch.ranges  (R_…)  for each query head of the key head: ranges of whole row blocks, masked row blocks, points
    merges            (M_…)  batch, head, first row or key, count, sorted, first partial, parts
    QueryWork.masked  (B_…)  first key (-1 - slot where sorted), lo and hi of its run relative to it, offsets of bounds and bits
    KeyLaunch.whole, .masked the same with the first row in place of the key, and rows, row within the tile

A range is two columns, begin and end. *partial*: index of the partial result of a split item, -1 where it is in one part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from farlight.errors import PlanError
from farlight.kernels.triton.work_partition import WorkPartition
from farlight.plan.tables import Plan

__all__ = [
    "KeyLaunch",
    "KeyWork",
    "QueryLaunch",
    "QueryWork",
    "as_int32",
    "checked_int32",
    "key_launch",
    "permutations",
    "query_launch",
    "table_overflow",
]


@dataclass(frozen=True)
class QueryLaunch:
    """One kernel call over work items of at most `block_m` rows.

    work: `(programs, 15)`; merges: `(split items, 7)`; num_partials: partial results in the workspace. sorted_rows,
    sorted_keys, bits, points: permuted rows, permuted keys, bit masks, single pairs occur. add: earlier launches wrote some of
    the rows.
    """

    block_m: int
    work: Tensor
    merges: Tensor
    num_partials: int
    sorted_rows: bool
    sorted_keys: bool
    bits: bool
    points: bool
    add: bool


@dataclass(frozen=True)
class QueryWork:
    """All launches of a plan, in order, and the int32 tables that their items index.

    covers: the launches before the first with `add` write every row. rows, keys: permutations of all pieces and layers, one
    after another; whole: first key or slot of each whole block; masked: `(blocks, 5)`; point_key, point_row: of each single
    pair its key and its row within the item; data: the plan's mask data. earlier: work with tables of its own, which is done
    before.
    """

    launches: tuple[QueryLaunch, ...]
    covers: bool
    rows: Tensor
    keys: Tensor
    whole: Tensor
    masked: Tensor
    point_key: Tensor
    point_row: Tensor
    data: Tensor
    earlier: QueryWork | None = field(default=None, kw_only=True)

    def steps(self) -> Iterator[tuple[QueryWork, QueryLaunch]]:
        """Every launch in order, with the work that holds its tables."""
        if self.earlier is not None:
            yield from self.earlier.steps()
        yield from ((self, launch) for launch in self.launches)


@dataclass(frozen=True)
class KeyLaunch:
    """One kernel call over blocks of keys. Its row blocks and points are its own; the fields are those of `QueryLaunch`.

    work: `(programs, 5)`; ranges: `(programs, heads_per_kv · 6)`; whole, masked: `(row blocks, 7)`; point_row, point_key: of
    each single pair. sorted_keys: the blocks of all items are in the order of one permutation of the keys.
    """

    work: Tensor
    ranges: Tensor
    merges: Tensor
    num_partials: int
    whole: Tensor
    masked: Tensor
    point_row: Tensor
    point_key: Tensor
    sorted_rows: bool
    sorted_keys: bool
    bits: bool
    points: bool
    add: bool


@dataclass(frozen=True)
class KeyWork:
    """All launches of the dk/dv pass of a plan, in order. covers: the first writes every key; the rest as in `QueryWork`."""

    launches: tuple[KeyLaunch, ...]
    covers: bool
    rows: Tensor
    keys: Tensor
    data: Tensor
    earlier: KeyWork | None = field(default=None, kw_only=True)

    def steps(self) -> Iterator[tuple[KeyWork, KeyLaunch]]:
        """Every launch in order, with the work that holds its tables."""
        if self.earlier is not None:
            yield from self.earlier.steps()
        yield from ((self, launch) for launch in self.launches)


def checked_int32(x: Tensor) -> Tensor:
    """`as_int32`. Raises PlanError where a number does not fit."""
    if x.numel() and (int(x.max()) >= 2**31 or int(x.min()) < -(2**31)):
        raise table_overflow()
    return as_int32(x)


def as_int32(x: Tensor) -> Tensor:
    """A table of numbers that fit into int32, contiguous and never empty: a kernel needs an address."""
    if x.numel() >= 2**31:
        raise table_overflow()
    return (x if x.numel() else torch.zeros(1, dtype=torch.int64, device=x.device)).to(torch.int32).contiguous()


def table_overflow() -> PlanError:
    """The error for a plan whose block numbers do not fit into int32."""
    return PlanError("the plan has more than 2^31 blocks; split the queries over several calls.")


def permutations(plan: Plan) -> tuple[Tensor, Tensor, list[int], list[list[int]]]:
    """(rows, keys, row_base, key_base): all row and key permutations of a plan, concatenated, and the offset of each piece's
    and each layer's; -1 = natural order, no permutation.
    """
    rows, keys = [torch.zeros(0, dtype=torch.int32)], [torch.zeros(0, dtype=torch.int32)]
    row_base, key_base = [], []
    num_rows = num_keys = 0
    for piece in plan.pieces:
        row_base.append(-1 if piece.rows is None else num_rows)
        if piece.rows is not None:
            rows.append(piece.rows)
            num_rows += piece.rows.numel()
        key_base.append([-1] * len(piece.layers))
        for number, layer in enumerate(piece.layers):
            if layer.keys is not None:
                key_base[-1][number] = num_keys
                keys.append(layer.keys)
                num_keys += layer.keys.numel()
    return torch.cat(rows), torch.cat(keys), row_base, key_base


def query_launch(columns: Tensor, parts: WorkPartition, to_int32: Callable[[Tensor], Tensor], **options: Any) -> QueryLaunch:
    """A launch over the parts of items `columns` `(items, 6)`: batch, head, first row, rows, row within the tile, sorted."""
    split = columns[parts.split[:, 0]]
    merges = torch.cat((split[:, :4], split[:, 5:], parts.split[:, 1:]), 1)
    return QueryLaunch(
        work=to_int32(torch.cat((columns[parts.item], parts.ranges.flatten(1), parts.partial[:, None]), 1)),
        merges=to_int32(merges) if merges.shape[0] else merges,
        num_partials=parts.num_partials,
        **options,
    )


def key_launch(
    blocks: tuple[Tensor, Tensor, Tensor],
    kv_heads: int,
    parts: WorkPartition,
    to_int32: Callable[[Tensor], Tensor],
    **options: Any,
) -> KeyLaunch:
    """A launch over the parts of blocks of keys: (batch · kv_heads + key head, first key or slot, keys) of each."""
    batch_head, first, count = blocks
    columns = torch.stack((batch_head // kv_heads, batch_head % kv_heads, first, count), 1)
    split = columns[parts.split[:, 0]]
    is_sorted = torch.full_like(split[:, :1], int(options["sorted_keys"]))
    merges = torch.cat((split, is_sorted, parts.split[:, 1:]), 1)
    return KeyLaunch(
        work=to_int32(torch.cat((columns[parts.item], parts.partial[:, None]), 1)),
        ranges=to_int32(parts.ranges.flatten(1)),
        merges=to_int32(merges) if merges.shape[0] else merges,
        num_partials=parts.num_partials,
        **options,
    )
