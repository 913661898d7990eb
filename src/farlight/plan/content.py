"""`ContentPlan`: the plan of a router's pattern whose tables are in native memory, built and executed by the cpu backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from farlight.errors import PlanError
from farlight.patterns.expression import Pattern, Sizes
from farlight.plan.footprint import Derived
from farlight.plan.tables import Masks, Plan

__all__ = ["NATIVE_PLAN", "ContentPlan", "NativeTables", "naming_bad_indices"]

NATIVE_PLAN = "native plan"  # in Plan.derived


class NativeTables:
    """The native object that plans and executes a choice, in a `derived` that all plans of the choice share.

    The native object holds the tensors that its lists are in.
    """

    def __init__(self, native: Any) -> None:
        self.native, self.derived = native, Derived()
        self.derived[NATIVE_PLAN] = native

    @property
    def nbytes(self) -> int:
        return int(self.native.nbytes)


@contextmanager
def naming_bad_indices(pattern: Pattern, sizes: Sizes) -> Iterator[None]:
    """A native function that finds an index out of range gets the pattern's own error, which names it."""
    try:
        yield
    except ValueError as error:
        pattern.check(sizes)
        raise PlanError(f"malformed plan: {error}.") from error


class ContentPlan(Plan):
    """A plan without tables of its own: `pieces` is empty, and `derived` holds the native object that has them.

    A pattern of lists has native tables from the second forward pass on, the first backward pass, or `make_tables`: the first
    forward pass plans each tile where it computes it. `pairs` and `visited` are counted when they are read.
    """

    @staticmethod
    def of(pattern: Pattern, sizes: Sizes, tables: NativeTables, backend: str = "") -> ContentPlan:
        with torch.inference_mode(False):
            empty = torch.zeros(0, dtype=torch.int32, device="cpu")
        plan, masks = object.__new__(ContentPlan), Masks(empty, empty, empty, empty, empty)
        plan.__dict__.update(pattern=pattern, sizes=sizes, tile=32, longest=0, pieces=(), masks=masks, backend=backend)
        plan.__dict__.update(overlapping=tables.native.overlapping, derived=tables.derived)
        return plan

    @property
    def _native(self) -> Any:
        return self.derived[NATIVE_PLAN]

    @cached_property
    def _counts(self) -> tuple[int, int]:
        with naming_bad_indices(self.pattern, self.sizes):
            counts: tuple[int, int] = self._native.counts(torch.get_num_threads())
            return counts

    @cached_property
    def pairs(self) -> int:
        return self._counts[0]

    @cached_property
    def visited(self) -> int:
        return self._counts[1]

    def expected(self, dtype_code: int) -> tuple[int, int]:
        """(pairs, visited) of a forward pass, estimated from a sample of the tiles; dtype_code: of csrc/views.h."""
        with naming_bad_indices(self.pattern, self.sizes):
            counts: tuple[int, int] = self._native.expected(dtype_code, torch.get_num_threads())
            return counts

    def make_tables(self) -> None:
        """Plan now what a later call would plan."""
        with naming_bad_indices(self.pattern, self.sizes):
            self.derived.charge(self._native.make_tables(torch.get_num_threads()))

    @property
    def nbytes(self) -> int:
        """Bytes of the native tables and of the lists that they are made from."""
        return int(self._native.nbytes)

    def copied(self, backend: str = "") -> ContentPlan:
        """The same tables, made now, for calls of this backend: nothing can write into them."""
        plan = ContentPlan.of(self.pattern, self.sizes, NativeTables(self._native), backend)
        plan.make_tables()
        return plan

    def dense(self) -> Tensor:
        """The pairs as a bool mask `(B, H, n_q, n_k)`, for inspection and tests. Raises PlanError where a pair occurs twice."""
        s = self.sizes
        counts = torch.zeros(s.batch, s.heads, s.n_q, s.n_k, dtype=torch.uint8, device="cpu")
        if counts.numel():
            with naming_bad_indices(self.pattern, s):
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
