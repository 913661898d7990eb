"""The dq pass of the backward: delta of every row, and dq over the same work items as the forward pass.

    P = exp(S - lse);   dP = dO Vᵀ;   dS = P ∘ (dP - delta);   dQ = scale · dS K;   delta = Σ dO ∘ O - dlse

Scores are recomputed. Parts of split items go to a workspace, which `sum_kernel` adds up in their order.
"""

import triton
import triton.language as tl

from farlight.kernels.triton.jit.masks import (
    UNSPECIALIZED,
    gathered_keys,
    head_base,
    index_ids,
    kept_pairs,
    load_rows,
    masked_keys,
    product,
    row_hashes,
)
from farlight.kernels.triton.jit.work_tables import (
    B_FIELDS,
    M_BATCH,
    M_COUNT,
    M_FIELDS,
    M_FIRST,
    M_HEAD,
    M_PARTIAL,
    M_PARTS,
    M_SORTED,
    Q_BATCH,
    Q_FIELDS,
    Q_FIRST_ROW,
    Q_HEAD,
    Q_MASKED,
    Q_NUM_ROWS,
    Q_PARTIAL,
    Q_POINTS,
    Q_SORTED,
    Q_TILE_ROW,
    Q_WHOLE,
    Q_WHOLE_SORTED,
)

__all__ = ["delta_kernel", "dq_kernel", "sum_kernel"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def delta_kernel(
    dout_ptr, out_ptr, dlse_ptr, delta_ptr, sdb, sdh, sdn, sdd, heads, n_q, head_dim,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, DLSE: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """delta of BLOCK_M rows of one head, `(B, H, n_q)` float32. `out` and `dlse` are contiguous; DLSE: there is a dlse."""
    batch_head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    valid = row < n_q
    base = head_base(dout_ptr, batch_head // heads, batch_head % heads, sdb, sdh, UNIT)
    dout = load_rows(base, row, d, sdn * UNIT, sdd, valid, head_dim, WHOLE_D, WIDE)
    index = batch_head.to(tl.int64) * n_q + row
    out = load_rows(out_ptr, index, d, head_dim, 1, valid, head_dim, WHOLE_D, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    if DLSE:
        delta -= tl.load(dlse_ptr + index, mask=valid, other=0.0)
    tl.store(delta_ptr + index, delta, mask=valid)


@triton.jit
def _key_block(acc, q, dout, lse_log2, delta, k_base, v_base, key, exists, allowed, d, skn, skd, svn, svd, head_dim, scale_log2,
               hashes, max_dropped, keep_scale, MASKED: tl.constexpr, WHOLE_D: tl.constexpr, WIDE: tl.constexpr,
               DROPOUT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc + dS K of one block of keys. `exists` and `allowed` are read where MASKED."""
    index = key.to(tl.int64) if WIDE else key
    k_pointer = k_base + index[:, None] * skn + d[None, :] * skd
    v_pointer = v_base + index[:, None] * svn + d[None, :] * svd
    if MASKED:
        inside = exists[:, None] & (d[None, :] < head_dim)
        k, v = tl.load(k_pointer, mask=inside, other=0.0), tl.load(v_pointer, mask=inside, other=0.0)
    elif WHOLE_D:
        k, v = tl.load(k_pointer), tl.load(v_pointer)
    else:
        inside = d[None, :] < head_dim
        k, v = tl.load(k_pointer, mask=inside, other=0.0), tl.load(v_pointer, mask=inside, other=0.0)
    p = tl.exp2(product(q, tl.trans(k), None, PRECISION) * scale_log2 - lse_log2[:, None])
    if MASKED:
        p = tl.where(allowed, p, 0.0)
    dp = product(dout, tl.trans(v), None, PRECISION)
    if DROPOUT:
        dp = tl.where(kept_pairs(hashes[:, None], key[None, :], max_dropped), dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    return product(ds.to(k.dtype), k, acc, PRECISION)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, part_ptr, seed_ptr,
    work_ptr, rows_ptr, keys_ptr, whole_ptr, masked_ptr, point_key_ptr, point_row_ptr, data_ptr,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, sdb, sdh, sdn, sdd,
    heads, heads_per_kv, n_q, head_dim, q_offset, scale, scale_log2, max_dropped, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, SORTED_ROWS: tl.constexpr,
    SORTED_KEYS: tl.constexpr, BITS: tl.constexpr, POINTS: tl.constexpr, DROPOUT: tl.constexpr, ADD: tl.constexpr,
    SPLIT: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one work item.

    Tensors
        q, k, v, dout: any strides (dout's are sd…); lse, delta `(B, H, n_q)` float32, dq `(B, H, n_q, D)`: contiguous;
        part `(partials · BLOCK_M, D)` float32: the workspace of split items (SPLIT); seed `(1,)` int64 (DROPOUT).
    Work tables, strides, sizes and options
        as in `fwd_kernel`; scale is signed, scale_log2 = scale · log2(e); ADD adds to what earlier launches wrote.
    """
    work = work_ptr + tl.program_id(0).to(tl.int64) * Q_FIELDS
    batch, head, count = tl.load(work + Q_BATCH), tl.load(work + Q_HEAD), tl.load(work + Q_NUM_ROWS)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    skn, svn = skn * UNIT, svn * UNIT
    valid = m < count
    row = index_ids(tl.load(work + Q_FIRST_ROW), count, work + Q_SORTED, rows_ptr, m, SORTED_ROWS)
    k_base = head_base(k_ptr, batch, head // heads_per_kv, skb, skh, UNIT)
    v_base = head_base(v_ptr, batch, head // heads_per_kv, svb, svh, UNIT)
    q_base = head_base(q_ptr, batch, head, sqb, sqh, UNIT)
    dout_base = head_base(dout_ptr, batch, head, sdb, sdh, UNIT)
    q = load_rows(q_base, row, d, sqn * UNIT, sqd, valid, head_dim, WHOLE_D, WIDE)
    dout = load_rows(dout_base, row, d, sdn * UNIT, sdd, valid, head_dim, WHOLE_D, WIDE)
    row_index = (batch.to(tl.int64) * heads + head) * n_q + row
    lse = tl.load(lse_ptr + row_index, mask=valid, other=float("-inf"))
    # Rows that see nothing have probability 0 everywhere.
    lse_log2 = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    delta = tl.load(delta_ptr + row_index, mask=valid, other=0.0)
    hashes = row
    if DROPOUT:
        hashes = row_hashes(seed_ptr, batch, head, row + q_offset)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for i in range(tl.load(work + Q_WHOLE), tl.load(work + Q_WHOLE + 1)):
        key = tl.load(whole_ptr + i) + n
        acc = _key_block(acc, q, dout, lse_log2, delta, k_base, v_base, key, valid, valid, d, skn, skd, svn, svd, head_dim,
                         scale_log2, hashes, max_dropped, keep_scale, False, WHOLE_D, WIDE, DROPOUT, PRECISION)  # fmt: skip
    if SORTED_KEYS:
        for i in range(tl.load(work + Q_WHOLE_SORTED), tl.load(work + Q_WHOLE_SORTED + 1)):
            key = tl.load(keys_ptr + tl.load(whole_ptr + i) + n)
            acc = _key_block(acc, q, dout, lse_log2, delta, k_base, v_base, key, valid, valid, d, skn, skd, svn, svd, head_dim,
                             scale_log2, hashes, max_dropped, keep_scale, False, WHOLE_D, WIDE, DROPOUT, PRECISION)  # fmt: skip
    tile_row = tl.load(work + Q_TILE_ROW) + tl.minimum(m, count - 1)
    for i in range(tl.load(work + Q_MASKED), tl.load(work + Q_MASKED + 1)):
        key, exists, allowed = masked_keys(
            masked_ptr + i * B_FIELDS, tile_row, n, keys_ptr, data_ptr, BITS, SORTED_KEYS, BLOCK_N
        )
        acc = _key_block(acc, q, dout, lse_log2, delta, k_base, v_base, key, exists, allowed, d, skn, skd, svn, svd, head_dim,
                         scale_log2, hashes, max_dropped, keep_scale, True, WHOLE_D, WIDE, DROPOUT, PRECISION)  # fmt: skip
    if POINTS:
        end = tl.load(work + Q_POINTS + 1)
        for i in range(tl.load(work + Q_POINTS), end, BLOCK_N):
            key, exists, allowed = gathered_keys(i, end, m, n, point_key_ptr, point_row_ptr)
            acc = _key_block(acc, q, dout, lse_log2, delta, k_base, v_base, key, exists, allowed, d, skn, skd, svn, svd,
                             head_dim, scale_log2, hashes, max_dropped, keep_scale, True, WHOLE_D, WIDE, DROPOUT,
                             PRECISION)  # fmt: skip
    acc *= scale
    inside = valid[:, None] & (d[None, :] < head_dim)
    is_final = True
    if SPLIT:
        partial = tl.load(work + Q_PARTIAL)
        if partial >= 0:
            is_final = False
            index = partial.to(tl.int64) * BLOCK_M + m
            tl.store(part_ptr + index[:, None] * head_dim + d[None, :], acc, mask=inside)
    if is_final:
        pointer = dq_ptr + row_index[:, None] * head_dim + d[None, :]
        if ADD:
            acc += tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
        tl.store(pointer, acc.to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["heads", "n"])
def sum_kernel(
    grad_ptr, part_ptr, merges_ptr, index_ptr, heads, n, head_dim,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, SORTED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Sum the partial gradients of split rows (dq) or keys (dk, dv), in the order of their parts.

    grad: `(B, heads, n, D)`; part: `(partials · BLOCK_M, D)` float32; merges: `(programs, M_FIELDS)`; index: the permutation of
    rows or keys; ADD: add to what earlier launches wrote.
    """
    merge = merges_ptr + tl.program_id(0).to(tl.int64) * M_FIELDS
    batch, head, count = tl.load(merge + M_BATCH), tl.load(merge + M_HEAD), tl.load(merge + M_COUNT)
    parts = tl.load(merge + M_PARTS)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside = (m < count)[:, None] & (d[None, :] < head_dim)
    row = index_ids(tl.load(merge + M_FIRST), count, merge + M_SORTED, index_ptr, m, SORTED)
    first = tl.load(merge + M_PARTIAL).to(tl.int64) * BLOCK_M + m
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for i in range(0, parts):
        acc += tl.load(part_ptr + (first + i * BLOCK_M)[:, None] * head_dim + d[None, :], mask=inside, other=0.0)
    pointer = grad_ptr + ((batch.to(tl.int64) * heads + head) * n + row)[:, None] * head_dim + d[None, :]
    if ADD:
        acc += tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    tl.store(pointer, acc.to(grad_ptr.dtype.element_ty), mask=inside)
