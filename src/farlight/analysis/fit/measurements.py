"""What given patterns and routers cost and keep, head by head: the candidates that cannot be grown from a profile."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from farlight.analysis.fit.candidates import row_value
from farlight.analysis.fit.frontier import Option
from farlight.analysis.loss.probabilities import sizes_of, tiles
from farlight.patterns.expression import Pattern
from farlight.routing.notation import is_router, read_router

__all__ = ["Measured"]


class Measured:
    """Sums over texts of one layer for a list of expressions (see `read_router`)."""

    def __init__(self, expressions: Sequence[str]) -> None:
        self.expressions = list(expressions)
        self._routers = [read_router(expression) for expression in self.expressions]
        self._texts = 0
        self._sums: Tensor | None = None  # (expressions, 3, H): links, kept, value of a row when even

    def add(
        self, q: Tensor, k: Tensor, *, base: Pattern | None = None, scale: float | None = None, q_offset: int | None = None
    ) -> None:
        """Add the texts of a batch; the tensors are those of `Profile.add`, which checks them."""
        with torch.no_grad():
            sizes = sizes_of(q, k, q_offset)
            patterns = [router(q, k) for router in self._routers]
            if self._sums is None:
                self._sums = torch.zeros(len(patterns), 3, q.shape[1], dtype=torch.float64, device="cpu")
            self._texts += q.shape[0]
            for tile in tiles(q, k, base, scale, sizes):
                for sums, pattern in zip(self._sums, patterns, strict=True):
                    mask = tile.seen(pattern, sizes).expand_as(tile.full)
                    kept = (tile.full * mask).sum(-1)
                    worth = row_value(kept, True)
                    for into, found in zip(sums, (mask.sum(-1), kept, worth), strict=True):
                        into[tile.heads] += found.double().sum((0, 2)).cpu()

    def options(self, head: int, rows: int, even: bool) -> list[Option]:
        """The options of one head; `rows` is the number of query rows of a text."""
        if self._sums is None:
            return []
        out = []
        for expression, sums in zip(self.expressions, self._sums[:, :, head].tolist(), strict=True):
            links, kept, value = (number / max(1, self._texts) for number in sums)
            family = "content" if is_router(expression) else "given"
            value = value if even else kept
            out.append(Option(links, kept / max(1, rows), value / max(1, rows), partial(str, expression), family))
        return out
