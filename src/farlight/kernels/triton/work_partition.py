"""Dealing out work: long items are cut in parts, the heaviest come first, so that no processor is left with a long tail."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LEAST", "Counts", "Dealt", "counted", "deal", "parts_of", "picked"]

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


@dataclass(frozen=True)
class Counts:
    """How many items are dealt, the parts they make, how many of these are parts of cut items, how many items are cut."""

    items: int
    parts: int
    slots: int
    cut: int


def parts_of(total: Tensor, whole: Tensor, workers: int) -> Tensor:
    """In how many parts to cut items of `total` blocks each, `whole` being the blocks of all items."""
    limit = torch.div(whole + (workers * _PER_WORKER - 1), workers * _PER_WORKER, rounding_mode="floor").clamp(min=LEAST)
    many = torch.div(total + limit - 1, limit, rounding_mode="floor")
    return torch.where(total > limit + torch.div(limit, 2, rounding_mode="floor"), many, 1)


def counted(parts: Tensor, dealt: Tensor, times: int = 1) -> list[Tensor]:
    """The numbers of `Counts`, on the device: for items where `dealt` is True, `times` of each."""
    some = torch.where(dealt, parts, 0)
    slots = torch.where(some > 1, some, 0)
    return [x.sum() * times for x in (dealt, some, slots, slots > 0)]


def picked(flag: Tensor, many: int) -> Tensor:
    """Where `flag` is True, when it is known to be so `many` times: the device need not be asked."""
    place = torch.where(flag, flag.cumsum(0) - 1, many)
    out = torch.empty(many + 1, dtype=torch.int64, device=flag.device)
    return out.scatter_(0, place, torch.arange(flag.numel(), device=flag.device))[:many]


def deal(ranges: Tensor, unit: Tensor, workers: int, counts: Counts | None = None) -> Dealt:
    """Cut and order items. `ranges` `(items, K, 2)` are lists of work, of which `unit[k]` entries make one block.

    `counts`, where the caller has them, spare a question to the device.
    """
    begin, end = ranges.unbind(2)
    blocks = torch.div(end - begin + unit - 1, unit, rounding_mode="floor").clamp(min=0)
    total = blocks.sum(1)
    parts = parts_of(total, total.sum(), workers)
    if counts is None:
        counts = Counts(*(int(n) for n in counted(parts, torch.ones_like(parts, dtype=torch.bool))))
    size = torch.div(total + parts - 1, parts, rounding_mode="floor").clamp(min=1)
    item = torch.arange(counts.items, device=total.device).repeat_interleave(parts, output_size=counts.parts)
    part = torch.arange(counts.parts, device=total.device) - (parts.cumsum(0) - parts)[item]
    before = blocks.cumsum(1) - blocks
    first = ((part * size[item])[:, None] - before[item]).clamp(min=0)
    last = (((part + 1) * size[item])[:, None] - before[item]).clamp(min=0)
    low = begin[item] + torch.minimum(first, blocks[item]) * unit
    high = torch.minimum(begin[item] + torch.minimum(last, blocks[item]) * unit, torch.maximum(end, begin)[item])
    is_cut = parts[item] > 1
    slot = torch.where(is_cut, is_cut.long().cumsum(0) - 1, -1)
    cut = picked(parts > 1, counts.cut)
    heads = (parts[cut].cumsum(0) - parts[cut])[:, None]
    # Heavy first, by octaves only: within one, neighbours stay neighbours and share their keys in the cache.
    weight = torch.where(is_cut, torch.minimum(size[item], total[item]), total[item])
    order = torch.argsort(torch.log2(weight.clamp(min=1).double()).floor(), descending=True, stable=True)
    return Dealt(
        item[order],
        torch.stack((low, high), 2)[order],
        slot[order],
        counts.slots,
        torch.cat((cut[:, None], heads, parts[cut][:, None]), 1),
    )
