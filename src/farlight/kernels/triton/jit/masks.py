"""Device functions shared by all kernels: address arithmetic, masks, dropout, matrix products.

A block is read in two orientations: `[rows, keys]` in the forward and the dq pass, `[keys, rows]` in the dk/dv pass. Functions
here take the two index vectors already shaped to broadcast, and so serve both.
"""

import triton
import triton.language as tl

from farlight.kernels.triton.jit.work_tables import B_BITS, B_BOUNDS, B_FIRST, B_HI, B_LO

__all__ = [
    "UNSPECIALIZED",
    "allowed_pairs",
    "gathered_keys",
    "head_base",
    "index_ids",
    "kept_pairs",
    "load_rows",
    "masked_keys",
    "product",
    "row_hashes",
    "signed_ids",
]

# Arguments whose value triggers no recompilation. Strides come divided by UNIT, so that alignment is one option for all.
UNSPECIALIZED = [f"s{tensor}{dimension}" for tensor in "qkvd" for dimension in "bhn"]
UNSPECIALIZED += ["heads", "heads_per_kv", "n_q", "n_k", "q_offset", "max_dropped"]


@triton.jit
def head_base(ptr, batch, head, stride_b, stride_h, UNIT: tl.constexpr):
    """The address of one head's first row. In 64 bits throughout: a stride times UNIT may exceed 32 bits."""
    return ptr + (batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h) * UNIT


@triton.jit
def index_ids(first, count, sorted_ptr, table_ptr, offset, SORTED: tl.constexpr):
    """Row (or key) ids `first + offset`, read through the permutation `table_ptr` where `*sorted_ptr` is 1."""
    index = first + offset
    if SORTED:
        index = tl.load(table_ptr + index, mask=offset < count * tl.load(sorted_ptr), other=index)
    return index


@triton.jit
def signed_ids(first, exists, table_ptr, offset, SORTED: tl.constexpr, BLOCK: tl.constexpr):
    """Ids of a block whose first index is written as -1 - slot where it goes through the permutation."""
    index = first + offset
    if SORTED:
        through = exists & (offset < tl.where(first < 0, BLOCK, 0))
        index = tl.load(table_ptr + (-1 - first) + offset, mask=through, other=index)
    return index


@triton.jit
def allowed_pairs(column, row, block, data_ptr, BITS: tl.constexpr):
    """Which pairs of a masked block are allowed. `column`: keys from the block's first; `row`: rows within the plan's tile.

    Without a mask the run's ends decide; a BOUNDS mask moves them for each row, a BITS mask has 128 bits for each row.
    """
    lo, hi = tl.load(block + B_LO), tl.load(block + B_HI)
    bounds = tl.load(block + B_BOUNDS)
    bounded = row < tl.where(bounds >= 0, 1 << 30, 0)
    pointer = data_ptr + bounds + 2 * row
    low = lo + tl.load(pointer, mask=bounded, other=0)
    high = hi + tl.load(pointer + 1, mask=bounded, other=0)
    allowed = (column >= low) & (column < high)
    if BITS:
        bits = tl.load(block + B_BITS)
        if bits >= 0:
            bit = column - lo
            inside = (bit >= 0) & (column < hi)
            word = tl.load(data_ptr + bits + 4 * row + (bit >> 5), mask=inside & (row >= 0), other=0)
            allowed = allowed & (((word >> (bit & 31)) & 1) == 1)
    return allowed


@triton.jit
def masked_keys(block, tile_row, n, keys_ptr, data_ptr, BITS: tl.constexpr, SORTED_KEYS: tl.constexpr, BLOCK_N: tl.constexpr):
    """(key ids, which exist, allowed `[rows, keys]`) of a masked block of the forward or the dq pass."""
    exists = (n >= tl.load(block + B_LO)) & (n < tl.load(block + B_HI))
    allowed = allowed_pairs(n[None, :], tile_row[:, None], block, data_ptr, BITS)
    key = signed_ids(tl.load(block + B_FIRST), exists, keys_ptr, n, SORTED_KEYS, BLOCK_N)
    return key, exists, allowed


@triton.jit
def gathered_keys(begin, end, m, n, point_key_ptr, point_row_ptr):
    """(key ids, which exist, allowed `[rows, keys]`) of up to BLOCK_N single pairs: each key is for its own row alone."""
    exists = begin + n < end
    key = tl.load(point_key_ptr + begin + n, mask=exists, other=0)
    allowed = tl.load(point_row_ptr + begin + n, mask=exists, other=-1)[None, :] == m[:, None]
    return key, exists, allowed


@triton.jit
def _mix(x):
    """The finalizer of MurmurHash3."""
    x = x ^ (x >> 16)
    x = x * tl.full((), 0x85EBCA6B, tl.uint32)
    x = x ^ (x >> 13)
    x = x * tl.full((), 0xC2B2AE35, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _absorb(h, word):
    return _mix(h ^ word) * tl.full((), 5, tl.uint32) + tl.full((), 0xE6546B64, tl.uint32)


@triton.jit
def row_hashes(seed_ptr, batch, head, position):
    """The hash of (seed, batch, head, position), which seeds dropout of one row."""
    seed = tl.load(seed_ptr)
    h = tl.full((), 0x9E3779B9, tl.uint32)
    h = _absorb(h, (seed & 0xFFFFFFFF).to(tl.uint32))
    h = _absorb(h, ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    h = _absorb(h, batch.to(tl.uint32))
    h = _absorb(h, head.to(tl.uint32))
    return _absorb(h, position.to(tl.uint32))


@triton.jit
def kept_pairs(hashes, key, max_dropped):
    """True where dropout keeps the pair: its hash is above the largest dropped one."""
    pair_hash = _mix(hashes ^ (key.to(tl.uint32) * tl.full((), 0x9E3779B9, tl.uint32)))
    return pair_hash > max_dropped.to(tl.uint32)


@triton.jit
def load_rows(base, row, d, stride_row, stride_d, valid, head_dim, WHOLE_D: tl.constexpr, WIDE: tl.constexpr):
    """`(rows, D)` of a tensor with any strides; 0 where a row or a dimension does not exist."""
    index = row.to(tl.int64) if WIDE else row
    pointer = base + index[:, None] * stride_row + d[None, :] * stride_d
    if WHOLE_D:
        return tl.load(pointer, mask=valid[:, None], other=0.0)
    return tl.load(pointer, mask=valid[:, None] & (d[None, :] < head_dim), other=0.0)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, accumulated in float32. PRECISION: "ieee", "tf32", or "widened" for bfloat16 under the interpreter."""
    if PRECISION == "widened":
        # Triton's interpreter would multiply the bits of bfloat16 as if they were integers.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)
