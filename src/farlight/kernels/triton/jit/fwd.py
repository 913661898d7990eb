"""The forward kernel: one program holds BLOCK_M query rows and streams their key blocks through an online softmax.

Three loops over the work item's ranges (`work_tables`): whole blocks, with neither mask nor bound check; masked blocks, with
row bounds or bits; gathered keys, BLOCK_N single pairs at a time. Scores are scaled by scale · log2(e), so that exponentials
are powers of two. A row's running state is (acc, row_sum, row_max):

    row_max = max_j s_j;   row_sum = Σ_j 2^(s_j - row_max);   acc = Σ_j 2^(s_j - row_max) v_j;   out = acc / row_sum

Split-K: a long work item is computed in parts, each of which writes its (acc, row_sum, row_max) to a workspace; `merge_kernel`
adds them up. Plans whose pieces overlap (a row is served by several launches) keep row_sum and row_max of every row, and each
launch joins its result to what earlier ones wrote. Both join by (row_max, row_sum) and not by the lse: an lse of 10⁶ has
float32 steps of 1/16, which would be errors of 6 % in the weights.
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

__all__ = ["fwd_kernel", "merge_kernel"]


@triton.jit
def _load_k_transposed(base, key, d, stride_n, stride_d, head_dim, WHOLE_D: tl.constexpr, WIDE: tl.constexpr):
    """`(D, keys)` where every key exists."""
    index = key.to(tl.int64) if WIDE else key
    pointer = base + d[:, None] * stride_d + index[None, :] * stride_n
    if WHOLE_D:
        return tl.load(pointer)
    return tl.load(pointer, mask=d[:, None] < head_dim, other=0.0)


@triton.jit
def _load_v(base, key, d, stride_n, stride_d, head_dim, WHOLE_D: tl.constexpr, WIDE: tl.constexpr):
    """`(keys, D)` where every key exists."""
    index = key.to(tl.int64) if WIDE else key
    pointer = base + index[:, None] * stride_n + d[None, :] * stride_d
    if WHOLE_D:
        return tl.load(pointer)
    return tl.load(pointer, mask=d[None, :] < head_dim, other=0.0)


@triton.jit
def _whole_block(acc, row_sum, row_max, q, k_base, v_base, key, d, skn, skd, svn, svd, head_dim, scale_log2, hashes,
                 max_dropped, keep_scale, WHOLE_D: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Online softmax over one block of keys that every row sees."""
    k = _load_k_transposed(k_base, key, d, skn, skd, head_dim, WHOLE_D, WIDE)
    score = product(q, k, None, PRECISION)
    new_max = tl.maximum(row_max, tl.max(score, 1) * scale_log2)
    p = tl.exp2(score * scale_log2 - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(kept_pairs(hashes[:, None], key[None, :], max_dropped), p * keep_scale, 0.0)
    v = _load_v(v_base, key, d, svn, svd, head_dim, WHOLE_D, WIDE)
    acc = product(p.to(v.dtype), v, acc * rescale[:, None], PRECISION)
    return acc, row_sum, new_max


@triton.jit
def _masked_block(acc, row_sum, row_max, q, k_base, v_base, key, exists, allowed, d, skn, skd, svn, svd, head_dim, scale_log2,
                  hashes, max_dropped, keep_scale, WHOLE_D: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Online softmax over one block of keys of which each row sees what `allowed` says."""
    k = tl.trans(load_rows(k_base, key, d, skn, skd, exists, head_dim, WHOLE_D, WIDE))
    score = tl.where(allowed, product(q, k, None, PRECISION) * scale_log2, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(score, 1))
    # A finite base keeps rows that have seen nothing yet at exp2(-inf) = 0 instead of NaN.
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(score - base[:, None])
    rescale = tl.exp2(row_max - base)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(kept_pairs(hashes[:, None], key[None, :], max_dropped), p * keep_scale, 0.0)
    v = load_rows(v_base, key, d, svn, svd, exists, head_dim, WHOLE_D, WIDE)
    acc = product(p.to(v.dtype), v, acc * rescale[:, None], PRECISION)
    return acc, row_sum, new_max


@triton.jit(do_not_specialize=UNSPECIALIZED)
def fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, row_max_ptr, row_sum_ptr, part_out_ptr, part_max_ptr, part_sum_ptr, seed_ptr,
    work_ptr, rows_ptr, keys_ptr, whole_ptr, masked_ptr, point_key_ptr, point_row_ptr, data_ptr,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd,
    heads, heads_per_kv, n_q, head_dim, q_offset, scale_log2, max_dropped, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, SORTED_ROWS: tl.constexpr,
    SORTED_KEYS: tl.constexpr, BITS: tl.constexpr, POINTS: tl.constexpr, DROPOUT: tl.constexpr, NEGATE: tl.constexpr,
    ADD: tl.constexpr, JOIN: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of one work item.

    Tensors
        q, k, v: any strides; out `(B, H, n_q, D)` and lse `(B, H, n_q)`: contiguous; row_max, row_sum: as lse (JOIN);
        part_out `(partials · BLOCK_M, D)`, part_max and part_sum `(partials · BLOCK_M,)` float32: split-K workspace (SPLIT);
        seed `(1,)` int64 (DROPOUT).
    Work tables, int32
        work `(programs, Q_FIELDS)`; rows, keys: permutations; whole: first key or slot of each whole block; masked
        `(blocks, B_FIELDS)`; point_key, point_row: key, and row within the item, of each single pair; data: bounds and bits.
    Strides
        s + q, k or v + b (batch), h (head), n (row) or d (dimension); those of b, h and n are divided by UNIT.
    Sizes
        heads; heads_per_kv: query heads for each key head; n_q; head_dim; q_offset: position of row 0;
        scale_log2 = |scale| · log2(e); max_dropped: the largest hash that dropout drops; keep_scale = 1 / (1 - dropout).
    Options
        BLOCK_M rows, BLOCK_N keys, BLOCK_D >= head_dim (WHOLE_D: equal); SORTED_ROWS, SORTED_KEYS: some indices are permuted;
        BITS: bit masks occur; POINTS: single pairs occur; NEGATE: scale < 0; ADD: rows that see nothing keep what is there;
        JOIN: rows are served by several launches; SPLIT: some items are in parts; WIDE: 64-bit offsets within a head;
        UNIT: 1 or 16; PRECISION: see `product`.
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
    q = load_rows(q_base, row, d, sqn * UNIT, sqd, valid, head_dim, WHOLE_D, WIDE)
    if NEGATE:
        q = (0.0 - q.to(tl.float32)).to(q.dtype)
    hashes = row
    if DROPOUT:
        hashes = row_hashes(seed_ptr, batch, head, row + q_offset)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)

    for i in range(tl.load(work + Q_WHOLE), tl.load(work + Q_WHOLE + 1)):
        key = tl.load(whole_ptr + i) + n
        acc, row_sum, row_max = _whole_block(acc, row_sum, row_max, q, k_base, v_base, key, d, skn, skd, svn, svd, head_dim,
                                             scale_log2, hashes, max_dropped, keep_scale, WHOLE_D, WIDE, DROPOUT,
                                             PRECISION)  # fmt: skip
    if SORTED_KEYS:
        for i in range(tl.load(work + Q_WHOLE_SORTED), tl.load(work + Q_WHOLE_SORTED + 1)):
            key = tl.load(keys_ptr + tl.load(whole_ptr + i) + n)
            acc, row_sum, row_max = _whole_block(acc, row_sum, row_max, q, k_base, v_base, key, d, skn, skd, svn, svd, head_dim,
                                                 scale_log2, hashes, max_dropped, keep_scale, WHOLE_D, WIDE, DROPOUT,
                                                 PRECISION)  # fmt: skip
    # Rows beyond the item repeat the last one, whose mask exists.
    tile_row = tl.load(work + Q_TILE_ROW) + tl.minimum(m, count - 1)
    for i in range(tl.load(work + Q_MASKED), tl.load(work + Q_MASKED + 1)):
        key, exists, allowed = masked_keys(
            masked_ptr + i * B_FIELDS, tile_row, n, keys_ptr, data_ptr, BITS, SORTED_KEYS, BLOCK_N
        )
        acc, row_sum, row_max = _masked_block(acc, row_sum, row_max, q, k_base, v_base, key, exists, allowed, d, skn, skd, svn,
                                              svd, head_dim, scale_log2, hashes, max_dropped, keep_scale, WHOLE_D, WIDE,
                                              DROPOUT, PRECISION)  # fmt: skip
    if POINTS:
        end = tl.load(work + Q_POINTS + 1)
        for i in range(tl.load(work + Q_POINTS), end, BLOCK_N):
            key, exists, allowed = gathered_keys(i, end, m, n, point_key_ptr, point_row_ptr)
            acc, row_sum, row_max = _masked_block(acc, row_sum, row_max, q, k_base, v_base, key, exists, allowed, d, skn, skd,
                                                  svn, svd, head_dim, scale_log2, hashes, max_dropped, keep_scale, WHOLE_D,
                                                  WIDE, DROPOUT, PRECISION)  # fmt: skip

    is_final = True
    if SPLIT:
        partial = tl.load(work + Q_PARTIAL)
        if partial >= 0:
            is_final = False
            index = partial.to(tl.int64) * BLOCK_M + m
            inside = valid[:, None] & (d[None, :] < head_dim)
            tl.store(part_out_ptr + index[:, None] * head_dim + d[None, :], acc, mask=inside)
            tl.store(part_max_ptr + index, row_max, mask=valid)
            tl.store(part_sum_ptr + index, row_sum, mask=valid)
    if is_final:
        index = (batch.to(tl.int64) * heads + head) * n_q + row
        _store_rows(out_ptr, lse_ptr, row_max_ptr, row_sum_ptr, index, d, acc, row_sum, row_max, valid, head_dim, ADD, JOIN)


@triton.jit
def _store_rows(out_ptr, lse_ptr, row_max_ptr, row_sum_ptr, index, d, acc, row_sum, row_max, valid, head_dim,
                ADD: tl.constexpr, JOIN: tl.constexpr):  # fmt: skip
    """Write rows; with ADD those that see something, with ADD and JOIN joined to what earlier launches wrote."""
    if ADD:
        # A row that sees nothing here keeps to the bit what it had. A sum of NaN is stored.
        valid = valid & (row_sum != 0)
    inside = valid[:, None] & (d[None, :] < head_dim)
    pointer = out_ptr + index[:, None] * head_dim + d[None, :]
    if ADD and JOIN:
        old_max = tl.load(row_max_ptr + index, mask=valid, other=float("-inf"))
        old_sum = tl.load(row_sum_ptr + index, mask=valid, other=0.0)
        new_max = tl.maximum(old_max, row_max)
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        old_weight, rescale = old_sum * tl.exp2(old_max - base), tl.exp2(row_max - base)
        acc = tl.load(pointer, mask=inside, other=0.0).to(tl.float32) * old_weight[:, None] + acc * rescale[:, None]
        row_sum = old_weight + row_sum * rescale
        row_max = new_max
    empty = row_sum == 0
    divisor = tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(divisor)) * 0.6931471805599453)
    tl.store(pointer, (acc / divisor[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + index, lse, mask=valid)
    if JOIN:
        tl.store(row_max_ptr + index, row_max, mask=valid)
        tl.store(row_sum_ptr + index, row_sum, mask=valid)


@triton.jit(do_not_specialize=["heads", "n_q"])
def merge_kernel(
    out_ptr, lse_ptr, row_max_ptr, row_sum_ptr, part_out_ptr, part_max_ptr, part_sum_ptr, merges_ptr, rows_ptr,
    heads, n_q, head_dim,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, SORTED_ROWS: tl.constexpr, ADD: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of rows that were split. merges: `(programs, M_FIELDS)`; the rest as in `fwd_kernel`."""
    merge = merges_ptr + tl.program_id(0).to(tl.int64) * M_FIELDS
    batch, head, count = tl.load(merge + M_BATCH), tl.load(merge + M_HEAD), tl.load(merge + M_COUNT)
    parts = tl.load(merge + M_PARTS)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    valid = m < count
    inside = valid[:, None] & (d[None, :] < head_dim)
    row = index_ids(tl.load(merge + M_FIRST), count, merge + M_SORTED, rows_ptr, m, SORTED_ROWS)
    first = tl.load(merge + M_PARTIAL).to(tl.int64) * BLOCK_M + m
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for i in range(0, parts):
        row_max = tl.maximum(row_max, tl.load(part_max_ptr + first + i * BLOCK_M, mask=valid, other=float("-inf")))
    base = tl.where(row_max == float("-inf"), 0.0, row_max)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for i in range(0, parts):
        index = first + i * BLOCK_M
        rescale = tl.exp2(tl.load(part_max_ptr + index, mask=valid, other=float("-inf")) - base)
        row_sum += rescale * tl.load(part_sum_ptr + index, mask=valid, other=0.0)
        part = tl.load(part_out_ptr + index[:, None] * head_dim + d[None, :], mask=inside, other=0.0)
        acc += rescale[:, None] * part
    index = (batch.to(tl.int64) * heads + head) * n_q + row
    _store_rows(out_ptr, lse_ptr, row_max_ptr, row_sum_ptr, index, d, acc, row_sum, row_max, valid, head_dim, ADD, JOIN)
