"""From runs that start anywhere to blocks of keys: which are whole for some rows of a tile, and which need a mask.

A plan's tile may be cut into smaller groups of rows (*subtiles*) than it was planned for: the mask of a run says what each of
them sees, so that a subtile skips what only its neighbours see, and needs no mask where its own rows see all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.plan.tables import BITS, BOUNDS, EMPTY, Masks, Plan

__all__ = ["Extent", "Extents", "Ranges", "grid", "ranges_of", "spread"]


@dataclass(frozen=True)
class Extent:
    """What subtiles see of runs: slots `lo … hi` at all, `core_lo … core_hi` in every row (empty: core_hi <= core_lo)."""

    lo: Tensor
    hi: Tensor
    core_lo: Tensor
    core_hi: Tensor


class Extents:
    """Answers, for one height of subtiles, what the masks of a plan leave of a run."""

    def __init__(self, plan: Plan, height: int) -> None:
        masks = plan.masks
        self.subtiles = max(1, -(-plan.tile // height))
        number = masks.kind.numel()
        # Ends relative to the run's: the seen part, and the part that every row of the subtile sees.
        self.seen = torch.zeros(2, number, self.subtiles, dtype=torch.int64)
        self.core = torch.zeros(2, number, self.subtiles, dtype=torch.int64)
        self.start = masks.start.long()
        self.bits = masks.kind == BITS
        self.core[0, self.bits] = EMPTY
        bounded = (masks.kind == BOUNDS).nonzero().squeeze(1)
        if bounded.numel():
            self._read(masks, bounded, plan.tile, height)

    def _read(self, masks: Masks, bounded: Tensor, tile: int, height: int) -> None:
        at = masks.start[bounded].long()[:, None] + torch.arange(2 * tile)
        bound = masks.data[at].long().view(-1, tile, 2)
        missing = self.subtiles * height - tile
        empty = torch.tensor([EMPTY, 0]).expand(bound.shape[0], missing, 2)
        bound = torch.cat((bound, empty), 1).view(-1, self.subtiles, height, 2)
        low, high = bound.unbind(-1)
        self.seen[0, bounded] = low.amin(2)
        self.seen[1, bounded] = torch.where(low < EMPTY, high, -EMPTY).amax(2)
        if self.subtiles == 1:
            # The plan knows which rows are no rows at all; here they look like rows that see nothing.
            self.core[0, bounded, 0], self.core[1, bounded, 0] = masks.core_lo[bounded].long(), masks.core_hi[bounded].long()
        else:
            self.core[0, bounded] = low.amax(2)
            self.core[1, bounded] = high.amin(2)

    def of(self, lo: Tensor, hi: Tensor, mask: Tensor, subtile: Tensor) -> Extent:
        """The extents of runs `[lo, hi)` with these masks (-1 = whole) for these subtiles; all 1-D of one length."""
        masked = mask >= 0
        if not bool(masked.any()):
            return Extent(lo, hi, lo, hi)
        at = (mask.clamp(min=0), subtile)
        low, high, core_low, core_high = (torch.where(masked, table[at], 0) for table in (*self.seen, *self.core))
        return Extent(lo + low, hi + high, lo + core_low, hi + core_high)

    def data(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Where the bounds and the bits of these masks begin; -1 = there are none."""
        none = torch.full_like(mask, -1)
        if not self.start.numel():
            return none, none
        at = mask.clamp(min=0)
        start, bits = self.start[at], self.bits[at]
        return torch.where((mask >= 0) & ~bits, start, none), torch.where((mask >= 0) & bits, start, none)


def spread(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """(owner, index): the indices `begin[i] … end[i] - 1` of every i, one after another, and whose they are."""
    count = (end - begin).clamp(min=0)
    owner = torch.arange(count.numel()).repeat_interleave(count)
    return owner, begin[owner] + torch.arange(owner.numel()) - (count.cumsum(0) - count)[owner]


def grid(extent: Extent, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(run, first slot, whole): the blocks of `width` slots from the start of each run, and whether all rows see all of it."""
    run, step = spread(torch.zeros_like(extent.lo), torch.div(extent.hi - extent.lo + width - 1, width, rounding_mode="floor"))
    slot = extent.lo[run] + step * width
    return run, slot, (extent.core_lo[run] <= slot) & (slot + width <= extent.core_hi[run])


@dataclass(frozen=True)
class Ranges:
    """Where each owner's entries stand in a list."""

    begin: Tensor
    end: Tensor


def ranges_of(owner: Tensor, owners: int, base: int = 0) -> tuple[Tensor, Ranges]:
    """(order, ranges): how to sort entries by owner without changing their order, and each owner's range from `base`."""
    end = torch.bincount(owner, minlength=owners).cumsum(0) + base
    begin = torch.cat((torch.full((1,), base, dtype=torch.int64), end[:-1]))
    return torch.argsort(owner, stable=True), Ranges(begin, end)
