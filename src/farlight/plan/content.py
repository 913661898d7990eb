"""`ContentPlan`: the plan of a router's pattern whose tables are in native memory, built and executed by the cpu backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from farlight.errors import PlanError
from farlight.patterns.expression import Pattern, Sizes
from farlight.plan.footprint import Derived
from farlight.plan.tables import Masks, Plan

__all__ = ["NATIVE_PLAN", "ContentPlan", "NativeTables"]

NATIVE_PLAN = "native plan"  # in Plan.derived
_CLAUSES = "clauses of the native plan"


class NativeTables:
    """The native object that holds the tables of a choice, in a `derived` that all plans of the choice share.

    clauses: what the native object reads again in each call, so that their tables must live as long.
    """

    def __init__(self, native: Any, clauses: object = ()) -> None:
        self.native, self.derived = native, Derived()
        self.derived[NATIVE_PLAN] = native
        self.derived[_CLAUSES] = clauses

    @property
    def nbytes(self) -> int:
        return int(self.native.nbytes)


@dataclass(frozen=True, eq=False, repr=False)
class ContentPlan(Plan):
    """A plan without tables of its own: `pieces` is empty, and `derived` holds the native object that has them."""

    @staticmethod
    def of(pattern: Pattern, sizes: Sizes, tables: NativeTables, backend: str = "") -> ContentPlan:
        with torch.inference_mode(False):
            empty = torch.zeros(0, dtype=torch.int32, device="cpu")
        masks, native = Masks(empty, empty, empty, empty, empty), tables.native
        plan = ContentPlan(pattern, sizes, 32, 0, (), masks, native.pairs, native.visited, native.overlapping, backend)
        object.__setattr__(plan, "derived", tables.derived)
        return plan

    @property
    def _native(self) -> Any:
        return self.derived[NATIVE_PLAN]

    @property
    def nbytes(self) -> int:
        """Bytes of the native tables."""
        return int(self._native.nbytes)

    def copied(self, backend: str = "") -> ContentPlan:
        """The same tables, for calls of this backend: nothing can write into them."""
        return ContentPlan.of(self.pattern, self.sizes, NativeTables(self._native, self.derived[_CLAUSES]), backend)

    def dense(self) -> Tensor:
        """The pairs as a bool mask `(B, H, n_q, n_k)`, for inspection and tests. Raises PlanError where a pair occurs twice."""
        s = self.sizes
        counts = torch.zeros(s.batch, s.heads, s.n_q, s.n_k, dtype=torch.uint8, device="cpu")
        if counts.numel():
            self._native.dense(s.batch, s.heads, counts.data_ptr())
            if int(counts.max()) > 1:
                raise PlanError("a pair occurs twice in the plan.")
        return counts.bool()

    def transposed(self, block: int = 64) -> NoReturn:
        raise PlanError("the tables of this plan are native ones of the cpu backend: they have no transposed form.")

    def check(self) -> None:
        """Nothing: the native planner checks what it builds."""

    def __reduce__(self) -> NoReturn:
        raise PlanError("a plan of the cpu backend with native tables cannot be pickled; pickle its pattern.")
