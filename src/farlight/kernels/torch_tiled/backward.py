"""Backward pass of the torch backend: probabilities are recomputed from the lse, tile by tile.

    P = exp(S - lse);   dV = Pᵀ dO;   dP = dO Vᵀ;   dS = P ∘ (dP - Δ);   dQ = scale · dS K;   dK = scale · dSᵀ Q
    Δ = Σ dO ∘ O - dlse

With dropout, P in dV and dP carry the factor 1 / (1 - p) of kept links, else 0. For an lse too large to resolve
probabilities, the row maximum and the sum are recomputed and subtracted one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.kernels.backend import Origin
from farlight.kernels.torch_tiled.forward import acc_dtype, row_max_and_sum, tile_scores
from farlight.kernels.torch_tiled.gather import TileBatch, tile_batches
from farlight.kernels.torch_tiled.schedule import schedule_of
from farlight.kernels.torch_tiled.tile_terms import TileTerms
from farlight.plan.tables import Plan

__all__ = ["backward", "finite_lse", "is_large", "log_of_sum"]

# Rows of the element-wise product in Δ at a time: the whole product would be one more tensor of the size of out.
_DELTA_ROWS = 1024
# The lse beyond which probabilities computed from it are off by more than 2^-14, in float64 by more than 2^-33.
_LARGE_LSE = {torch.float32: 2.0**10, torch.float64: 2.0**20}


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
    terms: TileTerms | None = None,
    origin: Origin | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the inputs' dtypes, accumulated in float32 (float64 for float64 inputs); `terms` sums its own."""
    dtype = acc_dtype(q)
    parts = zip(dout.split(_DELTA_ROWS, 2), out.split(_DELTA_ROWS, 2), strict=True)
    delta = torch.cat([(d.to(dtype) * o.to(dtype)).sum(-1) for d, o in parts], 2) - dlse.to(dtype)
    row_max, log_sum = _split_lse(q, k, v, lse, plan, scale, dtype, terms)
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (q, k, v))
    for batch in tile_batches(schedule_of(plan, q.device), q.shape[1], k.shape[1], q.shape[3]):
        queries = batch.take_queries(q).to(dtype) * scale
        scores, point_scores, point_keys, run_slope, point_slope = tile_scores(batch, queries, k, terms)
        rows = batch.take_queries(dout).to(dtype), batch.take_queries(delta).unsqueeze(-1)
        tile = _Tile(batch, queries, *rows, terms)
        shifts = [batch.take_queries(x).unsqueeze(-1) for x in (row_max, log_sum) if x is not None]
        for part in (scores, point_scores):
            if part is not None:
                for shift in shifts:
                    part.sub_(shift)
                part.exp_()
        if scores is not None:
            factor = None
            if dropout:
                keys = batch.key_indices(q.device)[:, None]
                factor = batch.dropout_factor(seed, dropout, plan.sizes.q_offset, keys, dtype, origin)
            tile.add_run_gradients(scores, run_slope, k, v, dq, dk, dv, factor, scale)
        if point_scores is not None and point_keys is not None:
            factor = None
            if dropout:
                factor = batch.dropout_factor(seed, dropout, plan.sizes.q_offset, point_keys, dtype, origin)
            tile.add_point_gradients(point_scores, point_slope, point_keys, k, v, dq, dk, dv, factor, scale)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _split_lse(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, plan: Plan, scale: float, dtype: torch.dtype, terms: TileTerms | None
) -> tuple[Tensor | None, Tensor]:
    """The lse as (row maximum, log of the sum), to be subtracted in this order; (None, lse) where the lse is precise enough."""
    lse = finite_lse(lse).to(dtype)
    if not is_large(lse):
        return None, lse
    row_max, row_sum = row_max_and_sum(q, k, v, plan, scale=scale, terms=terms)
    return row_max, log_of_sum(lse, row_max, row_sum)


def finite_lse(lse: Tensor) -> Tensor:
    """The lse, 0 for empty rows: theirs is -inf, and with scores of -inf only, exp(-inf - 0) is the probability 0."""
    return torch.where(lse == float("-inf"), 0.0, lse)


def is_large(lse: Tensor) -> bool:
    """Whether an lse is too large to resolve probabilities."""
    return bool((lse.abs() > _LARGE_LSE[lse.dtype]).any())


def log_of_sum(lse: Tensor, row_max: Tensor, row_sum: Tensor) -> Tensor:
    """What is to be subtracted from the scores after row_max; row_sum = Σ exp(S - row_max)."""
    log_sum = torch.where(row_sum == 0, 1.0, row_sum).log()
    # The given lse decides: where it differs from the recomputed one by more than rounding (sinks), the difference is kept.
    difference = lse - (row_max + log_sum)
    is_rounding = difference.abs() <= 8 * torch.finfo(lse.dtype).eps * lse.abs()
    return torch.where(is_rounding, log_sum, log_sum + difference)


@dataclass(frozen=True)
class _Tile:
    """Row tensors of one batch of tiles: scaled queries and dout `(c, tiles, rows, D)`, delta `(c, tiles, rows, 1)`."""

    batch: TileBatch
    queries: Tensor
    dout: Tensor
    delta: Tensor
    terms: TileTerms | None

    def _grads(self, p: Tensor, dp: Tensor, factor: Tensor | None, slope: Tensor | None, keys: Tensor) -> tuple[Tensor, Tensor]:
        """(P with dropout, the gradient of scale · q kᵀ); adds those of the terms at `keys` `(tiles, 1 or count, m)`."""
        ds = (dp if factor is None else dp.mul_(factor)).sub_(self.delta).mul_(p)
        if self.terms is not None:
            self.terms.add_gradients(self.batch, ds, keys)
        if slope is not None:
            ds.mul_(slope)
        return p if factor is None else p.mul_(factor), ds

    def add_run_gradients(
        self,
        p: Tensor,
        slope: Tensor | None,
        k: Tensor,
        v: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        factor: Tensor | None,
        scale: float,
    ) -> None:
        """Accumulate the gradients of the runs; p `(c, tiles, rows, width)`."""
        batch = self.batch
        dp = self.dout @ batch.take_keys(v, p.dtype).transpose(-1, -2)
        p, ds = self._grads(p, dp, factor, slope, batch.key_indices(p.device)[:, None])
        batch.add_keys(dv, p.transpose(-1, -2) @ self.dout)
        batch.add_keys(dk, ds.transpose(-1, -2) @ self.queries)
        batch.put_queries(dq, (ds @ batch.take_keys(k, p.dtype)) * scale, add=True)

    def add_point_gradients(
        self,
        p: Tensor,
        slope: Tensor | None,
        point_keys: Tensor,
        k: Tensor,
        v: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        factor: Tensor | None,
        scale: float,
    ) -> None:
        """Accumulate the gradients of gathered keys; p `(c, tiles, rows, m)`, point_keys `(tiles, count, m)`.

        The products of a row run over the query heads of its key head, which sums dk and dv over them.
        """
        batch, count = self.batch, self.batch.group.count

        def by_row(x: Tensor) -> Tensor:
            """`(c, tiles, count, heads, …)` of `(c, tiles, heads · count, …)`."""
            rows: Tensor = x.unflatten(2, (-1, count)).movedim(2, 3)
            return rows

        keys, values = (batch.take_points(x, point_keys, p.dtype) for x in (k, v))
        dp = (by_row(self.dout) @ values.transpose(-1, -2)).movedim(3, 2).flatten(2, 3)
        p, ds = self._grads(p, dp, factor, slope, point_keys)
        batch.put_queries(dq, (by_row(ds) @ keys).movedim(3, 2).flatten(2, 3) * scale, add=True)
        index = point_keys.reshape(-1)
        for target, weight, rows in ((dv, p, self.dout), (dk, ds, self.queries)):
            value = by_row(weight).transpose(-1, -2) @ by_row(rows)  # (c, tiles, count, m, D)
            batch.add_points(target, index, value.flatten(1, 3))
