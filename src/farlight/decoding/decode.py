"""`fl.decode`: the answers for the newest queries, from the keys that a cache has kept."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from farlight.attention import attention
from farlight.decoding.cache import KVCache, refuse_gradients
from farlight.decoding.kept_attention import attend_kept
from farlight.decoding.slots import Numbers
from farlight.decoding.store import Store
from farlight.errors import ArgumentError, PatternError
from farlight.inputs import read_scale, refuse_layouts
from farlight.patterns.expression import Pattern, Sizes

__all__ = ["decode"]

# From this many queries on, a prompt of which nothing was dropped goes through the planner.
_PROMPT = 64


def decode(
    q: Tensor, cache: KVCache, *, scale: float | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens over everything appended to the cache, computed from what it kept.

        out[i] = Σ_j softmax_j(scale · q_i · k_j) v_j   over the appended j that the pattern lets i see

    Args:
        q: `(B, H, n, D)`, the queries of the last n tokens of the last `append`, in the cache's type; H a multiple of the heads
            of keys.
        scale: None means D^-½.
        return_lse: also return the natural log of each row's sum of exponentials, `(B, H, n)` float32 (float64 for float64).

    Returns out `(B, H, n, D)`; rows without a token (`real` was False) give 0 and -inf, like rows that see nothing. The
    cache is not changed, so that asking twice gives the same. No gradient is recorded.

    Raises ArgumentError when q does not fit the cache or asks for tokens before the last append.
    """
    out, lse = answer(q, cache, scale, return_lse)
    return (out, lse) if return_lse and lse is not None else out


def answer(
    q: Tensor, cache: KVCache, scale: float | None, return_lse: bool, also: Pattern | None = None
) -> tuple[Tensor, Tensor | None]:
    """`decode` where queries see only what `also` allows them too, a pattern of the text so far: (out, lse or None)."""
    start = _check(q, cache)
    factor = read_scale(scale, q.shape[-1])
    if q.is_meta or not q.shape[0]:  # nothing to compute: the shapes are the answer
        kind = torch.promote_types(q.dtype, torch.float32)
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=kind) if return_lse else None
    with torch.no_grad():
        if cache._routed is not None:
            store = cache._stores[0]
            return cache._routed.answer(q, store.k[:, :, : store.kept], store.v[:, :, : store.kept], factor, return_lse)
        if len(cache._stores) == 1:
            return _answer(q, cache, cache._stores[0], start, factor, return_lse, also)
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        for store in cache._stores:
            heads = list(store.rule.heads)
            out[:, heads], part = _answer(q[:, heads], cache, store, start, factor, return_lse, also)
            if part is not None:
                lse[:, heads] = part
    return out, lse if return_lse else None


def _check(q: Tensor, cache: KVCache) -> int:
    """The column of the last append that q begins with."""
    if not isinstance(cache, KVCache):
        raise ArgumentError(f"decode: the cache is {type(cache).__name__}; pass the fl.KVCache that the keys were appended to.")
    cache._settle()
    if cache._shape is None:
        raise ArgumentError("decode: nothing was appended to the cache yet; call cache.append(k, v) first.")
    refuse_layouts(q=q)
    if not isinstance(q, Tensor) or q.dim() != 4:
        found = f"{tuple(q.shape)}" if isinstance(q, Tensor) else type(q).__name__
        raise ArgumentError(f"decode: q is {found}; a tensor (B, H, n, D) is needed.")
    batch, kv_heads, dim = cache._shape
    heads = cache._sizes.heads
    if q.shape[0] != batch or q.shape[3] != dim or q.shape[1] % kv_heads:
        raise ArgumentError(
            f"decode: q is {tuple(q.shape)}, but the cache holds ({batch}, {kv_heads}, …, {dim}); batch and head_dim must "
            "agree, and the heads be a multiple."
        )
    if q.shape[1] != heads and cache.pattern.varies_over_heads:
        raise ArgumentError(
            f"decode: q has {q.shape[1]} heads, but the cache was made for {heads}, and its pattern differs from head to head; "
            f"make it with KVCache(pattern, heads={q.shape[1]})."
        )
    if (q.dtype, q.device) != cache._kind:
        raise ArgumentError(
            f"decode: q is {q.dtype} on {q.device}, but the cache holds {cache._kind[0]} on {cache._kind[1]}; they must agree."
        )
    refuse_gradients("decode", q)
    if q.shape[2] > cache._width:
        raise ArgumentError(
            f"decode: {q.shape[2]} queries, but the last append brought {cache._width} tokens; keys that only earlier queries "
            "see may be gone. Ask right after each append."
        )
    return cache._width - q.shape[2]


def _answer(
    q: Tensor, cache: KVCache, store: Store, start: int, scale: float, return_lse: bool, also: Pattern | None
) -> tuple[Tensor, Tensor | None]:
    kept = store.kept
    i = _query_positions(cache, start)
    k, v = store.k[:, :, :kept], store.v[:, :, :kept]
    if also is None and q.shape[2] == 1 and _all_seen(store, kept, i):
        return attend_kept(q, k, v, None, scale=scale, return_lse=return_lse)
    pattern = store.rule.pattern if also is None else also & store.rule.pattern
    if q.shape[2] >= _PROMPT and _is_whole(cache, store, pattern):
        return _prompt(q, k, v, store, pattern, i, scale, return_lse)
    masks = (q.shape[0] if pattern.varies_over_batch else len(i)) * (q.shape[1] if pattern.varies_over_heads else 1)
    step = max(1, _PAIRS // max(1, kept * masks))
    if q.shape[2] <= step:
        return attend_kept(q, k, v, _mask(cache, store, i, also), scale=scale, return_lse=return_lse)
    outs, lses = [], []
    for first in range(0, q.shape[2], step):
        mask = _mask(cache, store, i[:, first : first + step], also)
        # Neighbours see nearly the same keys: all others stay out of their products.
        index = mask.flatten(0, 2).any(0).nonzero().squeeze(1)
        part = q[:, :, first : first + step], k[:, :, index], v[:, :, index], mask[..., index]
        out, lse = attend_kept(*part, scale=scale, return_lse=return_lse)
        outs.append(out)
        lses += [] if lse is None else [lse]
    return torch.cat(outs, 2), torch.cat(lses, 2) if lses else None


# Pairs whose visibility is asked at a time.
_PAIRS = 1 << 19


def _query_positions(cache: KVCache, start: int) -> Numbers:
    """`(rows, n)`: where the queries of columns `start` … stand; -1 = no token."""
    if cache._columns is None:
        first = np.array(cache._start)[:, None]
        return first + np.arange(start, cache._width)
    out = np.full((len(cache._start), cache._width), -1, np.int64)
    for row, columns in enumerate(cache._columns):
        out[row, columns] = cache._start[row] + np.arange(columns.size)
    return out[:, start:]


def _all_seen(store: Store, kept: int, i: Numbers) -> bool:
    """Whether the one query of each row sees every slot: each row is full, and no key was passed over or is past its last."""
    slots = store.slots
    return all(
        slots.count[row] == kept and not slots.gaps[row] and slots.soonest[row] >= i[row, 0] >= 0 for row in range(slots.rows)
    )


def _is_whole(cache: KVCache, store: Store, pattern: Pattern) -> bool:
    """Whether nothing was dropped yet and `fl.attention` would read the pattern as it is meant here."""
    slots, texts = store.slots, cache._sizes
    return (
        slots.count == cache._lengths
        and (slots.rows == 1 or not pattern.varies_over_batch)
        and (cache.max_length is None or set(slots.count) == {cache.max_length})
        and (not pattern.varies_over_heads or len(cache._stores) == 1)
        and all(bool((slots.position[row, :n] == np.arange(n)).all()) for row, n in enumerate(slots.count))
        and all(_fits(pattern, Sizes(n, n, 0, texts.batch if slots.rows == 1 else 1, texts.heads)) for n in set(slots.count))
    )


def _prompt(
    q: Tensor, k: Tensor, v: Tensor, store: Store, pattern: Pattern, i: Numbers, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The answers for a prompt of which nothing was dropped, through the planner; texts of different lengths one by one."""
    if len(i) == 1 and bool((i >= 0).all()):
        found = attention(q, k, v, pattern, scale=scale, return_lse=return_lse)
        return found if isinstance(found, tuple) else (found, None)
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for row, count in enumerate(store.slots.count):
        items = slice(None) if len(i) == 1 else slice(row, row + 1)
        real = torch.from_numpy((i[row] >= 0).nonzero()[0]).to(q.device)
        own = q[items][:, :, real], k[items, :, :count], v[items, :, :count]
        found = attention(*own, pattern, scale=scale, return_lse=True)
        out[items, :, real], lse[items, :, real] = found[0], found[1]
    return out, lse if return_lse else None


def _fits(pattern: Pattern, sizes: Sizes) -> bool:
    """Whether the pattern can be asked about so short a text: it may name tokens that are still to come."""
    try:
        pattern.check(sizes)
    except PatternError:
        return False
    return True


def _mask(cache: KVCache, store: Store, i: Numbers, also: Pattern | None) -> Tensor:
    """`(B|1, H|1, n, kept)`: who sees which slot, for queries at the positions i `(rows, n)`."""
    device, slots, kept = store.k.device, store.slots, store.kept
    row = torch.from_numpy(np.ascontiguousarray(i)).to(device)[:, None, :, None]
    column = torch.from_numpy(slots.position[:, :kept]).to(device)[:, None, None, :]
    seen = _seen(store.rule.pattern, cache._sizes, store, row, column.clamp(min=0)) & (row >= 0)
    if also is not None:
        sizes = Sizes(cache._width, cache.length, cache.length - cache._width, cache._sizes.batch, cache._sizes.heads)
        also.check(sizes)
        seen = seen & _seen(also, sizes, store, row, column)
    if len(set(slots.count)) > 1:
        count = torch.tensor(slots.count, device=device).view(-1, 1, 1, 1)
        seen = seen & (torch.arange(kept, device=device) < count)
    return seen.expand(torch.broadcast_shapes(seen.shape, (1, 1, i.shape[1], kept)))


def _seen(pattern: Pattern, sizes: Sizes, store: Store, i: Tensor, j: Tensor) -> Tensor:
    b = torch.arange(sizes.batch if pattern.varies_over_batch else 1, device=i.device).view(-1, 1, 1, 1)
    h = torch.tensor(store.rule.heads if pattern.varies_over_heads else (0,), device=i.device).view(1, -1, 1, 1)
    return pattern._allows(sizes, b, h, i, j)
