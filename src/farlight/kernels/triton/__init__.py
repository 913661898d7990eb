"""Backend "triton": fused forward and backward kernels for GPUs, written in Triton and compiled at first use.

The plan is lowered once to lists of blocks (`lower_q`, `lower_kv`), uploaded and kept with the plan; a call then passes
addresses and strides. `jit/` holds the kernels; nothing here imports triton before a kernel is about to run.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from farlight.kernels.backend import Call, Grads, Request, Saved, ScoreGrads
from farlight.kernels.checks import host_plan, refused
from farlight.kernels.sinks import sink_gradient, with_sinks
from farlight.kernels.triton.device_caps import interpreted, missing, not_installed, unfit
from farlight.kernels.triton.launch import backward, forward
from farlight.kernels.triton.lowering_cache import SHAPE
from farlight.kernels.triton.routed import RoutedPlan, routed_plan
from farlight.plan.tables import Plan, PlanLike

__all__ = ["BACKEND", "SHAPE", "RoutedPlan", "backward", "forward", "interpreted", "routed_plan"]


class TritonBackend:
    """The Triton kernels as a plan backend that also plans a router's choice on the device."""

    name = "triton"
    tile_shape = SHAPE
    score_terms = frozenset({"sinks"})

    def reasons(self, request: Request) -> list[str]:
        """Why these kernels cannot serve the request; empty when they can."""
        refusals = [why for why in (not_installed(), unfit(request.device)) if why is not None] + refused(request)
        # Importing Triton takes a second: only where it would be used.
        broken = None if refusals else missing()
        return refusals if broken is None else [broken]

    def device_plan(self, request: Request) -> PlanLike | None:
        """The plan of a pattern whose tables are on the request's device, built there; None where that is not done."""
        return routed_plan(request)

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """(out, lse) of the planned pairs."""
        plan, (q, k, v) = _executable(call.plan), _of_one_width(call.q, call.k, call.v)
        out, lse = forward(q, k, v, plan, scale=call.scale, dropout=call.dropout, seed=call.seed)
        out = out[..., : call.v.shape[3]].contiguous()
        sinks = None if call.terms is None else call.terms.sinks
        return (out, lse) if sinks is None else with_sinks(out, lse, sinks)

    def backward(self, call: Call, saved: Saved, dout: Tensor, dlse: Tensor) -> Grads:
        """(dq, dk, dv) from the gradients of out and lse."""
        plan, (q, k, v, dout, out) = _executable(call.plan), _of_one_width(call.q, call.k, call.v, dout, saved.out)
        operands = dout, dlse, q, k, v, out, saved.lse, plan
        dq, dk, dv = backward(*operands, scale=call.scale, dropout=call.dropout, seed=call.seed)
        dq, dk, dv = (x[..., : y.shape[3]].contiguous() for x, y in ((dq, call.q), (dk, call.k), (dv, call.v)))
        return dq, dk, dv

    def score_backward(self, call: Call, saved: Saved, dout: Tensor, dlse: Tensor) -> tuple[Grads, ScoreGrads]:
        """The same, and the gradients of the tables of the terms."""
        sinks = None if call.terms is None else call.terms.sinks
        of_sinks = None if sinks is None else sink_gradient(*saved, dout, dlse, sinks)
        return self.backward(call, saved, dout, dlse), (None, None, of_sinks)


def _of_one_width(*tensors: Tensor) -> list[Tensor]:
    """The tensors, those that are narrower than the widest padded with zeros: these kernels take one head_dim."""
    widest = max(x.shape[3] for x in tensors)
    return [x if x.shape[3] == widest else functional.pad(x, (0, widest - x.shape[3])) for x in tensors]


def _executable(plan: PlanLike) -> Plan | RoutedPlan:
    return plan if isinstance(plan, RoutedPlan) else host_plan(plan)


BACKEND = TritonBackend()
