"""Registration of farlight's operators with torch's dispatcher: kernels, fakes, autograd kernels and batching rules.

An autograd kernel runs once for each level of `torch.func`, so that gradients nest, and compiled and exported programs are
served by the same rule as eager ones, in reverse and in forward mode. torch types none of this machinery.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

__all__ = [
    "Operator",
    "define",
    "differentiate",
    "forward_through",
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


def forward_through(name: str, kernel: Callable[..., Any]) -> Operator:
    """The operator `farlight::name` that only calls others, which are differentiated and batched themselves."""
    schema = torch.library.infer_schema(kernel, mutates_args=())
    _library.define(name + schema)
    _library.impl(name, kernel, "CompositeImplicitAutograd")
    operator: Operator = getattr(torch.ops.farlight, name).default
    return operator


def differentiate(operator: Operator, count: int, cotangents: Callable[..., Any], tangents: Callable[..., Any]) -> None:
    """Register the derivatives of an operator's first `count` arguments, tensors or None, in reverse and in forward mode.

    `cotangents(grads of the outputs, inputs, outputs)` returns those of the first arguments, `tangents(tangents of the first
    arguments, inputs, outputs)` those of the outputs; both call torch operations and differentiable operators.
    """

    class Differentiable(_Differentiable):
        @staticmethod
        def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
            outputs = _next_level(operator, keyset, *inputs)
            flat, ctx.structure = pytree.tree_flatten(inputs)
            is_tensor = [isinstance(x, Tensor) for x in flat]
            tensors = [x for x in flat if isinstance(x, Tensor)]
            ctx.constants = [None if tensor else x for x, tensor in zip(flat, is_tensor, strict=True)]
            ctx.is_tensor = is_tensor
            ctx.save_for_backward(*tensors, *outputs)
            ctx.save_for_forward(*tensors, *outputs)
            return outputs

        @staticmethod
        def saved(ctx: Any) -> tuple[Any, Sequence[Tensor]]:
            rest = iter(ctx.saved_tensors)
            flat = [next(rest) if tensor else x for x, tensor in zip(ctx.constants, ctx.is_tensor, strict=True)]
            return pytree.tree_unflatten(flat, ctx.structure), tuple(rest)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            inputs, outputs = Differentiable.saved(ctx)
            return None, *cotangents(grads, inputs, outputs), *(None,) * (len(inputs) - count)

        @staticmethod
        def jvp(ctx: Any, _: None, *given: Any) -> Any:
            inputs, outputs = Differentiable.saved(ctx)
            return tangents(given[:count], inputs, outputs)

    _set_autograd(operator, Differentiable, count)


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
        if (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)) or _has_tangent(*tensors):
            return differentiable.of(keyset, *args)
        return _below_autograd(operator, keyset, *args)

    _library.impl(operator._opname, kernel, "Autograd", with_keyset=True)


def _has_tangent(*tensors: Tensor) -> bool:
    # An autograd kernel sees one transform at a time, and torch has one level of forward mode at a time.
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def _next_level(operator: Operator, keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
    # `apply` turns gradients off, which the levels below are still to record.
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return _below_autograd(operator, keyset, *args)


def _below_autograd(operator: Operator, keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
    """The operator without autograd: its kernel, or what the next transform of `torch.func` makes of it."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)
