"""A call of `fl.attention` as values: its pattern, its sizes, and the `Request` that backends accept or refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from farlight.errors import ArgumentError, PlanError
from farlight.inputs import read_offset
from farlight.kernels.backend import Request
from farlight.patterns.chooser import Chooser
from farlight.patterns.expression import Pattern, Sizes
from farlight.plan import Plan
from farlight.score.lowered import ScoreTerms

__all__ = ["chosen", "read_pattern", "read_request", "read_sizes"]


def chosen(chooser: Chooser, q: Tensor, k: Tensor, sizes: Sizes) -> Pattern:
    """The pattern that a router chooses for q and k."""
    if sizes.q_offset != sizes.n_k - sizes.n_q:
        raise ArgumentError(
            f"q_offset = {sizes.q_offset} was given with a router, but a router takes the queries for the last of the "
            f"{sizes.n_k} tokens (q_offset = {sizes.n_k - sizes.n_q}); leave q_offset out, or pass a pattern."
        )
    return chooser.pattern_of(q, k)


def read_pattern(pattern: Pattern | Plan | Chooser, sizes: Sizes) -> Pattern:
    """The pattern, or that of a plan made for these sizes."""
    if isinstance(pattern, Pattern):
        return pattern
    if not isinstance(pattern, Plan):
        raise ArgumentError(f"the pattern is {type(pattern).__name__}; {_converter(pattern)}.")
    made = pattern.sizes
    if sizes != made:
        raise PlanError(
            f"the plan was made for n_q={made.n_q}, n_k={made.n_k}, batch={made.batch}, heads={made.heads}, "
            f"q_offset={made.q_offset}, but the tensors have n_q={sizes.n_q}, n_k={sizes.n_k}, batch={sizes.batch}, "
            f"heads={sizes.heads}, q_offset={sizes.q_offset}; make one with fl.plan(pattern, …) for these sizes, or pass "
            "the pattern itself."
        )
    return pattern.pattern


def _converter(value: Any) -> str:
    """What makes a pattern of a value that is none."""
    if type(value).__name__ == "BlockMask":
        return "make one of it by fl.from_block_mask(mask)"
    if (isinstance(value, Tensor) and value.layout is torch.strided) or isinstance(value, np.ndarray):
        return "make one of a mask by fl.from_dense(mask), of links by fl.from_edges(rows, cols, n)"
    if isinstance(value, Tensor) or hasattr(value, "tocoo"):
        return "make one of a sparse matrix by fl.from_sparse(matrix)"
    if hasattr(value, "nodes") and hasattr(value, "edges"):
        return "make one of a graph by fl.from_graph(graph)"
    if callable(value):
        return "make one of a mask function by fl.from_mask_mod(fn, n_q, n_k)"
    return "pass a pattern such as fl.window(256), or a plan from fl.plan"


def read_sizes(q: Tensor, k: Tensor, q_offset: int | None) -> Sizes:
    """The sizes of a call; the queries are the last positions where no offset is given."""
    offset = k.shape[2] - q.shape[2] if q_offset is None else read_offset(q_offset)
    return Sizes(q.shape[2], k.shape[2], offset, q.shape[0], q.shape[1])


def read_request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    sizes: Sizes,
    dropout: float,
    return_lse: bool,
    terms: ScoreTerms | None,
    choice: int | None = None,
) -> Request:
    """The call without its tensors; choice: products by which a router has chosen the pattern, None without one."""
    names: frozenset[str] = frozenset() if terms is None else terms.names
    tensors = (q, k, v) if terms is None else (q, k, v, *terms.tensors)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    shapes, options = (k.shape[1], q.shape[3], v.shape[3], q.dtype, q.device), (needs_grad, dropout, return_lse, names)
    return Request(pattern, sizes, *shapes, *options, choice=choice)
