"""`PerHeadRouter`: a router or pattern for each query head, as a per-head fit writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from farlight.errors import ArgumentError
from farlight.patterns import per_head
from farlight.patterns.expression import Pattern, Sizes
from farlight.routing.base import Router, RouterInput

__all__ = ["PerHeadRouter"]


class PerHeadRouter(Router):
    """Query head h uses `parts[h]`, a router or a pattern.

    The router of head h is called with q of that head `(B, 1, n_q, D)` and k of its key head `(B, 1, n_k, D)`. Raises
    ArgumentError when the number of parts is not the number of query heads.

    >>> import torch, farlight as fl
    >>> from farlight.routing import PerHeadRouter, TopKeys
    >>> x = torch.eye(3).expand(1, 2, 3, 3)
    >>> PerHeadRouter([TopKeys(1), fl.window(0, 1)])(x, x).dense(3, heads=2).int()[0].tolist()
    [[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 1, 0], [0, 1, 1], [0, 0, 1]]]
    """

    reads_16_bits = True

    def __init__(self, parts: Sequence[Router | Pattern]) -> None:
        super().__init__()
        for part in parts:
            if not isinstance(part, Router | Pattern):
                raise ArgumentError(
                    f"per_head: {type(part).__name__} is neither a router nor a pattern; give one of these for each head."
                )
        self.parts = list(parts)
        self.routers = nn.ModuleList(part for part in parts if isinstance(part, Router))

    def products(self, sizes: Sizes) -> int:
        by_head = replace(sizes, heads=1)
        return sum(part.products(by_head) for part in self.parts if isinstance(part, Router))

    def choose(self, inputs: RouterInput) -> Pattern:
        if inputs.heads != len(self.parts):
            raise ArgumentError(
                f"per_head was given {len(self.parts)} routers and patterns, but there are {inputs.heads} heads; "
                "give one for each."
            )
        group = inputs.heads // inputs.kv_heads
        patterns: list[Pattern] = []
        for head, part in enumerate(self.parts):
            if isinstance(part, Router):
                q, kv_head = inputs.q[:, head : head + 1], head // group
                patterns.append(part.chosen(replace(inputs, q=q, k=inputs.k[:, kv_head : kv_head + 1])))
            else:
                patterns.append(part)
        return per_head(patterns)
