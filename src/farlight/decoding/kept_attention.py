"""`attend_kept`: attention of a few queries over the keys in a cache, the only compute of decoding.

On a GPU a Triton kernel partitions the keys over the multiprocessors (split-K). Elsewhere, and for what that kernel does not
take, torch operations: all queries read the same key buffer, so one pair of matrix products (or torch's fused attention) covers
it; a single query that sees at most a quarter of the keys gathers those first.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from farlight.decoding.terms import KeptTerms
from farlight.kernels.sinks import with_sinks
from farlight.kernels.triton import decode as triton_decode
from farlight.ragged import expand_counts

__all__ = ["attend_kept"]

# Elements of the largest score tensor that is materialised at a time.
_MAX_SCORES = 1 << 22
# Keys are gathered when the row with most visible keys sees at most 1 / _GATHER_RATIO of them.
_GATHER_RATIO = 4


def attend_kept(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    return_lse: bool = False,
    terms: KeptTerms | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of q `(B, H, n_q, D)` over k, v `(B, H_kv, n, D)`, H a multiple of H_kv.

    mask: `(B or 1, H or 1, n_q, n)` bool, True = the query sees the key; None = every query sees every key. A row without a
    visible key gives out 0 and lse -inf, with sinks the sink. terms: on the scores, which are then materialised. Sums in
    float32, in float64 for float64; out `(B, H, n_q, D)` in q's dtype; lse `(B, H, n_q)` in the dtype of the sums, None unless
    return_lse.
    """
    if not k.shape[2] or not q.shape[2]:
        lse = torch.full(q.shape[:3], float("-inf"), dtype=_sum_dtype(q), device=q.device)
        if terms is not None and terms.sinks is not None:
            lse = terms.sinks.to(lse.dtype)[:, None].expand_as(lse).clone()
        return torch.zeros_like(q), lse if return_lse else None
    if terms is not None:
        out, lse = _in_chunks(q, k, v, mask, scale, terms)
        return out, lse if return_lse else None
    if triton_decode.serves(q, k):
        out, lse = triton_decode.decode(q, k, v, scale=scale, allowed=mask)
        return out, lse if return_lse else None
    if mask is not None and q.shape[2] == 1 and k.shape[2] >= 64:
        max_visible = int(mask.sum(-1).max())
        if max_visible * _GATHER_RATIO <= k.shape[2]:
            k, v, mask = _gather_visible(q, k, v, mask, max_visible)
            if not max_visible:
                return attend_kept(q, k, v, None, scale=scale, return_lse=return_lse)
    return _in_chunks(q, k, v, mask, scale, None) if return_lse else (_sdpa(q, k, v, mask, scale), None)


def _sum_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _in_chunks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, terms: KeptTerms | None
) -> tuple[Tensor, Tensor]:
    """`_matmul_softmax` for as many queries at a time as _MAX_SCORES allows."""
    step = max(1, _MAX_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    if q.shape[2] <= step:
        return _matmul_softmax(q, k, v, mask, scale, terms)
    chunks = []
    for rows in (slice(start, start + step) for start in range(0, q.shape[2], step)):
        chunk_terms = terms
        if terms is not None and terms.bias is not None:
            chunk_terms = dataclasses.replace(terms, bias=terms.bias if terms.bias.shape[2] == 1 else terms.bias[:, :, rows])
        chunk_mask = None if mask is None else mask[:, :, rows]
        chunks.append(_matmul_softmax(q[:, :, rows], k, v, chunk_mask, scale, chunk_terms))
    return torch.cat([out for out, _ in chunks], 2), torch.cat([lse for _, lse in chunks], 2)


def _matmul_softmax(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, terms: KeptTerms | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) by two matrix products and a materialised softmax."""
    batch, heads, n_q, dim = q.shape
    kv_heads, dtype = k.shape[1], _sum_dtype(q)
    # The queries of a group are stacked as rows: one product for each key head.
    rows = (q.to(dtype) * scale).reshape(batch, kv_heads, -1, dim)
    scores = torch.matmul(rows, k.to(dtype).transpose(2, 3))
    if terms is not None:
        scores = terms.on(scores.view(batch, heads, n_q, -1)).view(batch, kv_heads, -1, k.shape[2])
    empty = None
    if mask is not None:
        scores = scores.view(batch, heads, n_q, -1)
        # An empty row is computed unmasked and zeroed at the end: a softmax over -inf alone would be NaN.
        empty = ~mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~(mask | empty), float("-inf")).view(batch, kv_heads, -1, k.shape[2])
    lse = torch.logsumexp(scores, -1, keepdim=True)
    # softmax(scores), not exp(scores - lse): large scores round away the lse's digits below them.
    out = torch.matmul(torch.softmax(scores, -1), v.to(dtype)).view(q.shape)
    lse = lse.view(batch, heads, n_q)
    if empty is not None:
        out, lse = out.masked_fill(empty, 0.0), lse.masked_fill(empty.squeeze(-1), float("-inf"))
    if terms is not None and terms.sinks is not None:
        out, lse = with_sinks(out, lse, terms.sinks)
    return out.to(q.dtype), lse


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """out by torch's fused attention, the fastest without an lse: it reads 16-bit keys unconverted and tiles the scores."""
    empty = None
    if mask is not None:
        # An empty row is computed unmasked and zeroed: SDPA's kernels differ in what they return for it.
        empty = ~mask.any(-1, keepdim=True)
        mask = mask | empty
    kv_heads = k.shape[1]
    if mask is None or mask.shape[1] == q.shape[2] == 1:
        # The heads of a group share the mask: as queries of one key head they read its keys once.
        rows = q.reshape(q.shape[0], kv_heads, -1, q.shape[3])
        out = scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale).view(q.shape)
    else:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=kv_heads != q.shape[1])
    return out if empty is None else out.masked_fill(empty, 0.0)


def _gather_visible(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, max_visible: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The visible keys and values of a single query, and their mask (None = all visible).

    One list for all rows, `(B, H_kv, max_visible, D)`, where the mask does not vary over batch and heads; else one list per
    query head, `(B, H, max_visible, D)`, padded with key 0, which the mask `(B, H, 1, max_visible)` hides.
    """
    visible = mask.squeeze(2)
    if visible.shape[0] == visible.shape[1] == 1:
        index = visible[0, 0].nonzero().squeeze(1)
        return k.index_select(2, index), v.index_select(2, index), None
    batch, heads = q.shape[:2]
    visible = visible.expand(batch, heads, -1).flatten(0, 1)
    count = visible.sum(-1)
    key = visible.nonzero(as_tuple=True)[1]
    row, column = expand_counts(count, key.numel())
    indices = torch.zeros(batch * heads, max_visible, dtype=torch.int64, device=q.device)
    indices[row, column] = key
    item, head = (torch.arange(n, device=q.device) for n in (batch, heads))
    kv_head = head // (heads // k.shape[1])
    gather = item.view(-1, 1, 1), kv_head.view(1, -1, 1), indices.view(batch, heads, max_visible)
    if bool((count == max_visible).all()):
        return k[gather], v[gather], None
    is_key = torch.arange(max_visible, device=q.device) < count[:, None]
    return k[gather], v[gather], is_key.view(batch, heads, 1, max_visible)
