"""Registration of farlight's operators with torch's dispatcher: kernels, fakes, autograd kernels and batching rules.

An autograd kernel runs once for each level of `torch.func`, so that gradients nest, and compiled and exported programs are
served by the same rule as eager ones. It refuses what the fused kernels do not have: forward mode and second derivatives. torch
types none of this machinery; `farlight.ops` gives it typed kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from farlight.derivatives import refuse_second, refuse_tangents

__all__ = [
    "Operator",
    "define",
    "differentiate_backward",
    "differentiate_forward",
    "differentiate_scored",
    "is_batching_gradients",
    "set_vmap",
]

Operator: TypeAlias = "torch._ops.OpOverload[..., Any]"
_library = torch.library.Library("farlight", "FRAGMENT")
_VMAP_OF_GRADIENTS = torch._C._dispatch_key_parse("VmapMode")


def define(name: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Operator:
    """The operator `farlight::name`: its schema is read from the kernel's signature, `fake` gives shapes and dtypes."""
    schema = torch.library.infer_schema(kernel, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"farlight::{name}", fake, lib=_library)
    operator: Operator = getattr(torch.ops.farlight, name).default
    return operator


def set_vmap(operator: Operator, rule: Callable[..., Any]) -> None:
    """Register the batching rule of `torch.vmap`: `rule(operator, info, in_dims, *args)`."""

    def bound(info: Any, in_dims: Any, *args: Any) -> Any:
        return rule(operator, info, in_dims, *args)

    torch.library.register_vmap(f"farlight::{operator._opname}", bound, lib=_library)


def differentiate_forward(operator: Operator, gradients: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    """Register the gradients of q, k and v, the operator's first three arguments; the others have none.

    `gradients(dout, dlse, q, k, v, out, lse, tables, seed, *options)`.
    """

    class Attend(_Differentiable):
        @staticmethod
        def forward(
            ctx: Any,
            keyset: torch._C.DispatchKeySet,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            tables: Sequence[Tensor],
            seed: Tensor,
            *options: Any,
        ) -> tuple[Tensor, Tensor]:
            out, lse = _next_level(operator, keyset, q, k, v, tables, seed, *options)
            ctx.save_for_backward(q, k, v, out, lse, seed, *tables)
            ctx.options = options
            return out, lse

        @staticmethod
        def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
            q, k, v, out, lse, seed, *tables = ctx.saved_tensors
            grads = gradients(dout, dlse, q, k, v, out, lse, tables, seed, *ctx.options)
            return None, *grads, *(None,) * (2 + len(ctx.options))

    _set_autograd(operator, Attend, 3)


def differentiate_scored(operator: Operator, gradients: Callable[..., tuple[Tensor | None, ...]]) -> None:
    """The same for an operator whose first six arguments, of which the last three may be None, have gradients.

    `gradients(dout, dlse, *the six, out, lse, tables, seed, *options)`.
    """

    class AttendScored(_Differentiable):
        @staticmethod
        def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, Tensor]:
            out, lse = _next_level(operator, keyset, *args)
            *operands, tables, seed = args[:8]
            ctx.save_for_backward(*operands, out, lse, seed, *tables)
            ctx.options = args[8:]
            return out, lse

        @staticmethod
        def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
            *operands, seed = ctx.saved_tensors[:9]
            grads = gradients(dout, dlse, *operands, ctx.saved_tensors[9:], seed, *ctx.options)
            return None, *grads, *(None,) * (2 + len(ctx.options))

    _set_autograd(operator, AttendScored, 6)


def differentiate_backward(operator: Operator, count: int = 7) -> None:
    """Let the gradients that the operator returns refuse to be differentiated; its first `count` arguments are tensors."""

    class Backward(_Differentiable):
        @staticmethod
        def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
            grads: tuple[Tensor, ...] = _next_level(operator, keyset, *args)
            return grads

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> NoReturn:
            refuse_second()

    _set_autograd(operator, Backward, count)


def is_batching_gradients() -> bool:
    """Whether the older vmap is on, of `torch.autograd.grad(is_grads_batched=True)` and `jacobian(vectorize=True)`: it knows no
    batching rules and runs an operator once for each element, if no argument is a list.
    """
    return torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_OF_GRADIENTS)


class _Differentiable(torch.autograd.function._SingleLevelFunction):
    """One level of differentiation of an operator."""

    @classmethod
    def of(cls, *args: Any) -> Any:
        with enable_single_level_autograd_function():
            return cls.apply(*args)  # type: ignore[attr-defined]


def _set_autograd(operator: Operator, differentiable: type[_Differentiable], count: int) -> None:
    """The autograd kernel of an operator whose first `count` arguments have gradients."""

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        tensors = [x for x in args[:count] if isinstance(x, Tensor)]
        refuse_tangents(*tensors)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return differentiable.of(keyset, *args)
        return _below_autograd(operator, keyset, *args)

    _library.impl(operator._opname, kernel, "Autograd", with_keyset=True)


def _next_level(operator: Operator, keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
    # `apply` turns gradients off, which the levels below are still to record.
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return _below_autograd(operator, keyset, *args)


def _below_autograd(operator: Operator, keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
    """The operator without autograd: its kernel, or what the next transform of `torch.func` makes of it."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)
