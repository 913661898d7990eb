"""The backward pass by tiles: probabilities are computed again from the lse, or where that is large, from its two terms.

    P = exp(S - lse);   dV = Pᵀ dO;   dP = dO Vᵀ;   dS = P ∘ (dP - Δ);   dQ = scale · dS K;   dK = scale · dSᵀ Q
    Δ = Σ dO ∘ O - dlse

With dropout, P in dV and dP carry the kept links divided by 1 - p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.kernels.torch_tiled.forward import row_sums, score, take_points
from farlight.kernels.torch_tiled.gather import Batch, batches
from farlight.kernels.torch_tiled.schedule import schedule_of
from farlight.plan.tables import Plan

__all__ = ["backward"]

_ROWS = 1024
# The lse beyond which probabilities computed from it are off by more than 2^-14, in float64 by more than 2^-33.
_LARGE = {torch.float32: 2.0**10, torch.float64: 2.0**20}


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    *,
    scale: float,
    dropout: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), summed in float32 (float64 for float64 inputs)."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    schedule = schedule_of(plan, q.device)
    # Some rows at a time: the product of all would be one more tensor of the size of out.
    some = zip(dout.split(_ROWS, 2), out.split(_ROWS, 2), strict=True)
    delta = torch.cat([(d.to(kind) * o.to(kind)).sum(-1) for d, o in some], 2) - dlse.to(kind)
    peak, rest = _exact_lse(q, k, v, lse, plan, scale, kind)
    dq = torch.zeros(q.shape, dtype=kind, device=q.device)
    dk = torch.zeros(k.shape, dtype=kind, device=q.device)
    dv = torch.zeros(v.shape, dtype=kind, device=q.device)
    for batch in batches(schedule, q.shape[1], k.shape[1], q.shape[3]):
        queries = batch.take_queries(q).to(kind) * scale
        row_rest = batch.take_queries(rest).unsqueeze(-1)
        row_peak = None if peak is None else batch.take_queries(peak).unsqueeze(-1)
        row_delta = batch.take_queries(delta).unsqueeze(-1)
        row_dout = batch.take_queries(dout).to(kind)
        scores, alone, points = score(batch, queries, k, kind)
        kept = _Kept(batch, seed, dropout, plan.sizes.q_offset, q.device)
        if scores is not None:
            p = (scores if row_peak is None else scores.sub_(row_peak)).sub_(row_rest).exp_()
            dp = row_dout @ batch.take_keys(v, kind).transpose(-1, -2)
            keep = kept.of(batch.key_numbers(q.device)[:, None], kind) if dropout else None
            if keep is not None:
                dp *= keep
            ds = dp.sub_(row_delta).mul_(p)
            if keep is not None:
                p = p.mul_(keep)
            batch.add_keys(dv, p.transpose(-1, -2) @ row_dout)
            batch.add_keys(dk, ds.transpose(-1, -2) @ queries)
            batch.put_queries(dq, (ds @ batch.take_keys(k, kind)) * scale, add=True)
        if alone is not None and points is not None:
            alone = alone if row_peak is None else alone - row_peak
            _points(batch, alone, points, queries, row_rest, row_delta, row_dout, k, v, dq, dk, dv, kept, scale)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _exact_lse(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, plan: Plan, scale: float, kind: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """The lse as two terms: a peak to subtract first, and the rest. None: the lse has digits enough, it is the rest."""
    # Rows that see nothing have lse -inf and only scores of -inf: exp(-inf - 0) is the 0 wanted.
    lse = torch.where(lse == float("-inf"), 0.0, lse).to(kind)
    if not bool((lse.abs() > _LARGE[kind]).any()):
        return None, lse
    peak, total = row_sums(q, k, v, plan, scale=scale)
    rest = torch.where(total == 0, 1.0, total).log()
    apart = lse - (peak + rest)
    # Differences within the rounding of the lse say nothing.
    return peak, torch.where(apart.abs() <= 8 * torch.finfo(kind).eps * lse.abs(), rest, rest + apart)


class _Kept:
    """Dropout's factor for the links of one batch."""

    def __init__(self, batch: Batch, seed: Tensor, dropout: float, q_offset: int, device: torch.device) -> None:
        self.batch, self.seed, self.dropout, self.q_offset, self.device = batch, seed, dropout, q_offset, device

    def of(self, keys: Tensor, kind: torch.dtype) -> Tensor:
        keep = self.batch.kept(self.seed, self.dropout, self.q_offset, keys, self.device)
        return keep.to(kind) / (1 - self.dropout or 1.0)  # of dropout 1 no link is kept


def _points(
    batch: Batch,
    alone: Tensor,
    points: Tensor,
    queries: Tensor,
    row_rest: Tensor,
    row_delta: Tensor,
    row_dout: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    kept: _Kept,
    scale: float,
) -> None:
    """Gradients of the gathered links. Sums over the query heads of a key head happen in the products."""
    count, kind = batch.group.count, queries.dtype
    p = (alone - row_rest).exp()
    by_row = lambda x: x.unflatten(2, (-1, count)).movedim(2, 3)  # noqa: E731 - (c, tiles, count, heads, …)
    values, keys = take_points(batch, v, points, kind), take_points(batch, k, points, kind)
    dp = (by_row(row_dout) @ values.transpose(-1, -2)).movedim(3, 2).flatten(2, 3)
    if kept.dropout:
        keep = kept.of(points, kind)
        dp = dp * keep
        ds = p * (dp - row_delta)
        p = p * keep
    else:
        ds = p * (dp - row_delta)
    batch.put_queries(dq, ((by_row(ds) @ keys).movedim(3, 2).flatten(2, 3)) * scale, add=True)
    flat = points.reshape(-1)
    for target, weight, rows in ((dv, p, row_dout), (dk, ds, queries)):
        value = by_row(weight).transpose(-1, -2) @ by_row(rows)  # (c, tiles, count, m, D)
        # Two rows may have drawn one key: the sums must be accumulated.
        batch.add_points(target, flat, value.flatten(1, 3))
