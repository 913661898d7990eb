"""`Chooser`: what makes a pattern from queries and keys; `fl.attention` takes one where it takes a pattern."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeGuard, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from farlight.patterns.expression import Pattern
    from farlight.patterns.sizes import Sizes

__all__ = ["Chooser", "is_chooser"]


@runtime_checkable
class Chooser(Protocol):
    """`pattern_of(q, k)` is the pattern for q `(B, H, n_q, D)` and k `(B, H_kv, n_k, D)`; the queries are the last tokens.
    `products(sizes)`: about how many products of head_dim elements that takes, for estimates.
    """

    def pattern_of(self, q: Tensor, k: Tensor) -> Pattern: ...

    def products(self, sizes: Sizes) -> int: ...


def is_chooser(value: object) -> TypeGuard[Chooser]:
    """`isinstance(value, Chooser)` by the names alone: that of a protocol takes as long as a quarter of a short call."""
    return hasattr(value, "pattern_of") and hasattr(value, "products")
