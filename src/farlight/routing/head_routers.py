"""Each head its own router: what a fit writes when content decides in some heads and positions in others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from farlight.errors import ArgumentError
from farlight.patterns import per_head
from farlight.patterns.expression import Pattern
from farlight.routing.base import Choice, Router

__all__ = ["PerHeadRouter"]


class PerHeadRouter(Router):
    """Head h follows `parts[h]`, a router or a pattern. A part is shown its own head alone, with the keys that head reads.

    >>> import torch, farlight as fl
    >>> from farlight.routing import PerHeadRouter, TopKeys
    >>> x = torch.eye(3).expand(1, 2, 3, 3)
    >>> PerHeadRouter([TopKeys(1), fl.window(0, 1)])(x, x).dense(3, heads=2).int()[0].tolist()
    [[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 1, 0], [0, 1, 1], [0, 0, 1]]]
    """

    def __init__(self, parts: Sequence[Router | Pattern]) -> None:
        super().__init__()
        for part in parts:
            if not isinstance(part, Router | Pattern):
                raise ArgumentError(
                    f"per_head: {type(part).__name__} is neither a router nor a pattern; give one of these for each head."
                )
        self.parts = list(parts)
        self.routers = nn.ModuleList(part for part in parts if isinstance(part, Router))

    def choose(self, given: Choice) -> Pattern:
        if given.heads != len(self.parts):
            raise ArgumentError(
                f"per_head was given {len(self.parts)} routers and patterns, but there are {given.heads} heads; "
                "give one for each."
            )
        group = given.heads // given.kv_heads
        out: list[Pattern] = []
        for head, part in enumerate(self.parts):
            if isinstance(part, Router):
                keys = slice(head // group, head // group + 1)
                out.append(part.choose(replace(given, q=given.q[:, head : head + 1], k=given.k[:, keys])))
            else:
                out.append(part)
        return per_head(out)
