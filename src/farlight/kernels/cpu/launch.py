"""Calls of the native kernels: torch tensors in, newly allocated torch tensors out.

Tensors are passed to C++ as (address, batch stride, head stride, row stride), so any layout with a contiguous last dimension is
read in place. float16 is converted to float32. Outputs are contiguous. Where several pieces of a plan overlap in query rows,
results of 16-bit tensors are accumulated in float32 and rounded once at the end: natively for out, some heads at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from farlight.kernels.checks import addressable, check_gradients, check_plan, check_tensors, dropped
from farlight.kernels.cpu.native import module, native_plan
from farlight.kernels.cpu.terms import NativeTerms
from farlight.kernels.sinks import with_sinks
from farlight.plan.content import ContentPlan, naming_bad_indices
from farlight.plan.tables import Plan
from farlight.score.lowered import ScoreTerms

__all__ = ["as_operand", "backward", "forward", "strided_address"]

_CPU = torch.device("cpu")
_TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}  # enum Type in csrc/views.h


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    terms: ScoreTerms | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the planned pairs: `(B, H, n_q, D_v)` in q's dtype, contiguous, and `(B, H, n_q)` in float32.

    q: `(B, H, n_q, D)`; k: `(B, H_kv, n_k, D)`; v: `(B, H_kv, n_k, D_v)`; float32, bfloat16 or float16, any strides.
    scale multiplies q kᵀ.
    lse: natural logarithm of the sum of exp(score); -inf for a row without keys, whose out is zero.
    Raises ArgumentError for tensors the kernels do not take or that do not fit the plan.
    """
    dtype = q.dtype
    shape = check_tensors(q, k, v, "the native kernels take", _CPU)
    check_plan(q, k, plan)
    q, k, v = as_operand(q, "q"), as_operand(k, "k"), as_operand(v, "v")
    native = native_plan(plan)
    sinks = None if terms is None else terms.sinks
    # Where a row is written several times, or by no tile, its sink is added at the end, before the result is rounded.
    is_written_once = not native.overlapping and native.covers_all_rows
    out_dtype = q.dtype if sinks is None or is_written_once else torch.float32
    lowered = None if terms is None else NativeTerms(terms, shape[0], shape[1], with_sinks=is_written_once)
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=out_dtype, device=_CPU)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=_CPU)
    if out.numel():
        _run(
            module().forward,
            plan,
            native,
            _TYPE_CODES[q.dtype],
            _TYPE_CODES[out_dtype],
            shape,
            strided_address(q),
            strided_address(k),
            strided_address(v),
            out.data_ptr(),
            lse.data_ptr(),
            scale,
            *_dropout_arguments(dropout, seed),
            *(([], 0.0) if lowered is None else lowered.arguments()),
        )
    if sinks is not None and not is_written_once:
        out, lse = with_sinks(out, lse, sinks)
    return out.to(dtype), lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    *,
    scale: float,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    terms: NativeTerms | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the dtypes of q, k and v, contiguous. Accumulated in float32 in a fixed order: deterministic.

    dout, out: `(B, H, n_q, D_v)`; lse, and dlse, the gradient with respect to lse, or None: `(B, H, n_q)`.
    scale, dropout, seed: as in the forward call. `terms` receives the gradients of the terms. Raises ArgumentError as forward
    does.
    """
    dtype = q.dtype
    shape = check_tensors(q, k, v, "the native kernels take", _CPU)
    check_plan(q, k, plan)
    check_gradients(q, v, dout, out, lse, dlse)
    q, k, v = as_operand(q, "q"), as_operand(k, "k"), as_operand(v, "v")
    out, dout = as_operand(out.to(dtype), "out"), as_operand(dout.to(dtype), "dout")
    lse = addressable(lse.to(torch.float32).contiguous(), "lse")
    dlse = None if dlse is None else addressable(dlse.to(torch.float32).contiguous(), "dlse")
    native = native_plan(plan)
    dq_dtype = torch.float32 if native.overlapping else q.dtype
    dq = torch.empty(q.shape, dtype=dq_dtype, device=_CPU)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=_CPU) for x in (k, v))
    if q.numel() or k.numel():
        _run(
            module().backward,
            plan,
            native,
            _TYPE_CODES[q.dtype],
            _TYPE_CODES[dq_dtype],
            shape,
            strided_address(q),
            strided_address(k),
            strided_address(v),
            strided_address(out),
            strided_address(dout),
            lse.data_ptr(),
            0 if dlse is None else dlse.data_ptr(),
            dq.data_ptr(),
            dk.data_ptr(),
            dv.data_ptr(),
            scale,
            *_dropout_arguments(dropout, seed),
            *(([], 0.0) if terms is None else terms.arguments()),
        )
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _run(pass_: Callable[..., int], plan: Plan, *arguments: Any) -> None:
    """One native pass. What it keeps is charged to the plan: tables, or a schedule for this batch size and number of heads."""
    # The lists of a choice are read by the pass itself: an index out of range is named.
    naming = naming_bad_indices(plan.pattern, plan.sizes) if isinstance(plan, ContentPlan) else nullcontext()
    with naming:
        kept_bytes = pass_(*arguments, torch.get_num_threads())
    if kept_bytes:
        plan.derived.charge(kept_bytes)


def as_operand(x: Tensor, name: str) -> Tensor:
    """x itself where the kernels can read it: addressable, float32 or bfloat16, contiguous last dimension; else a copy."""
    x = addressable(x, name)
    if x.dtype == torch.float16:
        x = x.to(torch.float32)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strided_address(x: Tensor) -> tuple[int, int, int, int]:
    """(address, batch stride, head stride, row stride); strides in elements."""
    batch, head, row, _ = x.stride()
    return x.data_ptr(), batch, head, row


def _dropout_arguments(dropout: float, seed: int | Tensor) -> tuple[tuple[int, int, int], float]:
    """((hash threshold, low and high half of the seed), 1 / (1 - p)): a link with a hash below the threshold is dropped."""
    if not dropout:
        return (0, 0, 0), 1.0
    seed = int(seed)
    threshold, keep_scale = dropped(dropout)
    return (threshold, seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF), keep_scale
