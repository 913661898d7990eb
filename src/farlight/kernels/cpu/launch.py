"""One call of the native kernels: tensors in, tensors out, no copy where the last dimension is contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.kernels.checks import addressable, check_gradients, check_plan, check_tensors, dropped
from farlight.kernels.cpu.native import handle, module
from farlight.plan.tables import Plan

__all__ = ["backward", "forward"]

_CPU = torch.device("cpu")
_CODES = {torch.float32: 0, torch.bfloat16: 1}


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, dropout: float = 0.0, seed: int | Tensor = 0
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the planned pairs: `(B, H, n_q, D)` in q's dtype, contiguous, and `(B, H, n_q)` in float32.

    q: `(B, H, n_q, D)`; k, v: `(B, H_kv, n_k, D)`; float32, bfloat16 or float16, any strides.
    """
    given = q.dtype
    shape = check_tensors(q, k, v, "the native kernels take", _CPU)
    check_plan(q, k, plan)
    q, k, v = _usable(q, "q"), _usable(k, "k"), _usable(v, "v")
    native = handle(plan)
    joined = native.overlapping and q.dtype != torch.float32
    out_type = torch.float32 if joined else q.dtype
    out, lse = torch.empty(q.shape, dtype=out_type, device=_CPU), torch.empty(q.shape[:3], dtype=torch.float32, device=_CPU)
    if out.numel():
        grown = module().forward(
            native,
            _CODES[q.dtype],
            _CODES[out_type],
            shape,
            _address(q),
            _address(k),
            _address(v),
            out.data_ptr(),
            lse.data_ptr(),
            scale,
            *_links(dropout, seed),
            torch.get_num_threads(),
        )
        if grown:  # a schedule was made for this batch and these heads
            plan.derived.charge(grown)
    return out.to(given), lse


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the dtypes of q, k and v, contiguous; summed in float32, always in the same order.

    dout, out: as forward's out; dlse: the gradient that arrives at the lse, or None.
    """
    given = q.dtype
    shape = check_tensors(q, k, v, "the native kernels take", _CPU)
    check_plan(q, k, plan)
    check_gradients(q, dout, out, lse, dlse)
    q, k, v = _usable(q, "q"), _usable(k, "k"), _usable(v, "v")
    out, dout = _usable(out.to(given), "out"), _usable(dout.to(given), "dout")
    lse = addressable(lse.to(torch.float32).contiguous(), "lse")
    dlse = None if dlse is None else addressable(dlse.to(torch.float32).contiguous(), "dlse")
    native = handle(plan)
    dq_type = torch.float32 if native.overlapping else q.dtype
    dq = torch.empty(q.shape, dtype=dq_type, device=_CPU)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=_CPU) for x in (k, v))
    if q.numel() or k.numel():
        grown = module().backward(
            native,
            _CODES[q.dtype],
            _CODES[dq_type],
            shape,
            _address(q),
            _address(k),
            _address(v),
            _address(out),
            _address(dout),
            lse.data_ptr(),
            0 if dlse is None else dlse.data_ptr(),
            dq.data_ptr(),
            dk.data_ptr(),
            dv.data_ptr(),
            scale,
            *_links(dropout, seed),
            torch.get_num_threads(),
        )
        if grown:  # a schedule was made for this batch and these heads
            plan.derived.charge(grown)
    return dq.to(given), dk.to(given), dv.to(given)


def _usable(x: Tensor, name: str) -> Tensor:
    """Values in memory, of a dtype that the kernels know, with a contiguous last dimension."""
    x = addressable(x, name)
    if x.dtype == torch.float16:
        x = x.to(torch.float32)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _address(x: Tensor) -> tuple[int, int, int, int]:
    batch, head, row, _ = x.stride()
    return x.data_ptr(), batch, head, row


def _links(dropout: float, seed: int | Tensor) -> tuple[tuple[int, int, int], float]:
    """Which links fall, and by how much the others grow."""
    if not dropout:
        return (0, 0, 0), 1.0
    seed = int(seed)
    threshold, grown = dropped(dropout)
    return (threshold, seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF), grown
