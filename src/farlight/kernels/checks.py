"""What kernels that are given addresses ask of their arguments first: a wrong shape would have them read elsewhere."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from farlight.errors import ArgumentError, PlanError
from farlight.kernels.backend import Request
from farlight.patterns.expression import Sizes
from farlight.patterns.hashing import dropout_threshold
from farlight.plan.content import ContentPlan
from farlight.plan.tables import Plan, PlanLike

__all__ = [
    "KERNEL_DTYPES",
    "MOST_DIMS",
    "addressable",
    "any_host_plan",
    "check_gradients",
    "check_plan",
    "check_tensors",
    "dropped",
    "host_plan",
    "refused",
]

MOST_DIMS = 256
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refused(request: Request) -> list[str]:
    """Why a request is not for such kernels, whatever the device."""
    found = []
    if request.dtype not in KERNEL_DTYPES:
        found.append(f"{str(request.dtype).removeprefix('torch.')} is not one of float32, bfloat16, float16")
    for dim in dict.fromkeys((request.head_dim, request.value_dim)):
        if not 1 <= dim <= MOST_DIMS:
            found.append(f"head_dim {dim} is outside 1 … {MOST_DIMS}")
    return found


def addressable(x: Tensor, name: str) -> Tensor:
    """x where its memory holds its values, else a copy for which that is true: the one door to `data_ptr`.

    A tensor with the negative bit is stored with the other sign; a zero tensor of forward-mode derivatives has no storage.
    Raises ArgumentError where there are no values: a storage that was freed, a wrapper whose values are elsewhere.
    """
    if x.is_neg():
        x = x.resolve_neg()
    try:
        if x.data_ptr() or not x.numel():
            return x
    except RuntimeError as error:  # torch's own words for a tensor that has no address at all
        raise ArgumentError(_no_values(x, name)) from error
    if x._is_zerotensor():
        return x.clone()
    raise ArgumentError(_no_values(x, name))


def _no_values(x: Tensor, name: str) -> str:
    return (
        f"{name} {tuple(x.shape)} has no values in memory: its storage was freed, or it is a wrapper that outlived the "
        "transform it belongs to; pass a tensor with data."
    )


def host_plan(plan: PlanLike) -> Plan:
    """The plan, where its tables are tensors on the host. Raises PlanError for one of another backend's own."""
    if isinstance(plan, ContentPlan):
        raise PlanError(
            "this plan has native tables of the cpu backend, which no other backend reads; make one with fl.plan(…, backend=…)."
        )
    return any_host_plan(plan)


def any_host_plan(plan: PlanLike) -> Plan:
    """The plan, where its tables are on the host, native ones included. Raises PlanError for a plan built on a device."""
    if not isinstance(plan, Plan):
        raise PlanError(f"this backend executes plans of the host, not {type(plan).__name__}; make one with fl.plan.")
    return plan


class _Planned(Protocol):
    @property
    def sizes(self) -> Sizes: ...


def check_tensors(
    q: Tensor, k: Tensor, v: Tensor, who: str, device: torch.device, *, one_width: bool = False
) -> tuple[int, int, int, int, int]:
    """(batch, heads, kv heads, head_dim, head_dim of v) of tensors that `who` can take on `device`; `one_width`: only with
    equal head_dims. Raises ArgumentError.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.device != device or x.dtype not in KERNEL_DTYPES or x.dtype != q.dtype:
            raise ArgumentError(
                f"{name} is {x.dtype} of shape {tuple(x.shape)} on {x.device}; {who} (B, H, N, D) tensors of one dtype, "
                f"float32, bfloat16 or float16, on {device}."
            )
    batch, heads, _, dim = q.shape
    kv_heads, n_k = k.shape[1], k.shape[2]
    if k.shape != (batch, kv_heads, n_k, dim) or v.shape[:3] != k.shape[:3] or not kv_heads or heads % kv_heads:
        raise ArgumentError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; they must be (B, H, n_q, D), "
            "(B, H_kv, n_k, D) and (B, H_kv, n_k, D_v), with H a multiple of H_kv."
        )
    if not 1 <= min(dim, v.shape[3]) <= max(dim, v.shape[3]) <= MOST_DIMS:
        of_v = "" if v.shape[3] == dim else f" of q and k or {v.shape[3]} of v"
        raise ArgumentError(f"head_dim {dim}{of_v} is outside 1 … {MOST_DIMS}.")
    if one_width and v.shape[3] != dim:
        raise ArgumentError(f"q and k have head_dim {dim}, v has {v.shape[3]}; {who} equal ones: pad with zeros.")
    return batch, heads, kv_heads, dim, v.shape[3]


def check_plan(q: Tensor, k: Tensor, plan: _Planned) -> None:
    """Raise ArgumentError where the plan is for other numbers of tokens."""
    n_q, n_k = q.shape[2], k.shape[2]
    if (n_q, n_k) != (plan.sizes.n_q, plan.sizes.n_k):
        raise ArgumentError(
            f"the plan is for {plan.sizes.n_q} queries and {plan.sizes.n_k} keys, the tensors have {n_q} and {n_k}."
        )


def check_gradients(q: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> None:
    """Raise ArgumentError where something has not the shape that q and v give it."""
    of_out = (*q.shape[:3], v.shape[3])
    for name, x, size in (
        ("dout", dout, of_out),
        ("out", out, of_out),
        ("lse", lse, q.shape[:3]),
        ("dlse", dlse, q.shape[:3]),
    ):
        if x is not None and x.shape != size:
            raise ArgumentError(f"{name} has shape {tuple(x.shape)}, but q and v need {tuple(size)}.")


def dropped(dropout: float) -> tuple[int, float]:
    """The hash from which on a link is kept, and the factor by which those kept grow."""
    if not dropout:
        return 0, 1.0
    return dropout_threshold(dropout), 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0  # of 1: nothing is left to grow
