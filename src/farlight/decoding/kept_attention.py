"""Attention of a few queries over the keys that were kept: the one place where decoding computes.

On a GPU a Triton kernel splits the keys over the processors. Elsewhere, and for what it does not take, plain torch:
a batch of queries sees the same list of keys, so this is a pair of matrix products over everything kept; where each query
sees little of it, what it sees is gathered first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from farlight.kernels.triton import decode as triton_decode

__all__ = ["attend_kept"]

# Scores held at a time, in elements.
_SCORES = 1 << 22
# Keys are gathered when the fullest row sees less than one in so many.
_SPARSE = 4


def attend_kept(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of `q` `(B, H, n_q, D)` over `k`, `v` `(B, H_kv, n, D)`, H a multiple of H_kv.

    `mask` `(B|1, H|1, n_q, n)` bool says who sees what; None = every query sees every key. A row that sees nothing gives 0 and
    -inf. Sums are in float32, in float64 for float64; `out` has q's type, lse is None unless asked for.
    """
    if not k.shape[2] or not q.shape[2]:
        lse = torch.full(q.shape[:3], float("-inf"), dtype=_sums(q), device=q.device)
        return torch.zeros_like(q), lse if return_lse else None
    if triton_decode.serves(q, k):
        out, lse = triton_decode.decode(q, k, v, scale=scale, allowed=mask)
        return out, lse if return_lse else None
    if mask is not None and q.shape[2] == 1 and k.shape[2] >= 64:
        most = int(mask.sum(-1).max())
        if most * _SPARSE <= k.shape[2]:
            k, v, mask = _gathered(q, k, v, mask, most)
            if not most:
                return attend_kept(q, k, v, None, scale=scale, return_lse=return_lse)
    if not return_lse:
        return _by_sdpa(q, k, v, mask, scale), None
    step = max(1, _SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    if q.shape[2] <= step:
        return _by_products(q, k, v, mask, scale)
    parts = [
        _by_products(q[:, :, at], k, v, None if mask is None else mask[:, :, at], scale)
        for at in (slice(start, start + step) for start in range(0, q.shape[2], step))
    ]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _sums(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Two matrix products with a softmax between them, whose sum becomes the lse."""
    batch, heads, n_q, dim = q.shape
    kv_heads, kind = k.shape[1], _sums(q)
    # The queries of a group stand below one another: one product for each head of keys.
    rows = (q.to(kind) * scale).reshape(batch, kv_heads, -1, dim)
    scores = torch.matmul(rows, k.to(kind).transpose(2, 3))
    blind = None
    if mask is not None:
        scores = scores.view(batch, heads, n_q, -1)
        # A row that sees nothing takes part as if it saw everything and is blanked at the end: no NaN.
        blind = ~mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~(mask | blind), float("-inf")).view(batch, kv_heads, -1, k.shape[2])
    lse = torch.logsumexp(scores, -1, keepdim=True)
    # Not exp(scores - lse): where scores are large the lse has no digits left for the logarithm of their number.
    out = torch.matmul(torch.softmax(scores, -1), v.to(kind)).view(q.shape)
    lse = lse.view(batch, heads, n_q)
    if blind is not None:
        out, lse = out.masked_fill(blind, 0.0), lse.masked_fill(blind.squeeze(-1), float("-inf"))
    return out.to(q.dtype), lse


def _by_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """torch's fused attention, the fastest there is without an lse: it reads 16-bit keys as they are and holds few scores."""
    blind = None
    if mask is not None:
        # As above; SDPA's own answer for a row that sees nothing differs between its kernels.
        blind = ~mask.any(-1, keepdim=True)
        mask = mask | blind
    kv_heads = k.shape[1]
    if mask is None or mask.shape[1] == q.shape[2] == 1:
        # The heads of a group see the same: they are a run of queries on one head of keys, which are then read once.
        rows = q.reshape(q.shape[0], kv_heads, -1, q.shape[3])
        out = scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale).view(q.shape)
    else:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=kv_heads != q.shape[1])
    return out if blind is None else out.masked_fill(blind, 0.0)


def _gathered(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The seen keys alone, `most` for each row of a single query, and the mask among them (None = all are seen)."""
    seen = mask.squeeze(2)
    if seen.shape[0] == seen.shape[1] == 1:
        index = seen[0, 0].nonzero().squeeze(1)
        return k.index_select(2, index), v.index_select(2, index), None
    batch, heads = q.shape[:2]
    seen = seen.expand(batch, heads, -1)
    row, key = seen.flatten(0, 1).nonzero(as_tuple=True)
    count = seen.flatten(0, 1).sum(-1)
    place = torch.arange(row.numel(), device=q.device) - (count.cumsum(0) - count)[row]
    order = torch.zeros(batch * heads, most, dtype=torch.int64, device=q.device)
    order[row, place] = key
    item, head = (torch.arange(n, device=q.device) for n in (batch, heads))
    of_head = torch.div(head, heads // k.shape[1], rounding_mode="floor")
    at = item.view(-1, 1, 1), of_head.view(1, -1, 1), order.view(batch, heads, most)
    still = torch.arange(most, device=q.device) < count[:, None]
    return k[at], v[at], None if bool((count == most).all()) else still.view(batch, heads, 1, most)
