"""Backend "cpu": native C++ kernels, fused forward and backward, for float32, bfloat16 and float16 on any CPU.

A plan's tables are validated and copied into a native object once (`native.native_plan`); a call then passes addresses and
strides (`launch`). The kernels themselves are in csrc/ and described in docs/cpu_kernels.md.
"""

from __future__ import annotations

from torch import Tensor

from farlight.kernels.backend import Call, Grads, Request, Saved, ScoreGrads
from farlight.kernels.checks import any_host_plan, refused
from farlight.kernels.cpu.choose import TYPE_CODES
from farlight.kernels.cpu.content import content_plan
from farlight.kernels.cpu.launch import backward, forward
from farlight.kernels.cpu.native import available, fma_gflops, isa, unavailable, use, warn_if_missing
from farlight.kernels.cpu.terms import NativeTerms
from farlight.plan.tables import Plan, TileShape
from farlight.score.lowered import ALL_TERMS

__all__ = [
    "BACKEND",
    "SHAPE",
    "TYPE_CODES",
    "available",
    "backward",
    "fma_gflops",
    "forward",
    "isa",
    "unavailable",
    "use",
    "warn_if_missing",
]

SHAPE = TileShape(tile=32, gather=8, longest=16_384)


class CpuBackend:
    """The native kernels as a plan backend."""

    name = "cpu"
    tile_shape = SHAPE
    score_terms = ALL_TERMS

    def reasons(self, request: Request) -> list[str]:
        """Why the native kernels cannot serve the request; empty when they can."""
        missing = unavailable()
        refusals = [] if missing is None else [missing]
        if request.device.type != "cpu":
            refusals.append(f"the tensors are on {request.device.type}, these kernels run on the CPU")
        return refusals + refused(request)

    def device_plan(self, request: Request) -> Plan | None:
        """The plan of a router's pattern, built natively; None for a pattern that `farlight.plan` builds."""
        return content_plan(request.pattern, request.sizes, SHAPE) if request.pattern._tables else None

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """(out, lse) of the planned pairs."""
        plan = any_host_plan(call.plan)
        return forward(call.q, call.k, call.v, plan, scale=call.scale, dropout=call.dropout, seed=call.seed, terms=call.terms)

    def backward(self, call: Call, saved: Saved, dout: Tensor, dlse: Tensor) -> Grads:
        """(dq, dk, dv) from the gradients of out and lse."""
        plan, (q, k, v, *_) = any_host_plan(call.plan), call
        return backward(dout, dlse, q, k, v, *saved, plan, scale=call.scale, dropout=call.dropout, seed=call.seed)

    def score_backward(self, call: Call, saved: Saved, dout: Tensor, dlse: Tensor) -> tuple[Grads, ScoreGrads]:
        """The same, and the gradients of the tables of the terms."""
        assert call.terms is not None
        plan, (q, k, v, *_) = any_host_plan(call.plan), call
        terms = NativeTerms(call.terms, plan.sizes.batch, plan.sizes.heads)
        terms.want_gradients(call.wanted, dlse)
        grads = backward(dout, dlse, q, k, v, *saved, plan, scale=call.scale, dropout=call.dropout, seed=call.seed, terms=terms)
        return grads, terms.gradients(saved.lse)


BACKEND = CpuBackend()
