"""Launching the forward and backward kernels on a plan: work tables, allocation, kernel arguments.

A call fetches the plan's work tables (lowered and uploaded at the first call, `lowering_cache` and `routed`), allocates outputs
and split-K workspaces, and launches one kernel for each entry of the tables' `launches`, with a merge kernel after those that
have split items. Nothing is read from the device, so that a call with a known plan can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farlight.errors import ArgumentError
from farlight.kernels.checks import addressable, check_gradients, check_plan, check_tensors, dropped
from farlight.kernels.triton.autotune import config_for
from farlight.kernels.triton.configs import Config, padded
from farlight.kernels.triton.device_caps import interpreted
from farlight.kernels.triton.launches import KeyWork, QueryLaunch, QueryWork
from farlight.kernels.triton.lowering_cache import key_work, query_work
from farlight.kernels.triton.routed import RoutedPlan
from farlight.plan.tables import Plan

__all__ = ["backward", "forward", "is_wide", "on_device", "precision"]

_LOG2_E = 1.4426950408889634
# Rows of a program of the delta kernel.
_DELTA_ROWS = 64
AnyPlan = Plan | RoutedPlan


@dataclass(frozen=True)
class _Call:
    """Arguments that the passes of one call share."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: AnyPlan
    scale: float
    dropout: float
    seed: int | Tensor

    @property
    def heads_per_kv(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def q_offset(self) -> int:
        """Position of the first query modulo 2^32, as a signed number: dropout hashes it."""
        return (self.plan.sizes.q_offset + 2**31) % 2**32 - 2**31

    def query_work(self, config: Config) -> QueryWork:
        if isinstance(self.plan, RoutedPlan):
            return self.plan.queries(config, self.heads_per_kv)
        return query_work(self.plan, config.rows, config.keys, self.heads_per_kv, self.q.device)

    def key_work(self, config: Config) -> KeyWork:
        if isinstance(self.plan, RoutedPlan):
            return self.plan.keys(config, self.heads_per_kv)
        return key_work(self.plan, config.rows, config.keys, self.heads_per_kv, self.q.device)


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: AnyPlan, *, scale: float, dropout: float = 0.0, seed: int | Tensor = 0
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the planned pairs: `(B, H, n_q, D)` in q's dtype, contiguous, and `(B, H, n_q)` in float32.

    q: `(B, H, n_q, D)`; k, v: `(B, H_kv, n_k, D)`; float32, bfloat16 or float16, any strides.
    Raises ArgumentError where shapes, dtypes or devices fit neither each other nor the plan.
    """
    _check(q, k, v, plan)
    q, k, v = (addressable(x.detach(), name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    call = _Call(q, k, v, plan, scale, dropout, seed)

    def run(config: Config) -> tuple[Tensor, Tensor]:
        return _forward(call, config)

    return run(config_for("fwd", q, plan, run))


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: AnyPlan,
    *,
    scale: float,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the dtypes of q, k and v, contiguous; accumulated in float32, always in the same order.

    dout, out: as forward's out; lse: as forward's; dlse: the gradient with respect to the lse, or None.
    Raises ArgumentError as `forward` does.

    Weights are recomputed as exp(score - lse). An lse in float32 has 24 bits, so that their relative error is about
    2^-24 · |lse|: gradients in float32 lose digits from |lse| = 10³ on, those in bfloat16 from 10⁵ on.
    """
    _check(q, k, v, plan)
    check_gradients(q, v, dout, out, lse, dlse)
    q, k, v = (addressable(x.detach(), name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    dout, out = addressable(dout.detach().to(q.dtype), "dout"), addressable(out.detach().contiguous(), "out")
    lse = addressable(lse.detach().contiguous(), "lse")
    dlse = None if dlse is None else addressable(dlse.detach().to(torch.float32).contiguous(), "dlse")
    call = _Call(q, k, v, plan, scale, dropout, seed)
    delta = _delta(dout, out, dlse)

    def dq_pass(config: Config) -> Tensor:
        return _dq(call, config, dout, lse, delta)

    def dkdv_pass(config: Config) -> tuple[Tensor, Tensor]:
        return _dk_dv(call, config, dout, lse, delta)

    return dq_pass(config_for("dq", q, plan, dq_pass)), *dkdv_pass(config_for("dkdv", q, plan, dkdv_pass))


def _check(q: Tensor, k: Tensor, v: Tensor, plan: AnyPlan) -> None:
    batch, heads, _, _, _ = check_tensors(q, k, v, "the Triton kernels take", q.device, one_width=True)
    check_plan(q, k, plan)
    # Work items name their batch item and head.
    if (batch, heads) != (plan.sizes.batch, plan.sizes.heads):
        raise ArgumentError(
            f"the plan is for {plan.sizes.batch} batch items and {plan.sizes.heads} heads, q has {batch} and {heads}."
        )


# ---- the passes --------------------------------------------------------------------------------------------------------
def _forward(call: _Call, config: Config) -> tuple[Tensor, Tensor]:
    from farlight.kernels.triton.jit.fwd import fwd_kernel, merge_kernel

    q, k, v, plan, scale = call.q, call.k, call.v, call.plan, call.scale
    all_work = call.query_work(config)
    # A row that several launches serve is joined in float32, by its max and sum.
    join = plan.overlapping
    out_dtype = torch.float32 if join else q.dtype
    is_written = all_work.covers and bool(q.numel())
    out = (torch.empty if is_written else torch.zeros)(q.shape, dtype=out_dtype, device=q.device)
    lse = _row_values(q, None if is_written else float("-inf"))
    row_max = _row_values(q, None if is_written else float("-inf")) if join else lse
    row_sum = _row_values(q, None if is_written else 0.0) if join else lse
    dropout_arguments, seed = _dropout_arguments(call)
    with on_device(q.device):
        for work, launch in all_work.steps():
            part_out = _workspace(launch.num_partials * launch.block_m, q.shape[3], q.device)
            part_max = _workspace(launch.num_partials * launch.block_m, 1, q.device)
            part_sum = torch.empty_like(part_max) if launch.num_partials else part_max
            fwd_kernel[(launch.work.shape[0],)](
                q, k, v, out, lse, row_max, row_sum, part_out, part_max, part_sum, seed,
                *_query_tables(work, launch), *_strides(q, k, v), *_sizes(call), abs(scale) * _LOG2_E, *dropout_arguments,
                BLOCK_M=launch.block_m, BLOCK_N=config.keys, **_head_dim_options(q, k, v), **_launch_options(call, launch),
                NEGATE=scale < 0, JOIN=join, num_warps=_num_warps(config, launch.block_m), num_stages=config.stages,
            )  # fmt: skip
            if launch.num_partials:
                merge_kernel[(launch.merges.shape[0],)](
                    out, lse, row_max, row_sum, part_out, part_max, part_sum, launch.merges, work.rows,
                    q.shape[1], q.shape[2], q.shape[3], BLOCK_M=launch.block_m, BLOCK_D=padded(q.shape[3]),
                    SORTED_ROWS=launch.sorted_rows, ADD=launch.add, JOIN=join,
                )  # fmt: skip
    return out.to(q.dtype), lse


def _delta(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """`(B, H, n_q)` float32: Σ dout ∘ out - dlse, what the softmax's derivative subtracts in each row."""
    from farlight.kernels.triton.jit.bwd_dq import delta_kernel

    batch, heads, n_q, head_dim = dout.shape
    delta = _row_values(dout, None)
    if delta.numel():
        with on_device(dout.device):
            delta_kernel[(-(-n_q // _DELTA_ROWS), batch * heads)](
                dout, out, delta if dlse is None else dlse, delta, *_strides(dout), heads, n_q, head_dim,
                BLOCK_M=_DELTA_ROWS, BLOCK_D=padded(head_dim), WHOLE_D=head_dim == padded(head_dim), DLSE=dlse is not None,
                WIDE=is_wide(dout), UNIT=_unit(dout),
            )  # fmt: skip
    return delta


def _dq(call: _Call, config: Config, dout: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    from farlight.kernels.triton.jit.bwd_dq import dq_kernel, sum_kernel

    q, k, v, plan, scale = call.q, call.k, call.v, call.plan, call.scale
    all_work = call.query_work(config)
    make = torch.empty if all_work.covers and q.numel() else torch.zeros
    dq = make(q.shape, dtype=torch.float32 if plan.overlapping else q.dtype, device=q.device)
    dropout_arguments, seed = _dropout_arguments(call)
    with on_device(q.device):
        for work, launch in all_work.steps():
            part = _workspace(launch.num_partials * launch.block_m, q.shape[3], q.device)
            dq_kernel[(launch.work.shape[0],)](
                q, k, v, dout, lse, delta, dq, part, seed,
                *_query_tables(work, launch), *_strides(q, k, v, dout), *_sizes(call), scale, scale * _LOG2_E,
                *dropout_arguments,
                BLOCK_M=launch.block_m, BLOCK_N=config.keys, **_head_dim_options(q, k, v, dout),
                **_launch_options(call, launch), num_warps=_num_warps(config, launch.block_m), num_stages=config.stages,
            )  # fmt: skip
            if launch.num_partials:
                sum_kernel[(launch.merges.shape[0],)](
                    dq, part, launch.merges, work.rows, q.shape[1], q.shape[2], q.shape[3],
                    BLOCK_M=launch.block_m, BLOCK_D=padded(q.shape[3]), SORTED=launch.sorted_rows, ADD=launch.add,
                )  # fmt: skip
    return dq.to(q.dtype)


def _dk_dv(call: _Call, config: Config, dout: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    from farlight.kernels.triton.jit.bwd_dkdv import dkdv_kernel
    from farlight.kernels.triton.jit.bwd_dq import sum_kernel

    q, k, v, scale = call.q, call.k, call.v, call.scale
    kv_heads, n_k, head_dim = k.shape[1:]
    all_work = call.key_work(config)
    steps = list(all_work.steps())
    dtype = torch.float32 if len(steps) > 1 else k.dtype
    make = torch.empty if all_work.covers else torch.zeros
    dk, dv = make(k.shape, dtype=dtype, device=k.device), make(k.shape, dtype=dtype, device=k.device)
    heads, heads_per_kv, n_q, _, q_offset = _sizes(call)
    dropout_arguments, seed = _dropout_arguments(call)
    with on_device(q.device):
        for work, launch in steps:
            part_dk, part_dv = (_workspace(launch.num_partials * config.keys, head_dim, q.device) for _ in range(2))
            dkdv_kernel[(launch.work.shape[0],)](
                q, k, v, dout, lse, delta, dk, dv, part_dk, part_dv, seed,
                launch.work, launch.ranges, work.rows, work.keys, launch.whole, launch.masked, launch.point_row,
                launch.point_key, work.data,
                *_strides(q, k, v, dout),
                heads, heads_per_kv, n_q, n_k, head_dim, q_offset, scale, scale * _LOG2_E, *dropout_arguments,
                BLOCK_M=config.rows, BLOCK_N=config.keys, **_head_dim_options(q, k, v, dout), **_launch_options(call, launch),
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
            if launch.num_partials:
                for grad, part in ((dk, part_dk), (dv, part_dv)):
                    sum_kernel[(launch.merges.shape[0],)](
                        grad, part, launch.merges, work.keys, kv_heads, n_k, head_dim,
                        BLOCK_M=config.keys, BLOCK_D=padded(head_dim), SORTED=launch.sorted_keys, ADD=launch.add,
                    )  # fmt: skip
    return dk.to(k.dtype), dv.to(v.dtype)


# ---- kernel arguments ---------------------------------------------------------------------------------------------------
def _row_values(q: Tensor, fill: float | None) -> Tensor:
    """One float32 for each row, `(B, H, n_q)`; uninitialised where `fill` is None."""
    if fill is None:
        return torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return torch.full(q.shape[:3], fill, dtype=torch.float32, device=q.device)


def _workspace(rows: int, width: int, device: torch.device) -> Tensor:
    """Partial results of split items."""
    return torch.empty((rows, width), dtype=torch.float32, device=device)


def _query_tables(work: QueryWork, launch: QueryLaunch) -> tuple[Tensor, ...]:
    """The work tables of the forward and the dq pass, in the order of the kernels' parameters."""
    return (
        launch.work, work.rows, work.keys, work.whole, work.masked, work.point_key, work.point_row, work.data,
    )  # fmt: skip


def _launch_options(call: _Call, launch: Any) -> dict[str, bool]:
    """Compile-time options that follow from what a launch holds."""
    return {
        "SORTED_ROWS": launch.sorted_rows,
        "SORTED_KEYS": launch.sorted_keys,
        "BITS": launch.bits,
        "POINTS": launch.points,
        "DROPOUT": bool(call.dropout),
        "ADD": launch.add,
        "SPLIT": launch.num_partials > 0,
    }


def _head_dim_options(q: Tensor, *others: Tensor) -> dict[str, Any]:
    """Compile-time options that follow from the tensors' sizes, strides and dtype."""
    return {
        "BLOCK_D": padded(q.shape[3]),
        "WHOLE_D": padded(q.shape[3]) == q.shape[3],
        "WIDE": any(is_wide(x) for x in (q, *others)),
        "UNIT": _unit(q, *others),
        "PRECISION": precision(q),
    }


def _sizes(call: _Call) -> tuple[int, int, int, int, int]:
    """heads, query heads for each key head, queries, head_dim, position of the first query."""
    return call.q.shape[1], call.heads_per_kv, call.q.shape[2], call.q.shape[3], call.q_offset


def _dropout_arguments(call: _Call) -> tuple[tuple[int, float], Tensor]:
    """((the largest dropped hash as a signed 32-bit number, 1 / (1 - dropout)), the seed on the device)."""
    device, seed = call.q.device, call.seed
    if not call.dropout:
        return (0, 1.0), torch.empty(1, dtype=torch.int64, device=device)
    threshold, keep_scale = dropped(call.dropout)
    max_dropped = threshold - 1 if threshold else 0
    if isinstance(seed, Tensor) and seed.device.type == device.type:
        device_seed = addressable(seed.reshape(1), "seed")
    else:
        # Filled by a kernel: a captured graph cannot hold a copy from the host.
        device_seed = torch.full((1,), int(seed), dtype=torch.int64, device=device)
    return (max_dropped - 2**32 if max_dropped >= 2**31 else max_dropped, keep_scale), device_seed


def _unit(*tensors: Tensor) -> int:
    """16 when it divides all strides between heads and rows, which lets the compiler load rows as vectors; else 1."""
    return 16 if all(stride % 16 == 0 for x in tensors for stride in x.stride()[:3]) else 1


def _strides(*tensors: Tensor) -> list[int]:
    """Strides as the kernels take them: of batch items, heads and rows divided by the unit, of dimensions as they are."""
    unit = _unit(*tensors)
    return [stride for x in tensors for stride in (*(stride // unit for stride in x.stride()[:3]), x.stride(3))]


def is_wide(x: Tensor) -> bool:
    """Whether offsets inside one head need 64 bits."""
    return (x.shape[2] - 1) * x.stride(2) + (x.shape[3] - 1) * x.stride(3) >= 2**31


def precision(q: Tensor) -> str:
    """How matrix products are computed: float32 in full, or in tf32 where torch's float32 matmul precision allows it."""
    if q.dtype == torch.bfloat16 and interpreted():
        return "widened"
    tf32 = q.dtype == torch.float32 and q.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


def _num_warps(config: Config, block_m: int) -> int:
    """Fewer warps where a launch has fewer rows than the configuration."""
    return config.warps if block_m >= config.rows else max(2, min(config.warps, 4))


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensors' device the current one, on which kernels are launched."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return contextlib.nullcontext()
