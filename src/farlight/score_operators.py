"""The torch operators behind `fl.attention(…, score=…, sinks=…)`, and the autograd function of plain tensors.

As in `farlight.ops` the pattern travels as text and tables. The lowered terms travel as tensors, with gradients of their own:
the table of biases by distance, that by key, and the sinks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from farlight.batching import batched_by_item
from farlight.derivatives import scored_gradient_cotangents, scored_gradient_tangents, scored_tangents
from farlight.dispatcher import define, differentiate, forward_through, is_batching_gradients, set_vmap
from farlight.errors import UnsupportedError
from farlight.kernels.backend import Backend, Call, Request, Saved, ScoringBackend
from farlight.ops import empty_results, is_plain, planned
from farlight.patterns.expression import Pattern
from farlight.plan.tables import PlanLike
from farlight.score.lowered import ScoreTerms

__all__ = ["attend_scored", "attend_scored_backward", "attend_scored_selected", "differentiable_again"]

TermGrads: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


def attend_scored_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: ScoreTerms,
    request: Request,
    backend: Backend,
    plan: PlanLike,
    scale: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of plain tensors by a selected backend and its plan, differentiable in q, k, v and the terms' tensors."""
    out, lse = _AttendScored.apply(
        q, k, v, terms.distance, terms.key_bias, terms.sinks, seed, request, backend, plan, scale, terms.cap, terms.first
    )
    return out, lse


class _AttendScored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        q, k, v, distance, key_bias, sinks, seed, request, backend, plan, scale, cap, first = args
        terms = ScoreTerms(cap, first, distance, key_bias, sinks)
        out, lse = backend.forward(Call(q, k, v, plan, scale, request.dropout, seed, terms))
        if request.needs_grad:
            ctx.save_for_backward(q, k, v, distance, key_bias, sinks, out, lse, seed)
            ctx.request, ctx.backend, ctx.plan, ctx.scale, ctx.cap, ctx.first = request, backend, plan, scale, cap, first
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
        q, k, v, distance, key_bias, sinks, out, lse, seed = ctx.saved_tensors
        request: Request = ctx.request
        grads: tuple[Tensor | None, ...]
        if torch.is_grad_enabled() or is_batching_gradients() or not is_plain(dout, dlse):
            operands = dout, dlse, q, k, v, distance, key_bias, sinks, out, lse
            pattern = request.pattern
            options = pattern.text, ctx.scale, request.sizes.q_offset, request.dropout, ctx.backend.name, ctx.cap, ctx.first
            grads = _gradients(*operands, list(pattern._tables), seed, *options)
        else:
            terms = ScoreTerms(ctx.cap, ctx.first, distance, key_bias, sinks)
            call = Call(q, k, v, ctx.plan, ctx.scale, request.dropout, seed, terms, ctx.needs_input_grad[3:6])
            grads = _all_gradients(ctx.backend, call, Saved(out, lse), dout, dlse)
        return *grads, *(None,) * 7


def _all_gradients(
    backend: Backend, call: Call, saved: Saved, dout: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of q, k, v, distance, key_bias and sinks, None for a term that is not there."""
    grads, of_terms = cast(ScoringBackend, backend).score_backward(call, saved, dout, dlse)
    return *grads, *of_terms


# ---- the operators' kernels and fakes -----------------------------------------------------------------------------------
def _attend_scored(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distance: Tensor | None,
    key_bias: Tensor | None,
    sinks: Tensor | None,
    tables: Sequence[Tensor],
    seed: Tensor,
    pattern: str,
    scale: float,
    q_offset: int,
    dropout: float,
    backend: str,
    cap: float,
    first: int,
) -> tuple[Tensor, Tensor]:
    """(out, lse) over the pairs that the pattern allows, under the terms, by a plan backend."""
    terms = ScoreTerms(cap, first, distance, key_bias, sinks)
    executor, plan = planned(q, k, v, tables, pattern, q_offset, dropout, backend, terms.names)
    return executor.forward(Call(q, k, v, plan, scale, dropout, seed, terms))


def _attend_scored_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if torch.onnx.is_in_onnx_export():
        raise UnsupportedError(
            "this attention cannot be exported to ONNX, which has no operator for it; pass backend='dense' or 'reference', "
            "which are exported as ONNX's own operators."
        )
    return empty_results(q, v)


def _attend_scored_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distance: Tensor | None,
    key_bias: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tables: Sequence[Tensor],
    seed: Tensor,
    pattern: str,
    scale: float,
    q_offset: int,
    dropout: float,
    backend: str,
    cap: float,
    first: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, distance, key_bias and sinks; of a term that is not there an empty tensor."""
    terms = ScoreTerms(cap, first, distance, key_bias, sinks)
    executor, plan = planned(q, k, v, tables, pattern, q_offset, dropout, backend, terms.names)
    call = Call(q, k, v, plan, scale, dropout, seed, terms)
    grads = _all_gradients(executor, call, Saved(out, lse), dout, dlse)
    of_terms = [q.new_empty(0, dtype=lse.dtype) if grad is None else grad for grad in grads[3:]]
    return *grads[:3], *of_terms  # type: ignore[return-value]


def _backward_fake(dout: Tensor, dlse: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    lse = operands[7]
    q, k, v, *of_terms = operands[:6]
    empty = [lse.new_empty(0 if x is None else x.shape) for x in of_terms]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *empty


# Under the older vmap an operator may take no list and no None: all but the tensors wait here, under the number that is passed.
_waiting: dict[int, tuple[Any, ...]] = {}
_numbers = itertools.count()


def _attend_scored_backward_each(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distance: Tensor,
    key_bias: Tensor,
    sinks: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    number: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`attend_scored_backward` with tables, options and the terms that are not there found under a number."""
    missing, tables, options = _waiting[number]
    terms = (None if gone else x for x, gone in zip((distance, key_bias, sinks), missing, strict=True))
    grads: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    grads = attend_scored_backward(dout, dlse, q, k, v, *terms, out, lse, tables, seed, *options)
    return grads


def _gradients(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distance: Tensor | None,
    key_bias: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tables: Sequence[Tensor],
    seed: Tensor,
    *options: Any,
) -> tuple[Tensor | None, ...]:
    """`attend_scored_backward`, under the older vmap too; None for a term that is not there."""
    terms = distance, key_bias, sinks
    if torch.compiler.is_compiling() or not is_batching_gradients():
        grads = attend_scored_backward(dout, dlse, q, k, v, *terms, out, lse, tables, seed, *options)
    else:
        number = next(_numbers)
        _waiting[number] = tuple(x is None for x in terms), tables, options
        given = (lse.new_empty(0) if x is None else x for x in terms)
        try:
            grads = attend_scored_backward_each(dout, dlse, q, k, v, *given, out, lse, seed, number)
        finally:
            del _waiting[number]
    return *grads[:3], *(None if x is None else grad for x, grad in zip(terms, grads[3:], strict=True))


def _cotangents(grads: Sequence[Tensor], inputs: Sequence[Any], outputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Those of the first six inputs of `attend_scored` from those of out and lse."""
    dout, dlse = grads
    return _gradients(dout, dlse, *inputs[:6], *outputs, *inputs[6:])


class _ScoredAgain(torch.autograd.Function):
    """The identity on the output of an attention whose gradients cannot be differentiated; see `ops.differentiable_again`."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:6])
        ctx.pattern, ctx.scale, ctx.q_offset, ctx.cap, ctx.first = args[6:]
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return dout, *(None,) * 11
        operands, tables = ctx.saved_tensors, list(ctx.pattern._tables)
        options = ctx.pattern.text, ctx.scale, ctx.q_offset, 0.0, "auto", ctx.cap, ctx.first
        rest = tables, torch.zeros((), dtype=torch.int64), *options
        out, lse = attend_scored(*operands, *rest)
        return None, *_gradients(dout, torch.zeros_like(lse), *operands, out, lse, *rest), *(None,) * 5


def differentiable_again(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, terms: ScoreTerms, pattern: Pattern, scale: float, q_offset: int
) -> Tensor:
    """`out`, by operations that have first derivatives only, with derivatives of every order, of the terms' tensors too."""
    operands = q, k, v, terms.distance, terms.key_bias, terms.sinks
    again: Tensor = out
    if out.requires_grad:
        again = _ScoredAgain.apply(out, *operands, pattern, scale, q_offset, terms.cap, terms.first)
    return again


attend_scored = define("attend_scored", _attend_scored, _attend_scored_fake)
attend_scored_backward = define("attend_scored_backward", _attend_scored_backward, _backward_fake)
attend_scored_backward_each = forward_through("attend_scored_backward_each", _attend_scored_backward_each)
differentiate(attend_scored, 6, _cotangents, scored_tangents)
differentiate(attend_scored_backward, 10, scored_gradient_cotangents, scored_gradient_tangents)
set_vmap(attend_scored, batched_by_item)
set_vmap(attend_scored_backward, batched_by_item)
