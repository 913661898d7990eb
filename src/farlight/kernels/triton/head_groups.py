"""Which (batch, head) see the same tables: variants of pieces and layers joined into classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.plan.tables import Plan

__all__ = ["Classes", "classes_of"]


@dataclass(frozen=True)
class Classes:
    """`of`: (B, H) the class of each (batch, head); `variant[t][c]`: the variant of table t that class c reads."""

    of: Tensor
    variant: list[list[int]]

    @property
    def count(self) -> int:
        return int(self.of.max()) + 1

    def members(self, number: int) -> tuple[Tensor, Tensor]:
        """(batch, head) of the members of a class."""
        batch, head = (self.of == number).nonzero().unbind(1)
        return batch, head


def classes_of(plan: Plan, tables: list[Tensor]) -> Classes:
    """The classes of (batch, head) that read the same variants of these tables, each `(B|1, H|1)`."""
    shape = (plan.sizes.batch, plan.sizes.heads)
    code = torch.zeros(shape, dtype=torch.int64)
    for table in tables:
        code = torch.unique(code * (int(table.max()) + 1) + table.long(), return_inverse=True)[1]
    flat = code.reshape(-1)
    one = torch.zeros(int(flat.max()) + 1, dtype=torch.int64).scatter_(0, flat, torch.arange(flat.numel()))
    return Classes(code, [table.expand(shape).reshape(-1)[one].tolist() for table in tables])
