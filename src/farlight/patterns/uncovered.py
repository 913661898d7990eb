"""`unseen`: the key blocks that a pattern leaves uncovered, selected for attention to a summary of each.

A pattern over cells, not keys: column c stands for a cell of tokens whose keys and values are summarised in one vector
(routing.gist). Cells come in levels; level l has cells of 2^l blocks. Each uncovered block is covered by one cell, at the
coarsest level that its distance from the query allows, as in a multipole hierarchy.
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
    """Query i attends to the summary of cell c of `level`. Its keys are cells: n_k = ⌈keys / (block · 2^level)⌉.

    With blocks of `block` tokens (level 0) and cells of 2^l blocks, cell c of level l is *free* for query i when

    * `pattern` allows no key of the cell to i;
    * with causal=True, the whole cell lies in the past: (c + 1) · block · 2^l <= i + 1;
    * above level 0 it is far: neither the query's cell of that level nor a neighbour of it.

    The pair is allowed when the cell is free and either l = levels - 1 or the cell of level l + 1 that contains it is not
    free. So every block of which i sees no key is summarised exactly once, by the coarsest free cell around it.

    >>> import farlight as fl
    >>> from farlight.routing import unseen
    >>> unseen(fl.window(1), 2, 8).dense(8, 4, q_offset=0).int()[0, 0, [0, 3, 4]].tolist()
    [[0, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1]]
    """

    pattern: Pattern
    block: int
    keys: int
    level: int
    levels: int
    causal: bool

    def __init__(self, pattern: Any, block: int, keys: int, level: int = 0, levels: int = 1, causal: bool = False) -> None:
        if not isinstance(pattern, Pattern):
            raise PatternError(f"unseen: {type(pattern).__name__} is not a pattern; give the pattern of what is seen.")
        block, keys = whole("unseen: block", block, 1), whole("unseen: keys", keys, 0)
        levels, level = whole("unseen: levels", levels, 1), whole("unseen: level", level, 0)
        if level >= levels:
            raise PatternError(f"unseen: level = {level} does not exist among {levels} levels; use 0 … {levels - 1}.")
        option = ", True" if causal else ""
        self._set(
            pattern=pattern,
            block=block,
            keys=keys,
            level=level,
            levels=levels,
            causal=bool(causal),
            text=f"unseen({pattern.text}, {block}, {keys}, {level}, {levels}{option})",
            tables=pattern._tables,
            varies_over_batch=pattern.varies_over_batch,
            varies_over_heads=pattern.varies_over_heads,
        )

    def _cell_size(self, level: int) -> int:
        """Tokens of one cell."""
        return self.block << level

    def _num_cells(self, level: int) -> int:
        return -(-self.keys // self._cell_size(level))

    def _token_sizes(self, sizes: Sizes) -> Sizes:
        """The sizes of `pattern`: the same queries over tokens in place of cells."""
        return Sizes(sizes.n_q, self.keys, sizes.q_offset, sizes.batch, sizes.heads)

    def check(self, sizes: Sizes) -> None:
        num_cells = self._num_cells(self.level)
        if sizes.n_k != num_cells:
            raise PatternError(
                f"unseen: {self.keys} keys make {num_cells} cells of {self._cell_size(self.level)}, but n_k = {sizes.n_k}; "
                "pass one summary for each cell."
            )
        self.pattern.check(self._token_sizes(sizes))

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        out = self._is_free(sizes, b, h, i, j, self.level)
        if self.level + 1 < self.levels:
            out = out & ~self._is_free(sizes, b, h, i, j // 2, self.level + 1)
        return out

    def _is_free(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, cell: Tensor, level: int) -> Tensor:
        size, token_sizes = self._cell_size(level), self._token_sizes(sizes)
        out = torch.ones((), dtype=torch.bool, device=i.device)
        for step in range(min(size, self.keys)):
            key = cell * size + step
            allowed = self.pattern._allows(token_sizes, b, h, i, key.clamp(max=self.keys - 1))
            out = out & ~(allowed & (key < self.keys))
        if self.causal:
            out = out & ((cell + 1) * size <= i + 1)
        if level:
            out = out & ((i // size - cell).abs() > 1)
        return out

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        covered = self.pattern._spans(self._token_sizes(sizes), b, h, i)
        out = self._free_spans(covered, i, self.level, sizes.n_k)
        if self.level + 1 < self.levels:
            coarser = self._free_spans(covered, i, self.level + 1, self._num_cells(self.level + 1))
            row, lo, hi = coarser.listed()
            out = out - Spans.gather(i.numel(), sizes.n_k, row, lo * 2, hi * 2)
        return out

    def _free_spans(self, covered: Spans, i: Tensor, level: int, num_cells: int) -> Spans:
        """The free cells of each row, from the key intervals that `pattern` covers."""
        size = self._cell_size(level)
        row, lo, hi = covered.listed()
        touched = Spans.gather(i.numel(), num_cells, row, lo // size, (hi - 1) // size + 1)
        if self.causal:
            out = Spans.thin(num_cells, torch.zeros_like(i), (i + 1) // size)
        else:
            out = Spans.everything(i.numel(), num_cells, i.device)
        out = out - touched
        if level:
            query_cell = i // size
            out = out - Spans.thin(num_cells, query_cell - 1, query_cell + 2)
        return out
