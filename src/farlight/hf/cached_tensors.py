"""The keys and values that a cache layer hands to a model, which must reach the attention function as they are.

A `SparseCache` answers from what it kept, not from the tensors that the attention function is called with. That is right only
where those are the ones that its `update` returned. A `HandedOut` is such a tensor: it can be asked for its shape and passed
on, but not computed with. A model that expands latent keys, or takes values apart, is told so where it does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from farlight.errors import UnsupportedError

__all__ = ["REMEDY", "HandedOut", "cache_layer_of"]


class HandedOut(Tensor):
    """New keys or values `(B, H_kv, n, D)` of one `update` of one cache layer; `plain` is the tensor itself."""

    layer: Any
    update: int
    plain: Tensor

    @staticmethod
    def of(plain: Tensor, layer: Any, update: int) -> HandedOut:
        new = plain.as_subclass(HandedOut)
        new.layer, new.update, new.plain = layer, update, plain
        return new

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            mine = next(x for x in _flat((*args, *given.values())) if isinstance(x, HandedOut))
            name = getattr(func, "__name__", repr(func))
            if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i"):
                raise _computed_with(mine, name)
            found = func(*args, **given)
            if not any(isinstance(x, Tensor) for x in _flat((found,))):
                return found
            if isinstance(found, Tensor) and _is_the_same(found, mine.plain):
                return mine
        raise _computed_with(mine, name)


def cache_layer_of(module: nn.Module, key: Tensor, value: Tensor) -> Any:
    """The cache layer that must answer, since it handed out this key and value; None where no such layer did.

    Raises UnsupportedError where only one of them came from there, or both from different updates.
    """
    if not isinstance(key, HandedOut) and not isinstance(value, HandedOut):
        return None
    if isinstance(key, HandedOut) and isinstance(value, HandedOut):
        layer = key.layer
        if layer is value.layer and key.update == value.update == layer.updates:
            return layer
    raise UnsupportedError(
        f"{type(module).__name__} attends over keys and values of which a SparseCache did not hand out both in its last "
        f"update, so the cache does not keep what is attended over. {REMEDY}"
    )


REMEDY = (
    "Generate under fl.hf.use_pattern(model, pattern) without SparseCache; transformers' own cache then keeps every key, and "
    "the tokens are the same."
)


def _computed_with(tensor: HandedOut, name: str) -> UnsupportedError:
    return UnsupportedError(
        f"SparseCache: this model computes with the keys or values of layer {tensor.layer.number} ({name}) after the cache "
        "took them, as models with latent attention do, so the cache does not keep what is attended over. " + REMEDY
    )


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        else:
            yield value


def _is_the_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one: the same memory, read in the same way."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and a.device == b.device
        and a.stride() == b.stride()
        and a.data_ptr() == b.data_ptr()
    )
