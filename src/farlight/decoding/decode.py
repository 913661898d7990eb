"""`fl.decode`: attention of the newest queries over the keys that a cache holds.

On a CPU the native kernels attend for a few queries, in one call for all stores; what a query sees is a program that they
evaluate, or a mask. Elsewhere three paths, by what the queries see: every slot of the store (no mask, one fused attention); a
prompt of which nothing has been evicted (planned, `fl.attention`); anything else (the pattern's definition evaluated on the
positions of the slots gives a mask).
"""

from __future__ import annotations

from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from farlight.attention import attention
from farlight.decoding.cache import KVCache
from farlight.decoding.checks import refuse_gradients
from farlight.decoding.kept_attention import attend_kept
from farlight.decoding.native import NativeStores, readable
from farlight.decoding.slots import IntArray
from farlight.decoding.store import KeyStore
from farlight.errors import ArgumentError, PatternError
from farlight.inputs import read_scale, refuse_layouts
from farlight.patterns.expression import Pattern, Sizes

__all__ = ["decode"]

# Number of queries from which on a prompt of which nothing was evicted is planned instead of masked.
_PLANNED_QUERIES = 64
# Entries of a mask that is evaluated at a time.
_MAX_MASK = 1 << 19


@overload
def decode(q: Tensor, cache: KVCache, *, scale: float | None = ..., return_lse: Literal[False] = ...) -> Tensor: ...


@overload
def decode(q: Tensor, cache: KVCache, *, scale: float | None = ..., return_lse: Literal[True]) -> tuple[Tensor, Tensor]: ...


@overload
def decode(q: Tensor, cache: KVCache, *, scale: float | None = ..., return_lse: bool) -> Tensor | tuple[Tensor, Tensor]: ...


def decode(
    q: Tensor, cache: KVCache, *, scale: float | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens over every key ever appended to the cache, computed from the keys that it holds.

        out_i = Σ_j softmax_j(scale · q_i · k_j) v_j      over the appended j that the cache's pattern allows i

    Args:
        q: `(B, H, n, D)`, the queries of the last n tokens of the last `append`, in the cache's dtype and on its device; H a
            multiple of the cache's key heads.
        scale: None means D^-½.
        return_lse: also return the natural log of each row's sum of exponentials, `(B, H, n)` float32 (float64 for float64).

    Returns out `(B, H, n, D)` in q's dtype. Rows without a token (`real` was False) and rows that see no key give out 0 and lse
    -inf. The cache is unchanged: the same call again gives the same result. No gradient is recorded.

    Raises ArgumentError when q does not fit the cache, or has more queries than the last append had tokens.
    """
    out, lse = masked_decode(q, cache, scale, return_lse)
    return (out, lse) if return_lse and lse is not None else out


def masked_decode(
    q: Tensor, cache: KVCache, scale: float | None, return_lse: bool, extra: Pattern | None = None
) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) of `decode` under the cache's pattern & `extra`, a pattern of the text so far (None: no more)."""
    start = _check(q, cache)
    scale = read_scale(scale, q.shape[-1])
    if q.is_meta or not q.shape[0]:  # no values to compute: shapes and dtypes only
        dtype = torch.promote_types(q.dtype, torch.float32)
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=dtype) if return_lse else None
    with torch.no_grad():
        native = cache._native_stores() if q.shape[2] < _PLANNED_QUERIES and q.numel() else None
        if cache._router_state is not None:
            first = cache._last_start[0] + start
            result = None if native is None else native.attend_routed(readable(q, "q"), first, scale, return_lse)
            if result is not None:
                return result
            k, v = cache._stores[0].read(_compute_dtype(q, cache._stores[0]))
            return cache._router_state.attend(q, k, v, scale, return_lse)
        if native is not None:
            return _attend_native(readable(q, "q"), cache, native, start, scale, return_lse, extra)
        if len(cache._stores) == 1:
            return _attend_store(q, cache, cache._stores[0], start, scale, return_lse, extra)
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        for store in cache._stores:
            heads = list(store.rule.heads)
            out[:, heads], store_lse = _attend_store(q[:, heads], cache, store, start, scale, return_lse, extra)
            if store_lse is not None:
                lse[:, heads] = store_lse
    return out, lse if return_lse else None


def _check(q: Tensor, cache: KVCache) -> int:
    """The column of the last append that is q's first query. Raises ArgumentError when q does not fit the cache."""
    if not isinstance(cache, KVCache):
        raise ArgumentError(f"decode: the cache is {type(cache).__name__}; pass the fl.KVCache that the keys were appended to.")
    cache._rollback_unfinished()
    if cache._shape is None:
        raise ArgumentError("decode: nothing was appended to the cache yet; call cache.append(k, v) first.")
    refuse_layouts(q=q)
    if not isinstance(q, Tensor) or q.dim() != 4:
        actual = f"{tuple(q.shape)}" if isinstance(q, Tensor) else type(q).__name__
        raise ArgumentError(f"decode: q is {actual}; a tensor (B, H, n, D) is needed.")
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
    if (q.dtype, q.device) != (cache._dtype, cache._device):
        raise ArgumentError(
            f"decode: q is {q.dtype} on {q.device}, but the cache holds {cache._dtype} on {cache._device}; they must agree."
        )
    refuse_gradients("decode", q)
    if q.shape[2] > cache._last_width:
        raise ArgumentError(
            f"decode: {q.shape[2]} queries, but the last append brought {cache._last_width} tokens; keys that only earlier "
            "queries see may have been evicted. Decode right after each append."
        )
    return cache._last_width - q.shape[2]


def _compute_dtype(q: Tensor, store: KeyStore) -> torch.dtype | None:
    """The dtype that keys are read in: None = as stored, which is q's. Rounded keys are multiplied in float32 at least."""
    return None if store.pages.dtype == q.dtype else torch.promote_types(q.dtype, torch.float32)


def _attend_native(
    q: Tensor, cache: KVCache, native: NativeStores, start: int, scale: float, return_lse: bool, extra: Pattern | None
) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) of a few queries by the native kernels, over all stores."""
    i = _query_positions(cache, start)
    if extra is None:
        result = native.attend(q, i, scale, return_lse)
        if result is not None:
            return result
    num_masks = (
        sum(
            store.kept * (1 if not _pattern_of(store, extra).varies_over_heads else len(store.rule.heads))
            for store in cache._stores
        )
        * q.shape[0]
    )
    step = max(1, _MAX_MASK // max(1, num_masks))
    parts = []
    for first in range(0, q.shape[2], step):
        masks = [_mask(cache, store, i[:, first : first + step], extra) for store in cache._stores]
        parts.append(native.attend_masked(q[:, :, first : first + step], masks, scale, return_lse))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], 2), torch.cat(
        [lse for _, lse in parts if lse is not None], 2
    ) if return_lse else None


def _pattern_of(store: KeyStore, extra: Pattern | None) -> Pattern:
    return store.rule.pattern if extra is None else extra & store.rule.pattern


def _attend_store(
    q: Tensor, cache: KVCache, store: KeyStore, start: int, scale: float, return_lse: bool, extra: Pattern | None
) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) of the query heads of one store; q's first query is column `start` of the last append."""
    i = _query_positions(cache, start)
    k, v = store.read(_compute_dtype(q, store))
    dtype, q = q.dtype, q.to(k.dtype)
    out, lse = _attend_tensors(q, k, v, cache, store, i, scale, return_lse, extra)
    return out.to(dtype), lse


def _attend_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    store: KeyStore,
    i: IntArray,
    scale: float,
    return_lse: bool,
    extra: Pattern | None,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) of q at positions i over k and v, the slots of one store; all of one dtype."""
    kept = store.kept
    if extra is None and q.shape[2] == 1 and _sees_every_slot(store, kept, i):
        return attend_kept(q, k, v, None, scale=scale, return_lse=return_lse)
    pattern = _pattern_of(store, extra)
    if q.shape[2] >= _PLANNED_QUERIES and _nothing_evicted(cache, store, pattern):
        return _attend_prompt(q, k, v, store, pattern, i, scale, return_lse)
    num_masks = (q.shape[0] if pattern.varies_over_batch else len(i)) * (q.shape[1] if pattern.varies_over_heads else 1)
    step = max(1, _MAX_MASK // max(1, kept * num_masks))
    if q.shape[2] <= step:
        return attend_kept(q, k, v, _mask(cache, store, i, extra), scale=scale, return_lse=return_lse)
    outs, lses = [], []
    for first in range(0, q.shape[2], step):
        mask = _mask(cache, store, i[:, first : first + step], extra)
        # Adjacent queries see nearly the same keys; the products leave out keys that none of the chunk sees.
        index = mask.flatten(0, 2).any(0).nonzero().squeeze(1)
        chunk = q[:, :, first : first + step], k[:, :, index], v[:, :, index], mask[..., index]
        out, lse = attend_kept(*chunk, scale=scale, return_lse=return_lse)
        outs.append(out)
        lses += [] if lse is None else [lse]
    return torch.cat(outs, 2), torch.cat(lses, 2) if lses else None


def _query_positions(cache: KVCache, start: int) -> IntArray:
    """`(rows, n)`: the positions of the queries of columns start … of the last append; -1 = no token."""
    if cache._last_columns is None:
        first = np.array(cache._last_start)[:, None]
        return first + np.arange(start, cache._last_width)
    out = np.full((len(cache._last_start), cache._last_width), -1, np.int64)
    for row, columns in enumerate(cache._last_columns):
        out[row, columns] = cache._last_start[row] + np.arange(columns.size)
    return out[:, start:]


def _sees_every_slot(store: KeyStore, kept: int, i: IntArray) -> bool:
    """Whether the single query of each row sees slots 0 … kept - 1: all in use, all gapless, none past its last use."""
    slots = store.slots
    return slots.count == [kept] * slots.rows and all(
        slots.every_slot_is_seen(row, int(i[row, 0])) for row in range(slots.rows)
    )


def _nothing_evicted(cache: KVCache, store: KeyStore, pattern: Pattern) -> bool:
    """Whether slot s holds position s in every row, and `fl.attention` reads the pattern as the cache does.

    The latter fails where the pattern's meaning depends on the text's final length, or on the batch item of a row.
    """
    slots, texts = store.slots, cache._sizes
    return (
        slots.count == cache._lengths
        and (slots.rows == 1 or not pattern.varies_over_batch)
        and (cache.max_length is None or set(slots.count) == {cache.max_length})
        and (not pattern.varies_over_heads or len(cache._stores) == 1)
        and all(bool((slots.position[row, :n] == np.arange(n)).all()) for row, n in enumerate(slots.count))
        and all(_fits(pattern, Sizes(n, n, 0, texts.batch if slots.rows == 1 else 1, texts.heads)) for n in set(slots.count))
    )


def _attend_prompt(
    q: Tensor, k: Tensor, v: Tensor, store: KeyStore, pattern: Pattern, i: IntArray, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) of a prompt of which nothing was evicted, by `fl.attention`; one call per row where lengths differ."""
    if len(i) == 1 and bool((i >= 0).all()):
        result = attention(q, k, v, pattern, scale=scale, return_lse=return_lse)
        return result if isinstance(result, tuple) else (result, None)
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for row, count in enumerate(store.slots.count):
        items = slice(None) if len(i) == 1 else slice(row, row + 1)
        columns = torch.from_numpy((i[row] >= 0).nonzero()[0]).to(q.device)
        qkv = q[items][:, :, columns], k[items, :, :count], v[items, :, :count]
        row_out, row_lse = attention(*qkv, pattern, scale=scale, return_lse=True)
        out[items, :, columns], lse[items, :, columns] = row_out, row_lse
    return out, lse if return_lse else None


def _fits(pattern: Pattern, sizes: Sizes) -> bool:
    """Whether the pattern is valid for a text this short: it may name tokens that have not been appended yet."""
    try:
        pattern.check(sizes)
    except PatternError:
        return False
    return True


def _mask(cache: KVCache, store: KeyStore, i: IntArray, extra: Pattern | None) -> Tensor:
    """`(B or 1, H or 1, n, kept)` bool: which slots the queries at positions i `(rows, n)` see."""
    device, slots, kept = store.pages.device, store.slots, store.kept
    query = torch.from_numpy(np.ascontiguousarray(i)).to(device)[:, None, :, None]
    key = torch.from_numpy(slots.position[:, :kept]).to(device)[:, None, None, :]
    mask = _allowed(store.rule.pattern, cache._sizes, store, query, key.clamp(min=0)) & (query >= 0)
    if extra is not None:
        width, length = cache._last_width, cache.length
        sizes = Sizes(width, length, length - width, cache._sizes.batch, cache._sizes.heads)
        extra.check(sizes)
        mask = mask & _allowed(extra, sizes, store, query, key)
    if len(set(slots.count)) > 1:
        count = torch.tensor(slots.count, device=device).view(-1, 1, 1, 1)
        mask = mask & (torch.arange(kept, device=device) < count)
    return mask.expand(torch.broadcast_shapes(mask.shape, (1, 1, i.shape[1], kept)))


def _allowed(pattern: Pattern, sizes: Sizes, store: KeyStore, i: Tensor, j: Tensor) -> Tensor:
    """The pattern's definition at the pairs (i, j), for the batch items and query heads of the store that it tells apart."""
    b = torch.arange(sizes.batch if pattern.varies_over_batch else 1, device=i.device).view(-1, 1, 1, 1)
    h = torch.tensor(store.rule.heads if pattern.varies_over_heads else (0,), device=i.device).view(1, -1, 1, 1)
    return pattern._allows(sizes, b, h, i, j)
