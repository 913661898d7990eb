"""Routers as text, for the command line: `"topblocks(share=0.1) | window(16)"`. Parsed, never evaluated."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from farlight.errors import ArgumentError, PatternError, shorten
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern
from farlight.patterns.notation import parse
from farlight.patterns.positional import full
from farlight.routing.base import Choice, Router, joined
from farlight.routing.gist_router import Gist
from farlight.routing.head_routers import PerHeadRouter
from farlight.routing.kmeans import KMeans
from farlight.routing.lsh import LSH
from farlight.routing.topblocks import TopBlocks
from farlight.routing.topkeys import TopKeys

__all__ = ["always", "is_router", "read_router"]

_LONGEST = 4_000_000  # with room for the tables of fitted patterns


def read_router(text: str) -> Router:
    """The router that an expression stands for: the notation of patterns, with `topblocks`, `topkeys`, `lsh` and `kmeans`;
    `per_head([…])` may hold them, and `gist(…, block=16)` around all of it lets the rest be heard in summary.

    Their arguments are those of the classes; `kmeans(clusters, per_cluster=…, causal=…, shared=…, seed=…)` makes centroids
    for the heads it meets and fits them to the tokens of each call, as an analysis of one example wants. An expression
    without a router gives one that always answers with that pattern. Raises PatternError for anything else.

    >>> import torch
    >>> from farlight.routing import read_router
    >>> router = read_router("topblocks(share=0.1, block=8) | window(2)")
    >>> q = torch.randn(1, 2, 40, 4)
    >>> router(q, q).density(40, heads=2) < 0.4
    True
    """
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise PatternError(
            f"read_router: text of at most {_LONGEST} characters is needed, such as 'topblocks(8) | window(16)'."
        )
    try:
        body = ast.parse(text.strip(), mode="eval").body
        found = _read(body, text, body)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        if isinstance(error, PatternError):
            raise
        raise PatternError(f"cannot read the router {shorten(text)!r}: it is not an expression.") from None
    router = found if isinstance(found, Router) else _Always(found)
    router.expression = text
    return router


def is_router(text: str) -> bool:
    """Whether content decides somewhere in this expression (which need not be a correct one)."""
    try:
        return any(_name(inner) in _CONTENT for inner in ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


def _read(node: ast.expr, text: str, whole_text: ast.expr | None = None) -> Router | Pattern:
    if not any(_name(inner) in _CONTENT for inner in ast.walk(node)):
        return parse(ast.unparse(node))
    match node:
        case ast.BinOp(left=left, op=ast.BitOr() | ast.BitAnd() | ast.Sub() as sign, right=right):
            spelled = {ast.BitOr: "|", ast.BitAnd: "&", ast.Sub: "-"}[type(sign)]
            return joined(_read(left, text), _read(right, text), spelled)
        case ast.UnaryOp(op=ast.Invert(), operand=inner):
            return joined(full(), _read(inner, text), "-")
        case ast.Call(args=[ast.List(elts=parts)], keywords=[]) if _name(node) == "per_head":
            return PerHeadRouter([_read(part, text) for part in parts])
        case ast.Call(args=[inner, *rest], keywords=keywords) if _name(node) == "gist":
            if node is not whole_text:
                raise PatternError(
                    f"cannot read the router {shorten(text)!r}: gist(…) stands around the whole expression; move it outwards."
                )
            try:
                given = [ast.literal_eval(arg) for arg in rest]
                return Gist(_read(inner, text), *given, **{str(k.arg): ast.literal_eval(k.value) for k in keywords})
            except (TypeError, ValueError, ArgumentError) as error:
                if isinstance(error, PatternError):
                    raise
                raise PatternError(f"cannot read the router {shorten(text)!r}: gist: {shorten(str(error), 160)}") from None
        case ast.Call(args=args, keywords=keywords) if _name(node) in _ROUTERS:
            try:
                given = [ast.literal_eval(arg) for arg in args]
                named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in keywords}
                return _ROUTERS[_name(node)](*given, **named)
            except (TypeError, ValueError, ArgumentError) as error:
                call, why = shorten(ast.unparse(node)), shorten(str(error), 160)
                raise PatternError(f"cannot read the router {shorten(text)!r}: {call}: {why}") from None
    raise PatternError(
        f"cannot read the router {shorten(text)!r}: a router may stand alone, in per_head([…]), or be joined by |, &, - and ~; "
        f"{shorten(ast.unparse(node))!r} is something else."
    )


def _name(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    return ast.unparse(node.func).removeprefix("fl.").removeprefix("routing.").lower()


def always(pattern: Pattern) -> Router:
    """The router that always answers with this pattern."""
    return _Always(pattern)


class _Always(Router):
    """A pattern as a router."""

    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        self.pattern = pattern

    def choose(self, given: Choice) -> Pattern:
        return self.pattern


class _Fitted(Router):
    """KMeans with centroids made for each call."""

    def __init__(self, clusters: int, **options: Any) -> None:
        super().__init__()
        self.clusters, self.options = whole("kmeans: clusters", clusters, 1), options
        KMeans(1, 1, self.clusters, **options)  # so that a wrong option is refused here

    def choose(self, given: Choice) -> Pattern:
        router = KMeans(given.heads, given.q.shape[3], self.clusters, **self.options).to(given.q.device).eval()
        router.place(given, 10)
        return router.choose(given)


_ROUTERS: dict[str, Callable[..., Router]] = {"kmeans": _Fitted, "lsh": LSH, "topblocks": TopBlocks, "topkeys": TopKeys}
_CONTENT = {*_ROUTERS, "gist"}
