"""The torch operators behind `fl.attention`, and the one autograd function of plain tensors.

A pattern travels through a graph as its canonical text, a constant, and its tables, tensors; the backend and the plan are
selected inside the operator. So no mask enters a graph, nothing is recompiled when a length changes, and an exported program
needs nothing but farlight.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from farlight.batching import batched, batched_mask
from farlight.caching import SizedCache
from farlight.derivatives import attend_tangents, gradient_cotangents, gradient_tangents
from farlight.dispatcher import define, differentiate, forward_through, is_batching_gradients, set_vmap
from farlight.errors import UnsupportedError
from farlight.kernels import registry
from farlight.kernels.backend import Backend, Call, Grads, Request, Saved
from farlight.patterns.expression import Pattern, Sizes
from farlight.patterns.notation import parse
from farlight.plan.footprint import held_bytes
from farlight.plan.tables import PlanLike

__all__ = [
    "attend",
    "attend_backward",
    "attend_selected",
    "differentiable_again",
    "empty_results",
    "is_plain",
    "is_transformed",
    "pattern_mask",
    "pattern_of",
    "planned",
]

Options: TypeAlias = tuple[str, float, int, float, str]  # pattern text, scale, q_offset, dropout, backend
Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor, Sequence[Tensor], Tensor, str, float, int, float, str]  # those of `attend`


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors that nothing is tracing, so that an operator may be left out."""
    return (
        not torch.compiler.is_compiling()
        and all(type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and not is_transformed()
    )


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward mode may be at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


# ---- plain tensors ------------------------------------------------------------------------------------------------------
def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, request: Request, backend: Backend, plan: PlanLike, scale: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """(out, lse) of plain tensors by a selected backend and its plan, differentiable: both passes execute the one plan."""
    out, lse = _Attend.apply(q, k, v, request, backend, plan, scale, seed)
    return out, lse


class _SavingContext(Protocol):
    """What a forward pass leaves for its backward pass."""

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Context(_SavingContext, Protocol):
    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    request: Request
    backend: Backend
    plan: PlanLike
    scale: float


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        request: Request,
        backend: Backend,
        plan: PlanLike,
        scale: float,
        seed: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, lse = backend.forward(Call(q, k, v, plan, scale, request.dropout, seed))
        if request.needs_grad:
            ctx.save_for_backward(q, k, v, out, lse, seed)
            ctx.request, ctx.backend, ctx.plan, ctx.scale = request, backend, plan, scale
        return out, lse

    @staticmethod
    def backward(ctx: _Context, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, seed = ctx.saved_tensors
        request = ctx.request
        if torch.is_grad_enabled() or is_batching_gradients() or not is_plain(dout, dlse):
            # Batched, counted, or to be differentiated again: the operator serves that.
            pattern = request.pattern
            options = pattern.text, ctx.scale, request.sizes.q_offset, request.dropout, ctx.backend.name
            grads = _gradients(dout, dlse, q, k, v, out, lse, list(pattern._tables), seed, *options)
        else:
            call = Call(q, k, v, ctx.plan, ctx.scale, request.dropout, seed)
            grads = ctx.backend.backward(call, Saved(out, lse), dout, dlse)
        return *grads, None, None, None, None, None


# ---- the operators' kernels and fakes -----------------------------------------------------------------------------------
# Patterns without tables, by their text.
_parsed: SizedCache[Pattern] = SizedCache(16 * 2**20, lambda pattern: 2048 + held_bytes(pattern))


def pattern_of(text: str, tables: Sequence[Tensor]) -> Pattern:
    """The pattern of an operator's arguments."""
    # No limit: the text is that of a pattern that exists already.
    return parse(text, tuple(tables), limit=None) if tables else _parsed.get(text, lambda: parse(text, limit=None))


def planned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    text: str,
    q_offset: int,
    dropout: float,
    backend: str,
    terms: frozenset[str] = frozenset(),
) -> tuple[Backend, PlanLike]:
    """The plan backend for an operator's arguments, and its plan. terms: `ScoreTerms.names`."""
    sizes = Sizes(q.shape[2], k.shape[2], q_offset, q.shape[0], q.shape[1])
    shapes = k.shape[1], q.shape[3], v.shape[3], q.dtype, q.device
    request = Request(pattern_of(text, tables), sizes, *shapes, False, dropout, True, terms)
    executor = registry.plan_backend(request, backend)
    return executor, registry.plan_of(executor, request)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    seed: Tensor,
    pattern: str,
    scale: float,
    q_offset: int,
    dropout: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out, lse) over the pairs that the pattern allows, by a plan backend."""
    executor, plan = planned(q, k, v, tables, pattern, q_offset, dropout, backend)
    return executor.forward(Call(q, k, v, plan, scale, dropout, seed))


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    if torch.onnx.is_in_onnx_export():
        raise UnsupportedError(
            f"backend {rest[-1]!r} cannot be exported to ONNX, which has no operator for it; pass backend='dense', or "
            "backend='reference' where the lse or dropout is needed: these are exported as ONNX's own operators."
        )
    return empty_results(q, v)


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of a fake kernel."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=lse_dtype)


def _attend_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tables: Sequence[Tensor],
    seed: Tensor,
    pattern: str,
    scale: float,
    q_offset: int,
    dropout: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `attend`."""
    executor, plan = planned(q, k, v, tables, pattern, q_offset, dropout, backend)
    return executor.backward(Call(q, k, v, plan, scale, dropout, seed), Saved(out, lse), dout, dlse)


def _backward_fake(dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# Under the older vmap an operator may take no list: tables and options wait here, under the number that is passed instead.
_waiting: dict[int, tuple[Sequence[Tensor], Options]] = {}
_numbers = itertools.count()


def _attend_backward_each(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seed: Tensor, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` with tables and options found under a number."""
    tables, options = _waiting[number]
    grads: Grads = attend_backward(dout, dlse, q, k, v, out, lse, tables, seed, *options)
    return grads


def _gradients(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tables: Sequence[Tensor],
    seed: Tensor,
    *options: *Options,
) -> Grads:
    """`attend_backward`, under the older vmap too."""
    grads: Grads
    if torch.compiler.is_compiling() or not is_batching_gradients():
        grads = attend_backward(dout, dlse, q, k, v, out, lse, tables, seed, *options)
        return grads
    number = next(_numbers)
    _waiting[number] = tables, options
    try:
        grads = attend_backward_each(dout, dlse, q, k, v, out, lse, seed, number)
    finally:
        del _waiting[number]
    return grads


def _cotangents(grads: tuple[Tensor, Tensor], inputs: Inputs, outputs: tuple[Tensor, Tensor]) -> Grads:
    """Those of q, k and v from those of out and lse."""
    q, k, v, tables, seed, text, scale, q_offset, dropout, backend = inputs
    return _gradients(*grads, q, k, v, *outputs, tables, seed, text, scale, q_offset, dropout, backend)


class _AgainContext(_SavingContext, Protocol):
    saved_tensors: tuple[Tensor, Tensor, Tensor]
    pattern: Pattern
    scale: float
    q_offset: int


class _Again(torch.autograd.Function):
    """The identity on the output of an attention whose gradients cannot be differentiated.

    A gradient that is to be differentiated again leaves by q, k and v, through the operators.
    """

    @staticmethod
    def forward(
        ctx: _AgainContext, out: Tensor, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float, q_offset: int
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.pattern, ctx.scale, ctx.q_offset = pattern, scale, q_offset
        return out.view_as(out)

    @staticmethod
    def backward(ctx: _AgainContext, dout: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return dout, None, None, None, None, None, None
        q, k, v = ctx.saved_tensors
        tables, seed = list(ctx.pattern._tables), torch.zeros((), dtype=torch.int64)
        options = ctx.pattern.text, ctx.scale, ctx.q_offset, 0.0, "auto"
        out, lse = attend(q, k, v, tables, seed, *options)
        grads = _gradients(dout, torch.zeros_like(lse), q, k, v, out, lse, tables, seed, *options)
        return None, *grads, None, None, None


def differentiable_again(out: Tensor, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float, q_offset: int) -> Tensor:
    """`out`, the attention of q, k and v by operations that have first derivatives only, with derivatives of every order."""
    again: Tensor = _Again.apply(out, q, k, v, pattern, scale, q_offset) if out.requires_grad else out
    return again


def _pattern_mask(
    like: Tensor, tables: Sequence[Tensor], pattern: str, n_q: int, n_k: int, q_offset: int, batch: int, heads: int
) -> Tensor:
    """The dense mask of a pattern, `(batch|1, heads|1, n_q, n_k)`, on the device of `like`."""
    expression = pattern_of(pattern, tables)
    mask = expression.dense(n_q, n_k, batch=batch, heads=heads, q_offset=q_offset, device=like.device)
    return mask.expand(*_leading(expression, batch, heads), n_q, n_k).contiguous()


def _pattern_mask_fake(
    like: Tensor, tables: Sequence[Tensor], pattern: str, n_q: int, n_k: int, q_offset: int, batch: int, heads: int
) -> Tensor:
    return like.new_empty((*_leading(pattern_of(pattern, tables), batch, heads), n_q, n_k), dtype=torch.bool)


def _leading(pattern: Pattern, batch: int, heads: int) -> tuple[int, int]:
    return batch if pattern.varies_over_batch else 1, heads if pattern.varies_over_heads else 1


attend = define("attend", _attend, _attend_fake)
attend_backward = define("attend_backward", _attend_backward, _backward_fake)
attend_backward_each = forward_through("attend_backward_each", _attend_backward_each)
pattern_mask = define("pattern_mask", _pattern_mask, _pattern_mask_fake)
differentiate(attend, 3, _cotangents, attend_tangents)
differentiate(attend_backward, 7, gradient_cotangents, gradient_tangents)
set_vmap(attend, batched)
set_vmap(attend_backward, batched)
set_vmap(pattern_mask, batched_mask)
