"""Decoding: a few queries against many keys. Keys are split over programs, the query heads of a key head share its keys."""

import triton
import triton.language as tl

from farlight.kernels.triton.jit.masks import load_rows, product

__all__ = ["decode_kernel", "join_kernel"]


@triton.jit(do_not_specialize=["chunk"])
def decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, allowed_ptr, part_out_ptr, part_lse_ptr,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, sab, sah, san, sak,
    kv_heads, group, n_q, n_k, head_dim, scale, chunk, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, LENGTHS: tl.constexpr,
    MASK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of keys for BLOCK_M of the group · n_q rows of one key head; `scale` holds log2(e)."""
    split = tl.program_id(0)
    lane = tl.program_id(1)
    batch, kv_head = lane // kv_heads, lane % kv_heads
    r = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_N)
    valid = r < group * n_q
    head, row = kv_head * group + r // n_q, r % n_q
    q_at = q_ptr + batch.to(tl.int64) * sqb + head[:, None].to(tl.int64) * sqh + row[:, None] * sqn + d[None, :] * sqd
    q = tl.load(q_at, mask=valid[:, None] & (d[None, :] < head_dim), other=0.0)
    k_base = k_ptr + batch.to(tl.int64) * skb + kv_head.to(tl.int64) * skh
    v_base = v_ptr + batch.to(tl.int64) * svb + kv_head.to(tl.int64) * svh
    mask_base = allowed_ptr + batch.to(tl.int64) * sab + head[:, None].to(tl.int64) * sah + row[:, None].to(tl.int64) * san
    end = n_k
    if LENGTHS:
        end = tl.minimum(end, tl.load(lengths_ptr + batch).to(tl.int32))
    start = split * chunk
    end = tl.minimum(end, start + chunk)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for at in range(start, end, BLOCK_N):
        key = at + c
        exists = key < end
        k = load_rows(k_base, key, d, skn, skd, exists, head_dim, WHOLE_D, WIDE)
        v = load_rows(v_base, key, d, svn, svd, exists, head_dim, WHOLE_D, WIDE)
        seen = exists[None, :] & valid[:, None]
        if MASK:
            mask_at = mask_base + key[None, :].to(tl.int64) * sak
            seen = seen & (tl.load(mask_at, mask=seen, other=0) != 0)
        score = tl.where(seen, product(q, tl.trans(k), None, PRECISION) * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(score - base[:, None])
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(p, 1)
        acc = product(p.to(v.dtype), v, acc * fade[:, None], PRECISION)
        peak = higher
    some = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, peak + tl.log2(some), float("-inf"))
    lse = tl.where(total != total, total, lse)
    place = ((batch.to(tl.int64) * kv_heads * group + head) * n_q + row) * splits + split
    tl.store(part_out_ptr + place[:, None] * head_dim + d[None, :], acc / some[:, None],
             mask=valid[:, None] & (d[None, :] < head_dim))  # fmt: skip
    tl.store(part_lse_ptr + place, lse, mask=valid)


@triton.jit
def join_kernel(out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, head_dim, splits, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """Join the splits of one row by their lse (in powers of two)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    top = tl.full((), float("-inf"), tl.float32)
    for at in range(0, splits, BLOCK_S):
        lse = tl.load(part_lse_ptr + row * splits + at + s, mask=at + s < splits, other=float("-inf"))
        top = tl.maximum(top, tl.max(lse, 0))
    base = tl.where(top == float("-inf"), 0.0, top)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    total = tl.zeros((), tl.float32)
    for at in range(0, splits, BLOCK_S):
        there = at + s < splits
        weight = tl.exp2(tl.load(part_lse_ptr + row * splits + at + s, mask=there, other=float("-inf")) - base)
        parts = part_out_ptr + (row * splits + at + s)[:, None] * head_dim + d[None, :]
        acc += tl.sum(weight[:, None] * tl.load(parts, mask=there[:, None] & (d[None, :] < head_dim), other=0.0), 0)
        total += tl.sum(weight, 0)
    some = tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + row * head_dim + d, (acc / some).to(out_ptr.dtype.element_ty), mask=d < head_dim)
    tl.store(lse_ptr + row, tl.where(total == 0, float("-inf"), (base + tl.log2(some)) * 0.6931471805599453))
