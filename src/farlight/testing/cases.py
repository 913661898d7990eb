"""`Case`, an attention problem as data (sizes, pattern, seed, memory layout), and `inputs`, its tensors.

Tensors are drawn on the CPU in float64 from a seed that hashes the case's name, then rounded: the same numbers on every
machine, device and dtype. Renaming a case therefore changes its numbers. The cases themselves are in `case_list.py`.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from farlight.patterns import Pattern, Sizes

__all__ = ["Case", "Inputs", "Layout", "bits", "inputs", "table"]

Layout = Literal["contiguous", "tokens first", "every other", "packed", "backwards", "repeated"]


@dataclass(frozen=True)
class Case:
    """One attention problem.

    Attributes:
        name: unique; part of the seed.
        pattern: fits the sizes below.
        n_q, n_k: queries and keys; n_k = -1 means n_q.
        batch, heads, kv_heads, head_dim: kv_heads = 0 means as many as heads.
        value_dim: head_dim of v; 0 means that of q and k.
        q_offset, dropout, scale: as in `farlight.attention`.
        seed: of the tensors.
        layout: memory layout of q, k and v (see `_with_layout`).
    """

    name: str
    pattern: Pattern
    n_q: int
    n_k: int = -1
    batch: int = 1
    heads: int = 2
    kv_heads: int = 0
    head_dim: int = 16
    q_offset: int | None = None
    dropout: float = 0.0
    scale: float | None = None
    seed: int = 0
    layout: Layout = "contiguous"
    value_dim: int = 0

    def __post_init__(self) -> None:
        # Defaults that depend on other fields; object.__setattr__ because the dataclass is frozen.
        object.__setattr__(self, "n_k", self.n_q if self.n_k < 0 else self.n_k)
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)

    @property
    def sizes(self) -> Sizes:
        """The sizes as patterns and plans take them."""
        return Sizes.of(self.n_q, self.n_k, batch=self.batch, heads=self.heads, q_offset=self.q_offset)

    @property
    def scale_value(self) -> float:
        """The factor on the scores as a number."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Inputs:
    """q `(B, H, n_q, D)`, k `(B, H_kv, n_k, D)`, v `(B, H_kv, n_k, D_v)`; gradients of the output `(B, H, n_q, D_v)` and of
    the lse `(B, H, n_q)`."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    grad_lse: Tensor


def inputs(
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    requires_grad: bool = False,
) -> Inputs:
    """The tensors of a case in `dtype` on `device`; grad_lse is float32, or float64 for float64.

    `requires_grad`: q, k and v are leaves that require gradients.
    """
    generator = torch.Generator().manual_seed(case.seed * 2**32 + zlib.crc32(case.name.encode()))
    heads, dims = (case.heads, case.kv_heads, case.kv_heads), (case.head_dim, case.head_dim, case.value_dim)
    drawn = [
        torch.randn(case.batch, h, n, dim, generator=generator, dtype=torch.float64)
        for h, n, dim in zip(heads, (case.n_q, case.n_k, case.n_k), dims, strict=True)
    ]
    grad_out = torch.randn(case.batch, case.heads, case.n_q, case.value_dim, generator=generator, dtype=torch.float64)
    grad_lse = torch.randn(case.batch, case.heads, case.n_q, generator=generator, dtype=torch.float64)
    strided = _with_layout([x.to(device, dtype) for x in drawn], case.layout)
    q, k, v = (x.requires_grad_(requires_grad) for x in strided)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return Inputs(q, k, v, grad_out.to(device, dtype), grad_lse.to(device, lse_dtype))


def _with_layout(tensors: list[Tensor], layout: Layout) -> list[Tensor]:
    """The same values with other strides; shapes stay `(B, heads, tokens, head_dim)`. "packed" is for one head_dim."""
    match layout:
        case "contiguous":
            return tensors
        case "tokens first":
            return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
        case "every other":  # every second element of a larger buffer, along tokens and along head_dim
            views = []
            for x in tensors:
                buffer = torch.full(
                    (*x.shape[:2], 2 * x.shape[2] + 1, 2 * x.shape[3] + 1), math.nan, dtype=x.dtype, device=x.device
                )
                view = buffer[:, :, 1::2, 1::2]
                view.copy_(x)
                views.append(view)
            return views
        case "packed":  # slices of one projection's output (batch, tokens, q | k | v, heads, head_dim)
            joined = torch.stack([x.transpose(1, 2) for x in tensors], 2)
            return [joined[:, :, part].transpose(1, 2) for part in range(3)]
        case "backwards":  # head_dim outside tokens in memory
            return [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors]
        case "repeated":  # the first batch item broadcast, stride 0
            return [x[:1].expand(x.shape) for x in tensors]
    raise ValueError(f"layout = {layout!r} is unknown")


def table(seed: int, *shape: int, low: int = 0, high: int = 2) -> Tensor:
    """A table of random integers in `[low, high)`, int64 on the CPU, the same on every machine."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def bits(seed: int, *shape: int, share: float = 0.5) -> Tensor:
    """A random bool table of this shape in which a fraction `share` is True on average."""
    return table(seed, *shape, high=1000) < int(share * 1000)
