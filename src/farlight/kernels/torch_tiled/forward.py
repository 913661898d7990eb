"""The forward pass by tiles: one softmax per tile, merged by lse where a row has several."""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.kernels.torch_tiled.gather import Batch, batches
from farlight.kernels.torch_tiled.schedule import schedule_of
from farlight.plan.tables import Plan

__all__ = ["forward", "row_sums"]


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, dropout: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the planned pairs. float64 is computed in float64, everything else in float32."""
    out, peak, total = _attend(q, k, v, plan, scale, dropout, seed)
    # log 0 is the -inf of a row that sees nothing.
    return out.to(q.dtype), total.log() + peak


def row_sums(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> tuple[Tensor, Tensor]:
    """(peak, total) of each row's scores `(B, H, n_q)`, lse = peak + log total; (0, 0) for a row that sees nothing."""
    _, peak, total = _attend(q, k, v, plan, scale, 0.0, torch.zeros((), dtype=torch.int64))
    return peak, total


def _attend(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, dropout: float, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    schedule = schedule_of(plan, q.device)
    out = torch.zeros(q.shape[:-1] + v.shape[-1:], dtype=kind if schedule.merges else q.dtype, device=q.device)
    peak, total = (torch.zeros(q.shape[:-1], dtype=kind, device=q.device) for _ in range(2))
    for batch in batches(schedule, q.shape[1], k.shape[1], q.shape[3]):
        piece_out, piece_peak, piece_total = _tile(batch, q, k, v, plan.sizes.q_offset, kind, scale, dropout, seed)
        # Rows that see nothing here may have been served by another piece.
        if schedule.merges or bool((piece_total == 0).any()):
            piece_out, piece_peak, piece_total = _merged(batch, out, peak, total, piece_out, piece_peak, piece_total)
        batch.put_queries(out, piece_out)
        batch.put_queries(peak, piece_peak)
        batch.put_queries(total, piece_total)
    return out, peak, total


def _tile(
    batch: Batch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offset: int,
    kind: torch.dtype,
    scale: float,
    dropout: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(c, tiles, heads · count, D)`, and the largest score and the sum of weights of the batch's rows."""
    queries = batch.take_queries(q).to(kind) * scale
    scores, alone, points = score(batch, queries, k, kind)
    top = [part.amax(-1) for part in (scores, alone) if part is not None]
    peak = top[0] if len(top) == 1 else torch.maximum(*top)
    # A finite peak keeps rows that see nothing at exp(-inf) = 0 instead of NaN.
    peak = torch.where(peak == float("-inf"), 0.0, peak).unsqueeze(-1)
    total = torch.zeros_like(peak)
    for part in (scores, alone):
        if part is not None:
            total += part.sub_(peak).exp_().sum(-1, keepdim=True)
    out: Tensor | float = 0.0
    left = 1 - dropout or 1.0  # of dropout 1 no link is kept
    if scores is not None:
        if dropout:
            keys = batch.key_numbers(q.device)[:, None]
            scores *= batch.kept(seed, dropout, q_offset, keys, q.device).to(kind) / left
        out = scores @ batch.take_keys(v, kind)
    if alone is not None and points is not None:
        if dropout:
            alone *= batch.kept(seed, dropout, q_offset, points, q.device).to(kind) / left
        out = out + weigh(batch, alone, v, points, kind)
    assert isinstance(out, Tensor)
    return out / torch.where(total == 0, 1.0, total), peak.squeeze(-1), total.squeeze(-1)


def score(batch: Batch, queries: Tensor, k: Tensor, kind: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Scores of the runs, scores of the gathered keys, and those keys; -inf where a pair is not allowed."""
    scores = alone = keys = None
    if batch.group.width:
        scores = queries @ batch.take_keys(k, kind).transpose(-1, -2)
        batch.hide(scores, float("-inf"))
    found = batch.points()
    if found is not None:
        keys, real = found
        taken = take_points(batch, k, keys, kind)
        by_row = queries.unflatten(2, (-1, batch.group.count)).movedim(2, -1)  # (c, tiles, count, D, heads)
        alone = (taken @ by_row).movedim(-1, 2)  # (c, tiles, heads, count, m)
        alone = alone.masked_fill(~real[:, None], float("-inf")).flatten(2, 3)
    return scores, alone, keys


def take_points(batch: Batch, x: Tensor, keys: Tensor, kind: torch.dtype) -> Tensor:
    """`(c, tiles, count, m, D)`: the gathered keys or values of each row."""
    return batch.take_points(x, keys).to(kind)


def weigh(batch: Batch, weight: Tensor, v: Tensor, keys: Tensor, kind: torch.dtype) -> Tensor:
    """Σ weight · value over the gathered keys of each row: `(c, tiles, heads · count, D)`."""
    values = take_points(batch, v, keys, kind)
    by_row = weight.unflatten(2, (-1, batch.group.count)).movedim(2, 3)  # (c, tiles, count, heads, m)
    out: Tensor = (by_row @ values).movedim(3, 2).flatten(2, 3)
    return out


def _merged(
    batch: Batch, out: Tensor, peak: Tensor, total: Tensor, more_out: Tensor, more_peak: Tensor, more_total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A piece's result joined to what the rows have already. Not by lse: where scores are large it has too few digits."""
    old_out, old_peak, old_total = (
        batch.take_queries(out).to(more_out.dtype),
        batch.take_queries(peak),
        batch.take_queries(total),
    )
    both = torch.where(old_total == 0, more_peak, torch.where(more_total == 0, old_peak, torch.maximum(old_peak, more_peak)))
    old, more = (old_peak - both).exp() * old_total, (more_peak - both).exp() * more_total
    old, more = torch.where(old_total == 0, 0.0, old), torch.where(more_total == 0, 0.0, more)
    sums = old + more
    share = torch.where(sums == 0, 1.0, sums)
    return old_out * (old / share).unsqueeze(-1) + more_out * (more / share).unsqueeze(-1), both, sums
