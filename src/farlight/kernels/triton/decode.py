"""Decoding: a few new queries over the keys of a cache, split-K over the processors.

Each program takes one chunk of keys for all query heads of one key head; a second kernel merges the chunks of each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.errors import ArgumentError, UnsupportedError
from farlight.kernels.checks import KERNEL_DTYPES, MOST_DIMS, addressable, check_tensors
from farlight.kernels.triton.configs import padded
from farlight.kernels.triton.device_caps import missing, num_processors, unfit
from farlight.kernels.triton.launch import is_wide, on_device, precision

__all__ = ["decode", "serves"]

_LOG2_E = 1.4426950408889634
_BLOCK_N = 64
# Fewest keys of a split: below, merging costs more than it saves.
_MIN_CHUNK = 4 * _BLOCK_N
# Rows (query heads of a key head times queries) beyond which the kernels that execute a plan are the better ones.
_MAX_ROWS = 256


def serves(q: Tensor, k: Tensor) -> bool:
    """Whether `decode` serves these tensors: few queries, on a device that Triton compiles for."""
    rows = q.shape[1] // max(1, k.shape[1]) * q.shape[2]
    is_small = q.device.type != "cpu" and q.dtype in KERNEL_DTYPES and q.shape[3] <= MOST_DIMS and rows <= _MAX_ROWS
    return is_small and unfit(q.device) is None and missing() is None


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a few queries over keys that a cache holds: `(B, H, n_q, D)` in q's dtype, `(B, H, n_q)` float32.

        out[i] = Σ_j P[i, j] v[j],   P = softmax over j < lengths[b] with allowed[b, h, i, j]

    q: `(B, H, n_q, D)`; k, v: `(B, H_kv, n_k, D)`, any strides; float32, bfloat16 or float16. lengths: `(B,)` int32 or int64,
    the number of real keys of each item (None: all); allowed: bool, broadcasting to `(B, H, n_q, n_k)` (None: every pair).
    Nothing is copied to or from the host, so that a step can be captured in a graph. A row without keys gives 0 and -inf.

    Raises ArgumentError where shapes or types do not fit, UnsupportedError where the kernels cannot run.
    """
    batch, heads, kv_heads, head_dim, _ = check_tensors(q, k, v, "decoding takes", q.device, one_width=True)
    _check_device(q.device)
    n_q, n_k = q.shape[2], k.shape[2]
    if lengths is not None and (lengths.shape != (batch,) or lengths.dtype not in (torch.int32, torch.int64)):
        raise ArgumentError(f"lengths is {lengths.dtype} of shape {tuple(lengths.shape)}; pass ({batch},) integers.")
    q, k, v = addressable(q, "q"), addressable(k, "k"), addressable(v, "v")
    lengths = None if lengths is None else addressable(lengths.to(q.device).contiguous(), "lengths")
    mask = None if allowed is None else _mask(addressable(allowed, "allowed"), (batch, heads, n_q, n_k))
    out = torch.empty((batch, heads, n_q, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, n_q), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse

    from farlight.kernels.triton.jit.decode import decode_kernel, decode_merge_kernel

    heads_per_kv, block_d = heads // kv_heads, padded(head_dim)
    block_m = min(64, padded(heads_per_kv * n_q))
    row_blocks = -(-heads_per_kv * n_q // block_m)
    # Two programs for each processor, in chunks of whole key blocks.
    max_splits = max(1, 2 * num_processors(q.device) // (batch * kv_heads * row_blocks))
    chunk = max(_MIN_CHUNK, -(-n_k // max_splits))
    chunk = -(-chunk // _BLOCK_N) * _BLOCK_N
    splits = max(1, -(-n_k // chunk))
    partials = batch * heads * n_q * splits
    part_out = torch.empty((partials, head_dim), dtype=torch.float32, device=q.device)
    part_max, part_sum = (torch.empty(partials, dtype=torch.float32, device=q.device) for _ in range(2))
    with on_device(q.device):
        decode_kernel[(splits, batch * kv_heads, row_blocks)](
            q, k, v, lse if lengths is None else lengths, lse if mask is None else mask.view(torch.uint8),
            part_out, part_max, part_sum,
            *q.stride(), *k.stride(), *v.stride(), *((0, 0, 0, 0) if mask is None else mask.stride()),
            kv_heads, heads_per_kv, n_q, n_k, head_dim, (head_dim**-0.5 if scale is None else scale) * _LOG2_E, chunk, splits,
            BLOCK_M=block_m, BLOCK_N=_BLOCK_N if block_d <= 128 else _BLOCK_N // 2, BLOCK_D=block_d,
            WHOLE_D=block_d == head_dim, LENGTHS=lengths is not None, MASK=mask is not None, WIDE=is_wide(k) or is_wide(v),
            PRECISION=precision(q), num_warps=4, num_stages=3 if block_d <= 64 else 2,
        )  # fmt: skip
        decode_merge_kernel[(batch * heads * n_q,)](
            out, lse, part_out, part_max, part_sum, head_dim, splits, BLOCK_S=16, BLOCK_D=block_d, num_warps=2
        )
    return out, lse


def _check_device(device: torch.device) -> None:
    for reason in (missing(), unfit(device)):
        if reason is not None:
            raise UnsupportedError(f"the Triton decode kernel cannot run: {reason}.")


def _mask(allowed: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """`allowed` broadcast to `(B, H, n_q, n_k)`. Raises ArgumentError where dtype or shape does not fit."""
    if allowed.dtype != torch.bool:
        raise ArgumentError(f"allowed is {allowed.dtype}; pass bool, True where a query may look at a key.")
    try:
        return allowed.expand(shape)
    except RuntimeError as error:
        raise ArgumentError(f"allowed has shape {tuple(allowed.shape)}, which does not broadcast to {shape}.") from error
