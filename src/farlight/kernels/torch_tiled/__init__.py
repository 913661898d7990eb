"""Backend "torch": block-sparse attention over a plan in plain torch operations, on any device and dtype.

Tiles with equal row counts, run widths and masks are stacked and computed as one batched matrix product, as many as a fixed
score budget allows. K/V rows are taken by slices, or gathered where tokens are sorted. Scores live for one such batch of
tiles only; the backward pass recomputes them.
"""

from __future__ import annotations

from torch import Tensor

from farlight.kernels.backend import Call, Grads, Request, Saved, ScoreGrads
from farlight.kernels.checks import host_plan
from farlight.kernels.sinks import sink_gradient
from farlight.kernels.torch_tiled.backward import backward
from farlight.kernels.torch_tiled.forward import forward, tile_terms
from farlight.plan.tables import TileShape
from farlight.score.lowered import ALL_TERMS

__all__ = ["BACKEND", "SHAPE", "backward", "forward"]

SHAPE = TileShape(tile=128, gather=8, longest=4096)


class TorchBackend:
    """The tiled torch operations as a plan backend."""

    name = "torch"
    tile_shape = SHAPE
    score_terms = ALL_TERMS
    honours_origin = True

    def reasons(self, request: Request) -> list[str]:
        """Empty: every dtype and device of torch is served."""
        return []

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """(out, lse) of the planned pairs."""
        plan, (q, k, v, *_) = host_plan(call.plan), call
        return forward(
            q, k, v, plan, scale=call.scale, dropout=call.dropout, seed=call.seed, terms=call.terms, origin=call.origin
        )

    def backward(self, call: Call, saved: Saved, dout: Tensor, dlse: Tensor) -> Grads:
        """(dq, dk, dv) from the gradients of out and lse."""
        return self.score_backward(call, saved, dout, dlse)[0]

    def score_backward(self, call: Call, saved: Saved, dout: Tensor, dlse: Tensor) -> tuple[Grads, ScoreGrads]:
        """The same, and the gradients of the tables of the terms."""
        plan, (q, k, v, *_) = host_plan(call.plan), call
        terms = tile_terms(call.terms, plan, call.origin)
        grads = backward(
            dout, dlse, q, k, v, *saved, plan,
            scale=call.scale, dropout=call.dropout, seed=call.seed, terms=terms, origin=call.origin,
        )  # fmt: skip
        of_tables = (None, None) if terms is None else terms.gradients()
        sinks = None if call.terms is None else call.terms.sinks
        return grads, (*of_tables, None if sinks is None else sink_gradient(*saved, dout, dlse, sinks))


BACKEND = TorchBackend()
