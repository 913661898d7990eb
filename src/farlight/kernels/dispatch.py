"""Which backend runs: one list of reasons serves the automatic choice, the error of a named backend, `explain` and doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from farlight.caching import SizedCache
from farlight.errors import ArgumentError, UnsupportedError, show
from farlight.kernels import cpu, dense, reference, triton
from farlight.kernels import torch_tiled as blocked
from farlight.kernels.calibrate import calibrated
from farlight.kernels.cost import Estimate, estimate
from farlight.kernels.request import Request
from farlight.plan import Plan, plan_for

__all__ = ["BACKENDS", "PLANNED", "Choice", "choose", "plan_of", "planned_backend", "reasons"]

BACKENDS = ("cpu", "triton", "torch", "dense", "reference")
# Backends that execute a plan, best first.
PLANNED = ("cpu", "triton", "torch")
# Estimates nearer than this factor are made again with rates measured on this machine.
_CLOSE = 4.0
_MODULES: dict[str, Any] = {"cpu": cpu, "triton": triton, "torch": blocked, "dense": dense, "reference": reference}


def reasons(backend: str, request: Request) -> list[str]:
    """Why this backend cannot serve the request; empty when it can."""
    found: list[str] = _MODULES[backend].reasons(request)
    return found


def check_name(backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ArgumentError(f"backend = {show(backend)} is unknown; use 'auto' or one of {', '.join(map(repr, BACKENDS))}.")


def planned_backend(request: Request) -> str:
    """The best backend that executes a plan. On a CPU without native kernels the first call says so."""
    if request.device.type == "cpu":
        cpu.warn_if_missing()
    for name in PLANNED:
        # On the CPU Triton is interpreted, which is for tests: only who names it gets it.
        if (name != "triton" or request.device.type != "cpu") and not reasons(name, request):
            return name
    raise UnsupportedError(refusal(request))


def plan_of(backend: str, request: Request) -> Plan | triton.RoutedPlan:
    """The plan that a backend executes: made on the device where the pattern was made there, and can be; else on the host."""
    found = triton.routed_plan(request) if backend == "triton" else None
    return plan_for(request.pattern, request.sizes, _MODULES[backend].SHAPE) if found is None else found


def refusal(request: Request) -> str:
    lines = [f"no backend can run this attention ({request.describe()}):"]
    lines += [f"  {name}: {'; '.join(reasons(name, request))}" for name in BACKENDS]
    return "\n".join(lines)


@dataclass(frozen=True)
class Choice:
    """The backend chosen, with what it and full attention are expected to cost."""

    backend: str
    sparse: Estimate
    dense: Estimate


def choose(request: Request) -> Choice:
    """The backend that "auto" takes: full attention where that is allowed and expected to be faster, else the best planned."""
    planned = planned_backend(request)
    plan = plan_of(planned, request)
    sparse, full = estimate(planned, request, plan.visited), estimate("dense", request, None)
    if 1 / _CLOSE < full.seconds / sparse.seconds < _CLOSE and request.device.type == "cpu":
        rates = calibrated()
        sparse, full = estimate(planned, request, plan.visited, rates), estimate("dense", request, None, rates)
    if not reasons("dense", request) and full.seconds < sparse.seconds:
        return Choice("dense", sparse, full)
    return Choice(planned, sparse, full)


_masks: SizedCache[dense.Mask] = SizedCache(64 * 2**20)


def dense_mask(request: Request) -> dense.Mask | None:
    """The mask for full attention, kept while it is small; None when every pair is allowed."""
    pattern, sizes, device = request.pattern, request.sizes, request.device

    def make() -> dense.Mask:
        with torch.inference_mode(False), torch.no_grad():
            mask = pattern.dense(
                sizes.n_q, sizes.n_k, batch=sizes.batch, heads=sizes.heads, q_offset=sizes.q_offset, device=device
            )
            # One entry says "everything" as well as n_q · n_k of them.
            if bool(mask.all()):
                return dense.Mask(torch.ones(1, dtype=torch.bool, device=device), None)
            return dense.Mask.of(mask).settled()

    mask = _masks.get((pattern.key, sizes, device), make)
    return mask if mask.pairs.dim() == 4 else None


def require(backend: str, request: Request) -> None:
    """Raise when a backend that was named cannot serve."""
    found = reasons(backend, request)
    if found:
        raise UnsupportedError(
            f"backend {backend!r} cannot run this attention ({request.describe()}): {'; '.join(found)}. "
            "A backend that is named never falls back; use backend='auto' or another one."
        )
