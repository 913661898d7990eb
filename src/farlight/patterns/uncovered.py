"""The blocks of keys of which a query sees nothing, as a pattern over blocks: who is to be heard in summary, and at which
level of detail.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farlight.errors import PatternError
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Atom, Pattern, Sizes
from farlight.patterns.spans import Spans

__all__ = ["unseen"]


class unseen(Atom):
    """Query i hears cell c of level l in summary. Its keys are cells: asked about ⌈keys / (block · 2^l)⌉ of them.

    With blocks of `block` tokens (level 0) and cells of 2^l blocks, cell c of level l is *free* for query i when

    * no key of it is allowed to i by `pattern`;
    * with causal=True, all of it lies in the past: (c + 1) · block · 2^l <= i + 1;
    * above level 0 it is far: it is neither the query's own cell of that level nor next to it.

    It is heard when it is free and either l = levels - 1 or the cell of level l + 1 that holds it is not free. So each block
    of which i sees nothing is heard exactly once, in the coarsest cell that its distance allows.

    >>> import farlight as fl
    >>> from farlight.routing import unseen
    >>> unseen(fl.window(1), 2, 8).dense(8, 4, q_offset=0).int()[0, 0, [0, 3, 4]].tolist()
    [[0, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1]]
    """

    def __init__(self, pattern: Any, block: int, keys: int, level: int = 0, levels: int = 1, causal: bool = False) -> None:
        if not isinstance(pattern, Pattern):
            raise PatternError(f"unseen: {type(pattern).__name__} is not a pattern; give the pattern of what is seen.")
        block, keys = whole("unseen: block", block, 1), whole("unseen: keys", keys, 0)
        levels, level = whole("unseen: levels", levels, 1), whole("unseen: level", level, 0)
        if level >= levels:
            raise PatternError(f"unseen: level = {level} does not exist among {levels} levels; use 0 … {levels - 1}.")
        flag = ", True" if causal else ""
        self._set(
            pattern=pattern,
            block=block,
            keys=keys,
            level=level,
            levels=levels,
            causal=bool(causal),
            text=f"unseen({pattern.text}, {block}, {keys}, {level}, {levels}{flag})",
            tables=pattern._tables,
            varies_over_batch=pattern.varies_over_batch,
            varies_over_heads=pattern.varies_over_heads,
        )

    pattern: Pattern
    block: int
    keys: int
    level: int
    levels: int
    causal: bool

    def _size(self, level: int) -> int:
        return self.block << level

    def _inner(self, sizes: Sizes) -> Sizes:
        return Sizes(sizes.n_q, self.keys, sizes.q_offset, sizes.batch, sizes.heads)

    def check(self, sizes: Sizes) -> None:
        wanted = -(-self.keys // self._size(self.level))
        if sizes.n_k != wanted:
            raise PatternError(
                f"unseen: {self.keys} keys make {wanted} cells of {self._size(self.level)}, but it is asked about {sizes.n_k}; "
                "pass one summary for each cell."
            )
        self.pattern.check(self._inner(sizes))

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        out = self._free(sizes, b, h, i, j, self.level)
        if self.level + 1 < self.levels:
            out = out & ~self._free(sizes, b, h, i, torch.div(j, 2, rounding_mode="floor"), self.level + 1)
        return out

    def _free(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, cell: Tensor, level: int) -> Tensor:
        size, inner = self._size(level), self._inner(sizes)
        out = torch.ones((), dtype=torch.bool, device=i.device)
        for step in range(min(size, self.keys)):
            key = cell * size + step
            seen = self.pattern._allows(inner, b, h, i, key.clamp(max=self.keys - 1))
            out = out & ~(seen & (key < self.keys))
        if self.causal:
            out = out & ((cell + 1) * size <= i + 1)
        if level:
            out = out & ((torch.div(i, size, rounding_mode="floor") - cell).abs() > 1)
        return out

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        seen = self.pattern._spans(self._inner(sizes), b, h, i)
        out = self._free_spans(seen, i, self.level, sizes.n_k)
        if self.level + 1 < self.levels:
            row, lo, hi = self._free_spans(seen, i, self.level + 1, -(-self.keys // self._size(self.level + 1))).listed()
            out = out - Spans.gather(i.numel(), sizes.n_k, row, lo * 2, hi * 2)
        return out

    def _free_spans(self, seen: Spans, i: Tensor, level: int, cells: int) -> Spans:
        size = self._size(level)
        row, lo, hi = seen.listed()
        first, last = torch.div(lo, size, rounding_mode="floor"), torch.div(hi - 1, size, rounding_mode="floor")
        touched = Spans.gather(i.numel(), cells, row, first, last + 1)
        out = Spans.everything(i.numel(), cells, i.device)
        if self.causal:
            out = Spans.thin(cells, torch.zeros_like(i), torch.div(i + 1, size, rounding_mode="floor"))
        out = out - touched
        if level:
            own = torch.div(i, size, rounding_mode="floor")
            out = out - Spans.thin(cells, own - 1, own + 2)
        return out
