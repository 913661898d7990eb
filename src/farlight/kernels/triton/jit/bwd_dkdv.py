"""The dk/dv pass of the backward: one program owns BLOCK_N keys of one key head and sums dk and dv over all rows that see them.

    dV = Pᵀ dO;   dK = scale · dSᵀ Q          (P, dS: see `bwd_dq`; here as [keys, rows])

The program loops over the query heads of its key head, and for each over whole row blocks, masked row blocks and single pairs.
There are no atomics: no two programs of a launch own the same key, and each sums in the order of its tables, so that gradients
are bit-identical from run to run.
"""

import triton
import triton.language as tl

from farlight.kernels.triton.jit.masks import (
    UNSPECIALIZED,
    allowed_pairs,
    head_base,
    kept_pairs,
    load_rows,
    product,
    row_hashes,
    signed_ids,
)
from farlight.kernels.triton.jit.work_tables import (
    B_FIRST,
    B_NUM_ROWS,
    B_TILE_ROW,
    K_BATCH,
    K_FIELDS,
    K_FIRST_KEY,
    K_HEAD,
    K_NUM_KEYS,
    K_PARTIAL,
    R_FIELDS,
    R_MASKED,
    R_POINTS,
    R_WHOLE,
    ROW_BLOCK_FIELDS,
)

__all__ = ["dkdv_kernel"]


@triton.jit
def _row_block(dk, dv, k, v, key, row, valid, allowed, q_base, dout_base, lse_base, delta_base, d, sqn, sqd, sdn, sdd, head_dim,
               scale_log2, seed_ptr, batch, head, q_offset, max_dropped, keep_scale, MASKED: tl.constexpr,
               WHOLE_D: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dk and dv with the contribution of one block of query rows. Rows that do not exist have probability 0."""
    q = load_rows(q_base, row, d, sqn, sqd, valid, head_dim, WHOLE_D, WIDE)
    lse = tl.load(lse_base + row, mask=valid, other=float("-inf"))
    lse_log2 = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    p = tl.exp2(product(k, tl.trans(q), None, PRECISION) * scale_log2 - lse_log2[None, :])
    if MASKED:
        p = tl.where(allowed, p, 0.0)
    dout = load_rows(dout_base, row, d, sdn, sdd, valid, head_dim, WHOLE_D, WIDE)
    dp = product(v, tl.trans(dout), None, PRECISION)
    delta = tl.load(delta_base + row, mask=valid, other=0.0)
    if DROPOUT:
        kept = kept_pairs(row_hashes(seed_ptr, batch, head, row + q_offset)[None, :], key[:, None], max_dropped)
        dp = tl.where(kept, dp * keep_scale, 0.0)
        dv = product(tl.where(kept, p * keep_scale, 0.0).to(dout.dtype), dout, dv, PRECISION)
    else:
        dv = product(p.to(dout.dtype), dout, dv, PRECISION)
    ds = p * (dp - delta[None, :])
    dk = product(ds.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, part_dk_ptr, part_dv_ptr, seed_ptr,
    work_ptr, ranges_ptr, rows_ptr, keys_ptr, whole_ptr, masked_ptr, point_row_ptr, point_key_ptr, data_ptr,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, sdb, sdh, sdn, sdd,
    heads, heads_per_kv, n_q, n_k, head_dim, q_offset, scale, scale_log2, max_dropped, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, SORTED_ROWS: tl.constexpr,
    SORTED_KEYS: tl.constexpr, BITS: tl.constexpr, POINTS: tl.constexpr, DROPOUT: tl.constexpr, ADD: tl.constexpr,
    SPLIT: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one work item.

    Tensors
        q, k, v, dout: any strides; lse, delta `(B, H, n_q)` float32; dk, dv `(B, H_kv, n_k, D)`: contiguous;
        part_dk, part_dv `(partials · BLOCK_N, D)` float32: the workspace of split items (SPLIT); seed `(1,)` int64 (DROPOUT).
    Work tables, int32
        work `(programs, K_FIELDS)`; ranges `(programs, heads_per_kv, R_FIELDS)`; rows, keys: permutations; whole, masked
        `(blocks, ROW_BLOCK_FIELDS)`; point_row, point_key: row and key of each single pair; data: bounds and bits.
    Strides, sizes and options
        as in `dq_kernel`; SORTED_KEYS: K_FIRST_KEY is a slot of `keys` in every item.
    """
    work = work_ptr + tl.program_id(0).to(tl.int64) * K_FIELDS
    batch, kv_head, first_key = tl.load(work + K_BATCH), tl.load(work + K_HEAD), tl.load(work + K_FIRST_KEY)
    n = tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    sqn, sdn = sqn * UNIT, sdn * UNIT
    exists = n < tl.load(work + K_NUM_KEYS)
    key = first_key + n
    if SORTED_KEYS:
        key = tl.load(keys_ptr + first_key + n, mask=exists, other=0)
    k = load_rows(head_base(k_ptr, batch, kv_head, skb, skh, UNIT), key, d, skn * UNIT, skd, exists, head_dim, WHOLE_D, WIDE)
    v = load_rows(head_base(v_ptr, batch, kv_head, svb, svh, UNIT), key, d, svn * UNIT, svd, exists, head_dim, WHOLE_D, WIDE)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for g in range(0, heads_per_kv):
        ranges = ranges_ptr + (tl.program_id(0).to(tl.int64) * heads_per_kv + g) * R_FIELDS
        head = kv_head * heads_per_kv + g
        q_base = head_base(q_ptr, batch, head, sqb, sqh, UNIT)
        dout_base = head_base(dout_ptr, batch, head, sdb, sdh, UNIT)
        lse_base = lse_ptr + (batch.to(tl.int64) * heads + head) * n_q
        delta_base = delta_ptr + (batch.to(tl.int64) * heads + head) * n_q
        for i in range(tl.load(ranges + R_WHOLE), tl.load(ranges + R_WHOLE + 1)):
            block = whole_ptr + i * ROW_BLOCK_FIELDS
            valid = m < tl.load(block + B_NUM_ROWS)
            row = signed_ids(tl.load(block + B_FIRST), valid, rows_ptr, m, SORTED_ROWS, BLOCK_M)
            dk, dv = _row_block(dk, dv, k, v, key, row, valid, valid, q_base, dout_base, lse_base, delta_base, d, sqn, sqd, sdn,
                                sdd, head_dim, scale_log2, seed_ptr, batch, head, q_offset, max_dropped, keep_scale, False,
                                WHOLE_D, WIDE, DROPOUT, PRECISION)  # fmt: skip
        for i in range(tl.load(ranges + R_MASKED), tl.load(ranges + R_MASKED + 1)):
            block = masked_ptr + i * ROW_BLOCK_FIELDS
            count = tl.load(block + B_NUM_ROWS)
            valid = m < count
            row = signed_ids(tl.load(block + B_FIRST), valid, rows_ptr, m, SORTED_ROWS, BLOCK_M)
            tile_row = tl.load(block + B_TILE_ROW) + tl.minimum(m, count - 1)
            allowed = allowed_pairs(n[:, None], tile_row[None, :], block, data_ptr, BITS)
            dk, dv = _row_block(dk, dv, k, v, key, row, valid, allowed, q_base, dout_base, lse_base, delta_base, d, sqn, sqd,
                                sdn, sdd, head_dim, scale_log2, seed_ptr, batch, head, q_offset, max_dropped, keep_scale, True,
                                WHOLE_D, WIDE, DROPOUT, PRECISION)  # fmt: skip
        if POINTS:
            end = tl.load(ranges + R_POINTS + 1)
            for i in range(tl.load(ranges + R_POINTS), end, BLOCK_M):
                valid = i + m < end
                row = tl.load(point_row_ptr + i + m, mask=valid, other=0)
                allowed = tl.load(point_key_ptr + i + m, mask=valid, other=-1)[None, :] == key[:, None]
                dk, dv = _row_block(dk, dv, k, v, key, row, valid, allowed, q_base, dout_base, lse_base, delta_base, d, sqn,
                                    sqd, sdn, sdd, head_dim, scale_log2, seed_ptr, batch, head, q_offset, max_dropped,
                                    keep_scale, True, WHOLE_D, WIDE, DROPOUT, PRECISION)  # fmt: skip
    dk *= scale
    inside = exists[:, None] & (d[None, :] < head_dim)
    is_final = True
    if SPLIT:
        partial = tl.load(work + K_PARTIAL)
        if partial >= 0:
            is_final = False
            index = (partial.to(tl.int64) * BLOCK_N + n)[:, None] * head_dim + d[None, :]
            tl.store(part_dk_ptr + index, dk, mask=inside)
            tl.store(part_dv_ptr + index, dv, mask=inside)
    if is_final:
        key_index = (batch.to(tl.int64) * (heads // heads_per_kv) + kv_head) * n_k + key
        index = key_index[:, None] * head_dim + d[None, :]
        if ADD:
            dk += tl.load(dk_ptr + index, mask=inside, other=0.0).to(tl.float32)
            dv += tl.load(dv_ptr + index, mask=inside, other=0.0).to(tl.float32)
        tl.store(dk_ptr + index, dk.to(dk_ptr.dtype.element_ty), mask=inside)
        tl.store(dv_ptr + index, dv.to(dv_ptr.dtype.element_ty), mask=inside)
