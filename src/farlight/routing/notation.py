"""`read_router`: routers from text such as `"topblocks(share=0.1) | window(16)"`, for the command line and for stored fits.

The text is parsed with `ast` and never evaluated: subexpressions without a router go to the pattern notation, the calls of
routers take literal arguments only.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from farlight.errors import ArgumentError, PatternError, shorten
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern
from farlight.patterns.notation import bracket_fault, parse
from farlight.patterns.positional import full
from farlight.routing.base import ConstantRouter, Router, RouterInput, combine
from farlight.routing.gist_router import Gist
from farlight.routing.head_routers import PerHeadRouter
from farlight.routing.kmeans import KMeans
from farlight.routing.lsh import LSH
from farlight.routing.topblocks import TopBlocks
from farlight.routing.topkeys import TopKeys

__all__ = ["is_router", "read_router"]

# Characters; the inlined tables of fitted patterns take most of them.
_MAX_LENGTH = 4_000_000
# Steps of Lloyd's algorithm for the `kmeans` of an expression.
_FIT_STEPS = 10


def read_router(text: str) -> Router:
    """The router that an expression denotes: the pattern notation plus `topblocks`, `topkeys`, `lsh`, `kmeans` and `gist`.

    The arguments are those of the classes, except `kmeans(clusters, per_cluster=…, causal=…, shared=…, seed=…)`, which makes a
    KMeans for the heads and head_dim of each call and fits it to that call's tokens (for analysing one example).
    `per_head([…])` may hold routers; `gist(…, block=16)` may stand only around the whole expression. An expression without a
    router gives a ConstantRouter. The result's `expression` is the text. Raises PatternError for anything else.

    >>> import torch
    >>> from farlight.routing import read_router
    >>> router = read_router("topblocks(share=0.1, block=8) | window(2)")
    >>> q = torch.randn(1, 2, 40, 4)
    >>> router(q, q).density(40, heads=2) < 0.4
    True
    """
    if not isinstance(text, str) or len(text) > _MAX_LENGTH:
        raise PatternError(
            f"read_router: text of at most {_MAX_LENGTH} characters is needed, such as 'topblocks(8) | window(16)'."
        )
    try:
        body = ast.parse(text.strip(), mode="eval").body
        parsed = _read(body, text, body)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        if isinstance(error, PatternError):
            raise
        why = bracket_fault(text) or ": it is not an expression."
        raise PatternError(f"cannot read the router {shorten(text)!r}{why}") from None
    router = parsed if isinstance(parsed, Router) else ConstantRouter(parsed)
    router.expression = text
    return router


def is_router(text: str) -> bool:
    """Whether the expression calls a router anywhere; an expression that does not parse has none."""
    try:
        return any(_call_name(sub) in _ROUTER_NAMES for sub in ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


def _read(node: ast.expr, text: str, root: ast.expr | None = None) -> Router | Pattern:
    """The router or pattern of one node of `text`; `root` is the node of the whole text, where a gist may stand."""
    if not any(_call_name(sub) in _ROUTER_NAMES for sub in ast.walk(node)):
        return parse(ast.unparse(node))
    match node:
        case ast.BinOp(left=left, op=ast.BitOr() | ast.BitAnd() | ast.Sub() as op, right=right):
            return combine(_read(left, text), _read(right, text), {ast.BitOr: "|", ast.BitAnd: "&", ast.Sub: "-"}[type(op)])
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return combine(full(), _read(operand, text), "-")
        case ast.Call(args=[ast.List(elts=parts)], keywords=[]) if _call_name(node) == "per_head":
            return PerHeadRouter([_read(part, text) for part in parts])
        case ast.Call(args=[inner, *rest], keywords=keywords) if _call_name(node) == "gist":
            if node is not root:
                raise PatternError(
                    f"cannot read the router {shorten(text)!r}: gist(…) stands around the whole expression; move it outwards."
                )
            try:
                return Gist(_read(inner, text), *map(ast.literal_eval, rest), **_literal_options(keywords))
            except (TypeError, ValueError, ArgumentError) as error:
                if isinstance(error, PatternError):
                    raise
                raise PatternError(f"cannot read the router {shorten(text)!r}: gist: {shorten(str(error), 160)}") from None
        case ast.Call(args=args, keywords=keywords) if _call_name(node) in _ROUTERS:
            try:
                return _ROUTERS[_call_name(node)](*map(ast.literal_eval, args), **_literal_options(keywords))
            except (TypeError, ValueError, ArgumentError) as error:
                call, why = shorten(ast.unparse(node)), shorten(str(error), 160)
                raise PatternError(f"cannot read the router {shorten(text)!r}: {call}: {why}") from None
    raise PatternError(
        f"cannot read the router {shorten(text)!r}: a router may stand alone, in per_head([…]), or be joined by |, &, - and ~; "
        f"{shorten(ast.unparse(node))!r} is something else."
    )


def _literal_options(keywords: list[ast.keyword]) -> dict[str, Any]:
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in keywords}


def _call_name(node: ast.AST) -> str:
    """The lower-case name of a called function without `fl.` and `routing.`; "" for another node."""
    if not isinstance(node, ast.Call):
        return ""
    return ast.unparse(node.func).removeprefix("fl.").removeprefix("routing.").lower()


class _FittedKMeans(Router):
    """`kmeans(…)` of an expression: a KMeans made for, and fitted to, the tokens of each call."""

    def __init__(self, clusters: int, **options: Any) -> None:
        super().__init__()
        self.clusters, self.options = whole("kmeans: clusters", clusters, 1), options
        KMeans(1, 1, self.clusters, **options)  # checks the options before the first call

    def choose(self, inputs: RouterInput) -> Pattern:
        router = KMeans(inputs.heads, inputs.q.shape[3], self.clusters, **self.options).to(inputs.q.device).eval()
        router.fit_inputs(inputs, _FIT_STEPS)
        return router.choose(inputs)


_ROUTERS: dict[str, Callable[..., Router]] = {"kmeans": _FittedKMeans, "lsh": LSH, "topblocks": TopBlocks, "topkeys": TopKeys}
_ROUTER_NAMES = {*_ROUTERS, "gist"}
