"""`fl.packed_attention`: documents packed in one row, with queries and keys of different lengths."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from farlight.attention import attention
from farlight.errors import refuse_tracing
from farlight.inputs import check_tensors
from farlight.packed import attend_packed, read_cumulative
from farlight.patterns.chooser import Chooser
from farlight.patterns.expression import Pattern
from farlight.score.terms import Score

__all__ = ["packed_attention"]


@overload
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Chooser,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any = ...,
    *,
    scale: float | None = ...,
    dropout: float = ...,
    seed: int | Tensor | None = ...,
    score: Score | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Chooser,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any = ...,
    *,
    scale: float | None = ...,
    dropout: float = ...,
    seed: int | Tensor | None = ...,
    score: Score | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Chooser,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any = ...,
    *,
    scale: float | None = ...,
    dropout: float = ...,
    seed: int | Tensor | None = ...,
    score: Score | None = ...,
    sinks: Tensor | None = ...,
    return_lse: bool,
    backend: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Chooser,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    score: Score | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`fl.attention` of each of several documents that lie one after another in one row.

    Document d has the queries `cu_seqlens_q[d] … cu_seqlens_q[d + 1] - 1` and the keys of `cu_seqlens_k`; it is a sequence of
    its own under the pattern: its keys stand at positions 0, 1, …, its queries are the last of them (bottom-right alignment,
    as in FlashAttention's varlen functions). A pattern of distances alone (`full`, `causal`, `window`, `offsets`, `strided` and
    their algebra) is one call over all documents; any other pattern, or a router, is a call for each document.

    Args:
        q: `(1, H, Σ n_q, D)`. k, v: `(1, H_kv, Σ n_k, D)`, v of any head_dim.
        cu_seqlens_q, cu_seqlens_k: cumulative lengths from 0 to the number of tokens, integers; None: those of the queries.
        scale, dropout, seed, score, sinks, return_lse, backend: as in `fl.attention`. Where each document is a call, document
            d draws its dropout from seed + d.

    Returns:
        out `(1, H, Σ n_q, D_v)`; with `return_lse` also lse `(1, H, Σ n_q)`.

    Raises:
        PatternError, ArgumentError: lengths do not fit. UnsupportedError: a key_bias; lengths that cannot be read (compiled).

    >>> import torch, farlight as fl
    >>> q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 12, 8)
    >>> fl.packed_attention(q, k, k, fl.causal(), [0, 1, 3], [0, 5, 12]).shape
    torch.Size([1, 2, 3, 8])
    """
    refuse_tracing("fl.packed_attention")
    check_tensors(q, k, v)
    q_lengths = read_cumulative("cu_seqlens_q", cu_seqlens_q, q.shape[2])
    k_lengths = read_cumulative("cu_seqlens_k", cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, k.shape[2])
    options: dict[str, Any] = {"scale": scale, "dropout": dropout, "seed": seed, "score": score, "sinks": sinks}
    options |= {"return_lse": return_lse, "backend": backend}
    out, *lse = attend_packed(attention, (q, k, v), pattern, (q_lengths, k_lengths), options)
    return (out, lse[0]) if return_lse else out
