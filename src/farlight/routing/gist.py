"""Attention that also listens to what it does not look at: blocks that were not chosen take part in summary."""

from __future__ import annotations

import math

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
    """Exact softmax over the keys that `pattern` allows and one summary for each block of which it allows nothing.

        out_i = Σ_{j seen} e^{s q_i·k_j} v_j + Σ_{c heard} n_c e^{s q_i·k̄_c} v̄_c,  over  Σ e^{s q_i·k_j} + Σ n_c e^{s q_i·k̄_c}

    k̄_c and v̄_c are the means of cell c's keys and values, n_c is its number of keys: a summary speaks for n_c tokens at once.
    Were all keys of a cell equal, this would be exactly full attention. A block of which a query sees at least one key is
    not summarised for it: what it sees of that block it sees whole, and the rest of the block stays silent, so let the
    pattern choose whole blocks (`TopBlocks`, `blocked_window`).

    Args:
        q, k, v, scale, return_lse, backend: as in `fl.attention`; differentiable, through the means too.
        pattern: what is seen token by token. With causal=True pass a causal one: it is used as it is.
        block: tokens in a block.
        levels: 1 hears every unseen block on its own, which costs n_q · n_k / block links. With more, cells of 2, 4, … blocks
            stand in where the distance allows (see `unseen`): a query hears a few cells of each level, and n log n links in
            all when levels=None, as many as the text has room for.
        causal: hear only what lies wholly in the past (all keys of the cell at positions <= the query's).
        key_mask: `(B, n_k)` bool, True = real: padding has no part in means and sizes. It is not seen either.

    Hierarchies of summaries: Zhu & Soricut 2021, "H-Transformer-1D", arXiv:2107.11906.

    >>> import torch, farlight as fl
    >>> from farlight.routing import gist_attention
    >>> q, v = torch.randn(2, 1, 1, 12, 4).unbind(0)
    >>> k = torch.randn(1, 1, 3, 4).repeat_interleave(4, 2)          # equal keys in each block: nothing is lost
    >>> near = fl.blocked_window(0, block=4)
    >>> torch.allclose(gist_attention(q, k, v, near, block=4), fl.attention(q, k, v, fl.full()), atol=1e-5)
    True
    """
    block = whole("gist_attention: block", block, 1)
    n_q, n_k = q.shape[2], k.shape[2]
    if levels is None:
        levels = max(1, (n_k // block).bit_length() - 2)  # the coarsest level has four cells or a few more
    levels = whole("gist_attention: levels", levels, 1)
    if not isinstance(pattern, Pattern):
        raise ArgumentError(f"gist_attention: {type(pattern).__name__} is not a pattern; pass e.g. TopBlocks(8, 64)(q, k).")
    if key_mask is not None and (key_mask.dtype != torch.bool or tuple(key_mask.shape) not in ((k.shape[0], n_k), (1, n_k))):
        raise ArgumentError(
            f"gist_attention: key_mask is {tuple(key_mask.shape)} of {key_mask.dtype}; "
            f"a bool tensor {(k.shape[0], n_k)} is needed."
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seen = pattern if key_mask is None else pattern & padding(key_mask)
    pieces = [attention(q, k, v, seen, scale=scale, return_lse=True, backend=backend)]
    kind = torch.promote_types(q.dtype, torch.float32)
    # Summaries are few: they are taken in float32 at least, where autocast would round the logarithms of sizes.
    with without_autocast(q):
        wide = (q.to(kind), k.to(kind), v.to(kind))
        for level in range(levels if n_k else 0):
            heard: Pattern = unseen(seen, block, n_k, level, levels, causal)
            pieces.append(_summaries(*wide, heard, block << level, n_k - n_q, key_mask, scale, backend))
    out, lse = merge([(piece.to(kind), part) for piece, part in pieces])
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def _summaries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heard: Pattern,
    size: int,
    q_offset: int,
    real: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out, lse) over the summaries of cells of `size` tokens, each counted as often as it has keys."""
    sizes = block_sizes(k.shape[2], size, real, k.device)
    k, v = block_mean(k, size, real), block_mean(v, size, real)
    if bool((sizes == size).all()):
        out, lse = attention(q, k, v, heard, scale=scale, q_offset=q_offset, return_lse=True, backend=backend)
        return out, lse + math.log(size)
    if bool((sizes == 0).any()):
        heard = heard & padding(sizes > 0)
    # Cells of unequal size: log n_c is one more channel of the keys, against a 1 in the queries.
    weight = sizes.clamp(min=1).to(k.dtype).log()[:, None, :, None].expand(*k.shape[:3], 1)
    q = torch.cat((q * scale, q.new_ones(*q.shape[:3], 1)), -1)
    k, wide = torch.cat((k, weight), -1), torch.cat((v, v.new_zeros(*v.shape[:3], 1)), -1)
    out, lse = attention(q, k, wide, heard, scale=1.0, q_offset=q_offset, return_lse=True, backend=backend)
    return out[..., :-1], lse
