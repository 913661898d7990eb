"""Cutting runs of keys into blocks: which blocks are whole for a group of rows, which need a mask.

A plan's run begins and ends at any key, and its mask says what each row of a tile sees of it. A tile may be lowered as several
*subtiles* (groups of fewer rows than the tile was planned with). For each subtile the mask gives two intervals of the run: what
some row sees, outside of which nothing is visited, and the *core* that every row sees, inside of which no mask is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.plan.tables import BITS, BOUNDS, EMPTY, Masks, Plan
from farlight.ragged import expand_counts

__all__ = ["MaskExtents", "RunExtents", "TableRanges", "cut_into_blocks", "sort_by_owner"]


@dataclass(frozen=True)
class RunExtents:
    """Of each (run, subtile): some row sees the slots `lo … hi - 1`, every row `core_lo … core_hi - 1` (empty: hi <= lo)."""

    lo: Tensor
    hi: Tensor
    core_lo: Tensor
    core_hi: Tensor


class MaskExtents:
    """What the masks of a plan leave of a run, for subtiles of `block_m` rows.

    `seen`, `core`: `(2, masks, subtiles)`, the interval's begin relative to the run's begin, its end relative to the run's end.
    """

    def __init__(self, plan: Plan, block_m: int) -> None:
        masks = plan.masks
        self.subtiles = max(1, -(-plan.tile // block_m))
        self.seen = torch.zeros(2, masks.kind.numel(), self.subtiles, dtype=torch.int64)
        self.core = torch.zeros_like(self.seen)
        self.start = masks.start.long()
        self.is_bits = masks.kind == BITS
        # Bit masks are not looked into: all of the run may be seen, none of it counts as core.
        self.core[0, self.is_bits] = EMPTY
        bounded = (masks.kind == BOUNDS).nonzero().squeeze(1)
        if bounded.numel():
            self._read_bounds(masks, bounded, plan.tile, block_m)

    def _read_bounds(self, masks: Masks, bounded: Tensor, tile: int, block_m: int) -> None:
        """Reduce the row bounds of each subtile: min and max for `seen`, max and min for `core`."""
        index = masks.start[bounded].long()[:, None] + torch.arange(2 * tile)
        bounds = masks.data[index].long().view(-1, tile, 2)
        empty_rows = torch.tensor([EMPTY, 0]).expand(bounds.shape[0], self.subtiles * block_m - tile, 2)
        low, high = torch.cat((bounds, empty_rows), 1).view(-1, self.subtiles, block_m, 2).unbind(-1)
        self.seen[0, bounded] = low.amin(2)
        self.seen[1, bounded] = torch.where(low < EMPTY, high, -EMPTY).amax(2)
        if self.subtiles == 1:
            # Rows beyond a short tile look like rows that see nothing; the plan's own core leaves them out.
            self.core[0, bounded, 0], self.core[1, bounded, 0] = masks.core_lo[bounded].long(), masks.core_hi[bounded].long()
        else:
            self.core[0, bounded] = low.amax(2)
            self.core[1, bounded] = high.amin(2)

    def of(self, lo: Tensor, hi: Tensor, mask: Tensor, subtile: Tensor) -> RunExtents:
        """The extents of runs `[lo, hi)` with these masks (-1 = none) for these subtiles; all 1-D of one length."""
        masked = mask >= 0
        if not bool(masked.any()):
            return RunExtents(lo, hi, lo, hi)
        index = (mask.clamp(min=0), subtile)
        low, high, core_low, core_high = (torch.where(masked, table[index], 0) for table in (*self.seen, *self.core))
        return RunExtents(lo + low, hi + high, lo + core_low, hi + core_high)

    def mask_offsets(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets in `data` of the row bounds and of the bits of these masks; -1 = the mask has none."""
        none = torch.full_like(mask, -1)
        if not self.start.numel():
            return none, none
        index = mask.clamp(min=0)
        start, is_bits = self.start[index], self.is_bits[index]
        return torch.where((mask >= 0) & ~is_bits, start, none), torch.where((mask >= 0) & is_bits, start, none)


def cut_into_blocks(extents: RunExtents, block_n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(run, first slot, whole) of each block of `block_n` slots, counted from where a run begins to be seen.

    A block is whole when it lies within the core: every row sees all of it. The last block of a run may go beyond the run's
    end; then it is not whole.
    """
    run, step = expand_counts(((extents.hi - extents.lo + block_n - 1) // block_n).clamp(min=0))
    slot = extents.lo[run] + step * block_n
    return run, slot, (extents.core_lo[run] <= slot) & (slot + block_n <= extents.core_hi[run])


@dataclass(frozen=True)
class TableRanges:
    """Of each owner the range `begin … end - 1` of its entries in a table that is sorted by owner."""

    begin: Tensor
    end: Tensor


def sort_by_owner(owner: Tensor, owners: int, base: int = 0) -> tuple[Tensor, TableRanges]:
    """(order, ranges): the stable order that sorts entries by owner, and each owner's range, counted from `base`."""
    end = torch.bincount(owner, minlength=owners).cumsum(0) + base
    begin = torch.cat((torch.full((1,), base, dtype=torch.int64), end[:-1]))
    return torch.argsort(owner, stable=True), TableRanges(begin, end)
