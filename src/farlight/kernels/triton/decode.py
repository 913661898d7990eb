"""One or a few new queries against the keys of a cache: the keys are split over the processors and joined by lse."""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.errors import ArgumentError, UnsupportedError
from farlight.kernels.checks import KERNEL_DTYPES, MOST_DIMS, addressable, check_tensors
from farlight.kernels.triton.configs import padded
from farlight.kernels.triton.device_caps import missing, unfit, workers
from farlight.kernels.triton.launch import on_device, precision

__all__ = ["decode", "serves"]

_LOG2_E = 1.4426950408889634
_BLOCK = 64
# Keys of a split at the least: below, joining costs more than it saves.
_SHORTEST = 4 * _BLOCK
# Rows of one key head beyond which this is no longer decoding.
_MOST_ROWS = 256


def serves(q: Tensor, k: Tensor) -> bool:
    """Whether `decode` is the kernel to take for these tensors: few queries, on a device that Triton compiles for."""
    rows = q.shape[1] // max(1, k.shape[1]) * q.shape[2]
    fits = q.device.type != "cpu" and q.dtype in KERNEL_DTYPES and q.shape[3] <= MOST_DIMS and rows <= _MOST_ROWS
    return fits and unfit(q.device) is None and missing() is None


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
    how many keys of each item are real (None: all); allowed: bool, broadcasting to `(B, H, n_q, n_k)` (None: every pair).
    Nothing is copied to or from the host, so that a step can be captured in a graph. A row without keys gives 0 and -inf.

    Raises ArgumentError where shapes or types do not fit, UnsupportedError where the kernels cannot run.
    """
    batch, heads, kv_heads, head_dim = check_tensors(q, k, v, "decoding takes", q.device)
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

    from farlight.kernels.triton.jit.decode import decode_kernel, join_kernel

    group = heads // kv_heads
    height = min(64, padded(group * n_q))
    stacks = -(-group * n_q // height)
    wanted = max(1, 2 * workers(q.device) // (batch * kv_heads * stacks))
    chunk = max(_SHORTEST, -(-n_k // wanted))
    chunk = -(-chunk // _BLOCK) * _BLOCK
    splits = max(1, -(-n_k // chunk))
    part_out = torch.empty((batch * heads * n_q * splits, head_dim), dtype=torch.float32, device=q.device)
    part_lse = torch.empty(batch * heads * n_q * splits, dtype=torch.float32, device=q.device)
    wide = padded(head_dim)
    with on_device(q.device):
        decode_kernel[(splits, batch * kv_heads, stacks)](
            q, k, v, lse if lengths is None else lengths, lse if mask is None else mask.view(torch.uint8),
            part_out, part_lse,
            *q.stride(), *k.stride(), *v.stride(), *((0, 0, 0, 0) if mask is None else mask.stride()),
            kv_heads, group, n_q, n_k, head_dim, (head_dim**-0.5 if scale is None else scale) * _LOG2_E, chunk, splits,
            BLOCK_M=height, BLOCK_N=_BLOCK if wide <= 128 else _BLOCK // 2, BLOCK_D=wide, WHOLE_D=wide == head_dim,
            LENGTHS=lengths is not None, MASK=mask is not None,
            WIDE=any((x.shape[2] - 1) * x.stride(2) + (head_dim - 1) * x.stride(3) >= 2**31 for x in (k, v)),
            PRECISION=precision(q), num_warps=4, num_stages=3 if wide <= 64 else 2,
        )  # fmt: skip
        join_kernel[(batch * heads * n_q,)](
            out, lse, part_out, part_lse, head_dim, splits, BLOCK_S=16, BLOCK_D=wide, num_warps=2
        )
    return out, lse


def _check_device(device: torch.device) -> None:
    for why in (missing(), unfit(device)):
        if why is not None:
            raise UnsupportedError(f"the Triton decode kernel cannot run: {why}.")


def _mask(allowed: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    if allowed.dtype != torch.bool:
        raise ArgumentError(f"allowed is {allowed.dtype}; pass bool, True where a query may look at a key.")
    try:
        return allowed.expand(shape)
    except RuntimeError as error:
        raise ArgumentError(f"allowed has shape {tuple(allowed.shape)}, which does not broadcast to {shape}.") from error
