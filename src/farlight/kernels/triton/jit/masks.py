"""What kernels of both passes share: which links of a block are allowed, and which of them dropout leaves.

Blocks are read in two orientations: rows down and keys across in the passes over queries, the reverse in the pass over keys.
Functions here take the two index vectors already shaped to broadcast, and so serve both.
"""

import triton
import triton.language as tl

__all__ = ["BLOCK_FIELDS", "UNSPECIALIZED", "allowed_links", "kept_links", "load_rows", "product", "row_hashes"]

BLOCK_FIELDS = tl.constexpr(5)
# Arguments by whose value no kernel is compiled anew. Strides come divided by UNIT, so that alignment is one option for all.
UNSPECIALIZED = [f"s{tensor}{dimension}" for tensor in "qkvd" for dimension in "bhn"]
UNSPECIALIZED += ["heads", "group", "n_q", "n_k", "q_offset", "below"]


@triton.jit
def allowed_links(column, row, block, data_ptr, BITS: tl.constexpr):
    """Which links of a masked block are allowed. `block` points at (…, lo, hi, bounds, bits): the run's ends relative to
    column 0, and where the mask's data begin, -1 = it has none.
    """
    lo, hi = tl.load(block + 1), tl.load(block + 2)
    bounds = tl.load(block + 3)
    bounded = row < tl.where(bounds >= 0, 1 << 30, 0)
    at = data_ptr + bounds + 2 * row
    low = lo + tl.load(at, mask=bounded, other=0)
    high = hi + tl.load(at + 1, mask=bounded, other=0)
    allowed = (column >= low) & (column < high)
    if BITS:
        bits = tl.load(block + 4)
        if bits >= 0:
            place = column - lo
            inside = (place >= 0) & (column < hi)
            word = tl.load(data_ptr + bits + 4 * row + (place >> 5), mask=inside & (row >= 0), other=0)
            allowed = allowed & (((word >> (place & 31)) & 1) == 1)
    return allowed


@triton.jit
def _mix(x):
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
    """The hash of (seed, batch, head, position) from which the fate of each of a row's links is drawn."""
    seed = tl.load(seed_ptr)
    h = tl.full((), 0x9E3779B9, tl.uint32)
    h = _absorb(h, (seed & 0xFFFFFFFF).to(tl.uint32))
    h = _absorb(h, ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    h = _absorb(h, batch.to(tl.uint32))
    h = _absorb(h, head.to(tl.uint32))
    return _absorb(h, position.to(tl.uint32))


@triton.jit
def kept_links(hashes, key, below):
    """True where the link survives: its hash is not among the lowest `below + 1`."""
    drawn = _mix(hashes ^ (key.to(tl.uint32) * tl.full((), 0x9E3779B9, tl.uint32)))
    return drawn > below.to(tl.uint32)


@triton.jit
def load_rows(base, row, d, stride_row, stride_d, valid, head_dim, WHOLE_D: tl.constexpr, WIDE: tl.constexpr):
    """`(rows, D)` of a tensor with any strides; 0 where a row or a dimension does not exist."""
    at = row.to(tl.int64) if WIDE else row
    pointer = base + at[:, None] * stride_row + d[None, :] * stride_d
    if WHOLE_D:
        return tl.load(pointer, mask=valid[:, None], other=0.0)
    return tl.load(pointer, mask=valid[:, None] & (d[None, :] < head_dim), other=0.0)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, summed in float32."""
    if PRECISION == "widened":
        # Triton's interpreter would multiply the bits of bfloat16 as if they were integers.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)
