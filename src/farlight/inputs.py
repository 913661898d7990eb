"""Checking and reading the arguments of `fl.attention`: tensors, numbers, and what is not supported."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from farlight.errors import ArgumentError, UnsupportedError, show

__all__ = [
    "autocast_inputs",
    "check_tensors",
    "even_widths",
    "read_dropout",
    "read_offset",
    "read_scale",
    "read_seed",
    "refuse_distributed",
    "refuse_layouts",
    "without_autocast",
]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def autocast_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v cast as torch's own attention casts them under autocast; float64 and everything outside autocast stay."""
    if not isinstance(q, Tensor) or q.is_meta or not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    q, k, v = (x.to(dtype) if isinstance(x, Tensor) and x.dtype != torch.float64 else x for x in (q, k, v))
    return q, k, v


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Autocast switched off for the device of x; tensors without data know no autocast."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ArgumentError or UnsupportedError where q, k and v are not the operands of one attention."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ArgumentError(f"{name} is {type(x).__name__}, not a torch tensor; pass (B, H, N, D) tensors.")
        if x.is_nested or x.layout is not torch.strided:
            refuse_layouts(**{name: x})
        if x.dim() != 4:
            raise ArgumentError(
                f"{name} has shape {tuple(x.shape)}: attention needs 4 dimensions (B, H, N, D); add or split some."
            )
        if x.dtype not in _DTYPES:
            raise ArgumentError(f"{name} has dtype {x.dtype}; use float16, bfloat16, float32 or float64.")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ArgumentError(f"q is {q.dtype}, but {name} is {x.dtype}; cast them to one dtype.")
        if x.device != q.device:
            raise ArgumentError(f"q is on {q.device}, but {name} is on {x.device}; move them to one device.")
        if x.shape[0] != q.shape[0]:
            raise ArgumentError(f"q has a batch of {q.shape[0]}, but {name} of {x.shape[0]}; they must be equal.")
    if k.shape[3] != q.shape[3]:
        raise ArgumentError(f"q has head_dim {q.shape[3]}, but k has {k.shape[3]}; they must be equal.")
    if k.shape[:3] != v.shape[:3]:
        raise ArgumentError(
            f"k has shape {tuple(k.shape)}, but v has {tuple(v.shape)}; they must have equal heads and tokens: only the "
            "last dimension, head_dim, may differ."
        )
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[3] == 0 or v.shape[3] == 0:
        raise ArgumentError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: heads and head_dim must be at least 1."
        )
    if q.shape[1] % k.shape[1]:
        raise ArgumentError(f"q has {q.shape[1]} heads and k has {k.shape[1]}: the first must be a multiple of the second.")


def refuse_layouts(**tensors: object) -> None:
    """Raise for a tensor whose values do not stand at strides in one piece of memory: nested, sparse, of another library."""
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.is_nested:
            raise UnsupportedError(
                f"{name} is a nested tensor, which is not supported: pad it and pass fl.padding(lengths), or pack the texts "
                "into one row and pass fl.documents(lengths=…)."
            )
        if isinstance(x, Tensor) and x.layout is not torch.strided:
            raise ArgumentError(f"{name} has layout {x.layout}; a dense tensor is needed: call {name}.to_dense().")


def even_widths(of_keys: int, of_values: int) -> str:
    """What to do where values are narrower or wider than keys."""
    if of_values < of_keys:
        return f"pad v with zeros by torch.nn.functional.pad(v, (0, {of_keys - of_values})) and keep out[..., :{of_values}]."
    return (
        f"pad q and k with zeros by torch.nn.functional.pad(…, (0, {of_values - of_keys})) and pass scale={of_keys} ** -0.5, "
        "or the scale that you use."
    )


def refuse_distributed(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise for tensors that are spread over processes."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if type(x).__name__ == "DTensor":
            raise UnsupportedError(f"{name} is a DTensor, which is not supported; pass {name}.to_local() on each rank.")


def read_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the scores: `scale`, or head_dim ** -0.5 for None."""
    if scale is None:
        return float(head_dim**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ArgumentError(f"scale = {show(scale)} is {type(scale).__name__}; pass a number, or None for head_dim ** -0.5.")
    if not math.isfinite(scale):
        raise ArgumentError(f"scale = {scale} is not finite; pass a finite number, or None for head_dim ** -0.5.")
    return float(scale)


def read_dropout(dropout: float) -> float:
    """The share of links to drop, in 0 … 1."""
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout <= 1.0:
        raise ArgumentError(f"dropout = {show(dropout)}: it is the share of links to drop and must lie in 0 <= dropout <= 1.")
    return float(dropout)


def read_offset(q_offset: int) -> int:
    """The position of the first query."""
    if isinstance(q_offset, bool) or not isinstance(q_offset, (int, torch.SymInt)):
        raise ArgumentError(f"q_offset = {show(q_offset)}: it is the position of the first query, a whole number or None.")
    return q_offset


def read_seed(seed: int | Tensor | None, dropout: float) -> Tensor:
    """The seed of dropout as a 0-d int64 tensor: drawn from torch's default generator where it is needed and None is given."""
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ArgumentError(f"seed has shape {tuple(seed.shape)} and dtype {seed.dtype}; pass one int64 number.")
        return seed.reshape(())
    if seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ArgumentError(f"seed = {show(seed)}: pass a whole number in 0 … 2^63 - 1, or None.")
        return torch.tensor(seed, dtype=torch.int64, device="cpu")
    if not dropout:
        return torch.zeros((), dtype=torch.int64, device="cpu")
    return torch.randint(2**62, (), dtype=torch.int64, device="cpu")
