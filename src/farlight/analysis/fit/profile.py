"""Attention profiles: the full attention of a layer summed over texts, from which fixed patterns are fitted.

The share that a fixed pattern keeps is linear in the mean probability of each pair, so that mean is all a fit needs. Up to
`MAX_DENSE_TOKENS` it is stored pair by pair, `(H, n_q, n_k)`. For longer texts four marginals are stored, O(n) memory per head:
  * by distance j - i, `(H, n_q + n_k - 1)`: for windows, dilations, strides, offsets;
  * by key, `(H, n_k)`: which keys are candidates for global keys;
  * row by row for the `NUM_COLUMNS` heaviest keys, `(H, n_q, columns)`: their overlap with distances;
  * by cells of `block` x `block` pairs, at most `MAX_DENSE_TOKENS` a side: for block patterns.
Every sum has a twin that counts the pairs that the base allows (`…_links`). Sinks are summed by row, `(H, n_q)`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.analysis.loss.probabilities import Tile, check_problem, lowered_terms, score_keys, sizes_of, tiles
from farlight.errors import ArgumentError
from farlight.patterns.expression import Pattern, Sizes
from farlight.score.lowered import ScoreTerms
from farlight.score.terms import Score

__all__ = ["MAX_DENSE_TOKENS", "NUM_COLUMNS", "HeadProfile", "LayerProfile", "skew_diagonals"]

MAX_DENSE_TOKENS = 1024
NUM_COLUMNS = 64


@dataclass(frozen=True)
class HeadProfile:
    """Means over texts of one head, float64 on the CPU. Query row r stands at position q_offset + r.

    Attributes:
        block: side of a cell; 1 where the profile is stored pair by pair.
        distance, distance_links: `(n_q + n_k - 1,)`; index d holds the pairs with key - row = d - (n_q - 1), that is at
            distance j - i = d - (n_q - 1) - q_offset.
        columns: `(columns,)` int64, positions of the keys with most probability, in rising order.
        column, column_links: `(n_q, columns)`, probability and allowed pairs of these keys by row.
        cells, cell_links: the same by cells, `(⌈n_q / block⌉, ⌈n_k / block⌉)`.
        sink: `(n_q,)`, the share of each row's sink, which every pattern keeps; zeros without sinks.
    """

    n_q: int
    n_k: int
    q_offset: int
    block: int
    distance: Tensor
    distance_links: Tensor
    columns: Tensor
    column: Tensor
    column_links: Tensor
    cells: Tensor
    cell_links: Tensor
    sink: Tensor

    @property
    def mean_sink(self) -> float:
        """The mean of `sink` over the rows; 0 for no rows."""
        return float(self.sink.sum()) / max(1, self.n_q)

    @functools.cached_property
    def prefix(self) -> Tensor:
        """`(rows of cells, columns of cells + 1)`: exclusive prefix sums of `cells` along the keys."""
        return torch.nn.functional.pad(self.cells.cumsum(1), (1, 0))


class LayerProfile:
    """Sums of one layer's full attention over texts of equal sizes: `add` batches, then read the means by `head(h)`.

    `num_texts`: texts added. `shape`: (heads, n_q, n_k, q_offset), None before the first text. Stored sums: see the module.
    """

    def __init__(self) -> None:
        self.num_texts = 0
        self.shape: tuple[int, int, int, int] | None = None

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
        """Add softmax(scale · q·kᵀ), under the terms, over the pairs of `base`: q `(B, H, n_q, D)`, k `(B, H_kv, n_k, D)`.

        Raises ArgumentError for tensors that do not fit together, or sizes that differ from those of the first texts.
        """
        check_problem(q, k, None, scale)
        terms = lowered_terms(score, sinks, q, k, q_offset)
        sizes = sizes_of(q, k, q_offset)
        shape = (q.shape[1], q.shape[2], k.shape[2], sizes.q_offset)
        if self.shape is None:
            self._allocate(shape, q.device)
        elif shape != self.shape:
            raise ArgumentError(
                f"a profile of (heads, queries, keys, offset) = {self.shape} was given {shape}; give texts of one length."
            )
        first_texts = self.num_texts == 0
        self.num_texts += q.shape[0]
        with torch.no_grad():
            lse = torch.zeros(q.shape[:3], dtype=torch.float64, device=q.device)
            for tile in tiles(q, k, base, scale, sizes, terms):
                self._add_tile(tile)
                if self.block > 1:
                    top = tile.scores.amax(-1).double()
                    lse[tile.items, tile.heads, tile.rows] = top - tile.probability.amax(-1).double().log()
            if self.block > 1:
                self._add_columns(q, k, lse, base, scale, sizes, terms, first_texts)

    def _allocate(self, shape: tuple[int, int, int, int], device: torch.device) -> None:
        self.shape = shape
        heads, n_q, n_k, _ = shape
        self.block = 1
        while -(-max(n_q, n_k) // self.block) > MAX_DENSE_TOKENS:
            self.block *= 2
        grid = (heads, -(-n_q // self.block), -(-n_k // self.block))
        # A cell of several pairs sums more terms.
        dtype = torch.float64 if self.block > 1 else torch.float32
        self.cells = torch.zeros(grid, dtype=dtype, device=device)
        self.cell_links = torch.zeros(grid, dtype=torch.float32, device=device)
        self.sink = torch.zeros(heads, n_q, dtype=torch.float64, device=device)
        if self.block > 1:
            self.distance = torch.zeros(heads, n_q + n_k - 1, dtype=torch.float64, device=device)
            self.distance_links = torch.zeros_like(self.distance)
            self.by_key = torch.zeros(heads, n_k, dtype=torch.float64, device=device)

    def _add_tile(self, tile: Tile) -> None:
        assert self.shape is not None
        _, n_q, n_k, _ = self.shape
        texts, keys = tile.probability.shape[0], tile.probability.shape[3]
        probability = torch.nn.functional.pad(tile.probability.sum(0), (0, n_k - keys))  # (heads, rows, n_k)
        rows = probability.shape[1]
        if tile.allowed is None:
            links = probability.new_full((1, rows, n_k), float(texts))
        else:
            links = tile.allowed.expand(texts, *tile.allowed.shape[1:]).sum(0).to(probability.dtype)
            links = torch.nn.functional.pad(links, (0, n_k - keys))
        heads = tile.heads
        if tile.sink is not None:
            self.sink[heads, tile.rows] += tile.sink.sum(0, dtype=torch.float64)
        if self.block == 1:
            self.cells[heads, tile.rows] += probability.to(self.cells.dtype)
            self.cell_links[heads, tile.rows] += links.to(self.cell_links.dtype)
            return
        self.by_key[heads] += probability.sum(1, dtype=torch.float64)
        first_cell = tile.rows.start // self.block
        above = tile.rows.start - first_cell * self.block  # rows of the first cell that lie before the tile
        for values, total in ((probability, self.cells), (links, self.cell_links)):
            padded = torch.nn.functional.pad(values, (0, -n_k % self.block, above, -(rows + above) % self.block))
            cells = padded.unflatten(2, (-1, self.block)).sum(3).unflatten(1, (-1, self.block)).sum(2)
            total[heads, first_cell : first_cell + cells.shape[1]] += cells.to(total.dtype)
        # Distances of the tile's last row come first; row n_q - 1 has index 0.
        start = n_q - 1 - (tile.rows.stop - 1)
        for values, total in ((probability, self.distance), (links, self.distance_links)):
            total[heads, start : start + n_k + rows - 1] += skew_diagonals(values).sum(1, dtype=torch.float64)

    def _add_columns(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        base: Pattern | None,
        scale: float | None,
        sizes: Sizes,
        terms: ScoreTerms | None,
        first_texts: bool,
    ) -> None:
        """Add the rows of the heaviest keys (chosen from the first texts added): exp(score - lse) at these keys alone."""
        assert self.shape is not None
        heads, n_q, n_k, q_offset = self.shape
        if first_texts:
            self.columns = self.by_key.topk(min(NUM_COLUMNS, n_k), 1).indices.sort(1).values
            self.column = torch.zeros(heads, n_q, self.columns.shape[1], dtype=torch.float64, device=q.device)
            self.column_links = torch.zeros_like(self.column)
        b = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1)
        i = (torch.arange(n_q, device=q.device) + q_offset).view(1, -1, 1)
        for head in range(heads):
            keys = self.columns[head]
            scores = score_keys(q, k, head, keys, scale, q_offset, terms)
            allowed = torch.ones_like(scores, dtype=torch.bool)
            if base is not None:
                h = torch.tensor(head, device=q.device)
                allowed = base._allows(sizes, b, h, i, keys.view(1, 1, -1)).expand_as(scores)
            probability = torch.exp(scores - lse[:, head, :, None]).masked_fill(~allowed, 0.0)
            self.column[head] += probability.sum(0)
            self.column_links[head] += allowed.sum(0)

    def head(self, head: int) -> HeadProfile:
        """The means of one head. Raises ArgumentError when no text has been added."""
        if self.shape is None:
            raise ArgumentError("the profile is empty; add at least one text to it first.")
        _, n_q, n_k, q_offset = self.shape
        num_texts = max(1, self.num_texts)
        cells, cell_links = (x[head].double().cpu() / num_texts for x in (self.cells, self.cell_links))
        if self.block > 1:
            parts = (self.distance[head], self.distance_links[head], self.column[head], self.column_links[head])
            distance, distance_links, column, column_links = (x.cpu() / num_texts for x in parts)
            columns = self.columns[head].cpu()
        else:
            distance, distance_links = (skew_diagonals(x[None])[0].sum(0) for x in (cells, cell_links))
            columns = cells.sum(0).topk(min(NUM_COLUMNS, n_k)).indices.sort().values
            column, column_links = cells[:, columns], cell_links[:, columns]
        sums = distance, distance_links, columns, column, column_links, cells, cell_links
        return HeadProfile(n_q, n_k, q_offset, self.block, *sums, self.sink[head].cpu() / num_texts)


def skew_diagonals(x: Tensor) -> Tensor:
    """`(H, rows, n)` to `(H, rows, n + rows - 1)`: row r shifted right by rows - 1 - r, so diagonals become columns."""
    heads, rows, n = x.shape
    if not rows or not n:
        return x.new_zeros(heads, rows, max(0, n + rows - 1))
    # Rows of width n + rows, read back with width n + rows - 1, move one place to the right per row.
    padded = torch.nn.functional.pad(x.flip(1), (0, rows)).flatten(1)[:, : rows * (n + rows - 1)]
    return padded.view(heads, rows, n + rows - 1).flip(1)
