"""Plans of routers' patterns, built by the native planner (csrc/content) straight from lists of blocks, keys or labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farlight.errors import PlanError, UnsupportedError, shorten
from farlight.kernels.cpu.choose import SCORES, TYPE_CODES
from farlight.kernels.cpu.launch import as_operand, strided_address
from farlight.kernels.cpu.native import module, unavailable
from farlight.patterns.expression import Pattern, Sizes
from farlight.plan import plan_for
from farlight.plan.cache import kept_with
from farlight.plan.chosen_links import ChosenLinks
from farlight.plan.content import ContentPlan, NativeTables
from farlight.plan.content_clauses import ClauseKind, ContentClause, content_clauses, listed_clauses
from farlight.plan.routed_union import split_routed
from farlight.plan.tables import TileShape

__all__ = ["content_plan", "lost_bound"]


def content_plan(pattern: Pattern, sizes: Sizes, shape: TileShape) -> ContentPlan | None:
    """The plan of a pattern with lists or labels; None for a pattern that the native planner does not read.

    shape: tiles of 32 rows. Raises PatternError where a table does not fit the sizes.
    """
    if not pattern._tables or unavailable() is not None:
        return None
    tables = kept_with(pattern, ("cpu", sizes, shape), lambda: _tables(pattern, sizes, shape))
    return None if tables is None else ContentPlan.of(pattern, sizes, tables)


def _tables(pattern: Pattern, sizes: Sizes, shape: TileShape) -> NativeTables | None:
    native = _build(pattern, sizes, shape)
    return None if native is None else NativeTables(native)


def _build(pattern: Pattern, sizes: Sizes, shape: TileShape) -> Any:
    """The native plan, or None."""
    extents = [sizes.batch, sizes.heads, sizes.n_q, sizes.n_k, sizes.q_offset]
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        clauses = listed_clauses(pattern, sizes)
        if clauses is None:
            return _build_sorted(pattern, sizes, shape, extents)
    numbers = [_numbers(clause) for clause in clauses]
    try:
        return module().Plan(extents, numbers, shape.gather, torch.get_num_threads())
    except ValueError as error:
        pattern.check(sizes)  # names the index that is out of range
        raise PlanError(f"malformed plan: {error}.") from error


def _build_sorted(pattern: Pattern, sizes: Sizes, shape: TileShape, extents: list[int]) -> Any:
    """The native plan of clusterings, perhaps in union with a fixed pattern, or None."""
    if any(table.device.type != "cpu" for table in pattern._tables):
        return None
    split = split_routed(pattern, sizes)
    if split is None or any(links.rows is None or links.points is not None for links in split.pieces):
        return None
    pieces = [_sorted_tables(links, sizes) for links in split.pieces]
    fixed = None if split.fixed is None else plan_for(split.fixed, sizes, shape)
    numbers = []
    for links, tables in zip(split.pieces, pieces, strict=True):
        numbers.append([*links.shape, sizes.n_q, sizes.n_k, *(table.data_ptr() for table in tables)])
    return module().Plan(fixed, extents, numbers)


def _sorted_tables(links: ChosenLinks, sizes: Sizes) -> tuple[Tensor, ...]:
    """(rows, row_count, keys, key_count, lo, hi) of SortedLinks in csrc/content/sorted_piece.h."""
    assert links.rows is not None
    assert links.keys is not None
    variants = links.shape[0] * links.shape[1]
    places = torch.arange(sizes.n_q, device="cpu").expand(variants, -1)
    lo, hi = (x.squeeze(2).expand(variants, -1).contiguous() for x in (links.lo, links.ends(places)))
    return links.rows.contiguous(), links.row_count.contiguous(), links.keys.contiguous(), links.key_count.contiguous(), lo, hi


def lost_bound(q: Tensor, k: Tensor, pattern: Pattern, sizes: Sizes, lse: Tensor, scale: float) -> Tensor:
    """`(B, H, n_q)` float32: an upper bound of the share of full attention that each row of a router's pattern has missed.

    A granule c of 8 keys, of which the row misses n_c, holds at most n_c exp(scale · Σ_d max(q_d min_d, q_d max_d)), with the
    channel-wise bounds of its keys; lost = u / (1 + u), u the sum of these over exp(lse). Full attention ends at the query
    where every clause of the pattern does, and leaves out padding that no clause sees. Rounding is added to the bound.

    Raises UnsupportedError for a pattern that is not a union of lists, windows and named tokens, and without the native module.
    """
    missing = unavailable()
    clauses = None if missing is not None else content_clauses(pattern, sizes)
    if clauses is None:
        why = missing or "the bound is known for listed blocks or keys, windows and named tokens, on the CPU"
        raise UnsupportedError(
            f"return_lost: {why}, but the pattern is "
            f"{shorten(repr(pattern), 80)}; pass a router such as fl.routing.TopBlocks, perhaps | fl.window(…)."
        )
    is_causal = all(clause.causal or (clause.kind == ClauseKind.BAND and clause.right == 0) for clause in clauses)
    real = None
    if all(clause.real_keys is not None for clause in clauses):
        masks = torch.broadcast_tensors(*(clause.real_keys for clause in clauses))
        real = torch.stack(masks).amax(0).contiguous()
    q, k, lse = as_operand(q, "q"), as_operand(k, "k"), lse.to(torch.float32).contiguous()
    lost = torch.empty(lse.shape, dtype=torch.float32, device="cpu")
    mask = [0, 1] if real is None else [real.data_ptr(), real.shape[0]]
    tensors = [TYPE_CODES[q.dtype], *q.shape[:2], k.shape[1], sizes.n_q, sizes.n_k, q.shape[3], 0, *mask]
    rule = [8, 1, sizes.q_offset, sizes.q_offset, int(is_causal), 0, SCORES.index("minmax"), 0]
    extents = [sizes.batch, sizes.heads, sizes.n_q, sizes.n_k, sizes.q_offset]
    numbers = [_numbers(clause) for clause in clauses]
    views = strided_address(q), strided_address(k)
    module().lost(extents, numbers, tensors + rule, *views, scale, lse.data_ptr(), lost.data_ptr(), torch.get_num_threads())
    return lost


def _numbers(clause: ContentClause) -> list[int]:
    """The numbers of a native clause: `clause_of` in csrc/plan_binding.cpp. They hold addresses of the clause's tables."""
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
