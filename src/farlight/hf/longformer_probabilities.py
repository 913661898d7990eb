"""The layout of Longformer's and LED's attention probabilities: columns by distance, not by position.

Hugging Face's encoders return, for N tokens, G global ones (the most of any text in the batch) and w = attention_window / 2:

    attentions          (B, H, N, G + 2w + 1)   of local rows: the G global keys in order, then the keys at i - w … i + w
    global_attentions   (B, H, N, G)            of the global rows: column g is the g-th global token over all N keys

A global key inside the window counts among the first G columns, and its place in the window is 0; so are the rows of global and
of padding tokens, keys beyond the ends, and columns of a text with fewer global tokens. The modules return both with the head
axis before the row axis swapped as their encoders expect it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farlight.hf.probabilities import probabilities
from farlight.patterns.algebra import PerHead
from farlight.patterns.expression import Pattern

__all__ = ["global_probabilities", "local_probabilities"]


def local_probabilities(
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    window_pattern: Pattern,
    is_global: Tensor | None,
    index: Tensor | None,
    used: Tensor | None,
) -> Tensor:
    """`(B, N, H, G + 2w + 1)`: the probabilities of the local rows, by global key and by place in the window.

    `q`, `k` `(B, H, N, D)`; `pattern` the allowed pairs, `window_pattern` the window of all heads or of each; `is_global`,
    `index`, `used` as in the roles of the tokens.
    """
    windows: Any = window_pattern.parts if isinstance(window_pattern, PerHead) else (window_pattern,)
    distances = torch.tensor([[x * one.dilation for x in range(-one.left, one.right + 1)] for one in windows], device=q.device)
    weights = probabilities(q, k, pattern, None)
    batch, heads, n, _ = weights.shape
    rows = torch.arange(n, device=q.device)[:, None]
    keys = rows + distances[:, None, :]  # (1 | H, N, 2w + 1)
    inside = (keys >= 0) & (keys < n)
    clamped = keys.clamp(0, n - 1)
    local = weights.gather(3, clamped.expand(batch, heads, n, -1)).masked_fill(~inside, 0.0)
    if is_global is None or index is None:
        return local.transpose(1, 2)
    local = local.masked_fill(is_global[:, clamped], 0.0)
    by_global = weights.gather(3, index[:, None, None, :].expand(-1, heads, n, -1))
    if used is not None:
        by_global = by_global.masked_fill(~used[:, None, None, :], 0.0)
    return torch.cat((by_global, local), 3).transpose(1, 2)


def global_probabilities(q: Tensor, k: Tensor, pattern: Pattern, index: Tensor | None, used: Tensor | None) -> Tensor:
    """`(B, H, G, N)`: the probabilities of the global rows; `index` where q has a row for every token."""
    weights = probabilities(q, k, pattern, None)
    if index is not None:
        weights = weights.gather(2, index[:, None, :, None].expand(-1, weights.shape[1], -1, weights.shape[3]))
    return weights if used is None else weights.masked_fill(~used[:, None, :, None], 0.0)
