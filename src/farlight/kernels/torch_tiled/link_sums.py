"""Sums over the links of a plan, and all their derivatives: what second and higher derivatives and forward mode are made of.

A *link sum* maps packed rows `(B, H, n_q, R)` and packed keys `(B, H_kv, n_k, K)`, several tensors side by side in the last
dimension, to sums over the allowed pairs:

    row_sums[i] = Σ_j f(rows[i], keys[j]);   key_sums[j] = Σ_i g(rows[i], keys[j])

With the lse among the rows, no term depends on more than its own row and key: a tile computes its terms from its rows and
keys. The vector-Jacobian and the Jacobian-vector product of a link sum are link sums over longer rows and keys, tile
by tile (`torch.func.vjp` of the tile's function), so every order of derivative runs over the plan, in memory linear in n.

Two link sums are written here, and every other kind is derived from them:

    "tangent"     rows q | lse | q';       keys k | v | k' | v':  Σ_j P Z (S' v + v') | Σ_j P S',   S' = scale (q'·k + q·k')
    "gradients"   rows q | lse | dO | Δ;   keys k | v:            dq;  dk | dv                      (see `backward.py`)

P = exp(S - lse), S = scale q·k, Z the factor of dropout. A kind's name with "r" appended is its reverse derivative (rows and
keys | cotangents of both sums → cotangents of rows and keys), with "f" its forward derivative (rows | tangents, keys | tangents
→ tangents of both sums). A further term of the scores belongs in `_Links.probabilities`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from farlight.kernels.torch_tiled.backward import split_lse
from farlight.kernels.torch_tiled.gather import TileBatch, tile_batches
from farlight.kernels.torch_tiled.schedule import schedule_of
from farlight.plan.tables import Plan

__all__ = ["Widths", "link_sums", "widths"]


class Widths(NamedTuple):
    """Columns of the packed rows and keys, and of the sums by row and by key."""

    rows: int
    keys: int
    row_sums: int
    key_sums: int


def widths(kind: str, head_dim: int, value_dim: int) -> Widths:
    """The columns of a kind of link sum: "tangent" or "gradients", "." and any number of "r" and "f"."""
    base, _, steps = kind.partition(".")
    d, d_v = head_dim, value_dim
    n = Widths(2 * d + 1, 2 * (d + d_v), d_v + 1, 0) if base == "tangent" else Widths(d + d_v + 2, d + d_v, d, d + d_v)
    for step in steps:
        n = _next(n, step)
    return n


def link_sums(
    kind: str,
    rows: Tensor,
    keys: Tensor,
    plan: Plan,
    *,
    head_dim: int,
    value_dim: int,
    scale: float,
    dropout: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """The sums `(B, H, n_q, ·)` and `(B, H_kv, n_k, ·)` of one kind over the plan's links; operands float32 or float64."""
    n, dtype = widths(kind, head_dim, value_dim), rows.dtype
    terms = _derived(kind, head_dim, value_dim)
    row_sums = rows.new_zeros((*rows.shape[:3], n.row_sums))
    key_sums = keys.new_zeros((*keys.shape[:3], n.key_sums))
    q, k, v = rows[..., :head_dim], keys[..., :head_dim], keys[..., head_dim : head_dim + value_dim]
    row_max, log_sum = split_lse(q, k, v, rows[..., head_dim], plan, scale, dtype, None)
    for batch in tile_batches(schedule_of(plan, rows.device), rows.shape[1], keys.shape[1], n.keys):
        tile_rows = torch.cat(
            (batch.take_queries(q), batch.take_queries(log_sum[..., None]), batch.take_queries(rows[..., head_dim + 1 :])), -1
        )
        shift = None if row_max is None else batch.take_queries(row_max).unsqueeze(-1)
        if batch.group.width:
            factor = None
            if dropout:
                at = batch.key_indices(rows.device)[:, None]
                factor = batch.dropout_factor(seed, dropout, plan.sizes.q_offset, at, dtype)
            links = _Links(scale, _hidden(batch, rows.device), shift, factor)
            by_row, by_key = terms(tile_rows, batch.take_keys(keys, dtype), links)
            batch.put_queries(row_sums, by_row, add=True)
            batch.add_keys(key_sums, by_key)
        _add_points(batch, terms, tile_rows, shift, keys, row_sums, key_sums, plan, scale, dropout, seed)
    return row_sums, key_sums


def _add_points(
    batch: TileBatch,
    terms: _Terms,
    tile_rows: Tensor,
    shift: Tensor | None,
    keys: Tensor,
    row_sums: Tensor,
    key_sums: Tensor,
    plan: Plan,
    scale: float,
    dropout: float,
    seed: Tensor,
) -> None:
    """Accumulate the terms of gathered keys: each row is a tile of its own, with the query heads of one key head as rows."""
    points = batch.points()
    if points is None:
        return
    at, valid = points
    count, dtype = batch.group.count, tile_rows.dtype

    def by_row(x: Tensor) -> Tensor:
        """`(c, tiles, count, heads, …)` of `(c, tiles, heads · count, …)`."""
        rows: Tensor = x.unflatten(2, (-1, count)).movedim(2, 3)
        return rows

    factor = by_row(batch.dropout_factor(seed, dropout, plan.sizes.q_offset, at, dtype)) if dropout else None
    links = _Links(scale, ~valid[:, :, None], None if shift is None else by_row(shift), factor)
    row_terms, key_terms = terms(by_row(tile_rows), batch.take_points(keys, at, dtype), links)
    batch.put_queries(row_sums, row_terms.movedim(3, 2).flatten(2, 3), add=True)
    batch.add_points(key_sums, at.reshape(-1), key_terms.flatten(1, 3))


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


@dataclass(frozen=True)
class _Links:
    """The pairs of stacked tiles: `hidden` (not allowed), `shift` (the rows' score maximum, where lse is relative to it), and
    `factor` (of dropout) broadcast to the tile's scores `(…, rows, keys)`.
    """

    scale: float
    hidden: Tensor | None
    shift: Tensor | None
    factor: Tensor | None

    def probabilities(self, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        """P `(…, rows, keys)`, 0 where a pair is not allowed."""
        scores = q @ k.mT * self.scale
        if self.hidden is not None:
            scores = scores.masked_fill(self.hidden, float("-inf"))
        if self.shift is not None:
            scores = scores - self.shift
        return torch.exp(scores - lse)

    def dropped(self, x: Tensor) -> Tensor:
        """x ∘ Z."""
        return x if self.factor is None else x * self.factor


_Terms: TypeAlias = Callable[[Tensor, Tensor, _Links], tuple[Tensor, Tensor]]


def _derived(kind: str, d: int, d_v: int) -> _Terms:
    """The tile's function of a kind: rows `(…, r, R)`, keys `(…, w, K)` → their sums over the tile."""
    base, _, steps = kind.partition(".")

    def tangent(rows: Tensor, keys: Tensor, links: _Links) -> tuple[Tensor, Tensor]:
        q, lse, dq = rows.split((d, 1, d), -1)
        k, v, dk, dv = keys.split((d, d_v, d, d_v), -1)
        p = links.probabilities(q, k, lse)
        ds = p * (dq @ k.mT + q @ dk.mT) * links.scale
        return torch.cat((links.dropped(ds) @ v + links.dropped(p) @ dv, ds.sum(-1, keepdim=True)), -1), keys[..., :0]

    def gradients(rows: Tensor, keys: Tensor, links: _Links) -> tuple[Tensor, Tensor]:
        q, lse, dout, delta = rows.split((d, 1, d_v, 1), -1)
        k, v = keys.split((d, d_v), -1)
        p = links.probabilities(q, k, lse)
        ds = p * (links.dropped(dout @ v.mT) - delta) * links.scale
        return ds @ k, torch.cat((ds.mT @ q, links.dropped(p).mT @ dout), -1)

    terms: _Terms = tangent if base == "tangent" else gradients
    n = widths(base, d, d_v)
    for step in steps:
        terms, n = (_reverse if step == "r" else _forward)(terms, n), _next(n, step)
    return terms


def _next(n: Widths, step: str) -> Widths:
    """The columns of the reverse ("r") or forward ("f") derivative."""
    if step == "r":
        return Widths(n.rows + n.row_sums, n.keys + n.key_sums, n.rows, n.keys)
    return n._replace(rows=2 * n.rows, keys=2 * n.keys)


def _reverse(terms: _Terms, n: Widths) -> _Terms:
    def derived(rows: Tensor, keys: Tensor, links: _Links) -> tuple[Tensor, Tensor]:
        (rows, drows), (keys, dkeys) = rows.split((n.rows, n.row_sums), -1), keys.split((n.keys, n.key_sums), -1)
        _, pullback = torch.func.vjp(lambda r, k: terms(r, k, links), rows, keys)[:2]
        drows, dkeys = pullback((drows, dkeys))
        return drows, dkeys

    return derived


def _forward(terms: _Terms, n: Widths) -> _Terms:
    """The pushforward as the pullback of the pullback, which is linear: torch has one level of forward mode, perhaps taken."""

    def derived(rows: Tensor, keys: Tensor, links: _Links) -> tuple[Tensor, Tensor]:
        (rows, trows), (keys, tkeys) = rows.split(n.rows, -1), keys.split(n.keys, -1)
        sums, pullback = torch.func.vjp(lambda r, k: terms(r, k, links), rows, keys)[:2]
        _, pushforward = torch.func.vjp(lambda a, b: pullback((a, b)), *(torch.zeros_like(x) for x in sums))[:2]
        tangents = pushforward((trows, tkeys))
        return tangents[0], tangents[1]

    return derived
