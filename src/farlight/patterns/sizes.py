"""`Sizes`: the shape of the attention problem on which a pattern is evaluated.

A pattern is defined for any sequence length. Every question that depends on the length (which pairs, how many, in which
intervals) takes a `Sizes`.
"""

from __future__ import annotations

from dataclasses import dataclass

from farlight.errors import PatternError

__all__ = ["Sizes"]


@dataclass(frozen=True)
class Sizes:
    """`(batch, heads, n_q, n_k)` of an attention problem; query row r has position `q_offset + r`, keys 0 … n_k - 1."""

    n_q: int
    n_k: int
    q_offset: int
    batch: int = 1
    heads: int = 1

    @staticmethod
    def of(n_q: int, n_k: int | None = None, *, batch: int = 1, heads: int = 1, q_offset: int | None = None) -> Sizes:
        """The sizes with defaults filled in: `n_k = n_q`, `q_offset = n_k - n_q`. Raises PatternError for impossible ones.

        >>> Sizes.of(2, 5)
        Sizes(n_q=2, n_k=5, q_offset=3, batch=1, heads=1)
        """
        n_k = n_q if n_k is None else n_k
        for name, value in (("n_q", n_q), ("n_k", n_k)):
            if value < 0:
                raise PatternError(f"{name} = {value}: a number of tokens cannot be negative; pass {name} >= 0.")
        for name, value in (("batch", batch), ("heads", heads)):
            if value < 1:
                raise PatternError(f"{name} = {value}: there must be at least one; pass {name} >= 1.")
        return Sizes(n_q, n_k, n_k - n_q if q_offset is None else q_offset, batch, heads)
