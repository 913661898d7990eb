"""One call of the Triton kernels: look up what the plan was lowered to, allocate results, launch."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from farlight.errors import ArgumentError
from farlight.kernels.checks import addressable, check_gradients, check_plan, check_tensors, dropped
from farlight.kernels.triton.autotune import config_for
from farlight.kernels.triton.configs import Config, padded
from farlight.kernels.triton.device_caps import interpreted
from farlight.kernels.triton.lower_kv import KeyWork
from farlight.kernels.triton.lower_q import QueryWork
from farlight.kernels.triton.lowering_cache import key_work, query_work
from farlight.kernels.triton.routed import RoutedPlan
from farlight.plan.tables import Plan

__all__ = ["backward", "forward", "on_device", "precision"]

_LOG2_E = 1.4426950408889634
AnyPlan = Plan | RoutedPlan


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: AnyPlan, *, scale: float, dropout: float = 0.0, seed: int | Tensor = 0
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the planned pairs: `(B, H, n_q, D)` in q's dtype, contiguous, and `(B, H, n_q)` in float32.

    q: `(B, H, n_q, D)`; k, v: `(B, H_kv, n_k, D)`; float32, bfloat16 or float16, any strides.
    """
    _check(q, k, v, plan)
    q, k, v = (addressable(x.detach(), name) for x, name in ((q, "q"), (k, "k"), (v, "v")))

    def run(config: Config) -> tuple[Tensor, Tensor]:
        return _forward(q, k, v, plan, config, scale, dropout, seed)

    return run(config_for("forward", q, plan, run))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, plan: AnyPlan, config: Config, scale: float, dropout: float, seed: int | Tensor
) -> tuple[Tensor, Tensor]:
    from farlight.kernels.triton.jit.fwd import forward_kernel, merge_kernel

    every = _query_work(plan, config, q.device, q.shape[1] // k.shape[1])
    wide = plan.overlapping and q.dtype != torch.float32
    kind = torch.float32 if wide else q.dtype
    if every.covers and q.numel():
        out = torch.empty(q.shape, dtype=kind, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    else:
        out = torch.zeros(q.shape, dtype=kind, device=q.device)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
    sizes = _sizes(q, k, plan, v)
    links, draws = _links(dropout, seed, q.device)
    with on_device(q.device):
        for work, launch in every.steps():
            part_out = torch.empty((launch.slots * launch.height, q.shape[3]), dtype=torch.float32, device=q.device)
            part_lse = torch.empty(launch.slots * launch.height, dtype=torch.float32, device=q.device)
            forward_kernel[(launch.work.shape[0],)](
                q, k, v, out, lse, part_out, part_lse, draws,
                launch.work, work.rows, work.keys, work.whole, work.masked, work.point_key, work.point_row, work.data,
                *strides(q, k, v),
                *sizes, abs(scale) * _LOG2_E, *links,
                BLOCK_M=launch.height, BLOCK_N=config.keys, **_common(q, k, v), ORDERED=launch.ordered, KEYED=launch.keyed,
                BITS=launch.bits, POINTS=launch.points, DROPOUT=bool(dropout), NEGATE=scale < 0, ADD=launch.add,
                SPLIT=launch.slots > 0, num_warps=_warps(config, launch.height), num_stages=config.stages,
            )  # fmt: skip
            if launch.slots:
                merge_kernel[(launch.merges.shape[0],)](
                    out, lse, part_out, part_lse, launch.merges, work.rows, q.shape[1], q.shape[2], q.shape[3],
                    BLOCK_M=launch.height, BLOCK_D=padded(q.shape[3]), ORDERED=launch.ordered, ADD=launch.add,
                )  # fmt: skip
    return out.to(q.dtype), lse


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
    """(dq, dk, dv) in the dtypes of q, k and v, contiguous; summed in float32, always in the same order.

    dout, out: as forward's out; dlse: the gradient that arrives at the lse, or None.
    """
    from farlight.kernels.triton.jit.bwd_dq import delta_kernel

    _check(q, k, v, plan)
    check_gradients(q, dout, out, lse, dlse)
    q, k, v = (addressable(x.detach(), name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    dout, out = addressable(dout.detach().to(q.dtype), "dout"), addressable(out.detach().contiguous(), "out")
    lse = addressable(lse.detach().contiguous(), "lse")
    dlse = None if dlse is None else addressable(dlse.detach().to(torch.float32).contiguous(), "dlse")
    batch, heads, n_q, head_dim = q.shape
    delta = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if delta.numel():
        with on_device(q.device):
            delta_kernel[(-(-n_q // 64), batch * heads)](
                dout, out, delta if dlse is None else dlse, delta, *strides(dout), heads, n_q, head_dim,
                BLOCK_M=64, BLOCK_D=padded(head_dim), WHOLE_D=head_dim == padded(head_dim), DLSE=dlse is not None,
                WIDE=_is_wide(dout), UNIT=_unit(dout),
            )  # fmt: skip

    def queries(config: Config) -> Tensor:
        return _dq(dout, q, k, v, lse, delta, plan, config, scale, dropout, seed)

    def keys(config: Config) -> tuple[Tensor, Tensor]:
        return _dk_dv(dout, q, k, v, lse, delta, plan, config, scale, dropout, seed)

    return queries(config_for("queries", q, plan, queries)), *keys(config_for("keys", q, plan, keys))


def _dq(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, plan: AnyPlan, config: Config, scale: float,
    dropout: float, seed: int | Tensor,
) -> Tensor:  # fmt: skip
    from farlight.kernels.triton.jit.bwd_dq import queries_kernel, sum_kernel

    every = _query_work(plan, config, q.device, q.shape[1] // k.shape[1])
    kind = torch.float32 if plan.overlapping else q.dtype
    make = torch.empty if every.covers and q.numel() else torch.zeros
    dq = make(q.shape, dtype=kind, device=q.device)
    links, draws = _links(dropout, seed, q.device)
    with on_device(q.device):
        for work, launch in every.steps():
            part = torch.empty((launch.slots * launch.height, q.shape[3]), dtype=torch.float32, device=q.device)
            queries_kernel[(launch.work.shape[0],)](
                q, k, v, dout, lse, delta, dq, part, draws,
                launch.work, work.rows, work.keys, work.whole, work.masked, work.point_key, work.point_row, work.data,
                *strides(q, k, v, dout),
                *_sizes(q, k, plan, v), scale, scale * _LOG2_E, *links,
                BLOCK_M=launch.height, BLOCK_N=config.keys, **_common(q, k, v, dout), ORDERED=launch.ordered,
                KEYED=launch.keyed, BITS=launch.bits, POINTS=launch.points, DROPOUT=bool(dropout), ADD=launch.add,
                SPLIT=launch.slots > 0, num_warps=_warps(config, launch.height), num_stages=config.stages,
            )  # fmt: skip
            if launch.slots:
                sum_kernel[(launch.merges.shape[0],)](
                    dq, part, launch.merges, work.rows, q.shape[1], q.shape[2], q.shape[3],
                    BLOCK_M=launch.height, BLOCK_D=padded(q.shape[3]), ORDERED=launch.ordered, ADD=launch.add,
                )  # fmt: skip
    return dq.to(q.dtype)


def _dk_dv(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, plan: AnyPlan, config: Config, scale: float,
    dropout: float, seed: int | Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from farlight.kernels.triton.jit.bwd_dkdv import keys_kernel
    from farlight.kernels.triton.jit.bwd_dq import sum_kernel

    kv_heads, n_k, head_dim = k.shape[1:]
    every = _key_work(plan, config, q.device, q.shape[1] // kv_heads)
    steps = list(every.steps())
    kind = torch.float32 if len(steps) > 1 else k.dtype
    make = torch.empty if every.covers else torch.zeros
    dk, dv = make(k.shape, dtype=kind, device=k.device), make(k.shape, dtype=kind, device=k.device)
    heads, group, n_q, _, q_offset = _sizes(q, k, plan, v)
    links, draws = _links(dropout, seed, q.device)
    with on_device(q.device):
        for work, launch in steps:
            shape = (launch.slots * config.keys, head_dim)
            part_dk, part_dv = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
            keys_kernel[(launch.work.shape[0],)](
                q, k, v, dout, lse, delta, dk, dv, part_dk, part_dv, draws,
                launch.work, launch.ranges, work.rows, work.keys, launch.whole, launch.masked, launch.point_row,
                launch.point_key, work.data,
                *strides(q, k, v, dout),
                heads, group, n_q, n_k, head_dim, q_offset, scale, scale * _LOG2_E, *links,
                BLOCK_M=config.rows, BLOCK_N=config.keys, **_common(q, k, v, dout), ORDERED=launch.ordered,
                KEYED=launch.keyed, BITS=launch.bits, POINTS=launch.points, DROPOUT=bool(dropout), ADD=launch.add,
                SPLIT=launch.slots > 0, num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
            if launch.slots:
                for into, part in ((dk, part_dk), (dv, part_dv)):
                    sum_kernel[(launch.merges.shape[0],)](
                        into, part, launch.merges, work.keys, kv_heads, n_k, head_dim,
                        BLOCK_M=config.keys, BLOCK_D=padded(head_dim), ORDERED=launch.keyed, ADD=launch.add,
                    )  # fmt: skip
    return dk.to(k.dtype), dv.to(v.dtype)


def _query_work(plan: AnyPlan, config: Config, device: torch.device, group: int) -> QueryWork:
    if isinstance(plan, RoutedPlan):
        return plan.queries(config, group)
    return query_work(plan, config.rows, config.keys, group, device)


def _key_work(plan: AnyPlan, config: Config, device: torch.device, group: int) -> KeyWork:
    if isinstance(plan, RoutedPlan):
        return plan.keys(config, group)
    return key_work(plan, config.rows, config.keys, group, device)


def _check(q: Tensor, k: Tensor, v: Tensor, plan: AnyPlan) -> None:
    batch, heads, _, _ = check_tensors(q, k, v, "the Triton kernels take", q.device)
    check_plan(q, k, plan)
    # The lists name each batch item and head.
    if (batch, heads) != (plan.sizes.batch, plan.sizes.heads):
        raise ArgumentError(
            f"the plan is for {plan.sizes.batch} batch items and {plan.sizes.heads} heads, q has {batch} and {heads}."
        )


# ---- arguments that the kernels share --------------------------------------------------------------------------------
def _sizes(q: Tensor, k: Tensor, plan: AnyPlan, v: Tensor) -> tuple[int, int, int, int, int]:
    """heads, query heads for each key head, queries, head_dim, position of the first query (modulo 2^32, for hashing)."""
    offset = (plan.sizes.q_offset + 2**31) % 2**32 - 2**31
    return q.shape[1], q.shape[1] // k.shape[1], q.shape[2], q.shape[3], offset


def _links(dropout: float, seed: int | Tensor, device: torch.device) -> tuple[tuple[int, float], Tensor]:
    """(the largest hash of a dropped link as a signed number, the factor of the others), and the seed on the device."""
    threshold, grown = dropped(dropout)
    below = threshold - 1 if threshold else 0
    if not dropout:
        return (0, 1.0), torch.empty(1, dtype=torch.int64, device=device)
    if isinstance(seed, Tensor) and seed.device.type == device.type:
        draws = addressable(seed.reshape(1), "seed")
    else:
        # Filled by a kernel: no copy from the host that a captured graph could not hold.
        draws = torch.full((1,), int(seed), dtype=torch.int64, device=device)
    return (below - 2**32 if below >= 2**31 else below, grown), draws


def _common(q: Tensor, *others: Tensor) -> dict[str, Any]:
    wide = padded(q.shape[3])
    return {
        "BLOCK_D": wide,
        "WHOLE_D": wide == q.shape[3],
        "WIDE": any(_is_wide(x) for x in (q, *others)),
        "UNIT": _unit(q, *others),
        "PRECISION": precision(q),
    }


def _unit(*tensors: Tensor) -> int:
    """16 when all strides between heads and rows are divisible by it, which lets rows be read in wide loads; else 1."""
    return 16 if all(stride % 16 == 0 for x in tensors for stride in x.stride()[:3]) else 1


def strides(*tensors: Tensor) -> list[int]:
    """The strides as the kernels take them: between batch items, heads and rows in units, inside a row as they are."""
    unit = _unit(*tensors)
    return [one for x in tensors for one in (*(stride // unit for stride in x.stride()[:3]), x.stride(3))]


def _is_wide(x: Tensor) -> bool:
    """Whether offsets inside one head need 64 bits."""
    return (x.shape[2] - 1) * x.stride(2) + (x.shape[3] - 1) * x.stride(3) >= 2**31


def precision(q: Tensor) -> str:
    """How products are formed: float32 in full, unless the user allows torch's own to be rounded to tf32."""
    if q.dtype == torch.bfloat16 and interpreted():
        return "widened"
    may_round = q.dtype == torch.float32 and q.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if may_round else "ieee"


def _warps(config: Config, height: int) -> int:
    """Fewer warps where there are fewer rows."""
    return config.warps if height >= config.rows else max(2, min(config.warps, 4))


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be that of the tensors."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return contextlib.nullcontext()
