"""The backward pass over keys: one program owns a block of keys of one key head and sums dk and dv over all that see it.

    dV = Pᵀ dO;   dK = scale · dSᵀ Q

Nothing is added atomically: no two programs of a launch write to one key, and each sums in the order of its list, so that the
gradients are the same to the bit from run to run.
"""

import triton
import triton.language as tl

from farlight.kernels.triton.jit.masks import UNSPECIALIZED, allowed_links, kept_links, load_rows, product, row_hashes

__all__ = ["KEY_WORK_FIELDS", "RANGE_FIELDS", "keys_kernel"]

# batch, key head, first slot, slots, slot of the workspace
KEY_WORK_FIELDS = tl.constexpr(5)
# for each query head of the key head: whole from, to, masked from, to, points from, to
RANGE_FIELDS = tl.constexpr(6)
# first row (-1 - it where rows are sorted), lo, hi, bounds, bits, rows, place in the plan's tile
ITEM_FIELDS = tl.constexpr(7)


@triton.jit
def _rows(dk, dv, k, v, key, row, valid, allowed, q_base, dout_base, lse_base, delta_base, d, sqn, sqd, sdn, sdd, head_dim,
          scale, seed_ptr, batch, head, q_offset, below, grown, MASKED: tl.constexpr, WHOLE_D: tl.constexpr,
          WIDE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add what some query rows give to dk and dv. Rows that do not exist have probability 0."""
    q = load_rows(q_base, row, d, sqn, sqd, valid, head_dim, WHOLE_D, WIDE)
    lse = tl.load(lse_base + row, mask=valid, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    p = tl.exp2(product(k, tl.trans(q), None, PRECISION) * scale - lse[None, :])
    if MASKED:
        p = tl.where(allowed, p, 0.0)
    dout = load_rows(dout_base, row, d, sdn, sdd, valid, head_dim, WHOLE_D, WIDE)
    dp = product(v, tl.trans(dout), None, PRECISION)
    delta = tl.load(delta_base + row, mask=valid, other=0.0)
    if DROPOUT:
        kept = kept_links(row_hashes(seed_ptr, batch, head, row + q_offset)[None, :], key[:, None], below)
        dp = tl.where(kept, dp * grown, 0.0)
        dv = product(tl.where(kept, p * grown, 0.0).to(dout.dtype), dout, dv, PRECISION)
    else:
        dv = product(p.to(dout.dtype), dout, dv, PRECISION)
    ds = p * (dp - delta[None, :])
    dk = product(ds.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def keys_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, part_dk_ptr, part_dv_ptr, seed_ptr,
    work_ptr, ranges_ptr, rows_ptr, keys_ptr, whole_ptr, masked_ptr, point_row_ptr, point_key_ptr, data_ptr,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, sdb, sdh, sdn, sdd,
    heads, group, n_q, n_k, head_dim, q_offset, scale, scale_log2, below, grown,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, ORDERED: tl.constexpr,
    KEYED: tl.constexpr, BITS: tl.constexpr, POINTS: tl.constexpr, DROPOUT: tl.constexpr, ADD: tl.constexpr,
    SPLIT: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sqb, sqh, sqn = sqb * UNIT, sqh * UNIT, sqn * UNIT
    skb, skh, skn = skb * UNIT, skh * UNIT, skn * UNIT
    svb, svh, svn = svb * UNIT, svh * UNIT, svn * UNIT
    sdb, sdh, sdn = sdb * UNIT, sdh * UNIT, sdn * UNIT
    work = work_ptr + tl.program_id(0).to(tl.int64) * KEY_WORK_FIELDS
    batch, kv_head, start = tl.load(work), tl.load(work + 1), tl.load(work + 2)
    c = tl.arange(0, BLOCK_N)
    s = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    exists = c < tl.load(work + 3)
    key = start + c
    if KEYED:
        key = tl.load(keys_ptr + start + c, mask=exists, other=0)
    k_base = k_ptr + batch.to(tl.int64) * skb + kv_head.to(tl.int64) * skh
    v_base = v_ptr + batch.to(tl.int64) * svb + kv_head.to(tl.int64) * svh
    k = load_rows(k_base, key, d, skn, skd, exists, head_dim, WHOLE_D, WIDE)
    v = load_rows(v_base, key, d, svn, svd, exists, head_dim, WHOLE_D, WIDE)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for g in range(0, group):
        ranges = ranges_ptr + (tl.program_id(0).to(tl.int64) * group + g) * RANGE_FIELDS
        head = kv_head * group + g
        q_base = q_ptr + batch.to(tl.int64) * sqb + head.to(tl.int64) * sqh
        dout_base = dout_ptr + batch.to(tl.int64) * sdb + head.to(tl.int64) * sdh
        lse_base = lse_ptr + (batch.to(tl.int64) * heads + head) * n_q
        delta_base = delta_ptr + (batch.to(tl.int64) * heads + head) * n_q
        for i in range(tl.load(ranges), tl.load(ranges + 1)):
            item = whole_ptr + i * ITEM_FIELDS
            first = tl.load(item)
            valid = s < tl.load(item + 5)
            row = first + s
            if ORDERED:
                row = tl.load(rows_ptr + (-1 - first) + s, mask=valid & (s < tl.where(first < 0, BLOCK_M, 0)), other=row)
            dk, dv = _rows(dk, dv, k, v, key, row, valid, valid, q_base, dout_base, lse_base, delta_base, d, sqn, sqd, sdn, sdd,
                           head_dim, scale_log2, seed_ptr, batch, head, q_offset, below, grown, False, WHOLE_D, WIDE, DROPOUT,
                           PRECISION)  # fmt: skip
        for i in range(tl.load(ranges + 2), tl.load(ranges + 3)):
            item = masked_ptr + i * ITEM_FIELDS
            first, count, tile_row = tl.load(item), tl.load(item + 5), tl.load(item + 6)
            valid = s < count
            row = first + s
            if ORDERED:
                row = tl.load(rows_ptr + (-1 - first) + s, mask=valid & (s < tl.where(first < 0, BLOCK_M, 0)), other=row)
            tile = tl.minimum(tile_row + s, tile_row + count - 1)
            allowed = allowed_links(c[:, None], tile[None, :], item, data_ptr, BITS)
            dk, dv = _rows(dk, dv, k, v, key, row, valid, allowed, q_base, dout_base, lse_base, delta_base, d, sqn, sqd, sdn,
                           sdd, head_dim, scale_log2, seed_ptr, batch, head, q_offset, below, grown, True, WHOLE_D, WIDE,
                           DROPOUT, PRECISION)  # fmt: skip
        if POINTS:
            end = tl.load(ranges + 5)
            for i in range(tl.load(ranges + 4), end, BLOCK_M):
                valid = i + s < end
                row = tl.load(point_row_ptr + i + s, mask=valid, other=0)
                allowed = tl.load(point_key_ptr + i + s, mask=valid, other=-1)[None, :] == key[:, None]
                dk, dv = _rows(dk, dv, k, v, key, row, valid, allowed, q_base, dout_base, lse_base, delta_base, d, sqn, sqd,
                               sdn, sdd, head_dim, scale_log2, seed_ptr, batch, head, q_offset, below, grown, True, WHOLE_D,
                               WIDE, DROPOUT, PRECISION)  # fmt: skip
    dk *= scale
    inside = exists[:, None] & (d[None, :] < head_dim)
    direct = True
    if SPLIT:
        slot = tl.load(work + 4)
        if slot >= 0:
            direct = False
            at = (slot.to(tl.int64) * BLOCK_N + c)[:, None] * head_dim + d[None, :]
            tl.store(part_dk_ptr + at, dk, mask=inside)
            tl.store(part_dv_ptr + at, dv, mask=inside)
    if direct:
        place = (batch.to(tl.int64) * (heads // group) + kv_head) * n_k + key
        at = place[:, None] * head_dim + d[None, :]
        if ADD:
            dk += tl.load(dk_ptr + at, mask=inside, other=0.0).to(tl.float32)
            dv += tl.load(dv_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=inside)
        tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)
