"""Forward pass of the torch backend: one softmax per batch of tiles, merged where a row occurs in several.

Each row keeps (out, max, sum): the normalised output, the largest score, and Σ exp(score − max); lse = max + log sum. Two
results of a row are merged by rescaling both to the larger maximum. The maximum and the sum stay apart until the end: for
large scores the lse alone has too few digits for the weights of the merge.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from farlight.kernels.backend import Origin
from farlight.kernels.sinks import with_sinks
from farlight.kernels.torch_tiled.gather import TileBatch, tile_batches
from farlight.kernels.torch_tiled.schedule import schedule_of
from farlight.kernels.torch_tiled.tile_terms import TileTerms
from farlight.plan.tables import Plan
from farlight.score.lowered import ScoreTerms

__all__ = ["TileScores", "acc_dtype", "forward", "row_max_and_sum", "tile_scores", "tile_terms"]


def acc_dtype(x: Tensor) -> torch.dtype:
    """The dtype of scores and sums: float64 for float64 inputs, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def tile_terms(terms: ScoreTerms | None, plan: Plan, origin: Origin | None = None) -> TileTerms | None:
    """The terms as tiles apply them; None where there is none but sinks."""
    if terms is None or not terms.names - {"sinks"}:
        return None
    return TileTerms(terms, plan.sizes, origin)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float,
    dropout: float,
    seed: Tensor,
    terms: ScoreTerms | None = None,
    origin: Origin | None = None,
) -> tuple[Tensor, Tensor]:
    """(out `(B, H, n_q, D_v)` in q's dtype, lse `(B, H, n_q)` in `acc_dtype`) over the plan's links; empty rows 0, -inf."""
    options = scale, dropout, seed, tile_terms(terms, plan, origin), origin
    out, row_max, row_sum = _attend(q, k, v, plan, *options)
    lse = row_sum.log() + row_max
    if terms is not None and terms.sinks is not None:
        out, lse = with_sinks(out.to(lse.dtype), lse, terms.sinks)
    return out.to(q.dtype), lse


def row_max_and_sum(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, terms: TileTerms | None = None
) -> tuple[Tensor, Tensor]:
    """(max, sum) of each row's scores, `(B, H, n_q)`: lse = max + log sum; (0, 0) for an empty row."""
    _, row_max, row_sum = _attend(q, k, v, plan, scale, 0.0, torch.zeros((), dtype=torch.int64), terms, None)
    return row_max, row_sum


class TileScores(NamedTuple):
    """Scores of a batch of tiles, -inf where a pair is not allowed; None for what the tiles do not have.

    runs `(c, tiles, rows, width)`, points `(c, tiles, rows, m)`, point_keys `(tiles, count, m)`; rows = heads per key head ·
    count. run_slope and point_slope: the derivative of a capped score, None without softcap.
    """

    runs: Tensor | None
    points: Tensor | None
    point_keys: Tensor | None
    run_slope: Tensor | None = None
    point_slope: Tensor | None = None


def tile_scores(batch: TileBatch, queries: Tensor, k: Tensor, terms: TileTerms | None = None) -> TileScores:
    """The scores of a batch of tiles; queries `(c, tiles, rows, D)`, scaled."""
    scores = point_scores = point_keys = run_slope = point_slope = None
    if batch.group.width:
        scores = queries @ batch.take_keys(k, queries.dtype).transpose(-1, -2)
        if terms is not None:
            scores, run_slope = terms.apply(batch, scores, batch.key_indices(queries.device)[:, None])
        batch.mask_scores(scores)
    points = batch.points()
    if points is not None:
        point_keys, valid = points
        keys = batch.take_points(k, point_keys, queries.dtype)
        by_row = queries.unflatten(2, (-1, batch.group.count)).movedim(2, -1)  # (c, tiles, count, D, heads)
        point_scores = (keys @ by_row).movedim(-1, 2)  # (c, tiles, heads, count, m)
        if terms is not None:
            capped, point_slope = terms.apply(batch, point_scores.flatten(2, 3), point_keys)
            point_scores = capped.view(point_scores.shape)
        point_scores = point_scores.masked_fill(~valid[:, None], float("-inf")).flatten(2, 3)
    return TileScores(scores, point_scores, point_keys, run_slope, point_slope)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scale: float,
    dropout: float,
    seed: Tensor,
    terms: TileTerms | None,
    origin: Origin | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, max, sum) of every row."""
    dtype = acc_dtype(q)
    schedule = schedule_of(plan, q.device)
    out = torch.zeros(q.shape[:-1] + v.shape[-1:], dtype=dtype if schedule.merges else q.dtype, device=q.device)
    row_max, row_sum = (torch.zeros(q.shape[:-1], dtype=dtype, device=q.device) for _ in range(2))
    for batch in tile_batches(schedule, q.shape[1], k.shape[1], q.shape[3]):
        queries = batch.take_queries(q).to(dtype) * scale
        result = _attend_tiles(batch, queries, k, v, plan.sizes.q_offset, dropout, seed, terms, origin)
        # Also without merging, a row that is empty here may have a result of another piece, which must not be overwritten.
        if schedule.merges or bool((result[2] == 0).any()):
            before = (batch.take_queries(out).to(dtype), batch.take_queries(row_max), batch.take_queries(row_sum))
            result = _merged(*before, *result)
        for target, value in zip((out, row_max, row_sum), result, strict=True):
            batch.put_queries(target, value)
    return out, row_max, row_sum


def _attend_tiles(
    batch: TileBatch,
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    q_offset: int,
    dropout: float,
    seed: Tensor,
    terms: TileTerms | None,
    origin: Origin | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out `(c, tiles, rows, D_v)`, max, sum `(c, tiles, rows)`) of one batch of tiles."""
    scores, point_scores, point_keys, *_ = tile_scores(batch, queries, k, terms)
    maxima = [part.amax(-1) for part in (scores, point_scores) if part is not None]
    row_max = maxima[0] if len(maxima) == 1 else torch.maximum(*maxima)
    # A finite maximum gives empty rows exp(-inf) = 0 instead of NaN.
    row_max = torch.where(row_max == float("-inf"), 0.0, row_max).unsqueeze(-1)
    row_sum = torch.zeros_like(row_max)
    for part in (scores, point_scores):
        if part is not None:
            row_sum += part.sub_(row_max).exp_().sum(-1, keepdim=True)
    out: Tensor | float = 0.0
    if scores is not None:
        if dropout:
            keys = batch.key_indices(queries.device)[:, None]
            scores *= batch.dropout_factor(seed, dropout, q_offset, keys, queries.dtype, origin)
        out = scores @ batch.take_keys(v, queries.dtype)
    if point_scores is not None and point_keys is not None:
        if dropout:
            point_scores *= batch.dropout_factor(seed, dropout, q_offset, point_keys, queries.dtype, origin)
        values = batch.take_points(v, point_keys, queries.dtype)
        by_row = point_scores.unflatten(2, (-1, batch.group.count)).movedim(2, 3)  # (c, tiles, count, heads, m)
        out = out + (by_row @ values).movedim(3, 2).flatten(2, 3)
    assert isinstance(out, Tensor)
    return out / torch.where(row_sum == 0, 1.0, row_sum), row_max.squeeze(-1), row_sum.squeeze(-1)


def _merged(
    out_a: Tensor, max_a: Tensor, sum_a: Tensor, out_b: Tensor, max_b: Tensor, sum_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Two partial softmax results of the same rows as one; sum 0 = no link."""
    row_max = torch.where(sum_a == 0, max_b, torch.where(sum_b == 0, max_a, torch.maximum(max_a, max_b)))
    weight_a = torch.where(sum_a == 0, 0.0, (max_a - row_max).exp() * sum_a)
    weight_b = torch.where(sum_b == 0, 0.0, (max_b - row_max).exp() * sum_b)
    row_sum = weight_a + weight_b
    norm = torch.where(row_sum == 0, 1.0, row_sum)
    return out_a * (weight_a / norm).unsqueeze(-1) + out_b * (weight_b / norm).unsqueeze(-1), row_max, row_sum
