"""Sums over the links of a plan, and all their derivatives: what second and higher derivatives and forward mode are made of.

A *link sum* maps packed rows `(B, H, n_q, R)`, packed keys `(B, H_kv, n_k, K)`, several tensors side by side in the last
dimension, and a packed table by distance `(B, H, L, T)` to sums over the allowed pairs:

    row_sums[i] = Σ_j f(rows[i], keys[j], table[d]);   key_sums[j] = Σ_i g(…);   table_sums[d] = Σ_{i, j at distance d} h(…)

    d = clip(j - i - first, 0, L - 1), of positions

With the lse among the rows, no term depends on more than its own row, key and distance: a tile computes its terms from its
rows and keys (`link_terms.py`). The vector-Jacobian and the Jacobian-vector product of a link sum are link sums over longer
rows, keys and tables, tile by tile, so every order of derivative runs over the plan, in memory linear in n.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from farlight.kernels.torch_tiled.backward import finite_lse, is_large, log_of_sum
from farlight.kernels.torch_tiled.gather import TileBatch, tile_batches
from farlight.kernels.torch_tiled.link_terms import Shape, TilePairs, link_terms, widths
from farlight.kernels.torch_tiled.schedule import schedule_of
from farlight.kernels.torch_tiled.tile_terms import add_at, distance_index
from farlight.plan.tables import Plan

__all__ = ["Formula", "link_sums"]


@dataclass(frozen=True)
class Formula:
    """The attention whose links are summed over; `first`: the distance of the table's first entry."""

    shape: Shape
    scale: float
    dropout: float
    seed: Tensor
    cap: float = 0.0
    first: int = 0


def link_sums(kind: str, rows: Tensor, keys: Tensor, table: Tensor, plan: Plan, of: Formula) -> tuple[Tensor, Tensor, Tensor]:
    """The sums `(B, H, n_q, ·)`, `(B, H_kv, n_k, ·)` and `(B, H, L, ·)` of one kind; operands float32 or float64."""
    n, terms = widths(kind, of.shape), link_terms(kind, of.shape)
    row_sums = rows.new_zeros((*rows.shape[:3], n.row_sums))
    key_sums = keys.new_zeros((*keys.shape[:3], n.key_sums))
    table_sums = table.new_zeros((*table.shape[:3], n.table_sums))
    row_max, log_sum = _split_lse(rows, keys, table, plan, of)
    if row_max is not None:
        d = of.shape.head_dim
        rows = torch.cat((rows[..., :d], log_sum, rows[..., d + 1 :]), -1)
    for part in _parts(plan, rows, keys, n.keys + n.table, of):
        links = part.links(None if row_max is None else part.take_rows(row_max))
        sums = terms(part.take_rows(rows), part.take_keys(keys), part.take_table(table), links)
        part.add_rows(row_sums, sums[0])
        part.add_keys(key_sums, sums[1])
        part.add_table(table_sums, sums[2])
    return row_sums, key_sums, table_sums


def _split_lse(rows: Tensor, keys: Tensor, table: Tensor, plan: Plan, of: Formula) -> tuple[Tensor | None, Tensor]:
    """The lse as (row maximum, log of the sum), both `(B, H, n_q, 1)`; (None, lse) where the lse is precise enough."""
    d, d_v, b, t = of.shape
    lse = finite_lse(rows[..., d : d + 1])
    if not is_large(lse):
        return None, lse
    row_max, row_sum = torch.full_like(lse, float("-inf")), torch.zeros_like(lse)

    def scores(part: _Part) -> Tensor:
        k, _, by_key = part.take_keys(keys[..., : d + d_v + b]).split((d, d_v, b), -1)
        return part.links(None).scores(part.take_rows(rows[..., :d]), k, by_key, part.take_table(table[..., :t]))[0]

    for part in _parts(plan, rows, keys, d + d_v + b + t, of):
        part.put_rows(row_max, torch.maximum(part.take_rows(row_max), scores(part).amax(-1, keepdim=True)))
    row_max = finite_lse(row_max)
    for part in _parts(plan, rows, keys, d + d_v + b + t, of):
        part.add_rows(row_sum, torch.exp(scores(part) - part.take_rows(row_max)).sum(-1, keepdim=True))
    return row_max, log_of_sum(lse, row_max, row_sum)


def _parts(plan: Plan, rows: Tensor, keys: Tensor, columns: int, of: Formula) -> Iterator[_Part]:
    """The runs and the gathered keys of all tiles, in a fixed order. columns: what is gathered of a key."""
    per_key = rows.shape[1] // keys.shape[1]
    for batch in tile_batches(schedule_of(plan, rows.device), rows.shape[1], keys.shape[1], columns):
        if batch.group.width:
            yield _Part(batch, None, rows.device, rows.dtype, plan.sizes.q_offset, per_key, of)
        points = batch.points()
        if points is not None:
            yield _Part(batch, points, rows.device, rows.dtype, plan.sizes.q_offset, per_key, of)


@dataclass(frozen=True)
class _Part:
    """The runs of a batch of tiles, or, with `points`, its gathered keys: there each row is a tile of its own, with the query
    heads of one key head as rows.
    """

    batch: TileBatch
    points: tuple[Tensor, Tensor] | None
    device: torch.device
    dtype: torch.dtype
    q_offset: int
    per_key: int  # query heads of one key head
    of: Formula

    def take_rows(self, x: Tensor) -> Tensor:
        """`(c, tiles, heads · count, R)`; of points `(c, tiles, count, heads, R)`."""
        return self._by_row(self.batch.take_queries(x))

    def put_rows(self, x: Tensor, value: Tensor) -> None:
        """The inverse of `take_rows`, into x."""
        self.batch.put_queries(x, self._by_tile(value))

    def add_rows(self, x: Tensor, value: Tensor) -> None:
        """x += value, at the rows of `take_rows`."""
        self.batch.put_queries(x, self._by_tile(value), add=True)

    def take_keys(self, x: Tensor) -> Tensor:
        """`(c, tiles, width, K)`; of points `(c, tiles, count, m, K)`."""
        return self.batch.take_keys(x, self.dtype) if self.points is None else self.batch.take_points(x, self.keys, self.dtype)

    def add_keys(self, x: Tensor, value: Tensor) -> None:
        """x += value, at the keys of `take_keys`."""
        if not x.shape[-1]:
            return
        if self.points is None:
            self.batch.add_keys(x, value)
        else:
            self.batch.add_points(x, self.keys.reshape(-1), value.flatten(1, 3))

    def take_table(self, x: Tensor) -> Tensor:
        """`(c, tiles, heads · count, width, T)`; of points `(c, tiles, count, heads, m, T)`: the entries of the pairs."""
        batch, heads = self.batch, self.batch.heads
        per_key = (heads.q1 - heads.q0) // (heads.k1 - heads.k0)
        if not x.shape[-1]:
            rows, width = per_key * batch.group.count, self.keys.shape[-1]
            return self._by_row(x.new_empty(batch.key_heads, batch.tiles, rows, width, 0))
        entries = x[heads.batch, heads.q0 : heads.q1].reshape(-1, *x.shape[2:])[:, self._distances(x)]
        return self._by_row(entries.unflatten(0, (-1, per_key)).transpose(1, 2).flatten(2, 3))

    def add_table(self, x: Tensor, value: Tensor) -> None:
        """x += value, at the distances of the pairs."""
        if not x.shape[-1]:
            return
        heads = self.batch.heads
        by_head = self._by_tile(value).unflatten(2, (-1, self.batch.group.count)).transpose(1, 2).flatten(0, 1)
        sums = x[heads.batch, heads.q0 : heads.q1]  # a copy where `batch` is a tensor
        add_at(sums.view(-1, *x.shape[2:]), self._distances(x), by_head)
        if isinstance(heads.batch, Tensor):
            x[heads.batch, heads.q0 : heads.q1] = sums

    def links(self, shift: Tensor | None) -> TilePairs:
        """The pairs, for the terms; shift: the row maximum, by `take_rows`."""
        factor = None
        if self.of.dropout:
            factor = self.batch.dropout_factor(self.of.seed, self.of.dropout, self.q_offset, self.keys, self.dtype)
            factor = self._by_row(factor)
        hidden = _hidden(self.batch, self.device) if self.points is None else ~self.points[1][:, :, None]
        heads = self.batch.heads
        first = heads.q0 - heads.k0 * self.per_key
        last = first + (heads.q1 - heads.q0) // (heads.k1 - heads.k0)
        return TilePairs(self.of.scale, self.of.cap, hidden, shift, factor, first, last)

    @cached_property
    def keys(self) -> Tensor:
        """`(tiles, 1, width)`; of points `(tiles, count, m)`."""
        return self.batch.key_indices(self.device)[:, None] if self.points is None else self.points[0]

    def _distances(self, table: Tensor) -> Tensor:
        """`(tiles, count, width | m)`: the entry of the table for each pair."""
        return distance_index(self.batch, self.keys, self.q_offset, self.of.first, table.shape[2])

    def _by_row(self, x: Tensor) -> Tensor:
        """Of points `(c, tiles, count, heads, …)` from `(c, tiles, heads · count, …)`."""
        return x if self.points is None else x.unflatten(2, (-1, self.batch.group.count)).movedim(2, 3)

    def _by_tile(self, x: Tensor) -> Tensor:
        """The inverse of `_by_row`."""
        return x if self.points is None else x.movedim(3, 2).flatten(2, 3)


def _hidden(batch: TileBatch, device: torch.device) -> Tensor | None:
    """`(heads · count, width)` bool, True where a pair of the batch's tiles is not allowed; None where all are."""
    group = batch.group
    if not group.hidden:
        return None
    hidden = torch.zeros(group.count, group.width, dtype=torch.bool, device=device)
    for c0, c1, columns in group.hidden:
        hidden[:, c0:c1] = columns
    heads = batch.heads
    return hidden.repeat((heads.q1 - heads.q0) // (heads.k1 - heads.k0), 1)
