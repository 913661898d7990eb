"""`fl.decode`: attention of the newest queries over the keys that a cache holds.

On a CPU the native kernels attend for a few queries, in one call for all stores; what a query sees is a program that they
evaluate, or a mask. Elsewhere three paths, by what the queries see: every slot of the store (no mask, one fused attention); a
prompt of which nothing has been evicted (planned, `fl.attention`); anything else (the pattern's definition evaluated on the
positions of the slots gives a mask).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from farlight.attention import attention
from farlight.decoding.cache import KVCache
from farlight.decoding.checks import refuse_gradients
from farlight.decoding.kept_attention import attend_kept
from farlight.decoding.native import NativeStores, readable
from farlight.decoding.slot_queries import SlotQueries, positions_of_columns
from farlight.decoding.store import KeyStore
from farlight.decoding.terms import DecodeTerms, read_terms
from farlight.errors import ArgumentError, PatternError
from farlight.inputs import read_scale, refuse_layouts
from farlight.patterns.expression import Pattern, Sizes
from farlight.score.terms import Score

__all__ = ["decode"]

# Number of queries from which on a prompt of which nothing was evicted is planned instead of masked.
_PLANNED_QUERIES = 64
# Entries of a mask that is evaluated at a time.
_MAX_MASK = 1 << 19


@overload
def decode(
    q: Tensor,
    cache: KVCache,
    *,
    scale: float | None = ...,
    score: Score | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def decode(
    q: Tensor,
    cache: KVCache,
    *,
    scale: float | None = ...,
    score: Score | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def decode(
    q: Tensor,
    cache: KVCache,
    *,
    scale: float | None = ...,
    score: Score | None = ...,
    sinks: Tensor | None = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def decode(
    q: Tensor,
    cache: KVCache,
    *,
    scale: float | None = None,
    score: Score | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens over every key ever appended to the cache, computed from the keys that it holds.

        out_i = Σ_j softmax_j(S_ij) v_j,   S_ij = scale · q_i · k_j      over the appended j that the cache's pattern allows i

    Args:
        q: `(B, H, n, D)`, the queries of the last n tokens of the last `append`, in the cache's dtype and on its device; H a
            multiple of the cache's key heads.
        scale: None means D^-½.
        score: terms on the scores, a value of `fl.score`: S = softcap(scale · q kᵀ) + biases. Biases are those of positions,
            wherever the cache holds a key; a `key_bias` has one column for each position so far, or more. A router chooses by
            scale · q kᵀ alone. None: those of the cache.
        sinks: `(H,)`; each row sees one more key of this score and value 0, which the lse counts. None: those of the cache.
        return_lse: also return the natural log of each row's sum of exponentials, `(B, H, n)` float32 (float64 for float64).

    Returns out `(B, H, n, D)` in q's dtype. Rows without a token (`real` was False) and rows that see no key give out 0 and lse
    -inf, with sinks the sink. The cache is unchanged: the same call again gives the same result. No gradient is recorded.

    Raises ArgumentError when q or the terms do not fit the cache, or q has more queries than the last append had tokens.
    """
    terms = None
    if score is not None or sinks is not None or (isinstance(cache, KVCache) and cache.has_terms):
        _check(q, cache)
        terms = read_terms("decode", q, cache, score, sinks, cache.length)
    out, lse = masked_decode(q, cache, scale, return_lse, None, terms)
    return (out, lse) if return_lse and lse is not None else out


def masked_decode(
    q: Tensor,
    cache: KVCache,
    scale: float | None,
    return_lse: bool,
    extra: Pattern | None = None,
    terms: DecodeTerms | None = None,
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
            result = None if native is None else native.attend_routed(readable(q, "q"), first, scale, return_lse, terms)
            if result is not None:
                return result
            k, v = cache._stores[0].read(_compute_dtype(q, cache._stores[0]))
            return cache._router_state.attend(q, k, v, scale, return_lse, terms)
        query = SlotQueries(cache, positions_of_columns(cache, start), scale, return_lse, extra, terms)
        if native is not None:
            return _attend_native(readable(q, "q"), native, query)
        if len(cache._stores) == 1:
            return _attend_store(q, cache._stores[0], query)
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        for store in cache._stores:
            heads = list(store.rule.heads)
            of_heads = query if terms is None else replace(query, terms=terms.of_heads(heads))
            out[:, heads], store_lse = _attend_store(q[:, heads], store, of_heads)
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


def _attend_native(q: Tensor, native: NativeStores, query: SlotQueries) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) of a few queries by the native kernels, over all stores."""
    if query.extra is None:
        result = native.attend(q, query.i, query.scale, query.return_lse, query.terms)
        if result is not None:
            return result
    stores = query.cache._stores
    heads = (len(store.rule.heads) if query.pattern_of(store).varies_over_heads else 1 for store in stores)
    step = max(1, _MAX_MASK // max(1, sum(store.kept * n for store, n in zip(stores, heads, strict=True)) * q.shape[0]))
    parts = []
    for first in range(0, q.shape[2], step):
        some = query.rows(first, step)
        masks = [some.mask(store) for store in stores]
        chunk = q[:, :, first : first + step]
        parts.append(native.attend_masked(chunk, some.i, masks, query.scale, query.return_lse, query.terms))
    if len(parts) == 1:
        return parts[0]
    lses = [lse for _, lse in parts if lse is not None]
    return torch.cat([out for out, _ in parts], 2), torch.cat(lses, 2) if lses else None


def _attend_store(q: Tensor, store: KeyStore, query: SlotQueries) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) of the query heads of one store."""
    k, v = store.read(_compute_dtype(q, store))
    dtype, q = q.dtype, q.to(k.dtype)
    out, lse = _attend_tensors(q, k, v, store, query)
    return out.to(dtype), lse


def _attend_tensors(q: Tensor, k: Tensor, v: Tensor, store: KeyStore, query: SlotQueries) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) of q over k and v, the slots of one store; all of one dtype."""
    kept, scale, return_lse = store.kept, query.scale, query.return_lse
    if query.extra is None and q.shape[2] == 1 and query.sees_every_slot(store):
        return attend_kept(q, k, v, None, scale=scale, return_lse=return_lse, terms=query.terms_of(store))
    pattern = query.pattern_of(store)
    if q.shape[2] >= _PLANNED_QUERIES and _nothing_evicted(query.cache, store, pattern):
        return _attend_prompt(q, k, v, store, pattern, query)
    num_masks = (q.shape[0] if pattern.varies_over_batch else len(query.i)) * (q.shape[1] if pattern.varies_over_heads else 1)
    step = max(1, _MAX_MASK // max(1, kept * num_masks))
    if q.shape[2] <= step:
        mask = query.mask(store)
        return attend_kept(q, k, v, mask, scale=scale, return_lse=return_lse, terms=query.terms_of(store))
    outs, lses = [], []
    for first in range(0, q.shape[2], step):
        some = query.rows(first, step)
        mask = some.mask(store)
        # Adjacent queries see nearly the same keys; the products leave out keys that none of the chunk sees.
        index = mask.flatten(0, 2).any(0).nonzero().squeeze(1)
        chunk = q[:, :, first : first + step], k[:, :, index], v[:, :, index], mask[..., index]
        out, lse = attend_kept(*chunk, scale=scale, return_lse=return_lse, terms=some.terms_of(store, index))
        outs.append(out)
        lses += [] if lse is None else [lse]
    return torch.cat(outs, 2), torch.cat(lses, 2) if lses else None


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
    q: Tensor, k: Tensor, v: Tensor, store: KeyStore, pattern: Pattern, query: SlotQueries
) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) of a prompt of which nothing was evicted, by `fl.attention`; one call per row where lengths differ."""
    i, scale, terms = query.i, query.scale, query.terms
    sinks = None if terms is None else terms.sinks
    if len(i) == 1 and bool((i >= 0).all()):
        score = None if terms is None else terms.score
        result = attention(q, k, v, pattern, scale=scale, score=score, sinks=sinks, return_lse=query.return_lse)
        return result if isinstance(result, tuple) else (result, None)
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    if sinks is not None:
        lse[:] = sinks.to(lse.dtype)[:, None]
    for row, count in enumerate(store.slots.count):
        items = slice(None) if len(i) == 1 else slice(row, row + 1)
        columns = torch.from_numpy((i[row] >= 0).nonzero()[0]).to(q.device)
        qkv = q[items][:, :, columns], k[items, :, :count], v[items, :, :count]
        score = None if terms is None else terms.score_of(count, items)
        row_out, row_lse = attention(*qkv, pattern, scale=scale, score=score, sinks=sinks, return_lse=True)
        out[items, :, columns], lse[items, :, columns] = row_out, row_lse
    return out, lse if query.return_lse else None


def _fits(pattern: Pattern, sizes: Sizes) -> bool:
    """Whether the pattern is valid for a text this short: it may name tokens that have not been appended yet."""
    try:
        pattern.check(sizes)
    except PatternError:
        return False
    return True
