"""Full attention by torch's `scaled_dot_product_attention` under the pattern's mask: the better choice for short texts."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from farlight.caching import SizedCache
from farlight.kernels.backend import Request
from farlight.kernels.checks import addressable
from farlight.score.lowered import ALL_TERMS, ScoreTerms

__all__ = ["BACKEND", "LARGEST_MASK", "Mask", "attend", "cached_mask", "differentiable", "readable"]

# Bytes of mask that are still called short.
LARGEST_MASK = 2**28


class DenseBackend:
    """Torch's fused full attention as a mask backend."""

    name = "dense"
    score_terms = ALL_TERMS - {"softcap"}

    def reasons(self, request: Request) -> list[str]:
        """Why full attention cannot serve the request; empty when it can."""
        refusals = []
        sizes, pattern = request.sizes, request.pattern
        if request.return_lse:
            refusals.append("scaled_dot_product_attention does not give the lse; pass return_lse=False")
        if request.dropout:
            refusals.append("its dropout draws other links than farlight's; use dropout=0")
        masks = (sizes.batch if pattern.varies_over_batch else 1) * (sizes.heads if pattern.varies_over_heads else 1)
        if request.terms:  # the mask is of numbers, for every head
            masks = sizes.batch * sizes.heads * request.dtype.itemsize
        nbytes = masks * sizes.n_q * sizes.n_k
        if nbytes > LARGEST_MASK:
            refusals.append(f"its mask would take {nbytes / 2**20:,.0f} MiB, more than {LARGEST_MASK // 2**20} MiB")
        return refusals

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        *,
        scale: float,
        q_offset: int,
        dropout: float,
        seed: Tensor,
        terms: ScoreTerms | None = None,
    ) -> tuple[Tensor, None]:
        """(out, None) under the mask; dropout is 0, as `reasons` requires."""
        if terms is not None:
            return _attend_biased(q, k, v, mask, scale, q_offset, terms), None
        return attend(q, k, v, Mask.of(mask), scale=scale), None


BACKEND = DenseBackend()


class Mask(NamedTuple):
    """The pairs that are allowed, `(B|1, H|1, n_q, n_k)`, as `scaled_dot_product_attention` can be asked.

    Its answer for a row that sees nothing differs between its own kernels: such a row is let see everything, then blanked
    where `seeing`, `(B|1, H|1, n_q, 1)`, is False. None: every row sees something.
    """

    pairs: Tensor
    seeing: Tensor | None

    @classmethod
    def of(cls, pairs: Tensor) -> Mask:
        seeing = pairs.any(-1, keepdim=True)
        return cls(pairs | ~seeing, seeing)

    @property
    def nbytes(self) -> int:
        return self.pairs.nbytes + (0 if self.seeing is None else self.seeing.nbytes)

    def settled(self) -> Mask:
        """The same without `seeing` where it says nothing; asks the device."""
        return self if self.seeing is None or not bool(self.seeing.all()) else Mask(self.pairs, None)


_masks: SizedCache[Mask] = SizedCache(64 * 2**20)


def cached_mask(request: Request) -> Mask | None:
    """The mask of the request's pattern, cached while it is small; None when every pair is allowed."""
    pattern, sizes, device = request.pattern, request.sizes, request.device

    def build() -> Mask:
        with torch.inference_mode(False), torch.no_grad():
            pairs = pattern.dense(
                sizes.n_q, sizes.n_k, batch=sizes.batch, heads=sizes.heads, q_offset=sizes.q_offset, device=device
            )
            # One entry says "everything" as well as n_q · n_k of them.
            if bool(pairs.all()):
                return Mask(torch.ones(1, dtype=torch.bool, device=device), None)
            return Mask.of(pairs).settled()

    mask = _masks.get((pattern.key, sizes, device), build)
    return mask if mask.pairs.dim() == 4 else None


def readable(x: Tensor, name: str) -> Tensor:
    """x, or a copy where torch's fused kernels would read it wrongly: without storage, or with strides that overlap."""
    x, reach = addressable(x, name), 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < reach:
            return x.contiguous()
        reach += stride * (size - 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def differentiable() -> contextlib.AbstractContextManager[object]:
    """Within it, SDPA consists of torch operations, which have derivatives of every order and mode; fused kernels do not."""
    return sdpa_kernel(SDPBackend.MATH)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, *, scale: float) -> Tensor:
    """out for `mask`; None = every pair."""
    if not q.numel() or not k.numel():
        zero = (q.sum(-1, keepdim=True) + k.sum() + v.sum()).expand(*q.shape[:-1], v.shape[-1])
        return torch.where(torch.zeros((), dtype=torch.bool, device=q.device), zero, 0.0)
    # A literal True: under compile with dynamic shapes a comparison is a SymBool, which SDPA does not take.
    grouped: Any = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    allowed = None if mask is None else mask.pairs
    out = scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, **grouped)
    return out if mask is None or mask.seeing is None else torch.where(mask.seeing, out, 0.0)


def _attend_biased(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, q_offset: int, terms: ScoreTerms) -> Tensor:
    """out under the mask as numbers: the biases, -inf for pairs that are not allowed, and the sinks as one key of zeros."""
    batch, heads, n_q, n_k = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    bias = terms.bias(n_q, n_k, q_offset)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    seeing = None if terms.sinks is not None else mask.any(-1, keepdim=True)
    allowed = mask if seeing is None else mask | ~seeing
    numbers = torch.zeros((), dtype=exact, device=q.device) if bias is None else bias
    numbers = torch.where(allowed, numbers, float("-inf")).expand(batch, heads, n_q, n_k)
    if terms.sinks is not None:
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
        numbers = torch.cat([numbers, terms.sinks[None, :, None, None].expand(batch, heads, n_q, 1)], -1)
    return attend(q, k, v, Mask(numbers.to(q.dtype), seeing), scale=scale)
