"""`Router`, the base class of routers: modules that map queries and keys to a pattern.

`router(q, k)` returns an ordinary pattern, a value that `|`, `&`, `-`, `fl.plan`, `fl.attention`, `count` and the notation
accept. A router computes no attention. Its choice has no gradient; what a router learns, it learns by its own means
(`KMeans` by moving averages, scorers through `gated_attention`).

A router is one class with one method: `choose(inputs: RouterInput) -> Pattern`. `Router.forward` checks the operands, converts
them to float32 or float64 and calls `choose` without gradients and without autocast.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor, nn

from farlight.errors import ArgumentError, OperandError, refuse_tracing, show
from farlight.inputs import without_autocast
from farlight.patterns.expression import Pattern, Sizes
from farlight.patterns.positional import full

__all__ = ["CombinedRouter", "ConstantRouter", "Router", "RouterInput", "check_inputs", "combine", "row_chunks"]

# Elements of the largest score tensor that a router materialises at a time.
_MAX_SCORES = 1 << 23


@dataclass(frozen=True)
class RouterInput:
    """The checked operands of `Router.choose`.

    q `(B, H, n_q, D)` and k `(B, H_kv, n_k, D)`, float32 or float64, detached (16 bits too for a router that `reads_16_bits`);
    query row r has position `n_k - n_q + r`, as in
    `fl.attention`. query_mask `(B, n_q)` and key_mask `(B, n_k)`, bool, True = real token; None where every token is real.
    """

    q: Tensor
    k: Tensor
    query_mask: Tensor | None
    key_mask: Tensor | None

    def widened(self) -> RouterInput:
        """The operands in float32 at least."""
        dtype = torch.promote_types(self.q.dtype, torch.float32)
        return self if self.q.dtype == self.k.dtype == dtype else replace(self, q=self.q.to(dtype), k=self.k.to(dtype))

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
        """The position of query row 0."""
        return self.n_k - self.n_q

    def key_mask_by_head(self) -> Tensor | None:
        """`(B, 1, n_k)` bool, broadcastable over heads, or None."""
        return None if self.key_mask is None else self.key_mask[:, None]

    def query_mask_by_head(self) -> Tensor | None:
        """`(B, 1, n_q)` bool, broadcastable over heads, or None."""
        return None if self.query_mask is None else self.query_mask[:, None]


class Router(nn.Module):
    """A module whose call `router(q, k)` returns a pattern; `router | other`, `router & other`, `router - other` are routers.

    Subclasses implement `choose`. `forward` takes q `(B, H, n_q, D)` and k `(B, H_kv, n_k, D)` of any floating dtype, and two
    optional bool masks, True = real token: `key_mask` `(B or 1, n_k)` removes padded keys from every choice; `query_mask`
    `(B or 1, n_q)` gives padded queries an empty row, and defaults to the last n_q columns of `key_mask` (queries are the last
    tokens of the same text). Raises ArgumentError for operands of other shapes or dtypes.

    >>> import torch, farlight as fl
    >>> from farlight.routing import TopKeys
    >>> q = k = torch.eye(4).view(1, 1, 4, 4)
    >>> router = TopKeys(1) | fl.window(1, 0)
    >>> router(q, k).dense(4).int()[0, 0].tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """

    # The text that `read_router` made this router from; None for a router built in Python.
    expression: str | None = None
    # Whether `choose` takes 16-bit operands as they are; else they are widened to float32 before.
    reads_16_bits = False

    def choose(self, inputs: RouterInput) -> Pattern:
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, query_mask: Tensor | None = None) -> Pattern:
        refuse_tracing("a router")
        with torch.no_grad():
            inputs = check_inputs(q, k, key_mask, query_mask, widen=False)
            # Meta tensors and empty batches have no values to choose by, and no output values that depend on the choice.
            if inputs.q.is_meta or not inputs.batch:
                return full()
            with without_autocast(inputs.q):
                return self.chosen(inputs)

    def chosen(self, inputs: RouterInput) -> Pattern:
        """`choose`, from operands of a dtype that it reads."""
        return self.choose(inputs if self.reads_16_bits else inputs.widened())

    def __bool__(self) -> NoReturn:
        raise OperandError(
            f"a router is neither true nor false ({type(self).__name__}): Python's `and`, `or` and `not` drop an operand. "
            "Write `&`, `|` and `-`; ask `router is None` where there may be none."
        )

    def pattern_of(self, q: Tensor, k: Tensor) -> Pattern:
        """`self(q, k)`: what makes a router a `Chooser`, which `fl.attention` takes where it takes a pattern."""
        pattern: Pattern = self(q, k)
        return pattern

    def products(self, sizes: Sizes) -> int:
        """About how many products of head_dim elements a choice takes, from which `fl.explain` and `auto` estimate its time; 0
        for a router that does not say.
        """
        return 0

    def __or__(self, other: Router | Pattern) -> Router:
        return combine(self, other, "|")

    def __ror__(self, other: Pattern) -> Router:
        return combine(other, self, "|")

    def __rand__(self, other: Pattern) -> Router:
        return combine(other, self, "&")

    def __rsub__(self, other: Pattern) -> Router:
        return combine(other, self, "-")

    def __and__(self, other: Router | Pattern) -> Router:
        return combine(self, other, "&")

    def __sub__(self, other: Router | Pattern) -> Router:
        return combine(self, other, "-")


_OPERATORS: dict[str, Callable[[Pattern, Pattern], Pattern]] = {"|": operator.or_, "&": operator.and_, "-": operator.sub}


class CombinedRouter(Router):
    """`left symbol right` as one router, symbol in `|`, `&`, `-`; each side is a router or a constant pattern."""

    reads_16_bits = True

    def __init__(self, left: Router | Pattern, right: Router | Pattern, symbol: str) -> None:
        super().__init__()
        self.left, self.right, self.symbol = left, right, symbol

    def choose(self, inputs: RouterInput) -> Pattern:
        left, right = (side.chosen(inputs) if isinstance(side, Router) else side for side in (self.left, self.right))
        return self.joined(left, right)

    def products(self, sizes: Sizes) -> int:
        return sum(side.products(sizes) for side in (self.left, self.right) if isinstance(side, Router))

    def joined(self, left: Pattern, right: Pattern) -> Pattern:
        """The choices of both sides, joined by the operator."""
        return _OPERATORS[self.symbol](left, right)


class ConstantRouter(Router):
    """A router that returns the same pattern for every input."""

    reads_16_bits = True

    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        self.pattern = pattern

    def choose(self, inputs: RouterInput) -> Pattern:
        return self.pattern


def combine(left: Router | Pattern, right: Router | Pattern, symbol: str) -> Router:
    """`CombinedRouter` of checked operands; symbol in `|`, `&`, `-`. Raises ArgumentError for another operand type."""
    for side in (left, right):
        if not isinstance(side, Router | Pattern):
            raise ArgumentError(
                f"`router {symbol} {show(side)}`: {type(side).__name__} is neither a router nor a pattern; "
                "join routers with routers and patterns."
            )
    return CombinedRouter(left, right, symbol)


def check_inputs(
    q: Tensor, k: Tensor, key_mask: Tensor | None = None, query_mask: Tensor | None = None, *, widen: bool = True
) -> RouterInput:
    """The operands of a router call, checked, detached and, with `widen`, in float32 at least. Raises ArgumentError."""
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.dtype.is_floating_point:
            actual = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentError(f"router: {name} is {actual}; a floating point tensor (B, H, N, D) is needed.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ArgumentError(f"router: q is {tuple(q.shape)} and k is {tuple(k.shape)}: batch and head_dim must agree.")
    if not q.shape[1] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ArgumentError(
            f"router: q has {q.shape[1]} heads and k has {k.shape[1]}: the first must be a multiple of the second, both >= 1."
        )
    key_mask = _check_mask("key_mask", key_mask, k)
    query_mask = _check_mask("query_mask", query_mask, q)
    if key_mask is not None and query_mask is None:
        if q.shape[2] > k.shape[2]:
            raise ArgumentError(
                f"router: key_mask was given for {k.shape[2]} keys, but there are {q.shape[2]} queries, so that it cannot say "
                "which of these are real; pass query_mask too."
            )
        query_mask = key_mask[:, k.shape[2] - q.shape[2] :]
    inputs = RouterInput(q.detach(), k.detach(), query_mask, key_mask)
    return inputs.widened() if widen or q.dtype != k.dtype else inputs


def _check_mask(name: str, mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask on x's device, expanded to `(B, N)`. Raises ArgumentError."""
    if mask is None:
        return None
    shape = (x.shape[0], x.shape[2])
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) not in (shape, (1, shape[1])):
        actual = f"{tuple(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentError(f"router: {name} is {actual}; a bool tensor {shape}, True where a token is real, is needed.")
    return mask.detach().to(x.device).expand(shape)


def row_chunks(num_rows: int, scores_per_row: int) -> Iterator[slice]:
    """Slices that cover `num_rows` rows, each of at most 2^23 scores (and at least one row)."""
    step = max(1, _MAX_SCORES // max(1, scores_per_row))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))
