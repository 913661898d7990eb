"""The torch operators behind `fl.attention`: schemas, fakes and gradients, so that compile, export and autograd see one op.

A pattern travels as its canonical text, a constant, and its tables, tensors; the plan is looked up inside the operator. So
no mask enters a graph, nothing is recompiled when a length changes, and an exported program needs nothing but farlight.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from farlight.kernels import blocked, cpu, triton
from farlight.kernels.dispatch import plan_of, planned_backend, require
from farlight.kernels.request import Request
from farlight.patterns.base import Pattern, Sizes
from farlight.patterns.text import parse

__all__ = ["attend", "attend_backward", "attend_now", "is_plain", "pattern_mask"]

_KERNELS = {"cpu": cpu, "triton": triton, "torch": blocked}


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> Pattern:
    return parse(text)


def _pattern(text: str, tables: Sequence[Tensor]) -> Pattern:
    return parse(text, tuple(tables)) if tables else _parsed(text)


def _request(q: Tensor, k: Tensor, pattern: Pattern, q_offset: int, dropout: float) -> Request:
    sizes = Sizes(q.shape[2], k.shape[2], q_offset, q.shape[0], q.shape[1])
    return Request(pattern, sizes, k.shape[1], q.shape[3], q.dtype, q.device, False, dropout, True)


def _found(backend: str, request: Request) -> tuple[Any, Any]:
    """The kernels of a backend, and the plan that they execute."""
    if backend == "auto":
        backend = planned_backend(request)
    else:
        require(backend, request)
    return _KERNELS[backend], plan_of(backend, request)


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors that nothing is tracing, so that an operator may be left out."""
    return (
        not torch.compiler.is_compiling()
        and all(type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def attend_now(
    q: Tensor, k: Tensor, v: Tensor, request: Request, *, scale: float, seed: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """What `attend` computes, without the operator around it, for plain tensors: the pattern itself is at hand here, and so the
    plan that is kept for it. With gradients the plan is looked up once and serves the backward pass too.
    """
    out, lse = _Attend.apply(q, k, v, request, scale, seed, backend)
    return out, lse


class _Attend(torch.autograd.Function):
    """`attend` and `attend_backward` for plain tensors."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, request: Request, scale: float, seed: Tensor, backend: str
    ) -> tuple[Tensor, Tensor]:
        kernel, plan = _found(backend, request)
        out, lse = kernel.forward(q, k, v, plan, scale=scale, dropout=request.dropout, seed=seed)
        if request.needs_grad:
            ctx.save_for_backward(q, k, v, out, lse, seed)
            ctx.found = kernel, plan, scale, request.dropout
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, seed = ctx.saved_tensors
        kernel, plan, scale, dropout = ctx.found
        dq, dk, dv = kernel.backward(dout, dlse, q, k, v, out, lse, plan, scale=scale, dropout=dropout, seed=seed)
        return dq, dk, dv, None, None, None, None


@torch.library.custom_op("farlight::attend", mutates_args=())
def attend(
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
    """(out, lse) over the pairs that the pattern allows, by a backend that executes plans."""
    request = _request(q, k, _pattern(pattern, tables), q_offset, dropout)
    kernel, plan = _found(backend, request)
    out, lse = kernel.forward(q, k, v, plan, scale=scale, dropout=dropout, seed=seed)
    return out, lse


@attend.register_fake
def _(
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
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=kind)


@torch.library.custom_op("farlight::attend_backward", mutates_args=())
def attend_backward(
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
    request = _request(q, k, _pattern(pattern, tables), q_offset, dropout)
    kernel, plan = _found(backend, request)
    grads: tuple[Tensor, Tensor, Tensor] = kernel.backward(
        dout, dlse, q, k, v, out, lse, plan, scale=scale, dropout=dropout, seed=seed
    )
    return grads


@attend_backward.register_fake
def _(
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
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, tables, seed, pattern, scale, q_offset, dropout, backend = inputs
    ctx.save_for_backward(q, k, v, *output, seed, *tables)
    ctx.options = (pattern, scale, q_offset, dropout, backend)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, seed, *tables = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    dq, dk, dv = attend_backward(dout, dlse, q, k, v, out, lse, tables, seed, *ctx.options)
    return dq, dk, dv, [None] * len(tables), None, None, None, None, None, None


attend.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("farlight::pattern_mask", mutates_args=())
def pattern_mask(
    like: Tensor, tables: Sequence[Tensor], pattern: str, n_q: int, n_k: int, q_offset: int, batch: int, heads: int
) -> Tensor:
    """The dense mask of a pattern, `(batch, heads, n_q, n_k)`, on the device of `like`."""
    found = _pattern(pattern, tables)
    mask = found.dense(n_q, n_k, batch=batch, heads=heads, q_offset=q_offset, device=like.device)
    return mask.expand(batch if found.varies_over_batch else 1, heads if found.varies_over_heads else 1, n_q, n_k).contiguous()


@pattern_mask.register_fake
def _(
    like: Tensor, tables: Sequence[Tensor], pattern: str, n_q: int, n_k: int, q_offset: int, batch: int, heads: int
) -> Tensor:
    found = _pattern(pattern, tables)
    shape = (batch if found.varies_over_batch else 1, heads if found.varies_over_heads else 1, n_q, n_k)
    return like.new_empty(shape, dtype=torch.bool)
