"""Plans of routers' patterns, built by the native planner (csrc/content) straight from lists of blocks, keys or labels."""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.errors import UnsupportedError, shorten
from farlight.kernels.cpu.choose import SCORES, TYPE_CODES
from farlight.kernels.cpu.launch import as_operand, strided_address
from farlight.kernels.cpu.native import module, unavailable
from farlight.patterns.expression import Pattern, Sizes
from farlight.plan.cache import kept_with
from farlight.plan.content import ContentPlan, NativeTables, naming_bad_indices
from farlight.plan.content_clauses import ClauseKind, ContentClause, content_clauses, listed_clauses
from farlight.plan.label_links import LabelPiece, label_union
from farlight.plan.tables import TileShape

__all__ = ["content_plan", "listed_pairs", "lost_bound"]


def content_plan(pattern: Pattern, sizes: Sizes, shape: TileShape) -> ContentPlan | None:
    """The plan of a pattern with lists or labels; None for a pattern that the native planner does not read.

    shape: tiles of 32 rows. Raises PatternError where a table does not fit the sizes.
    """
    if not pattern._tables or unavailable() is not None:
        return None
    tables = kept_with(pattern, ("cpu", sizes, shape), lambda: _tables(pattern, sizes, shape))
    return None if tables is None else ContentPlan.of(pattern, sizes, tables)


def listed_pairs(pattern: Pattern, sizes: Sizes, shape: TileShape) -> int | None:
    """The number of pairs of a pattern with lists over batch and heads, tile by tile; None for any other pattern."""
    tables = None
    if pattern._tables and unavailable() is None:
        with torch.inference_mode(False), torch.no_grad():
            tables = _listed_tables(pattern, sizes, shape)
    return None if tables is None else ContentPlan.of(pattern, sizes, tables).pairs


def _tables(pattern: Pattern, sizes: Sizes, shape: TileShape) -> NativeTables | None:
    """The native plan, or None."""
    with torch.inference_mode(False), torch.no_grad():
        return _listed_tables(pattern, sizes, shape) or _labelled_tables(pattern, sizes, shape)


def _listed_tables(pattern: Pattern, sizes: Sizes, shape: TileShape) -> NativeTables | None:
    """The native plan of lists of blocks or keys, perhaps in union with windows and named tokens, or None."""
    clauses = listed_clauses(pattern, sizes)
    if clauses is None:
        return None
    numbers = [_numbers(clause) for clause in clauses]
    owners = [table for clause in clauses for table in (clause.table, clause.real_keys) if table is not None]
    return NativeTables(module().Plan(_extents(sizes), numbers, owners, shape.gather))


def _labelled_tables(pattern: Pattern, sizes: Sizes, shape: TileShape) -> NativeTables | None:
    """The native plan of clusterings, perhaps in union with a fixed pattern, or None."""
    with torch.device("cpu"):
        union = label_union(pattern, sizes)
        if union is None:
            return None
        clauses = [] if union.fixed is None else content_clauses(union.fixed, sizes)
    if clauses is None:
        return None
    # Outside of the device's context, which would intercept the reading of every table.
    pieces, numbers = [_label_numbers(piece) for piece in union.pieces], [_numbers(clause) for clause in clauses]
    return NativeTables(module().Plan(_extents(sizes), numbers, shape.gather, pieces, torch.get_num_threads()))


def _label_numbers(piece: LabelPiece) -> list[int]:
    """The numbers of `label_links_of` in csrc/plan_binding.cpp. They hold addresses of the piece's tables."""
    starts = [0, 1, 1] if piece.starts is None else [piece.starts.data_ptr(), *piece.starts.shape[:2]]
    real = [0, 1] if piece.real_keys is None else [piece.real_keys.data_ptr(), piece.real_keys.shape[0]]
    excluded = [0 if mask is None else mask.data_ptr() for mask in (piece.excluded_rows, piece.excluded_keys)]
    query, key = ([labels.data_ptr(), *labels.shape[:2]] for labels in (piece.query, piece.key))
    return [*piece.shape, *query, *key, *real, *excluded, *starts, piece.lower, piece.upper]


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
    numbers = [_numbers(clause) for clause in clauses]
    views = strided_address(q), strided_address(k)
    addresses = scale, lse.data_ptr(), lost.data_ptr()
    with naming_bad_indices(pattern, sizes):
        module().lost(_extents(sizes), numbers, tensors + rule, *views, *addresses, torch.get_num_threads())
    return lost


def _extents(sizes: Sizes) -> list[int]:
    return [sizes.batch, sizes.heads, sizes.n_q, sizes.n_k, sizes.q_offset]


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
        8 if table is None else table.element_size(),
        -1 if clause.head is None else clause.head,
    ]
