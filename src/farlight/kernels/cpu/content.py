"""Plans of routers' patterns, built by the native planner (csrc/content) straight from the lists of blocks or keys."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from farlight.errors import PlanError
from farlight.kernels.cpu.native import module, unavailable
from farlight.patterns.expression import Pattern, Sizes
from farlight.plan.content import ContentPlan
from farlight.plan.content_clauses import ContentClause, content_clauses

__all__ = ["content_plan"]

# Native tables by (identity of the pattern, sizes); an entry goes with its pattern. A choice is hashed by identity: digesting
# its lists would take a tenth of the time of planning them, and no other pattern will have the same.
_native_plans: dict[tuple[int, Sizes], Any] = {}


def content_plan(pattern: Pattern, sizes: Sizes, gather: int) -> ContentPlan | None:
    """The plan of a pattern with lists of blocks or keys; None for a pattern that the native planner does not read.

    gather: cost of a gathered pair over that of a visited one. Raises PatternError where a table does not fit the sizes.
    """
    if not pattern._tables or unavailable() is not None:
        return None
    key = id(pattern), sizes
    if key not in _native_plans:
        _native_plans[key] = _build(pattern, sizes, gather)
        weakref.finalize(pattern, _native_plans.pop, key, None)
    native = _native_plans[key]
    return None if native is None else ContentPlan.of(pattern, sizes, native)


def _build(pattern: Pattern, sizes: Sizes, gather: int) -> Any:
    """The native plan, or None."""
    with torch.inference_mode(False), torch.no_grad():
        clauses = content_clauses(pattern, sizes)
    if clauses is None:
        return None
    numbers = [_numbers(clause) for clause in clauses]
    shape = [sizes.batch, sizes.heads, sizes.n_q, sizes.n_k, sizes.q_offset]
    try:
        return module().Plan(shape, numbers, gather, torch.get_num_threads())
    except ValueError as error:
        pattern.check(sizes)  # names the index that is out of range
        raise PlanError(f"malformed plan: {error}.") from error


def _numbers(clause: ContentClause) -> list[int]:
    """The numbers of a native clause: `clause_of` in csrc/binding.cpp. They hold addresses of the clause's tables."""
    table, real = clause.table, clause.real_keys
    tables = [0, 1, 1, 0, 0] if table is None else [table.data_ptr(), *table.shape]
    masks = [0, 1] if real is None else [real.data_ptr(), real.shape[0]]
    return [
        int(clause.kind),
        int(clause.causal),
        *tables,
        clause.block,
        clause.query_block,
        clause.base,
        clause.left,
        clause.right,
        *masks,
    ]
