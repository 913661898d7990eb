"""Dealing out work: long items are cut in parts, the heaviest come first, so that no processor is left with a long tail."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LEAST", "Dealt", "deal"]

# Blocks below which an item is not cut: a part costs a round trip of its sums through memory.
LEAST = 16
# Parts for each processor that the longest items are cut for.
_PER_WORKER = 8


@dataclass(frozen=True)
class Dealt:
    """Parts of items: `item`, their ranges `(parts, K, 2)`, `slot` of the workspace (-1: the item is in one part), in the order
    in which they should start; and for each item that was cut (item, first slot, parts).
    """

    item: Tensor
    ranges: Tensor
    slot: Tensor
    slots: int
    cut: Tensor


def deal(ranges: Tensor, unit: Tensor, workers: int) -> Dealt:
    """Cut and order items. `ranges` `(items, K, 2)` are lists of work, of which `unit[k]` entries make one block."""
    begin, end = ranges.unbind(2)
    blocks = torch.div(end - begin + unit - 1, unit, rounding_mode="floor").clamp(min=0)
    total = blocks.sum(1)
    limit = max(LEAST, -(-int(total.sum()) // (workers * _PER_WORKER)))
    parts = torch.where(total > limit + limit // 2, torch.div(total + limit - 1, limit, rounding_mode="floor"), 1)
    size = torch.div(total + parts - 1, parts, rounding_mode="floor").clamp(min=1)
    item = torch.arange(total.numel()).repeat_interleave(parts)
    part = torch.arange(item.numel()) - (parts.cumsum(0) - parts)[item]
    before = blocks.cumsum(1) - blocks
    first = ((part * size[item])[:, None] - before[item]).clamp(min=0)
    last = (((part + 1) * size[item])[:, None] - before[item]).clamp(min=0)
    low = begin[item] + torch.minimum(first, blocks[item]) * unit
    high = torch.minimum(begin[item] + torch.minimum(last, blocks[item]) * unit, torch.maximum(end, begin)[item])
    is_cut = parts[item] > 1
    slot = torch.where(is_cut, is_cut.long().cumsum(0) - 1, -1)
    cut = (parts > 1).nonzero().squeeze(1)
    heads = (parts[cut].cumsum(0) - parts[cut])[:, None]
    # Heavy first, by octaves only: within one, neighbours stay neighbours and share their keys in the cache.
    weight = torch.where(is_cut, torch.minimum(size[item], total[item]), total[item])
    order = torch.argsort(torch.log2(weight.clamp(min=1).double()).floor(), descending=True, stable=True)
    return Dealt(
        item[order],
        torch.stack((low, high), 2)[order],
        slot[order],
        int(is_cut.sum()),
        torch.cat((cut[:, None], heads, parts[cut][:, None]), 1),
    )
