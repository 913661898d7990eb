"""The forward kernel: one program holds some query rows and streams their blocks of keys through an online softmax.

Three loops: whole blocks, without any mask; blocks at the edges of what the rows see, with bounds or bits; keys gathered one
by one, a block's worth at a time, where each row is allowed its own. Exponentials are powers of two: the factor log2(e) is in
the scale.
"""

import triton
import triton.language as tl

from farlight.kernels.triton.jit.masks import (
    BLOCK_FIELDS,
    UNSPECIALIZED,
    allowed_links,
    kept_links,
    load_rows,
    product,
    row_hashes,
)

__all__ = ["WORK_FIELDS", "forward_kernel"]

# batch, head, first row, rows, place in the plan's tile, sorted, then from and to of whole, keyed, masked, points; slot of the
# workspace, -1 = none
WORK_FIELDS = tl.constexpr(15)


@triton.jit
def _load_across(base, key, d, stride_n, stride_d, head_dim, WHOLE_D: tl.constexpr, WIDE: tl.constexpr):
    """`(D, keys)` where every key exists."""
    at = key.to(tl.int64) if WIDE else key
    pointer = base + d[:, None] * stride_d + at[None, :] * stride_n
    if WHOLE_D:
        return tl.load(pointer)
    return tl.load(pointer, mask=d[:, None] < head_dim, other=0.0)


@triton.jit
def _load_down(base, key, d, stride_n, stride_d, head_dim, WHOLE_D: tl.constexpr, WIDE: tl.constexpr):
    """`(keys, D)` where every key exists."""
    at = key.to(tl.int64) if WIDE else key
    pointer = base + at[:, None] * stride_n + d[None, :] * stride_d
    if WHOLE_D:
        return tl.load(pointer)
    return tl.load(pointer, mask=d[None, :] < head_dim, other=0.0)


@triton.jit
def _whole(acc, total, peak, q, k_base, v_base, key, d, skn, skd, svn, svd, head_dim, scale, hashes, below, grown,
           WHOLE_D: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One block of keys that every row sees."""
    k = _load_across(k_base, key, d, skn, skd, head_dim, WHOLE_D, WIDE)
    score = product(q, k, None, PRECISION)
    higher = tl.maximum(peak, tl.max(score, 1) * scale)
    p = tl.exp2(score * scale - higher[:, None])
    fade = tl.exp2(peak - higher)
    total = total * fade + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(kept_links(hashes[:, None], key[None, :], below), p * grown, 0.0)
    v = _load_down(v_base, key, d, svn, svd, head_dim, WHOLE_D, WIDE)
    acc = product(p.to(v.dtype), v, acc * fade[:, None], PRECISION)
    return acc, total, higher


@triton.jit
def _some(acc, total, peak, q, k_base, v_base, key, exists, allowed, d, skn, skd, svn, svd, head_dim, scale, hashes, below,
          grown, WHOLE_D: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One block of keys of which each row sees what `allowed` says."""
    k = tl.trans(load_rows(k_base, key, d, skn, skd, exists, head_dim, WHOLE_D, WIDE))
    score = tl.where(allowed, product(q, k, None, PRECISION) * scale, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1))
    # A finite peak keeps rows that have seen nothing yet at exp2(-inf) = 0 instead of NaN.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(score - base[:, None])
    fade = tl.exp2(peak - base)
    total = total * fade + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(kept_links(hashes[:, None], key[None, :], below), p * grown, 0.0)
    v = load_rows(v_base, key, d, svn, svd, exists, head_dim, WHOLE_D, WIDE)
    acc = product(p.to(v.dtype), v, acc * fade[:, None], PRECISION)
    return acc, total, higher


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, seed_ptr,
    work_ptr, rows_ptr, keys_ptr, whole_ptr, masked_ptr, point_key_ptr, point_row_ptr, data_ptr,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd,
    heads, group, n_q, head_dim, q_offset, scale, below, grown,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, ORDERED: tl.constexpr,
    KEYED: tl.constexpr, BITS: tl.constexpr, POINTS: tl.constexpr, DROPOUT: tl.constexpr, NEGATE: tl.constexpr,
    ADD: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sqb, sqh, sqn = sqb * UNIT, sqh * UNIT, sqn * UNIT
    skb, skh, skn = skb * UNIT, skh * UNIT, skn * UNIT
    svb, svh, svn = svb * UNIT, svh * UNIT, svn * UNIT
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
    q = load_rows(q_base, row, d, sqn, sqd, valid, head_dim, WHOLE_D, WIDE)
    if NEGATE:
        q = (0.0 - q.to(tl.float32)).to(q.dtype)
    hashes = row
    if DROPOUT:
        hashes = row_hashes(seed_ptr, batch, head, row + q_offset)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)

    for i in range(tl.load(work + 6), tl.load(work + 7)):
        key = tl.load(whole_ptr + i) + c
        acc, total, peak = _whole(acc, total, peak, q, k_base, v_base, key, d, skn, skd, svn, svd, head_dim, scale, hashes,
                                  below, grown, WHOLE_D, WIDE, DROPOUT, PRECISION)  # fmt: skip
    if KEYED:
        for i in range(tl.load(work + 8), tl.load(work + 9)):
            key = tl.load(keys_ptr + tl.load(whole_ptr + i) + c)
            acc, total, peak = _whole(acc, total, peak, q, k_base, v_base, key, d, skn, skd, svn, svd, head_dim, scale, hashes,
                                      below, grown, WHOLE_D, WIDE, DROPOUT, PRECISION)  # fmt: skip
    tile = tl.minimum(tile_row + s, tile_row + count - 1)
    for i in range(tl.load(work + 10), tl.load(work + 11)):
        block = masked_ptr + i * BLOCK_FIELDS
        slot = tl.load(block)
        exists = (c >= tl.load(block + 1)) & (c < tl.load(block + 2))
        allowed = allowed_links(c[None, :], tile[:, None], block, data_ptr, BITS)
        key = slot + c
        if KEYED:
            # Slots of sorted keys are written as -1 - slot.
            key = tl.load(keys_ptr + (-1 - slot) + c, mask=exists & (c < tl.where(slot < 0, BLOCK_N, 0)), other=slot + c)
        acc, total, peak = _some(acc, total, peak, q, k_base, v_base, key, exists, allowed, d, skn, skd, svn, svd, head_dim,
                                 scale, hashes, below, grown, WHOLE_D, WIDE, DROPOUT, PRECISION)  # fmt: skip
    if POINTS:
        end = tl.load(work + 13)
        for i in range(tl.load(work + 12), end, BLOCK_N):
            exists = i + c < end
            key = tl.load(point_key_ptr + i + c, mask=exists, other=0)
            allowed = tl.load(point_row_ptr + i + c, mask=exists, other=-1)[None, :] == s[:, None]
            acc, total, peak = _some(acc, total, peak, q, k_base, v_base, key, exists, allowed, d, skn, skd, svn, svd, head_dim,
                                     scale, hashes, below, grown, WHOLE_D, WIDE, DROPOUT, PRECISION)  # fmt: skip

    seeing = total > 0
    out = acc / tl.where(seeing, total, 1.0)[:, None]
    lse = tl.where(seeing, (peak + tl.log2(tl.where(seeing, total, 1.0))) * 0.6931471805599453, float("-inf"))
    # What is not a number must stay so, also where a sum of NaN is not above 0.
    broken = total != total
    out = tl.where(broken[:, None], total[:, None], out)
    lse = tl.where(broken, total, lse)
    inside = valid[:, None] & (d[None, :] < head_dim)
    direct = True
    if SPLIT:
        slot = tl.load(work + 14)
        if slot >= 0:
            direct = False
            place = slot.to(tl.int64) * BLOCK_M + s
            tl.store(part_out_ptr + place[:, None] * head_dim + d[None, :], out, mask=inside)
            tl.store(part_lse_ptr + place, lse, mask=valid)
    if direct:
        place = (batch.to(tl.int64) * heads + head) * n_q + row
        store_rows(out_ptr, lse_ptr, place, d, out, lse, valid, inside, head_dim, ADD)


@triton.jit
def store_rows(out_ptr, lse_ptr, place, d, out, lse, valid, inside, head_dim, ADD: tl.constexpr):
    """Write rows, or join them by lse to what another piece has written there."""
    pointer = out_ptr + place[:, None] * head_dim + d[None, :]
    if ADD:
        old = tl.load(lse_ptr + place, mask=valid, other=float("-inf"))
        top = tl.maximum(old, lse)
        base = tl.where(top == float("-inf"), 0.0, top)
        before, now = tl.exp(old - base), tl.exp(lse - base)
        both = before + now
        share = tl.where(both == 0, 1.0, both)
        out = (tl.load(pointer, mask=inside, other=0.0).to(tl.float32) * before[:, None] + out * now[:, None]) / share[:, None]
        lse = tl.where(both == 0, float("-inf"), base + tl.log(share))
        # A row that sees nothing here keeps to the bit what it had.
        inside = inside & (now != 0)[:, None]
        valid = valid & (now != 0)
    tl.store(pointer, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + place, lse, mask=valid)


@triton.jit(do_not_specialize=["heads", "n_q"])
def merge_kernel(
    out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, work_ptr, rows_ptr, heads, n_q, head_dim,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, ORDERED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Join the parts of rows that were split. Work: batch, head, first row, rows, order, first slot, parts."""
    work = work_ptr + tl.program_id(0).to(tl.int64) * 7
    batch, head, start, count = tl.load(work), tl.load(work + 1), tl.load(work + 2), tl.load(work + 3)
    slot, parts = tl.load(work + 5), tl.load(work + 6)
    s = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    valid = s < count
    inside = valid[:, None] & (d[None, :] < head_dim)
    row = start + s
    if ORDERED:
        row = tl.load(rows_ptr + row, mask=s < count * tl.load(work + 4), other=row)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    origin = slot.to(tl.int64) * BLOCK_M + s
    for i in range(0, parts):
        top = tl.maximum(top, tl.load(part_lse_ptr + origin + i * BLOCK_M, mask=valid, other=float("-inf")))
    base = tl.where(top == float("-inf"), 0.0, top)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for i in range(0, parts):
        place = origin + i * BLOCK_M
        weight = tl.exp(tl.load(part_lse_ptr + place, mask=valid, other=float("-inf")) - base)
        total += weight
        acc += weight[:, None] * tl.load(part_out_ptr + place[:, None] * head_dim + d[None, :], mask=inside, other=0.0)
    seeing = total != 0
    out = acc / tl.where(seeing, total, 1.0)[:, None]
    lse = tl.where(seeing, base + tl.log(tl.where(seeing, total, 1.0)), float("-inf"))
    place = (batch.to(tl.int64) * heads + head) * n_q + row
    store_rows(out_ptr, lse_ptr, place, d, out, lse, valid, inside, head_dim, ADD)
