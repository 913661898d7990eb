"""`gist_attention`: exact attention over a pattern's keys plus one mean key and value for every block that it leaves uncovered.

The softmax is computed in pieces and merged exactly by lse: attention over the pattern, then, per level, attention over the
means of that level's cells under the pattern `unseen`. A cell's size n_c enters as log n_c added to its logit.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from farlight.attention import attention
from farlight.errors import ArgumentError
from farlight.inputs import without_autocast
from farlight.merge import merge
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern
from farlight.patterns.packing import padding
from farlight.patterns.uncovered import unseen
from farlight.routing.pooling import block_mean, block_sizes

__all__ = ["gist_attention"]


@overload
def gist_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    block: int = ...,
    levels: int | None = ...,
    causal: bool = ...,
    key_mask: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def gist_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    block: int = ...,
    levels: int | None = ...,
    causal: bool = ...,
    key_mask: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def gist_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    block: int = ...,
    levels: int | None = ...,
    causal: bool = ...,
    key_mask: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: bool,
    backend: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def gist_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    block: int = 64,
    levels: int | None = 1,
    causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the keys that `pattern` allows and one summary for each block of which it allows nothing.

        out_i = [Σ_{j ∈ P(i)} e^{s q_i·k_j} v_j + Σ_{c ∈ U(i)} n_c e^{s q_i·k̄_c} v̄_c]
              / [Σ_{j ∈ P(i)} e^{s q_i·k_j}     + Σ_{c ∈ U(i)} n_c e^{s q_i·k̄_c}]

    P(i): the keys that the pattern allows query i; U(i): the uncovered cells of i. A cell is a block, or 2^level adjacent
    blocks; k̄_c and v̄_c are the means of its keys and values, n_c is its number of real keys. Equal to full attention where
    the keys of every cell are equal. A block of which i sees one key is covered: its other keys take no part, so let the
    pattern consist of whole blocks (`TopBlocks`, `blocked_window`).

    Args:
        q, k, v, scale, return_lse, backend: as in `fl.attention`; differentiable, through the means too.
        pattern: P, used as it is; it must be causal itself where `causal=True`.
        block: tokens in a block.
        levels: number of cell sizes, block · 2^0 … block · 2^(levels - 1). 1: every uncovered block is its own cell, up to
            n_q · n_k / block links. None: as many as leave at least four cells on the coarsest level, n log n links in all.
            Which cell covers an uncovered block is defined at `unseen`.
        causal: only cells whose keys all have positions <= the query's.
        key_mask: `(B or 1, n_k)` bool, True = real; padding is in no mean, no size and no P(i).

    Returns out `(B, H, n_q, D)` in q's dtype, and lse `(B, H, n_q)` in float32 (float64 for float64) with return_lse.
    Raises ArgumentError for a pattern or mask of another type or shape.

    Hierarchies of summaries: Zhu & Soricut 2021, "H-Transformer-1D", arXiv:2107.11906.

    >>> import torch, farlight as fl
    >>> from farlight.routing import gist_attention
    >>> q, v = torch.randn(2, 1, 1, 12, 4).unbind(0)
    >>> k = torch.randn(1, 1, 3, 4).repeat_interleave(4, 2)          # equal keys in each block: exact
    >>> near = fl.blocked_window(0, block=4)
    >>> torch.allclose(gist_attention(q, k, v, near, block=4), fl.attention(q, k, v, fl.full()), atol=1e-5)
    True
    """
    block = whole("gist_attention: block", block, 1)
    n_q, n_k = q.shape[2], k.shape[2]
    if levels is None:
        levels = max(1, (n_k // block).bit_length() - 2)  # four to eight cells on the coarsest level
    levels = whole("gist_attention: levels", levels, 1)
    if not isinstance(pattern, Pattern):
        raise ArgumentError(f"gist_attention: {type(pattern).__name__} is not a pattern; pass e.g. TopBlocks(8, 64)(q, k).")
    if key_mask is not None and (key_mask.dtype != torch.bool or tuple(key_mask.shape) not in ((k.shape[0], n_k), (1, n_k))):
        raise ArgumentError(
            f"gist_attention: key_mask is {tuple(key_mask.shape)} of {key_mask.dtype}; "
            f"a bool tensor {(k.shape[0], n_k)} is needed."
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    covered = pattern if key_mask is None else pattern & padding(key_mask)
    pieces = [attention(q, k, v, covered, scale=scale, return_lse=True, backend=backend)]
    dtype = torch.promote_types(q.dtype, torch.float32)
    # Autocast would round log n_c to 16 bits. There are few summaries, so float32 costs little.
    with without_autocast(q):
        qkv = (q.to(dtype), k.to(dtype), v.to(dtype))
        for level in range(levels if n_k else 0):
            uncovered: Pattern = unseen(covered, block, n_k, level, levels, causal)
            pieces.append(_attend_summaries(*qkv, uncovered, block << level, n_k - n_q, key_mask, scale, backend))
    out, lse = merge([(piece_out.to(dtype), piece_lse) for piece_out, piece_lse in pieces])
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def _attend_summaries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    uncovered: Pattern,
    cell: int,
    q_offset: int,
    key_mask: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention over the means of cells of `cell` tokens, logit s · q·k̄_c + log n_c; pattern: query × cell."""
    sizes = block_sizes(k.shape[2], cell, key_mask, k.device)
    k, v = block_mean(k, cell, key_mask), block_mean(v, cell, key_mask)
    if bool((sizes == cell).all()):
        # A constant in every logit changes the lse only.
        out, lse = attention(q, k, v, uncovered, scale=scale, q_offset=q_offset, return_lse=True, backend=backend)
        return out, lse + math.log(cell)
    if bool((sizes == 0).any()):
        uncovered = uncovered & padding(sizes > 0)
    # Cells of unequal size: one more channel, 1 in q and log n_c in k, adds log n_c to the logit.
    log_size = sizes.clamp(min=1).to(k.dtype).log()[:, None, :, None].expand(*k.shape[:3], 1)
    q = torch.cat((q * scale, q.new_ones(*q.shape[:3], 1)), -1)
    k, v = torch.cat((k, log_size), -1), torch.cat((v, v.new_zeros(*v.shape[:3], 1)), -1)
    out, lse = attention(q, k, v, uncovered, scale=1.0, q_offset=q_offset, return_lse=True, backend=backend)
    return out[..., :-1], lse
