"""Measured candidates: links and kept share of patterns and routers that are run on q and k, head by head.

Complements the grown families (`candidates.py`): a router's pairs depend on content, so its cost and gain cannot be read from a
profile of mean probabilities; they are measured per text and averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from farlight.analysis.fit.candidates import row_value
from farlight.analysis.fit.frontier import Option
from farlight.analysis.loss.probabilities import lowered_terms, sizes_of, tiles
from farlight.patterns.expression import Pattern
from farlight.routing.notation import is_router, read_router
from farlight.score.terms import Score

__all__ = ["CandidateMeasurements"]


class CandidateMeasurements:
    """Sums over the texts of one layer for a list of expressions (see `farlight.routing.read_router`)."""

    def __init__(self, expressions: Sequence[str]) -> None:
        self.expressions = list(expressions)
        self._routers = [read_router(expression) for expression in self.expressions]
        self._num_texts = 0
        self._sums: Tensor | None = None  # (expressions, 3, H) float64: links, kept, value with `even`; summed over rows

    def add(
        self,
        q: Tensor,
        k: Tensor,
        *,
        base: Pattern | None = None,
        scale: float | None = None,
        q_offset: int | None = None,
        score: Score | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """Add the texts of a batch: q `(B, H, n_q, D)`, k `(B, H_kv, n_k, D)`, as checked by `LayerProfile.add`."""
        terms = lowered_terms(score, sinks, q, k, q_offset)
        with torch.no_grad():
            sizes = sizes_of(q, k, q_offset)
            patterns = [router(q, k) for router in self._routers]
            if self._sums is None:
                self._sums = torch.zeros(len(patterns), 3, q.shape[1], dtype=torch.float64, device="cpu")
            self._num_texts += q.shape[0]
            for tile in tiles(q, k, base, scale, sizes, terms):
                for sums, pattern in zip(self._sums, patterns, strict=True):
                    mask = tile.mask(pattern, sizes).expand_as(tile.probability)
                    kept = (tile.probability * mask).sum(-1)
                    kept = kept if tile.sink is None else kept + tile.sink
                    for total, rows in zip(sums, (mask.sum(-1), kept, row_value(kept, True)), strict=True):
                        total[tile.heads] += rows.double().sum((0, 2)).cpu()

    def options(self, head: int, num_rows: int, even: bool) -> list[Option]:
        """The options of one head; `num_rows`: query rows of a text; `even` as in `farlight.fit`."""
        if self._sums is None:
            return []
        options = []
        for expression, sums in zip(self.expressions, self._sums[:, :, head].tolist(), strict=True):
            links, kept, even_value = (total / max(1, self._num_texts) for total in sums)
            family = "content" if is_router(expression) else "given"
            value = even_value if even else kept
            options.append(Option(links, kept / max(1, num_rows), value / max(1, num_rows), partial(str, expression), family))
        return options
