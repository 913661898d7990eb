"""Load balance: long work items are cut into parts, and parts start longest first.

A work item is what one program would compute: a group of rows with its key blocks, or a block of keys with its row blocks. Its
cost is counted in blocks. Items are cut so that no part has much more than 1 / PARTS_PER_PROCESSOR of a processor's share of
all blocks. Programs start in table order, each on the first idle processor: longest first leaves a short tail. Parts of an item
write partial results to a workspace, which a second kernel merges (split-K).

The partition runs on the tensors' device. `PartitionCounts`, the table lengths, is read from it unless the caller has them:
a router's choice is lowered with one read for all tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.ragged import exclusive_cumsum, expand_counts

__all__ = [
    "MIN_BLOCKS",
    "PARTS_PER_PROCESSOR",
    "PartitionCounts",
    "WorkPartition",
    "num_parts",
    "partition",
    "partition_counts",
    "true_indices",
]

# Blocks up to which an item is not cut: a part costs a round trip of its partial result through memory.
MIN_BLOCKS = 16
PARTS_PER_PROCESSOR = 8


@dataclass(frozen=True)
class WorkPartition:
    """Parts of work items, in the order in which they start.

    item: `(parts,)` the item of each part; ranges: `(parts, K, 2)` its ranges in the K tables; partial: `(parts,)` index of its
    partial result, -1 where the item is in one part; num_partials: partial results in the workspace; split: `(split items, 3)`
    (item, index of its first partial result, parts) of each item that was cut.
    """

    item: Tensor
    ranges: Tensor
    partial: Tensor
    num_partials: int
    split: Tensor


@dataclass(frozen=True)
class PartitionCounts:
    """Table lengths of a partition: items, their parts, parts of split items, split items."""

    items: int
    parts: int
    partials: int
    split_items: int


def num_parts(blocks: Tensor, total: Tensor, processors: int) -> Tensor:
    """`(items,)`: the number of parts of items of `blocks` blocks each; `total`: blocks of all items."""
    limit = ((total + (processors * PARTS_PER_PROCESSOR - 1)) // (processors * PARTS_PER_PROCESSOR)).clamp(min=MIN_BLOCKS)
    # An item a little above the limit is left whole: two short parts would cost more than they balance.
    return torch.where(blocks > limit + limit // 2, (blocks + limit - 1) // limit, 1)


def partition_counts(parts: Tensor, used: Tensor, copies: int = 1) -> list[Tensor]:
    """The fields of `PartitionCounts` as 0-d tensors on the device: for `copies` copies of each item where `used` is True."""
    used_parts = torch.where(used, parts, 0)
    partials = torch.where(used_parts > 1, used_parts, 0)
    return [x.sum() * copies for x in (used, used_parts, partials, partials > 0)]


def true_indices(flags: Tensor, count: int) -> Tensor:
    """`flags.nonzero().squeeze(1)` of 1-D flags of which `count` are True: a known length needs no synchronisation."""
    target = torch.where(flags, flags.cumsum(0) - 1, count)
    out = torch.empty(count + 1, dtype=torch.int64, device=flags.device)
    return out.scatter_(0, target, torch.arange(flags.numel(), device=flags.device))[:count]


def partition(
    ranges: Tensor, entries_per_block: Tensor, processors: int, counts: PartitionCounts | None = None
) -> WorkPartition:
    """Cut items into parts of about equal cost, and order the parts.

    ranges: `(items, K, 2)`, of each item a range in each of K tables; entries_per_block: `(K,)`, how many entries of a table
    make one block (1, or BLOCK_N for single pairs). The ranges of an item, one after another, are one list of blocks; part p
    takes the blocks p · size … (p + 1) · size - 1 of it, clipped to each table.
    counts: the lengths, where the caller knows them; they spare a read from the device.
    """
    begin, end = ranges.unbind(2)
    blocks = ((end - begin + entries_per_block - 1) // entries_per_block).clamp(min=0)
    total = blocks.sum(1)
    parts = num_parts(total, total.sum(), processors)
    if counts is None:
        counts = PartitionCounts(*(int(n) for n in partition_counts(parts, torch.ones_like(parts, dtype=torch.bool))))
    size = ((total + parts - 1) // parts).clamp(min=1)
    item, part = expand_counts(parts, counts.parts)
    blocks_before = blocks.cumsum(1) - blocks
    first = ((part * size[item])[:, None] - blocks_before[item]).clamp(min=0)
    last = (((part + 1) * size[item])[:, None] - blocks_before[item]).clamp(min=0)
    part_begin = begin[item] + torch.minimum(first, blocks[item]) * entries_per_block
    part_end = begin[item] + torch.minimum(last, blocks[item]) * entries_per_block
    part_end = torch.minimum(part_end, torch.maximum(end, begin)[item])
    is_split = parts[item] > 1
    partial = torch.where(is_split, is_split.long().cumsum(0) - 1, -1)
    split = true_indices(parts > 1, counts.split_items)
    # Longest first by powers of two only: among parts of similar length, neighbours stay neighbours and share keys in L2.
    cost = torch.where(is_split, torch.minimum(size[item], total[item]), total[item])
    order = torch.argsort(torch.log2(cost.clamp(min=1).double()).floor(), descending=True, stable=True)
    return WorkPartition(
        item[order],
        torch.stack((part_begin, part_end), 2)[order],
        partial[order],
        counts.partials,
        torch.stack((split, exclusive_cumsum(parts[split]), parts[split]), 1),
    )
