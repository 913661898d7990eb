"""Checks of the arguments of `KVCache.append`, `fl.decode` and `fl.step`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from farlight.errors import ArgumentError, UnsupportedError, refuse_tracing, show
from farlight.inputs import even_widths, refuse_layouts
from farlight.score.terms import KeyBias, Score

if TYPE_CHECKING:
    from farlight.decoding.cache import KVCache

__all__ = ["check_items", "check_real", "check_score", "check_tokens", "read_dtype", "refuse_gradients"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_STORED = {"int8": torch.int8, torch.int8: torch.int8} | {dtype: dtype for dtype in _DTYPES}


def read_dtype(dtype: Any) -> torch.dtype | None:
    """The element type of stored keys and values. Raises ArgumentError."""
    if dtype is None:
        return None
    stored = _STORED.get(dtype) if isinstance(dtype, str | torch.dtype) else None
    if stored is None:
        raise ArgumentError(
            f"KVCache: dtype = {show(dtype)}: use 'int8', torch.float16, torch.bfloat16, torch.float32 or torch.float64, or "
            "None for that of the appended keys."
        )
    return stored


def check_tokens(cache: KVCache, k: Tensor, v: Tensor) -> None:
    """Raise ArgumentError unless k and v are alike, of a supported dtype, and fit the cache."""
    refuse_layouts(k=k, v=v)
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 4 or x.dtype not in _DTYPES:
            actual = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentError(
                f"KVCache.append: {name} is {actual}; (B, H_kv, n, D) in float16, bfloat16, float32 or float64 is needed."
            )
    if k.shape != v.shape or k.dtype != v.dtype or k.device != v.device:
        raise ArgumentError(
            f"KVCache.append: k is {tuple(k.shape)} of {k.dtype} on {k.device}, v is {tuple(v.shape)} of {v.dtype} on "
            f"{v.device}; they must agree" + (f": {even_widths(k.shape[3], v.shape[3])}" if k.shape[3] != v.shape[3] else ".")
        )
    refuse_gradients("KVCache.append", k, v)
    if cache._shape is None:
        if not (k.shape[1] and k.shape[3]):
            raise ArgumentError(f"KVCache.append: k is {tuple(k.shape)}: heads and head_dim must be at least 1.")
        return
    if (k.shape[0], k.shape[1], k.shape[3]) != cache._shape:
        b, h, d = cache._shape
        raise ArgumentError(f"KVCache.append: k is {tuple(k.shape)}, but the cache holds ({b}, {h}, …, {d}); use a new cache.")
    if (k.dtype, k.device) != (cache._dtype, cache._device):
        raise ArgumentError(
            f"KVCache.append: k is {k.dtype} on {k.device}, but the cache holds {cache._dtype} on {cache._device}; "
            "cast or move it, or use a new cache."
        )


def check_real(real: Any, k: Tensor) -> Tensor:
    """`real` as a bool CPU tensor `(B, n)`. Raises ArgumentError."""
    mask = torch.as_tensor(real, device="cpu")
    shape = (k.shape[0], k.shape[2])
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise ArgumentError(
            f"KVCache.append: real is {tuple(mask.shape)} of {mask.dtype}; bool {shape}, True where there is a token, "
            "is needed."
        )
    return mask


def check_score(what: str, score: Any, sinks: Any) -> None:
    """Raise ArgumentError unless score is a value of `fl.score` or None, and sinks a tensor or None."""
    if score is not None and not isinstance(score, Score):
        raise ArgumentError(
            f"{what}: score is {type(score).__name__}; pass a value of fl.score, such as fl.score.alibi(slopes)."
        )
    if sinks is not None and not (isinstance(sinks, Tensor) and sinks.is_floating_point()):
        raise ArgumentError(f"{what}: sinks is {show(sinks)}; pass a floating-point tensor (H,).")


def check_items(cache: KVCache, items: Any) -> Tensor:
    """`items` as int64 batch items `(n,)` that may replace those of the cache. Raises ArgumentError."""
    index = torch.as_tensor(items, device="cpu")
    if index.dim() != 1 or index.dtype.is_floating_point or index.dtype == torch.bool or not index.numel():
        raise ArgumentError(f"KVCache.select: {show(items)} is not a list of batch items; pass whole numbers.")
    if cache._shape is None:
        raise ArgumentError("KVCache.select: nothing was appended yet, so there are no batch items to choose from.")
    batch = cache._shape[0]
    if int(index.min()) < 0 or int(index.max()) >= batch:
        raise ArgumentError(f"KVCache.select: {show(index)} for a batch of {batch}; use 0 … {batch - 1}.")
    by_item = cache.score is not None and any(
        isinstance(term, KeyBias) and term.bias.shape[0] > 1 for term in cache.score.terms
    )
    if index.tolist() == list(range(batch)):
        return index
    if cache.pattern.varies_over_batch:
        raise ArgumentError(
            "KVCache.select: the pattern has tables of its own for each batch item, which cannot follow; use one pattern for "
            "all, and `real` for texts of different lengths."
        )
    if by_item:
        raise ArgumentError(
            "KVCache.select: the score has tables of its own for each batch item, which cannot follow; pass it to each "
            "fl.decode."
        )
    return index


def refuse_gradients(what: str, *tensors: Tensor) -> None:
    """Raise where autograd, forward-mode AD or tracing would record the call `what`: decoding has no derivatives."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ArgumentError(
            f"{what}: an input requires grad, but decoding records no gradients, since evicted keys could get none. "
            "Use torch.no_grad() or .detach(); for training use fl.attention."
        )
    if forward_ad._current_level >= 0:
        raise UnsupportedError(
            f"{what}: called inside a forward-mode derivative (jvp, jacfwd, linearize, dual numbers), but decoding records no "
            "derivatives. Use fl.attention(…, backend='reference')."
        )
    refuse_tracing(what)
