"""What a router is: a rule that reads queries and keys and answers with a pattern.

A router is called like a function, `router(q, k)`, and its answer is an ordinary pattern: a value that can be united,
intersected, planned, counted, drawn and stored. The choice is made without gradients; what a router learns it learns in
its own way (centroids by moving averages, scorers by `gated_attention`). Nothing here computes attention.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from farlight.errors import ArgumentError, OperandError, show
from farlight.inputs import without_autocast
from farlight.patterns.expression import Pattern
from farlight.patterns.positional import full

__all__ = ["Choice", "Joined", "Router", "joined", "read", "stretches"]

# Scores held at a time, in elements.
_SCORES = 1 << 23


@dataclass(frozen=True)
class Choice:
    """What a router decides on: checked queries and keys, and which tokens are real.

    q: `(B, H, n_q, D)`, k: `(B, H_kv, n_k, D)`, float32 or float64, without gradient; query row r stands at position
    `n_k - n_q + r`, as in `fl.attention`. query_real `(B, n_q)` and key_real `(B, n_k)` are None where every token is real.
    """

    q: Tensor
    k: Tensor
    query_real: Tensor | None
    key_real: Tensor | None

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def n_q(self) -> int:
        return self.q.shape[2]

    @property
    def n_k(self) -> int:
        return self.k.shape[2]

    @property
    def offset(self) -> int:
        """The position of the first query."""
        return self.n_k - self.n_q

    def key_part(self) -> Tensor | None:
        """`(B, 1, n_k)` bool, or None."""
        return None if self.key_real is None else self.key_real[:, None]

    def query_part(self) -> Tensor | None:
        """`(B, 1, n_q)` bool, or None."""
        return None if self.query_real is None else self.query_real[:, None]


class Router(nn.Module):
    """`router(q, k)` is a pattern. Joined with `|`, `&`, `-` to patterns or routers on its right, it stays a router.

    Subclasses answer `choose`. Called with `key_mask` `(B, n_k)`, True = real, padded tokens take no part: nobody sees them,
    and where the queries are the last tokens of the same text, padded ones choose nothing. `query_mask` `(B, n_q)` says it
    apart for queries that come from another text.

    >>> import torch, farlight as fl
    >>> from farlight.routing import TopKeys
    >>> q = k = torch.eye(4).view(1, 1, 4, 4)
    >>> router = TopKeys(1) | fl.window(1, 0)
    >>> router(q, k).dense(4).int()[0, 0].tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """

    # The text that `read_router` made it from; None for a router built by hand.
    expression: str | None = None

    def choose(self, given: Choice) -> Pattern:
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, query_mask: Tensor | None = None) -> Pattern:
        with torch.no_grad():
            given = read(q, k, key_mask, query_mask)
            # Nothing is chosen where there is nothing to choose by; what is seen then changes no answer.
            if given.q.is_meta or not given.batch:
                return full()
            with without_autocast(given.q):
                return self.choose(given)

    def __bool__(self) -> NoReturn:
        raise OperandError(
            f"a router is neither true nor false ({type(self).__name__}): Python's `and`, `or` and `not` drop an operand. "
            "Write `&`, `|` and `-`; ask `router is None` where there may be none."
        )

    def __or__(self, other: Router | Pattern) -> Router:
        return joined(self, other, "|")

    def __and__(self, other: Router | Pattern) -> Router:
        return joined(self, other, "&")

    def __sub__(self, other: Router | Pattern) -> Router:
        return joined(self, other, "-")


_SIGNS: dict[str, Callable[[Pattern, Pattern], Pattern]] = {"|": operator.or_, "&": operator.and_, "-": operator.sub}


class Joined(Router):
    """Two parts, each a router or a pattern, as one router."""

    def __init__(self, left: Router | Pattern, right: Router | Pattern, sign: str) -> None:
        super().__init__()
        self.left, self.right, self.sign = left, right, sign

    def choose(self, given: Choice) -> Pattern:
        left, right = (part.choose(given) if isinstance(part, Router) else part for part in (self.left, self.right))
        return _SIGNS[self.sign](left, right)


def joined(left: Router | Pattern, right: Router | Pattern, sign: str) -> Router:
    """The router that answers with the left part's pattern joined to the right part's by `|`, `&` or `-`."""
    for part in (left, right):
        if not isinstance(part, Router | Pattern):
            raise ArgumentError(
                f"`router {sign} {show(part)}`: {type(part).__name__} is neither a router nor a pattern; "
                "join routers with routers and patterns."
            )
    return Joined(left, right, sign)


def read(q: Tensor, k: Tensor, key_mask: Tensor | None = None, query_mask: Tensor | None = None) -> Choice:
    """Check what a router was called with. Raises ArgumentError."""
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.dtype.is_floating_point:
            found = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentError(f"router: {name} is {found}; a floating point tensor (B, H, N, D) is needed.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ArgumentError(f"router: q is {tuple(q.shape)} and k is {tuple(k.shape)}: batch and head_dim must agree.")
    if not q.shape[1] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ArgumentError(
            f"router: q has {q.shape[1]} heads and k has {k.shape[1]}: the first must be a multiple of the second, both >= 1."
        )
    key_real = _read_mask("key_mask", key_mask, k)
    query_real = _read_mask("query_mask", query_mask, q)
    if key_real is not None and query_real is None:
        if q.shape[2] > k.shape[2]:
            raise ArgumentError(
                f"router: key_mask was given for {k.shape[2]} keys, but there are {q.shape[2]} queries, so that it cannot say "
                "which of these are real; pass query_mask too."
            )
        query_real = key_real[:, k.shape[2] - q.shape[2] :]
    kind = torch.promote_types(q.dtype, torch.float32)
    return Choice(q.detach().to(kind), k.detach().to(kind), query_real, key_real)


def _read_mask(name: str, mask: Tensor | None, x: Tensor) -> Tensor | None:
    if mask is None:
        return None
    wanted = (x.shape[0], x.shape[2])
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) not in (wanted, (1, wanted[1])):
        found = f"{tuple(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentError(f"router: {name} is {found}; a bool tensor {wanted}, True where a token is real, is needed.")
    return mask.detach().to(x.device).expand(wanted)


def stretches(rows: int, per_row: int) -> Iterator[slice]:
    """Runs of rows whose scores, `per_row` elements each, are held at a time."""
    step = max(1, _SCORES // max(1, per_row))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
