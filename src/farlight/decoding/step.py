"""`fl.step`: append one token and attend over the cache in one call, the loop body of generation."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from farlight.decoding.cache import KVCache
from farlight.decoding.decode import decode
from farlight.decoding.terms import read_terms
from farlight.errors import ArgumentError
from farlight.inputs import read_scale
from farlight.score.terms import Score

__all__ = ["step"]


@overload
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    *,
    scale: float | None = ...,
    score: Score | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    *,
    scale: float | None = ...,
    score: Score | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    *,
    scale: float | None = ...,
    score: Score | None = ...,
    sinks: Tensor | None = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    *,
    scale: float | None = None,
    score: Score | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`cache.append(k, v)`, then `fl.decode(q, cache)`: the attention of new tokens over every key the pattern allows them.

        out_i = Σ_j softmax_j(S_ij) v_j,   S_ij = scale · q_i · k_j      over the appended j that the pattern allows i

    These tokens are among the j.

    For one token on a CPU both are one call of the native kernels.

    Args:
        q: `(B, H, n, D)`; k, v: `(B, H_kv, n, D)`: queries, keys and values of the next n tokens, as for `KVCache.append` and
            `fl.decode`.
        scale: None means D^-½.
        score, sinks: terms on the scores and attention sinks, as for `fl.decode`; None: those of the cache.
        return_lse: also return the natural log of each row's sum of exponentials, `(B, H, n)` float32 (float64 for float64).

    Returns out `(B, H, n, D)` in q's dtype. Raises ArgumentError as `append` and `decode` do; where q does not fit, before
    anything is appended.

    >>> import torch, farlight as fl
    >>> cache = fl.KVCache(fl.presets.streaming(4, 16))
    >>> for _ in range(100):
    ...     out = fl.step(*torch.randn(3, 1, 2, 1, 8).unbind(0), cache)
    >>> out.shape, cache.length, cache.kept
    (torch.Size([1, 2, 1, 8]), 100, 20)
    """
    fast = _native_step(q, k, v, cache, scale, score, sinks, return_lse)
    if fast is not None:
        return fast
    _check(q, k, cache)
    if score is not None or sinks is not None or cache.has_terms:
        read_terms("step", q, cache, score, sinks, cache.length + q.shape[2])  # what does not fit raises before the append
    cache.append(k, v)
    return decode(q, cache, scale=scale, score=score, sinks=sinks, return_lse=return_lse)


def _check(q: Tensor, k: Tensor, cache: KVCache) -> None:
    """Raise ArgumentError where q cannot be the queries of the tokens k."""
    if not isinstance(cache, KVCache):
        raise ArgumentError(f"step: the cache is {type(cache).__name__}; pass a fl.KVCache.")
    if not all(isinstance(x, Tensor) and x.dim() == 4 for x in (q, k)):
        raise ArgumentError("step: q and k must be tensors (B, H, n, D) and (B, H_kv, n, D).")
    fits = q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:] and k.shape[1] and not q.shape[1] % k.shape[1]
    if not fits or (q.dtype, q.device) != (k.dtype, k.device):
        raise ArgumentError(
            f"step: q is {tuple(q.shape)} of {q.dtype} on {q.device}, k is {tuple(k.shape)} of {k.dtype} on {k.device}; "
            "all but the heads must agree, and the heads of q be a multiple."
        )


def _native_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    scale: float | None,
    score: Score | None,
    sinks: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor] | None:
    """One token by one native call; None, and nothing changed, where the general path must check or reallocate."""
    native = cache._native if type(cache) is KVCache else None
    if native is None or not native.serves_steps or cache._appending or cache._last_columns is not None or not _is_eager():
        return None
    position = cache._lengths[0]
    if position == cache.max_length:
        return None
    scale, terms = native.scale if scale is None else read_scale(scale, native.token_shape[3]), None
    if score is not None or sinks is not None or cache.score is not None or cache.sinks is not None:
        if not native.fits_token(q, k, v):
            return None
        terms = read_terms("step", q, cache, score, sinks, position + 1)
    cache._appending = True
    result = native.step(q, k, v, position, scale, return_lse, terms)
    if result is None:
        cache._appending = False
        return None
    if native.router_state is not None:
        native.router_state.set_length(position + 1)
    vars(cache).update(
        _last_start=cache._lengths,
        _last_width=1,
        _lengths=[position + 1],
        _num_columns=cache._num_columns + 1,
        _appending=False,
    )
    out, lse = result
    if out is None:
        return decode(q, cache, scale=scale, score=score, sinks=sinks, return_lse=return_lse)
    return out if lse is None else (out, lse)


def _is_eager() -> bool:
    """Whether nothing records or transforms the calls of torch."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0:  # type: ignore[attr-defined]
        return False
    return torch._C._functorch.peek_interpreter_stack() is None
