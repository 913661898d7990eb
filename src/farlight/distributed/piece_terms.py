"""Score terms and dropout of one piece: functions of positions in the whole problem, for rows and keys numbered from 0.

Softcap needs no position and biases by key are taken by key. Biases by distance are a shifted part of the table where rows and
keys are runs of positions; elsewhere, and for dropout, the backend is given the positions (`Origin`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farlight.distributed.selection import Places
from farlight.kernels.backend import Origin, ScoreGrads
from farlight.kernels.torch_tiled.tile_terms import add_at
from farlight.score.lowered import ScoreTerms

__all__ = ["PieceTerms", "TermSums", "piece_terms"]


@dataclass(frozen=True, eq=False)
class PieceTerms:
    """What a backend is given for a piece. `low`: the column of the whole table at which the piece's part of it begins."""

    places: Places
    terms: ScoreTerms | None
    origin: Origin | None
    low: int = 0


class TermSums:
    """The gradients of the whole tables from the pairs that this rank computes; their sums over ranks are the gradients."""

    def __init__(self, whole: ScoreTerms | None, wanted: tuple[bool, bool, bool]) -> None:
        self.wanted = wanted
        tables = (None, None) if whole is None else (whole.distance, whole.key_bias)
        self.distance, self.key_bias = (
            torch.zeros_like(x) if x is not None and wants else None for x, wants in zip(tables, wanted, strict=False)
        )

    def add(self, piece: PieceTerms, grads: ScoreGrads) -> None:
        """Add the gradients of a piece's tables."""
        distance, key_bias, _ = grads
        if self.distance is not None and distance is not None:
            self.distance[:, piece.low : piece.low + distance.shape[1]] += distance
        if self.key_bias is not None and key_bias is not None:
            cells = torch.arange(self.key_bias.numel(), device=key_bias.device).view(self.key_bias.shape)
            add_at(self.key_bias.view(1, -1), _of_keys(cells, piece.places), key_bias[None])


def piece_terms(whole: ScoreTerms | None, places: Places, dropout: float) -> PieceTerms:
    """The terms of a piece, from those of the whole problem."""
    rows, keys = places.rows + places.whole.q_offset, places.keys
    distance = None if whole is None else whole.distance
    shift = None if distance is None else _shift(rows, keys, places)
    origin = None
    if dropout or (distance is not None and shift is None):
        origin = Origin(rows, keys, places.items, places.heads)
    if whole is None:
        return PieceTerms(places, None, origin)
    key_bias = None if whole.key_bias is None else _of_keys(whole.key_bias, places)
    if distance is None or shift is None or origin is not None:
        return PieceTerms(places, replace(whole, key_bias=key_bias, sinks=None), origin)
    low, high = 0, 0
    if rows.numel() and keys.numel():
        ends = int(keys[0] - rows[-1]) - whole.first, int(keys[-1] - rows[0]) - whole.first
        low, high = (min(max(end, 0), distance.shape[1] - 1) for end in ends)
    terms = replace(whole, first=whole.first + low + shift, distance=distance[:, low : high + 1], key_bias=key_bias, sinks=None)
    return PieceTerms(places, terms, None, low)


def _shift(rows: Tensor, keys: Tensor, places: Places) -> int | None:
    """First row - first key where both are runs of positions and the heads are those of the whole; else None."""
    if any(x.numel() and int(x[-1] - x[0]) + 1 != x.numel() for x in (rows, keys)) or not _is_whole(places):
        return None
    return int(rows[0] - keys[0]) if rows.numel() and keys.numel() else 0


def _is_whole(places: Places) -> bool:
    """Whether a piece has all batch items and heads of the whole, in their order."""
    batch, heads = places.whole.batch, places.whole.heads
    order = torch.arange(batch * heads).view(batch, heads)
    return places.items.shape == order.shape and torch.equal(places.items * heads + places.heads, order)


def _of_keys(bias: Tensor, places: Places) -> Tensor:
    """`(B or 1, H or 1, m)` of a piece, from `(B or 1, H or 1, n_k)` of the whole."""
    of_keys = bias[..., places.keys.to(bias.device)]
    if bias.shape[0] == bias.shape[1] == 1 or _is_whole(places):
        return of_keys
    item, head = (x.to(bias.device) for x in (places.items, places.heads))
    return of_keys[item if bias.shape[0] > 1 else item * 0, head if bias.shape[1] > 1 else head * 0]
