"""Keys and values that a cache layer returns from `update`, tracked until they reach the attention function.

A `SparseCache` attends over the keys it keeps, not over the tensors the attention function receives. That is exact only when
these tensors are the ones its `update` returned. A `CachedTensor` is a tensor subclass that checks it: shape queries and
identity operations pass, any other operation raises. A model that expands latent keys or slices values is refused at the
operation that does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from farlight.errors import UnsupportedError

__all__ = ["REMEDY", "CachedTensor", "cache_layer_of", "call_outside_graph", "mark_for_compilers"]


class CachedTensor(Tensor):
    """New keys or values `(B, H_kv, n, D)` of update number `update_id` of one cache layer; `data_tensor` has no subclass."""

    layer: Any
    update_id: int
    data_tensor: Tensor

    @staticmethod
    def of(tensor: Tensor, layer: Any, update_id: int) -> CachedTensor:
        # No view of `tensor`: torch.compile asks a view for its base, which is `tensor`, hence for `cached` again.
        cached: CachedTensor = Tensor._make_subclass(CachedTensor, tensor)
        cached.layer, cached.update_id, cached.data_tensor = layer, update_id, tensor
        return cached

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            cached = next(x for x in _flatten((*args, *keywords.values())) if isinstance(x, CachedTensor))
            name = getattr(func, "__name__", repr(func))
            if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i"):
                raise _modified(cached, name)
            result = func(*args, **keywords)
            if not any(isinstance(x, Tensor) for x in _flatten((result,))):
                return result
            if isinstance(result, Tensor) and _is_same_view(result, cached.data_tensor):
                return cached
        raise _modified(cached, name)


def cache_layer_of(module: nn.Module, key: Tensor, value: Tensor) -> Any:
    """The cache layer whose latest update returned this key and value; None where neither came from a `SparseCache`.

    Raises UnsupportedError where only one of them did, or both from different updates.
    """
    if not isinstance(key, CachedTensor) and not isinstance(value, CachedTensor):
        return None
    if isinstance(key, CachedTensor) and isinstance(value, CachedTensor):
        layer = key.layer
        if layer is value.layer and key.update_id == value.update_id == layer.num_updates:
            return layer
    raise UnsupportedError(
        f"{type(module).__name__} attends over keys and values of which a SparseCache did not hand out both in its last "
        f"update, so the cache does not keep what is attended over. {REMEDY}"
    )


REMEDY = (
    "Generate under fl.hf.use_pattern(model, pattern) without SparseCache; transformers' own cache then keeps every key, and "
    "the tokens are the same."
)


def call_outside_graph(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, at which torch.compile breaks its graph: a cache counts tokens and evicts keys in Python."""
    return _outside_graph(function, *args, **kwargs)


def mark_for_compilers() -> None:
    """Tell torch.compile that these calls leave its graphs. Called by `register`, not at import: it loads a compiler."""
    global _outside_graph
    if _outside_graph is _call:
        reason = "a SparseCache evicts keys and attends over its own buffers; compile without fullgraph=True"
        _outside_graph = torch.compiler.disable(_call, reason=reason)


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


_outside_graph: Callable[..., Any] = _call


def _modified(tensor: CachedTensor, operation: str) -> UnsupportedError:
    return UnsupportedError(
        f"SparseCache: this model computes with the keys or values of layer {tensor.layer.number} ({operation}) after the "
        "cache took them, as models with latent attention do, so the cache does not keep what is attended over. " + REMEDY
    )


def _flatten(values: Iterable[Any]) -> Iterable[Any]:
    """The entries of nested tuples and lists."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flatten(value)
        else:
            yield value


def _is_same_view(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors read the same memory with the same shape, strides and dtype."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and a.device == b.device
        and a.stride() == b.stride()
        and a.data_ptr() == b.data_ptr()
    )
