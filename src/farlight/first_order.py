"""Derivatives that attention under score terms does not have, refused: forward mode and second derivatives.

A kernel returns numbers without a graph. Without these checks its tangent would be zero, and a gradient taken with
`create_graph=True` a constant.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from farlight.errors import UnsupportedError

__all__ = ["FirstOrderOnly", "refuse_forward_mode", "refuse_second", "refuse_tangents"]


def refuse_forward_mode() -> NoReturn:
    """Raise UnsupportedError for a forward-mode derivative."""
    raise UnsupportedError(
        "fl.attention with score or sinks: a forward-mode derivative (jvp, jacfwd, linearize, duals) is needed, but this "
        "backend has reverse-mode derivatives only. Use backend='reference', which has both, or torch.func.vjp, jacrev or grad."
    )


def refuse_second() -> NoReturn:
    """Raise UnsupportedError for a second derivative."""
    raise UnsupportedError(
        "fl.attention with score or sinks: a second derivative (create_graph=True, hessian, hvp) is needed, but "
        "this backend has first derivatives only. Use backend='reference', which is twice differentiable."
    )


def refuse_tangents(*tensors: Tensor) -> None:
    """Raise UnsupportedError where a tensor carries a tangent. For autograd kernels, which see one transform at a time."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        refuse_forward_mode()


class _SecondRefused(torch.autograd.Function):
    """The identity on gradients; refuses to be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse_second()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        refuse_forward_mode()


class FirstOrderOnly(_SecondRefused):
    """The identity on q, k and v; refuses tangents, and its gradients refuse to be differentiated."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _SecondRefused.apply(*grads)
