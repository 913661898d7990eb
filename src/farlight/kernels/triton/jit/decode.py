"""Decode kernels: a few queries over many keys. The keys are split over programs (split-K) and merged.

The query heads of one key head are rows of one block, so that each K/V row is loaded once for all of them.
"""

import triton
import triton.language as tl

from farlight.kernels.triton.jit.masks import head_base, load_rows, product

__all__ = ["decode_kernel", "decode_merge_kernel"]


@triton.jit(do_not_specialize=["chunk"])
def decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, allowed_ptr, part_out_ptr, part_max_ptr, part_sum_ptr,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, sab, sah, san, sak,
    kv_heads, heads_per_kv, n_q, n_k, head_dim, scale_log2, chunk, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, LENGTHS: tl.constexpr,
    MASK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(acc, row max, row sum) of one chunk of keys for BLOCK_M of the heads_per_kv · n_q rows of one key head.

    Grid: (splits, B · kv_heads, row blocks). lengths `(B,)`: real keys of each item (LENGTHS); allowed: bool with strides sa…
    (MASK); part_out `(B · H · n_q · splits, D)`, part_max and part_sum `(B · H · n_q · splits,)` float32.
    scale_log2 = scale · log2(e); chunk: keys of a split.
    """
    split = tl.program_id(0)
    batch, kv_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    valid = m < heads_per_kv * n_q
    inside = valid[:, None] & (d[None, :] < head_dim)
    head, row = kv_head * heads_per_kv + m // n_q, m % n_q
    q_rows = q_ptr + batch.to(tl.int64) * sqb + head[:, None].to(tl.int64) * sqh + row[:, None] * sqn
    q = tl.load(q_rows + d[None, :] * sqd, mask=inside, other=0.0)
    k_base = head_base(k_ptr, batch, kv_head, skb, skh, 1)
    v_base = head_base(v_ptr, batch, kv_head, svb, svh, 1)
    mask_base = allowed_ptr + batch.to(tl.int64) * sab + head[:, None].to(tl.int64) * sah + row[:, None].to(tl.int64) * san
    end = n_k
    if LENGTHS:
        end = tl.minimum(end, tl.load(lengths_ptr + batch).to(tl.int32))
    begin = split * chunk
    end = tl.minimum(end, begin + chunk)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for first in range(begin, end, BLOCK_N):
        key = first + n
        exists = key < end
        k = load_rows(k_base, key, d, skn, skd, exists, head_dim, WHOLE_D, WIDE)
        v = load_rows(v_base, key, d, svn, svd, exists, head_dim, WHOLE_D, WIDE)
        allowed = exists[None, :] & valid[:, None]
        if MASK:
            allowed = allowed & (tl.load(mask_base + key[None, :].to(tl.int64) * sak, mask=allowed, other=0) != 0)
        score = tl.where(allowed, product(q, tl.trans(k), None, PRECISION) * scale_log2, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(score, 1))
        # A finite base keeps rows that have seen nothing yet at exp2(-inf) = 0 instead of NaN.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(score - base[:, None])
        rescale = tl.exp2(row_max - base)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = product(p.to(v.dtype), v, acc * rescale[:, None], PRECISION)
        row_max = new_max
    index = ((batch.to(tl.int64) * kv_heads * heads_per_kv + head) * n_q + row) * splits + split
    tl.store(part_out_ptr + index[:, None] * head_dim + d[None, :], acc, mask=inside)
    tl.store(part_max_ptr + index, row_max, mask=valid)
    tl.store(part_sum_ptr + index, row_sum, mask=valid)


@triton.jit
def decode_merge_kernel(
    out_ptr, lse_ptr, part_out_ptr, part_max_ptr, part_sum_ptr, head_dim, splits, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out and lse of one row from its splits, BLOCK_S at a time. Grid: (B · H · n_q,)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    row_max = tl.full((), float("-inf"), tl.float32)
    for first in range(0, splits, BLOCK_S):
        part_max = tl.load(part_max_ptr + row * splits + first + s, mask=first + s < splits, other=float("-inf"))
        row_max = tl.maximum(row_max, tl.max(part_max, 0))
    base = tl.where(row_max == float("-inf"), 0.0, row_max)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    row_sum = tl.zeros((), tl.float32)
    for first in range(0, splits, BLOCK_S):
        exists = first + s < splits
        index = row * splits + first + s
        rescale = tl.exp2(tl.load(part_max_ptr + index, mask=exists, other=float("-inf")) - base)
        part = part_out_ptr + index[:, None] * head_dim + d[None, :]
        acc += tl.sum(rescale[:, None] * tl.load(part, mask=exists[:, None] & (d[None, :] < head_dim), other=0.0), 0)
        row_sum += tl.sum(rescale * tl.load(part_sum_ptr + index, mask=exists, other=0.0), 0)
    divisor = tl.where(row_sum == 0, 1.0, row_sum)
    lse = tl.where(row_sum == 0, float("-inf"), (base + tl.log2(divisor)) * 0.6931471805599453)
    tl.store(out_ptr + row * head_dim + d, (acc / divisor).to(out_ptr.dtype.element_ty), mask=d < head_dim)
    tl.store(lse_ptr + row, lse)
