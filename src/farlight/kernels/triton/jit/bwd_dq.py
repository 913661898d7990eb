"""The backward pass over queries: Δ of every row, and dq by the same lists of blocks as the forward pass.

P = exp(S - lse);   dP = dO Vᵀ;   dS = P ∘ (dP - Δ);   dQ = scale · dS K;   Δ = Σ dO ∘ O - dlse
"""

import triton
import triton.language as tl

from farlight.kernels.triton.jit.fwd import WORK_FIELDS
from farlight.kernels.triton.jit.masks import (
    BLOCK_FIELDS,
    UNSPECIALIZED,
    allowed_links,
    kept_links,
    load_rows,
    product,
    row_hashes,
)

__all__ = ["delta_kernel", "queries_kernel", "sum_kernel"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def delta_kernel(
    dout_ptr, out_ptr, dlse_ptr, delta_ptr, sdb, sdh, sdn, sdd, heads, n_q, head_dim,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, DLSE: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Δ of BLOCK_M rows of one head. `out` and `dlse` are contiguous."""
    sdb, sdh, sdn = sdb * UNIT, sdh * UNIT, sdn * UNIT
    lane = tl.program_id(1)
    batch, head = lane // heads, lane % heads
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    valid = row < n_q
    base = dout_ptr + batch.to(tl.int64) * sdb + head.to(tl.int64) * sdh
    dout = load_rows(base, row, d, sdn, sdd, valid, head_dim, WHOLE_D, WIDE)
    place = lane.to(tl.int64) * n_q + row
    out = load_rows(out_ptr, place, d, head_dim, 1, valid, head_dim, WHOLE_D, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    if DLSE:
        delta -= tl.load(dlse_ptr + place, mask=valid, other=0.0)
    tl.store(delta_ptr + place, delta, mask=valid)


@triton.jit
def _block(acc, q, dout, lse, delta, k_base, v_base, key, exists, allowed, d, skn, skd, svn, svd, head_dim, scale, hashes,
           below, grown, MASKED: tl.constexpr, WHOLE_D: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """Add what one block of keys gives to dq."""
    at = key.to(tl.int64) if WIDE else key
    k_at = k_base + at[:, None] * skn + d[None, :] * skd
    v_at = v_base + at[:, None] * svn + d[None, :] * svd
    if MASKED:
        there = exists[:, None] & (d[None, :] < head_dim)
        k, v = tl.load(k_at, mask=there, other=0.0), tl.load(v_at, mask=there, other=0.0)
    elif WHOLE_D:
        k, v = tl.load(k_at), tl.load(v_at)
    else:
        there = d[None, :] < head_dim
        k, v = tl.load(k_at, mask=there, other=0.0), tl.load(v_at, mask=there, other=0.0)
    p = tl.exp2(product(q, tl.trans(k), None, PRECISION) * scale - lse[:, None])
    if MASKED:
        p = tl.where(allowed, p, 0.0)
    dp = product(dout, tl.trans(v), None, PRECISION)
    if DROPOUT:
        dp = tl.where(kept_links(hashes[:, None], key[None, :], below), dp * grown, 0.0)
    ds = p * (dp - delta[:, None])
    return product(ds.to(k.dtype), k, acc, PRECISION)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def queries_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, part_ptr, seed_ptr,
    work_ptr, rows_ptr, keys_ptr, whole_ptr, masked_ptr, point_key_ptr, point_row_ptr, data_ptr,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, sdb, sdh, sdn, sdd,
    heads, group, n_q, head_dim, q_offset, scale, scale_log2, below, grown,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, ORDERED: tl.constexpr,
    KEYED: tl.constexpr, BITS: tl.constexpr, POINTS: tl.constexpr, DROPOUT: tl.constexpr, ADD: tl.constexpr,
    SPLIT: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sqb, sqh, sqn = sqb * UNIT, sqh * UNIT, sqn * UNIT
    skb, skh, skn = skb * UNIT, skh * UNIT, skn * UNIT
    svb, svh, svn = svb * UNIT, svh * UNIT, svn * UNIT
    sdb, sdh, sdn = sdb * UNIT, sdh * UNIT, sdn * UNIT
    work = work_ptr + tl.program_id(0).to(tl.int64) * WORK_FIELDS
    batch, head, start, count = tl.load(work), tl.load(work + 1), tl.load(work + 2), tl.load(work + 3)
    tile_row = tl.load(work + 4)
    s = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_N)
    valid = s < count
    row = start + s
    if ORDERED:
        row = tl.load(rows_ptr + row, mask=s < count * tl.load(work + 5), other=row)
    kv_head = head // group
    k_base = k_ptr + batch.to(tl.int64) * skb + kv_head.to(tl.int64) * skh
    v_base = v_ptr + batch.to(tl.int64) * svb + kv_head.to(tl.int64) * svh
    q_base = q_ptr + batch.to(tl.int64) * sqb + head.to(tl.int64) * sqh
    dout_base = dout_ptr + batch.to(tl.int64) * sdb + head.to(tl.int64) * sdh
    q = load_rows(q_base, row, d, sqn, sqd, valid, head_dim, WHOLE_D, WIDE)
    dout = load_rows(dout_base, row, d, sdn, sdd, valid, head_dim, WHOLE_D, WIDE)
    place = (batch.to(tl.int64) * heads + head) * n_q + row
    lse = tl.load(lse_ptr + place, mask=valid, other=float("-inf"))
    # Rows that see nothing have probability 0 everywhere.
    lse = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    delta = tl.load(delta_ptr + place, mask=valid, other=0.0)
    hashes = row
    if DROPOUT:
        hashes = row_hashes(seed_ptr, batch, head, row + q_offset)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for i in range(tl.load(work + 6), tl.load(work + 7)):
        key = tl.load(whole_ptr + i) + c
        acc = _block(acc, q, dout, lse, delta, k_base, v_base, key, valid, valid, d, skn, skd, svn, svd, head_dim, scale_log2,
                     hashes, below, grown, False, WHOLE_D, WIDE, DROPOUT, PRECISION)  # fmt: skip
    if KEYED:
        for i in range(tl.load(work + 8), tl.load(work + 9)):
            key = tl.load(keys_ptr + tl.load(whole_ptr + i) + c)
            acc = _block(acc, q, dout, lse, delta, k_base, v_base, key, valid, valid, d, skn, skd, svn, svd, head_dim,
                         scale_log2, hashes, below, grown, False, WHOLE_D, WIDE, DROPOUT, PRECISION)  # fmt: skip
    tile = tl.minimum(tile_row + s, tile_row + count - 1)
    for i in range(tl.load(work + 10), tl.load(work + 11)):
        block = masked_ptr + i * BLOCK_FIELDS
        slot = tl.load(block)
        exists = (c >= tl.load(block + 1)) & (c < tl.load(block + 2))
        allowed = allowed_links(c[None, :], tile[:, None], block, data_ptr, BITS)
        key = slot + c
        if KEYED:
            key = tl.load(keys_ptr + (-1 - slot) + c, mask=exists & (c < tl.where(slot < 0, BLOCK_N, 0)), other=slot + c)
        acc = _block(acc, q, dout, lse, delta, k_base, v_base, key, exists, allowed, d, skn, skd, svn, svd, head_dim,
                     scale_log2, hashes, below, grown, True, WHOLE_D, WIDE, DROPOUT, PRECISION)  # fmt: skip
    if POINTS:
        end = tl.load(work + 13)
        for i in range(tl.load(work + 12), end, BLOCK_N):
            exists = i + c < end
            key = tl.load(point_key_ptr + i + c, mask=exists, other=0)
            allowed = tl.load(point_row_ptr + i + c, mask=exists, other=-1)[None, :] == s[:, None]
            acc = _block(acc, q, dout, lse, delta, k_base, v_base, key, exists, allowed, d, skn, skd, svn, svd, head_dim,
                         scale_log2, hashes, below, grown, True, WHOLE_D, WIDE, DROPOUT, PRECISION)  # fmt: skip
    acc *= scale
    inside = valid[:, None] & (d[None, :] < head_dim)
    direct = True
    if SPLIT:
        slot = tl.load(work + 14)
        if slot >= 0:
            direct = False
            at = slot.to(tl.int64) * BLOCK_M + s
            tl.store(part_ptr + at[:, None] * head_dim + d[None, :], acc, mask=inside)
    if direct:
        pointer = dq_ptr + place[:, None] * head_dim + d[None, :]
        if ADD:
            acc += tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
        tl.store(pointer, acc.to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["heads", "n"])
def sum_kernel(
    into_ptr, part_ptr, work_ptr, rows_ptr, heads, n, head_dim,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, ORDERED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Sum the parts of split rows (or keys), in their order. Work: batch, head, first row, rows, order, first slot, parts."""
    work = work_ptr + tl.program_id(0).to(tl.int64) * 7
    batch, head, start, count = tl.load(work), tl.load(work + 1), tl.load(work + 2), tl.load(work + 3)
    slot, parts = tl.load(work + 5), tl.load(work + 6)
    s = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside = (s < count)[:, None] & (d[None, :] < head_dim)
    row = start + s
    if ORDERED:
        row = tl.load(rows_ptr + row, mask=s < count * tl.load(work + 4), other=row)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    origin = slot.to(tl.int64) * BLOCK_M + s
    for i in range(0, parts):
        place = origin + i * BLOCK_M
        acc += tl.load(part_ptr + place[:, None] * head_dim + d[None, :], mask=inside, other=0.0)
    pointer = into_ptr + ((batch.to(tl.int64) * heads + head) * n + row)[:, None] * head_dim + d[None, :]
    if ADD:
        acc += tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    tl.store(pointer, acc.to(into_ptr.dtype.element_ty), mask=inside)
