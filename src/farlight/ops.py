"""The torch operators behind `fl.attention`: schemas, fakes, gradients and batching rules, so that compile, export, autograd
and `torch.func` see one op.

A pattern travels as its canonical text, a constant, and its tables, tensors; the plan is looked up inside the operator. So
no mask enters a graph, nothing is recompiled when a length changes, and an exported program needs nothing but farlight.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from farlight.batching import batched, batched_mask
from farlight.caching import SizedCache
from farlight.derivatives import refuse_forward_mode, refuse_second, refuse_tangents
from farlight.errors import UnsupportedError
from farlight.kernels import cpu, triton
from farlight.kernels import torch_tiled as blocked
from farlight.kernels.dispatch import plan_of, planned_backend, require
from farlight.kernels.request import Request
from farlight.patterns.expression import Pattern, Sizes
from farlight.patterns.notation import parse
from farlight.plan.footprint import held_bytes

__all__ = ["attend", "attend_backward", "attend_now", "is_plain", "pattern_mask"]

_Operator: TypeAlias = "torch._ops.OpOverload[..., Any]"
_KERNELS = {"cpu": cpu, "triton": triton, "torch": blocked}


# Patterns without tables, by their text.
_parsed: SizedCache[Pattern] = SizedCache(16 * 2**20, lambda pattern: 2048 + held_bytes(pattern))


def _pattern(text: str, tables: Sequence[Tensor]) -> Pattern:
    # The text is that of a pattern which is there already: it asks for nothing new.
    return parse(text, tuple(tables), limit=None) if tables else _parsed.get(text, lambda: parse(text, limit=None))


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
            ctx.found = kernel, plan, scale, request, backend
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, seed = ctx.saved_tensors
        kernel, plan, scale, request, backend = ctx.found
        if torch.is_grad_enabled() or _loops() or not is_plain(dout, dlse):
            # Batched, counted, or to be differentiated again: that is for the operator to serve or to refuse.
            pattern = request.pattern
            options = pattern.text, scale, request.sizes.q_offset, request.dropout, backend
            grads = _gradients(dout, dlse, q, k, v, out, lse, list(pattern._tables), seed, *options)
        else:
            grads = kernel.backward(dout, dlse, q, k, v, out, lse, plan, scale=scale, dropout=request.dropout, seed=seed)
        return *grads, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        refuse_forward_mode()


# ---- the kernels of the operators, and their fakes ----------------------------------------------------------------------
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
    """(out, lse) over the pairs that the pattern allows, by a backend that executes plans."""
    request = _request(q, k, _pattern(pattern, tables), q_offset, dropout)
    kernel, plan = _found(backend, request)
    out, lse = kernel.forward(q, k, v, plan, scale=scale, dropout=dropout, seed=seed)
    return out, lse


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    if torch.onnx.is_in_onnx_export():
        raise UnsupportedError(
            f"backend {options[-1]!r} cannot be exported to ONNX, which has no operator for it; pass backend='dense', or "
            "backend='reference' where the lse or dropout is needed: these are exported as ONNX's own operators."
        )
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=kind)


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
    request = _request(q, k, _pattern(pattern, tables), q_offset, dropout)
    kernel, plan = _found(backend, request)
    grads: tuple[Tensor, Tensor, Tensor] = kernel.backward(
        dout, dlse, q, k, v, out, lse, plan, scale=scale, dropout=dropout, seed=seed
    )
    return grads


def _attend_backward_fake(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _attend_backward_each(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seed: Tensor, call: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` with everything but tensors found under the number of the call."""
    tables, options = _calls[call]
    return _attend_backward(dout, dlse, q, k, v, out, lse, tables, seed, *options)


_calls: dict[int, tuple[Sequence[Tensor], tuple[Any, ...]]] = {}
_call_numbers = itertools.count()
_VMAP_OF_GRADIENTS = torch._C._dispatch_key_parse("VmapMode")


def _loops() -> bool:
    """Whether the older vmap is on, of `torch.autograd.grad(is_grads_batched=True)` and `jacobian(vectorize=True)`. It knows no
    rules: it runs an operator once for each element, if no argument is a list.
    """
    return torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_OF_GRADIENTS)


def _gradients(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward`, under the older vmap too."""
    if torch.compiler.is_compiling() or not _loops():
        found: tuple[Tensor, Tensor, Tensor] = attend_backward(*args)
        return found
    tensors, tables, seed, options = args[:7], args[7], args[8], args[9:]
    call = next(_call_numbers)
    _calls[call] = tables, options
    try:
        return attend_backward_each(*tensors, seed, call)  # type: ignore[no-any-return]
    finally:
        del _calls[call]


def _pattern_mask(
    like: Tensor, tables: Sequence[Tensor], pattern: str, n_q: int, n_k: int, q_offset: int, batch: int, heads: int
) -> Tensor:
    """The dense mask of a pattern, `(batch, heads, n_q, n_k)`, on the device of `like`."""
    found = _pattern(pattern, tables)
    mask = found.dense(n_q, n_k, batch=batch, heads=heads, q_offset=q_offset, device=like.device)
    return mask.expand(batch if found.varies_over_batch else 1, heads if found.varies_over_heads else 1, n_q, n_k).contiguous()


def _pattern_mask_fake(
    like: Tensor, tables: Sequence[Tensor], pattern: str, n_q: int, n_k: int, q_offset: int, batch: int, heads: int
) -> Tensor:
    found = _pattern(pattern, tables)
    shape = (batch if found.varies_over_batch else 1, heads if found.varies_over_heads else 1, n_q, n_k)
    return like.new_empty(shape, dtype=torch.bool)


# ---- registration -------------------------------------------------------------------------------------------------------
_library = torch.library.Library("farlight", "FRAGMENT")


def _operator(name: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> _Operator:
    schema = torch.library.infer_schema(kernel, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"farlight::{name}", fake, lib=_library)
    found: _Operator = getattr(torch.ops.farlight, name).default
    return found


attend = _operator("attend", _attend, _attend_fake)
attend_backward = _operator("attend_backward", _attend_backward, _attend_backward_fake)
attend_backward_each = _operator("attend_backward_each", _attend_backward_each, _attend_backward_fake)
pattern_mask = _operator("pattern_mask", _pattern_mask, _pattern_mask_fake)


def _below(operator: _Operator, keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
    """The operator without autograd: its kernel, or what the next transform of `torch.func` makes of it."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)


class _Differentiable(torch.autograd.function._SingleLevelFunction):
    """One level of differentiation of an operator: under `torch.func` its autograd kernel runs once for each level."""

    @staticmethod
    def below(operator: _Operator, keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        # `apply` turns gradients off, which the levels below are still to record.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return _below(operator, keyset, *args)

    @classmethod
    def of(cls, *args: Any) -> Any:
        with enable_single_level_autograd_function():
            return cls.apply(*args)  # type: ignore[attr-defined]


class _AttendOperator(_Differentiable):
    @staticmethod
    def forward(
        ctx: Any,
        operator: _Operator,
        keyset: torch._C.DispatchKeySet,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tables: Sequence[Tensor],
        seed: Tensor,
        *options: Any,
    ) -> tuple[Tensor, Tensor]:
        out, lse = _Differentiable.below(operator, keyset, q, k, v, tables, seed, *options)
        ctx.save_for_backward(q, k, v, out, lse, seed, *tables)
        ctx.options = options
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, seed, *tables = ctx.saved_tensors
        grads = _gradients(dout, dlse, q, k, v, out, lse, tables, seed, *ctx.options)
        return None, None, *grads, *(None,) * (2 + len(ctx.options))


class _BackwardOperator(_Differentiable):
    @staticmethod
    def forward(ctx: Any, operator: _Operator, keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[Tensor, Tensor, Tensor] = _Differentiable.below(operator, keyset, *args)
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        refuse_second()


def _autograd_of(operator: _Operator, differentiable: type[_Differentiable], count: int) -> Callable[..., Any]:
    """The autograd kernel of an operator whose first `count` arguments have gradients."""

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        refuse_tangents(*args[:count])
        if torch.is_grad_enabled() and any(x.requires_grad for x in args[:count]):
            return differentiable.of(operator, keyset, *args)
        return _below(operator, keyset, *args)

    return kernel


for _op, _differentiable, _count in (
    (attend, _AttendOperator, 3),
    (attend_backward, _BackwardOperator, 7),
    (attend_backward_each, _BackwardOperator, 7),
):
    _library.impl(_op._opname, _autograd_of(_op, _differentiable, _count), "Autograd", with_keyset=True)
for _op, _rule in ((attend, batched), (attend_backward, batched), (pattern_mask, batched_mask)):
    torch.library.register_vmap(f"farlight::{_op._opname}", functools.partial(_rule, _op), lib=_library)
