"""How the full attention of each head is spread over a text, summed over texts: what fixed patterns are fitted to.

Which pairs a fixed pattern should hold depends on the mean probability of each pair alone. Up to `DENSE` tokens that
mean is kept pair by pair. Beyond, it is kept in sums that memory can hold: by distance, by key, by cells of a coarse
grid, and row by row for the keys that receive most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.analysis.loss.probabilities import Tile, check_problem, sizes_of, tiles
from farlight.errors import ArgumentError
from farlight.patterns.expression import Pattern

__all__ = ["COLUMNS", "DENSE", "HeadProfile", "Profile"]

DENSE = 1024
COLUMNS = 64


@dataclass(frozen=True)
class HeadProfile:
    """One head's means over texts, float64 on the CPU. Rows r = 0 … n_q - 1 stand at q_offset + r.

    distance, distance_links: `(n_q + n_k - 1,)`, the sum of probability and the number of pairs with j - r = index - (n_q - 1)
    (j key, r row: the distance in positions is that minus q_offset). columns: positions of the keys that receive most;
    column, column_links: `(n_q, columns)`, their probability and whether the base allows it, row by row. cells, cell_links: the
    same over a grid of blocks of `block` rows and keys. `block` is 1 where everything is known pair by pair.
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


class Profile:
    """Collects texts of one layer: `add` them, then ask for `head(h)`. All texts must have the same sizes."""

    def __init__(self) -> None:
        self.texts = 0
        self.shape: tuple[int, int, int, int] | None = None
        self.links = 0.0  # pairs that the base allows in one text, all heads together

    def add(
        self, q: Tensor, k: Tensor, *, base: Pattern | None = None, scale: float | None = None, q_offset: int | None = None
    ) -> None:
        """Add the full attention of q `(B, H, n_q, D)` over k `(B, H_kv, n_k, D)`."""
        check_problem(q, k, None, scale)
        sizes = sizes_of(q, k, q_offset)
        shape = (q.shape[1], q.shape[2], k.shape[2], sizes.q_offset)
        if self.shape is None:
            self._start(shape, q.device)
        elif shape != self.shape:
            raise ArgumentError(
                f"a profile of (heads, queries, keys, offset) = {self.shape} was given {shape}; give texts of one length."
            )
        before = self.texts
        self.texts += q.shape[0]
        with torch.no_grad():
            lse = torch.zeros(q.shape[:3], dtype=torch.float64, device=q.device)
            for tile in tiles(q, k, base, scale, sizes):
                self._add(tile)
                if self.block > 1:
                    top = tile.scores.amax(-1).double()
                    lse[tile.items, tile.heads, tile.rows] = top - tile.full.amax(-1).double().log()
            if self.block > 1:
                self._add_columns(q, k, lse, base, scale, sizes.q_offset, first=before == 0)

    def _start(self, shape: tuple[int, int, int, int], device: torch.device) -> None:
        self.shape = shape
        heads, n_q, n_k, _ = shape
        self.block = 1
        while -(-max(n_q, n_k) // self.block) > DENSE:
            self.block *= 2
        grid = (heads, -(-n_q // self.block), -(-n_k // self.block))
        kind = torch.float64 if self.block > 1 else torch.float32
        self.cells = torch.zeros(grid, dtype=kind, device=device)
        self.cell_links = torch.zeros(grid, dtype=torch.float32, device=device)
        if self.block > 1:
            self.distance = torch.zeros(heads, n_q + n_k - 1, dtype=torch.float64, device=device)
            self.distance_links = torch.zeros_like(self.distance)
            self.by_key = torch.zeros(heads, n_k, dtype=torch.float64, device=device)

    def _add(self, tile: Tile) -> None:
        assert self.shape is not None
        _, n_q, n_k, _ = self.shape
        found = tile.full.sum(0)
        rows = found.shape[1]
        if tile.allowed is None:
            links = found.new_full((1, rows, n_k), float(tile.full.shape[0]))
        else:
            links = tile.allowed.expand(tile.full.shape[0], *tile.allowed.shape[1:]).sum(0).to(found.dtype)
        self.links += links.sum((1, 2)).expand(found.shape[0]).sum().item()
        here = tile.heads
        if self.block == 1:
            self.cells[here, tile.rows] += found.to(self.cells.dtype)
            self.cell_links[here, tile.rows] += links.to(self.cell_links.dtype)
            return
        self.by_key[here] += found.sum(1, dtype=torch.float64)
        first = tile.rows.start // self.block
        for what, into in ((found, self.cells), (links, self.cell_links)):
            ahead = tile.rows.start - first * self.block
            padded = torch.nn.functional.pad(what, (0, -n_k % self.block, ahead, -(rows + ahead) % self.block))
            blocked = padded.unflatten(2, (-1, self.block)).sum(3).unflatten(1, (-1, self.block)).sum(2)
            into[here, first : first + blocked.shape[1]] += blocked.to(into.dtype)
        # Row r of the tile begins one place further left in the order of distances.
        start = n_q - 1 - (tile.rows.stop - 1)
        for what, into in ((found, self.distance), (links, self.distance_links)):
            into[here, start : start + n_k + rows - 1] += skewed(what).sum(1, dtype=torch.float64)

    def _add_columns(
        self, q: Tensor, k: Tensor, lse: Tensor, base: Pattern | None, scale: float | None, q_offset: int, first: bool
    ) -> None:
        """Row by row for the keys that receive most (by the first texts added): exp(score - lse), without another pass."""
        assert self.shape is not None
        heads, n_q, n_k, _ = self.shape
        if first:
            self.columns = self.by_key.topk(min(COLUMNS, n_k), 1).indices.sort(1).values
            self.column = torch.zeros(heads, n_q, self.columns.shape[1], dtype=torch.float64, device=q.device)
            self.column_links = torch.zeros_like(self.column)
        group = heads // k.shape[1]
        factor = q.shape[3] ** -0.5 if scale is None else scale
        b = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1)
        i = (torch.arange(n_q, device=q.device) + q_offset).view(1, -1, 1)
        sizes = sizes_of(q, k, q_offset)
        for head in range(heads):
            keys = self.columns[head]
            scores = (q[:, head].double() * factor) @ k[:, head // group, keys].double().mT
            allowed = torch.ones_like(scores, dtype=torch.bool)
            if base is not None:
                h = torch.tensor(head, device=q.device)
                allowed = base._allows(sizes, b, h, i, keys.view(1, 1, -1)).expand_as(scores)
            probability = torch.exp(scores - lse[:, head, :, None]).masked_fill(~allowed, 0.0)
            self.column[head] += probability.sum(0)
            self.column_links[head] += allowed.sum(0)

    def head(self, head: int) -> HeadProfile:
        """The means of one head."""
        if self.shape is None:
            raise ArgumentError("the profile is empty; add at least one text to it first.")
        _, n_q, n_k, q_offset = self.shape
        texts = max(1, self.texts)
        cells, cell_links = (x[head].double().cpu() / texts for x in (self.cells, self.cell_links))
        if self.block > 1:
            parts = (self.distance[head], self.distance_links[head], self.column[head], self.column_links[head])
            distance, distance_links, column, column_links = (x.cpu() / texts for x in parts)
            columns = self.columns[head].cpu()
        else:
            distance, distance_links = (skewed(x[None])[0].sum(0) for x in (cells, cell_links))
            columns = cells.sum(0).topk(min(COLUMNS, n_k)).indices.sort().values
            column, column_links = cells[:, columns], cell_links[:, columns]
        return HeadProfile(
            n_q, n_k, q_offset, self.block, distance, distance_links, columns, column, column_links, cells, cell_links
        )


def skewed(x: Tensor) -> Tensor:
    """`(H, rows, n)` as `(H, rows, n + rows - 1)` in which row r begins at rows - 1 - r: diagonals become columns."""
    heads, rows, n = x.shape
    if not rows or not n:
        return x.new_zeros(heads, rows, max(0, n + rows - 1))
    # Rows laid out n + rows places apart drift by one place per row when read n + rows - 1 apart.
    padded = torch.nn.functional.pad(x.flip(1), (0, rows)).flatten(1)[:, : rows * (n + rows - 1)]
    return padded.view(heads, rows, n + rows - 1).flip(1)
