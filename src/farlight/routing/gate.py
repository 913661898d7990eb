"""`gated_attention`: attention whose logits include a learned link score, so that the gradient reaches the scorer."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from farlight.attention import attention
from farlight.errors import ArgumentError
from farlight.patterns.expression import Pattern

__all__ = ["gated_attention"]


@overload
def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    q_score: Tensor,
    k_score: Tensor,
    *,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    q_score: Tensor,
    k_score: Tensor,
    *,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    q_score: Tensor,
    k_score: Tensor,
    *,
    scale: float | None = ...,
    return_lse: bool,
    backend: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    q_score: Tensor,
    k_score: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Sparse attention with an additive, learned score in every logit.

        out_i = Σ_j softmax_j(scale · q_i · k_j + q_score_i · k_score_j) v_j      over the j that `pattern` allows i

    It trains a router's scoring vectors. `TopKeys()(q_score, k_score)` ranks keys by the same product q_score_i · k_score_j,
    and `TopBlocks(…)(q_score, k_score)` ranks blocks by its mean over the block. The score multiplies a link's weight by
    exp(score), so a link that lowers the loss is scored higher after the step. The gradient is exact for the links of the
    pattern. The choice itself has none, nor have links outside the pattern (no straight-through estimator). The score of a
    single link enters, never a block's mean, so a causal pattern stays causal.

    Args:
        q, k, v, pattern, scale, return_lse, backend: as in `fl.attention`.
        q_score, k_score: `(B, H, n_q, S)` and `(B, H_kv, n_k, S)` in q's dtype, any width S >= 1.

    Computed as one attention of head_dim D + S. Raises ArgumentError for scores of other shapes or dtypes.

    >>> import torch, farlight as fl
    >>> from farlight.routing import TopBlocks, gated_attention
    >>> q, k, v = torch.randn(3, 1, 2, 64, 8).unbind(0)
    >>> q_score, k_score = (torch.randn(1, 2, 64, 4, requires_grad=True) for _ in "qk")
    >>> pattern = TopBlocks(2, 8)(q_score, k_score) | fl.window(4)
    >>> gated_attention(q, k, v, pattern, q_score, k_score).sum().backward()
    >>> q_score.grad.shape
    torch.Size([1, 2, 64, 4])
    """
    for name, score, x in (("q_score", q_score, q), ("k_score", k_score, k)):
        if not isinstance(score, Tensor) or score.dim() != 4 or score.shape[:3] != x.shape[:3] or score.dtype != x.dtype:
            actual = f"{tuple(score.shape)} of {score.dtype}" if isinstance(score, Tensor) else type(score).__name__
            raise ArgumentError(
                f"gated_attention: {name} is {actual}; ({', '.join(map(str, x.shape[:3]))}, S) of {x.dtype} is needed."
            )
    if q_score.shape[3] != k_score.shape[3]:
        raise ArgumentError(
            f"gated_attention: q_score has width {q_score.shape[3]} and k_score {k_score.shape[3]}; they must be equal."
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide_q, wide_k = torch.cat((q * scale, q_score), -1), torch.cat((k, k_score), -1)
    wide_v = torch.cat((v, v.new_zeros(*v.shape[:3], k_score.shape[3])), -1)
    out, lse = attention(wide_q, wide_k, wide_v, pattern, scale=1.0, return_lse=True, backend=backend)
    out = out[..., : v.shape[3]]
    return (out, lse) if return_lse else out
