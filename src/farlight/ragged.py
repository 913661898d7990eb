"""Ragged rows as flat tensors: the owner and the position of each entry, from the rows' lengths.

Rows of different lengths lie one after another in one flat tensor. Three functions cover what planning, lowering and analysis
need of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["exclusive_cumsum", "expand_counts", "expand_ranges"]


def exclusive_cumsum(counts: Tensor) -> Tensor:
    """`(n,)`: where each row begins, rows of `counts[i]` entries lying one after another.

    >>> exclusive_cumsum(torch.tensor([2, 0, 3])).tolist()
    [0, 2, 2]
    """
    return counts.cumsum(0) - counts


def expand_counts(counts: Tensor, total: int | None = None) -> tuple[Tensor, Tensor]:
    """(owner, step), each `(sum(counts),)` int64: the row of each entry, and its place within that row.

    `total`: the sum of the counts where the caller knows it, which spares a synchronisation with the device.

    >>> [x.tolist() for x in expand_counts(torch.tensor([2, 0, 3]))]
    [[0, 0, 2, 2, 2], [0, 1, 0, 1, 2]]
    """
    owner = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts, output_size=total)
    return owner, torch.arange(owner.numel(), device=counts.device) - exclusive_cumsum(counts)[owner]


def expand_ranges(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """(owner, index): the integers `begin[i] … end[i] - 1` of every i, one range after another; empty where end <= begin.

    >>> [x.tolist() for x in expand_ranges(torch.tensor([5, 1]), torch.tensor([7, 2]))]
    [[0, 0, 1], [5, 6, 1]]
    """
    owner, step = expand_counts((end - begin).clamp(min=0))
    return owner, begin[owner] + step
