"""The terms of link sums: what a tile's rows and keys give to the sums, and every derivative of that.

Two functions are written here, the rest is derived from them by `torch.func.vjp`:

    "tangent"     rows q | lse | q';       keys k | v | b | k' | v' | b';  table t | t':  Σ_j P Z (S' v + v') | Σ_j P S'
    "gradients"   rows q | lse | dO | Δ;   keys k | v | b;                 table t:       dq;  dk | dv | db;  dt

    x = scale q·k;   S = cap · tanh(x / cap) + b + t;   P = exp(S - lse);   S' = (1 - tanh²) scale (q'·k + q·k') + b' + t'

with Z the factor of dropout; `backward.py` has the formulas of the gradients. b is the bias by key, one column for each query
head of the key head, t that of the pair, read from a table by distance; both and the cap may be missing. A kind's name with "r"
appended is its reverse derivative (rows, keys and table | cotangents of the three sums → cotangents of rows, keys and table),
with "f" its forward derivative (… | tangents → tangents of the sums). A further term of the scores belongs in
`TilePairs.scores` and `TilePairs.biased`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["LinkTerms", "Shape", "TilePairs", "Widths", "link_terms", "widths"]


class Shape(NamedTuple):
    """head_dim of q and k, that of v, and columns of b (query heads per key head, or 0) and t (1 or 0)."""

    head_dim: int
    value_dim: int
    key_biases: int = 0
    distances: int = 0


class Widths(NamedTuple):
    """Columns of the packed rows, keys and table, and of the sums by row, by key and by distance."""

    rows: int
    keys: int
    table: int
    row_sums: int
    key_sums: int
    table_sums: int


def widths(kind: str, of: Shape) -> Widths:
    """The columns of a kind of link sum: "tangent" or "gradients", "." and any number of "r" and "f"."""
    base, _, steps = kind.partition(".")
    d, d_v, b, t = of
    if base == "tangent":
        n = Widths(2 * d + 1, 2 * (d + d_v + b), 2 * t, d_v + 1, 0, 0)
    else:
        n = Widths(d + d_v + 2, d + d_v + b, t, d, d + d_v + b, t)
    for step in steps:
        n = _next(n, step)
    return n


@dataclass(frozen=True)
class TilePairs:
    """The pairs of stacked tiles: `hidden` (not allowed), `shift` (the rows' score maximum, where lse is relative to it), and
    `factor` (of dropout) broadcast to the tile's scores `(…, rows, keys)`. The rows are those of the query heads
    `[first_head, last_head)` of the key head, one head after the other.
    """

    scale: float
    cap: float
    hidden: Tensor | None
    shift: Tensor | None
    factor: Tensor | None
    first_head: int
    last_head: int

    def scores(self, q: Tensor, k: Tensor, by_key: Tensor, by_pair: Tensor) -> tuple[Tensor, Tensor | None]:
        """(S `(…, rows, keys)`, -inf where a pair is not allowed; dS/dx, None: 1)."""
        scores, slope = q @ k.mT * self.scale, None
        if self.cap:
            ratio = torch.tanh(scores / self.cap)
            scores, slope = ratio * self.cap, 1 - ratio.square()
        scores = self.biased(scores, by_key, by_pair)
        return scores if self.hidden is None else scores.masked_fill(self.hidden, float("-inf")), slope

    def probabilities(self, q: Tensor, k: Tensor, lse: Tensor, by_key: Tensor, by_pair: Tensor) -> tuple[Tensor, Tensor | None]:
        """(P `(…, rows, keys)`, 0 where a pair is not allowed; dS/dx, None: 1)."""
        scores, slope = self.scores(q, k, by_key, by_pair)
        if self.shift is not None:
            scores = scores - self.shift
        return torch.exp(scores - lse), slope

    def biased(self, x: Tensor, by_key: Tensor, by_pair: Tensor) -> Tensor:
        """x + b + t: by_key `(…, keys, heads of the key head | 0)`, by_pair `(…, rows, keys, 1 | 0)`."""
        if by_key.shape[-1]:
            columns = by_key[..., self.first_head : self.last_head].mT.unsqueeze(-2)
            x = (x.unflatten(-2, (columns.shape[-3], -1)) + columns).flatten(-3, -2)
        return x + by_pair.squeeze(-1) if by_pair.shape[-1] else x

    def of_keys(self, ds: Tensor, heads: int) -> Tensor:
        """The gradient of b `(…, keys, heads)` from that of the scores."""
        columns = ds.unflatten(-2, (self.last_head - self.first_head, -1)).sum(-2).mT
        return torch.nn.functional.pad(columns, (self.first_head, heads - self.last_head))

    def dropped(self, x: Tensor) -> Tensor:
        """x ∘ Z."""
        return x if self.factor is None else x * self.factor


LinkTerms: TypeAlias = Callable[[Tensor, Tensor, Tensor, TilePairs], tuple[Tensor, Tensor, Tensor]]


def link_terms(kind: str, of: Shape) -> LinkTerms:
    """The tile's function of a kind: rows `(…, r, R)`, keys `(…, w, K)`, table `(…, r, w, T)` → their sums over the tile.

    The third sum stays by pair, `(…, r, w, U)`.
    """
    base, _, steps = kind.partition(".")
    terms, n = _tangent(of) if base == "tangent" else _gradients(of), widths(base, of)
    for step in steps:
        terms, n = (_reverse if step == "r" else _forward)(terms, n), _next(n, step)
    return terms


def _tangent(of: Shape) -> LinkTerms:
    d, d_v, b, t = of

    def tangent(rows: Tensor, keys: Tensor, table: Tensor, links: TilePairs) -> tuple[Tensor, Tensor, Tensor]:
        q, lse, dq = rows.split((d, 1, d), -1)
        k, v, by_key, dk, dv, dby_key = keys.split((d, d_v, b, d, d_v, b), -1)
        by_pair, dby_pair = table.split((t, t), -1)
        p, slope = links.probabilities(q, k, lse, by_key, by_pair)
        dx = (dq @ k.mT + q @ dk.mT) * links.scale
        ds = p * links.biased(dx if slope is None else dx * slope, dby_key, dby_pair)
        by_row = torch.cat((links.dropped(ds) @ v + links.dropped(p) @ dv, ds.sum(-1, keepdim=True)), -1)
        return by_row, keys[..., :0], table[..., :0]

    return tangent


def _gradients(of: Shape) -> LinkTerms:
    d, d_v, b, t = of

    def gradients(rows: Tensor, keys: Tensor, table: Tensor, links: TilePairs) -> tuple[Tensor, Tensor, Tensor]:
        q, lse, dout, delta = rows.split((d, 1, d_v, 1), -1)
        k, v, by_key = keys.split((d, d_v, b), -1)
        p, slope = links.probabilities(q, k, lse, by_key, table)
        ds = p * (links.dropped(dout @ v.mT) - delta)
        dx = (ds if slope is None else ds * slope) * links.scale
        of_keys = [dx.mT @ q, links.dropped(p).mT @ dout]
        if b:
            of_keys.append(links.of_keys(ds, b))
        return dx @ k, torch.cat(of_keys, -1), ds.unsqueeze(-1)[..., :t]

    return gradients


def _next(n: Widths, step: str) -> Widths:
    """The columns of the reverse ("r") or forward ("f") derivative."""
    if step == "r":
        return Widths(n.rows + n.row_sums, n.keys + n.key_sums, n.table + n.table_sums, n.rows, n.keys, n.table)
    return n._replace(rows=2 * n.rows, keys=2 * n.keys, table=2 * n.table)


def _reverse(terms: LinkTerms, n: Widths) -> LinkTerms:
    def derived(rows: Tensor, keys: Tensor, table: Tensor, links: TilePairs) -> tuple[Tensor, Tensor, Tensor]:
        (rows, drows), (keys, dkeys) = rows.split((n.rows, n.row_sums), -1), keys.split((n.keys, n.key_sums), -1)
        table, dtable = table.split((n.table, n.table_sums), -1)
        _, pullback = torch.func.vjp(lambda r, k, t: terms(r, k, t, links), rows, keys, table)[:2]
        drows, dkeys, dtable = pullback((drows, dkeys, dtable))
        return drows, dkeys, dtable

    return derived


def _forward(terms: LinkTerms, n: Widths) -> LinkTerms:
    """The pushforward as the pullback of the pullback, which is linear: torch has one level of forward mode, perhaps taken."""

    def derived(rows: Tensor, keys: Tensor, table: Tensor, links: TilePairs) -> tuple[Tensor, Tensor, Tensor]:
        (rows, trows), (keys, tkeys) = rows.split(n.rows, -1), keys.split(n.keys, -1)
        table, ttable = table.split((n.table, n.table), -1)
        sums, pullback = torch.func.vjp(lambda r, k, t: terms(r, k, t, links), rows, keys, table)[:2]
        _, pushforward = torch.func.vjp(lambda a, b, c: pullback((a, b, c)), *(torch.zeros_like(x) for x in sums))[:2]
        tangents = pushforward((trows, tkeys, ttable))
        return tangents[0], tangents[1], tangents[2]

    return derived
