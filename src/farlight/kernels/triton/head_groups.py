"""Groups of (batch, head) pairs that read the same plan tables, so that each distinct table is lowered once.

A piece and each of its layers have a table `variant (B|1, H|1)`: which of their variants a (batch, head) reads. Pairs that read
the same variants of all tables form a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.plan.tables import Plan

__all__ = ["HeadGroups", "head_groups"]


@dataclass(frozen=True)
class HeadGroups:
    """group_id: `(B, H)` the group of each (batch, head); variants[t][g]: the variant of table t that group g reads."""

    group_id: Tensor
    variants: list[list[int]]

    @property
    def count(self) -> int:
        return int(self.group_id.max()) + 1

    def members(self, group: int) -> tuple[Tensor, Tensor]:
        """(batch, head) of each member of a group."""
        batch, head = (self.group_id == group).nonzero().unbind(1)
        return batch, head


def head_groups(plan: Plan, variant_tables: list[Tensor]) -> HeadGroups:
    """The groups of (batch, head) that agree in all of these variant tables, each `(B|1, H|1)`."""
    shape = (plan.sizes.batch, plan.sizes.heads)
    group_id = torch.zeros(shape, dtype=torch.int64)
    for table in variant_tables:
        group_id = torch.unique(group_id * (int(table.max()) + 1) + table.long(), return_inverse=True)[1]
    flat = group_id.reshape(-1)
    member = torch.zeros(int(flat.max()) + 1, dtype=torch.int64).scatter_(0, flat, torch.arange(flat.numel()))
    return HeadGroups(group_id, [table.expand(shape).reshape(-1)[member].tolist() for table in variant_tables])
