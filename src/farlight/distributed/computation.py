"""Forward and backward pass of one rank: exchange, pieces, merge; and the autograd function around them.

Forward: what others need is sent; the local piece is computed while it travels; then the border piece on arrived keys and the
guest piece of arrived queries. Partial results of guests travel back and are merged by lse in rank order.

Backward: probabilities are recomputed from the lse of the whole row, so each piece gives its share of the gradients. Remote
pieces come first; their gradients travel while the local piece is computed. Sums are in float32 (float64 for float64), in rank
order: the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farlight.distributed.collectives import Channel
from farlight.distributed.parcels import Field, Returned, add_tokens, all_keys, give_back, put_tokens, ship, take
from farlight.distributed.piece_terms import PieceTerms, TermSums, piece_terms
from farlight.distributed.routes import ClassRoute, PieceProblem, Route
from farlight.kernels import registry
from farlight.kernels.backend import Backend, Call, Grads, Request, Saved, ScoringBackend
from farlight.merge import merge
from farlight.score.lowered import ScoreTerms

__all__ = ["Run", "SpreadAttention"]

# Elements of an output that are merged at a time: half a megabyte in float32.
_TILE = 1 << 17


@dataclass(frozen=True)
class Run:
    """One call: the route, the channel, and the options that every piece shares. terms: those of the whole problem."""

    route: Route
    channel: Channel
    scale: float
    dropout: float
    seed: Tensor
    backend: str
    needs_grad: bool
    terms: ScoreTerms | None = None

    def forward(self, piece: PieceProblem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(out, lse) of a piece."""
        executor, call, _ = self._prepared(piece, q, k, v)
        return executor.forward(call)

    def backward(
        self, piece: PieceProblem, q: Tensor, k: Tensor, v: Tensor, saved: Saved, dout: Tensor, dlse: Tensor, sums: TermSums
    ) -> Grads:
        """(dq, dk, dv) of a piece; adds the gradients of its terms to `sums`."""
        executor, call, terms = self._prepared(piece, q, k, v)
        if terms.terms is None:
            return executor.backward(call, saved, dout, dlse)
        scoring = cast(ScoringBackend, executor)
        grads, of_terms = scoring.score_backward(call._replace(wanted=sums.wanted), saved, dout, dlse)
        sums.add(terms, of_terms)
        return grads

    def _prepared(self, piece: PieceProblem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Backend, Call, PieceTerms]:
        """The backend of a piece, its call and its terms."""
        of_piece = piece_terms(self.terms, piece.places, self.dropout)
        terms = of_piece.terms
        request = Request(
            piece.pattern, piece.sizes, k.shape[1], q.shape[3], v.shape[3], q.dtype, q.device, self.needs_grad, self.dropout,
            True, frozenset() if terms is None else terms.names, of_piece.origin is not None,
        )  # fmt: skip
        executor = registry.plan_backend(request, self.backend)
        plan = registry.plan_of(executor, request)
        call = Call(q, k, v, plan, self.scale, self.dropout, self.seed, terms, origin=of_piece.origin)
        return executor, call, of_piece


def _total(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- forward ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Arrived:
    """Per class: keys and values `(R, m, D)` and query rows `(R, G, m, D)` of other ranks."""

    k: Tensor
    v: Tensor
    q: Tensor


def _forward(run: Run, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[_Arrived]]:
    """(out, lse) of the local queries, and what arrived."""
    route, total = run.route, _total(q.dtype)
    fields = [Field(False, k.shape[3], k.dtype), Field(False, v.shape[3], v.dtype), Field(True, q.shape[3], q.dtype)]
    receive = ship(route, run.channel, "keys, values and queries", route.forward, fields, (k, v, q))
    out, lse = run.forward(route.local, q, k, v)
    arrived = [_Arrived(*tensors) for tensors in receive()]
    fields = [Field(True, v.shape[3], q.dtype), Field(True, 0, total)]
    guests = [_guest_forward(run, c, x, k, v) for c, x in zip(route.classes, arrived, strict=True)]
    back = give_back(
        route, run.channel, "partial outputs", route.forward, fields, guests,
        total=total, fill=(0.0, -torch.inf), combine=_merged_units,
    )  # fmt: skip
    borders = [_border_forward(run, c, x, q) for c, x in zip(route.classes, arrived, strict=True)]
    for c, border, returned in zip(route.classes, borders, back(), strict=True):
        _merge_into(out, lse, c, _contributions(c, border, returned), route.problem.group)
    return out, lse, arrived


def _guest_forward(run: Run, c: ClassRoute, x: _Arrived, k: Tensor, v: Tensor) -> list[Tensor]:
    """[out, lse] of the queries of other ranks on the local keys."""
    if c.guest is None:
        empty = x.q.new_full(x.q.shape[:3], -torch.inf, dtype=_total(x.q.dtype))
        return [x.q.new_zeros((*x.q.shape[:3], v.shape[3])), empty]
    return list(run.forward(c.guest, x.q, all_keys(k, c), all_keys(v, c)))


def _border_forward(run: Run, c: ClassRoute, x: _Arrived, q: Tensor) -> tuple[Tensor, Tensor] | None:
    """(out, lse) of the local border rows on the arrived keys."""
    if c.border is None:
        return None
    rows = take(q, c, c.border_rows, run.route.problem.group)
    return run.forward(c.border, rows, x.k.unsqueeze(1), x.v.unsqueeze(1))


def _merged_units(sources: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Partial (out, lse) units of all ranks, `(u, G · D)` and `(u, G)`, merged in rank order."""
    pieces = [(out.unflatten(1, (lse.shape[1], -1)).to(lse.dtype), lse) for out, lse in sources]
    out, lse = merge(pieces)
    return [out.flatten(1), lse]


def _contributions(
    c: ClassRoute, border: tuple[Tensor, Tensor] | None, returned: Returned
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(local rows, out, lse) beside the local piece, in a fixed order: border, ranks, broadcast."""
    parts = [] if border is None else [(c.border_rows, *border)]
    parts += [(c.rows.send[rank], out, lse) for rank, (out, lse) in enumerate(returned.direct)]
    if returned.shared is not None:
        parts.append((c.rows.everyone, returned.shared[0], returned.shared[1]))
    return [part for part in parts if part[0].numel()]


def _merge_into(out: Tensor, lse: Tensor, c: ClassRoute, parts: list[tuple[Tensor, Tensor, Tensor]], group: int) -> None:
    """Merge partial results into rows of (out, lse), in place, by tiles of rows that stay in the cache."""
    if not parts:
        return
    rows = torch.cat([index for index, _, _ in parts]).unique()
    for tile in rows.split(max(1, _TILE // max(1, c.heads * group * out.shape[3]))):
        inside = []
        for index, part, part_lse in parts:
            first, last = torch.searchsorted(index, tile[[0, -1]] + torch.tensor([0, 1])).tolist()
            if first < last:
                inside.append((index[first:last], part[:, :, first:last], part_lse[:, :, first:last]))
        _merge_tile(out, lse, c, tile, inside, group)


def _merge_tile(
    out: Tensor, lse: Tensor, c: ClassRoute, rows: Tensor, parts: list[tuple[Tensor, Tensor, Tensor]], group: int
) -> None:
    pieces = [(take(out, c, rows, group), take(lse, c, rows, group))]
    for index, part, part_lse in parts:
        if index.numel() == rows.numel():
            pieces.append((part, part_lse))
            continue
        at = torch.searchsorted(rows, index).to(out.device)
        whole = part.new_zeros((*part.shape[:2], rows.numel(), part.shape[3]))
        whole_lse = part_lse.new_full((*part.shape[:2], rows.numel()), -torch.inf)
        pieces.append((whole.index_copy_(2, at, part), whole_lse.index_copy_(2, at, part_lse)))
    merged, merged_lse = merge(pieces)
    put_tokens(out, c, rows, merged, group)
    put_tokens(lse, c, rows, merged_lse, group)


# ---- backward -----------------------------------------------------------------------------------------------------------
def _backward(
    run: Run,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saved: Saved,
    arrived: list[_Arrived],
    dout: Tensor,
    dlse: Tensor,
    terms: TermSums,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of the local tensors; adds the gradients of the score's tables to `terms`."""
    route, total, group = run.route, _total(q.dtype), run.route.problem.group
    delta = _delta(route, saved, dout, dlse)
    fields = [Field(True, v.shape[3], q.dtype), Field(True, 0, total), Field(True, 0, total)]
    receive = ship(route, run.channel, "output gradients", route.backward, fields, (dout, saved.lse, delta))
    borders = [_border_backward(run, c, x, q, saved, dout, dlse, terms) for c, x in zip(route.classes, arrived, strict=True)]
    guests = [_guest_backward(run, c, x, k, v, terms, *g) for c, x, g in zip(route.classes, arrived, receive(), strict=True)]
    fields = [Field(False, k.shape[3], k.dtype), Field(False, v.shape[3], v.dtype), Field(True, q.shape[3], q.dtype)]
    results = [[border[1], border[2], guest[0]] for border, guest in zip(borders, guests, strict=True)]
    back = give_back(
        route, run.channel, "gradients", route.backward, fields, results,
        total=total, fill=(0.0, 0.0, 0.0), combine=lambda sources: _summed(sources, total),
    )  # fmt: skip
    sums = [x.to(total) for x in run.backward(route.local, q, k, v, saved, dout, dlse, terms)]
    for c, border, guest, returned in zip(route.classes, borders, guests, back(), strict=True):
        add_tokens(sums[0], c, c.border_rows, border[0].to(total), group)
        if c.guest is not None:
            local = torch.arange(k.shape[2])
            for x, part in zip(sums[1:], guest[1:], strict=True):
                add_tokens(x, c, local, part.squeeze(1).to(total), 0)
        for rank, (dk, dv, dq) in enumerate(returned.direct):
            _add_returned(sums, c, c.keys.send[rank], c.rows.send[rank], (dk, dv, dq), group)
        if returned.shared is not None:
            _add_returned(sums, c, c.keys.everyone, c.rows.everyone, returned.shared, group)
    return sums[0].to(q.dtype), sums[1].to(k.dtype), sums[2].to(v.dtype)


def _add_returned(sums: list[Tensor], c: ClassRoute, keys: Tensor, rows: Tensor, parts: Sequence[Tensor], group: int) -> None:
    dk, dv, dq = (x.to(sums[0].dtype) for x in parts)
    add_tokens(sums[1], c, keys, dk, 0)
    add_tokens(sums[2], c, keys, dv, 0)
    add_tokens(sums[0], c, rows, dq, group)


def _summed(sources: Sequence[Sequence[Tensor]], total: torch.dtype) -> list[Tensor]:
    """The sums of the tensors of all ranks, in rank order."""
    out = [x.to(total, copy=True) for x in sources[0]]
    for source in sources[1:]:
        for x, part in zip(out, source, strict=True):
            x += part
    return out


def _delta(route: Route, saved: Saved, dout: Tensor, dlse: Tensor) -> Tensor:
    """Σ dout ∘ out - dlse of the rows, `(B, H, n_q)`; zeros where no query travels, so that nobody reads it."""
    if not route.backward.direct.any() and not route.backward.chunk:
        return torch.zeros_like(saved.lse)
    return (dout.to(saved.lse.dtype) * saved.out.to(saved.lse.dtype)).sum(-1) - dlse.to(saved.lse.dtype)


def _border_backward(
    run: Run, c: ClassRoute, x: _Arrived, q: Tensor, saved: Saved, dout: Tensor, dlse: Tensor, terms: TermSums
) -> tuple[Tensor, Tensor, Tensor]:
    """dq of the border rows, dk and dv of the arrived keys."""
    group = run.route.problem.group
    rows = take(q, c, c.border_rows, group)
    if c.border is None:
        return rows, torch.zeros_like(x.k), torch.zeros_like(x.v)
    out, lse, dout, dlse = (take(y, c, c.border_rows, group) for y in (saved.out, saved.lse, dout, dlse))
    keys, values = x.k.unsqueeze(1), x.v.unsqueeze(1)
    dq, dk, dv = run.backward(c.border, rows, keys, values, Saved(out, lse), dout, dlse, terms)
    return dq, dk.squeeze(1), dv.squeeze(1)


def _guest_backward(
    run: Run, c: ClassRoute, x: _Arrived, k: Tensor, v: Tensor, terms: TermSums, dout: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq of the guests, dk and dv `(R, 1, n, D)` of the local keys. Only delta of a guest is known: it is handed over as -dlse
    of an output of zeros, which gives the backend the same Δ.
    """
    keys, values = all_keys(k, c), all_keys(v, c)
    if c.guest is None:
        return torch.zeros_like(x.q), keys, values
    return run.backward(c.guest, x.q, keys, values, Saved(torch.zeros_like(dout), lse), dout, -delta, terms)


class SpreadAttention(torch.autograd.Function):
    """Attention over ranks as one differentiable operation: (q, k, v, biases by distance, biases by key, run) → (out, lse)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, distance: Tensor | None, key_bias: Tensor | None, run: Run
    ) -> tuple[Tensor, Tensor]:
        if run.terms is not None:
            run = replace(run, terms=replace(run.terms, distance=distance, key_bias=key_bias))
        out, lse, arrived = _forward(run, q, k, v)
        if run.needs_grad:
            ctx.run = replace(run, terms=None)
            ctx.terms = run.terms and replace(run.terms, distance=None, key_bias=None)
            tensors = (x for a in arrived for x in (a.k, a.v, a.q))
            ctx.save_for_backward(q, k, v, out, lse, distance, key_bias, *tensors)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, distance, key_bias, *rest = ctx.saved_tensors
        terms = ctx.terms and replace(ctx.terms, distance=distance, key_bias=key_bias)
        arrived = [_Arrived(*rest[first : first + 3]) for first in range(0, len(rest), 3)]
        sums = TermSums(terms, (*ctx.needs_input_grad[3:5], False))
        run = replace(ctx.run, terms=terms)
        grads = _backward(run, q, k, v, Saved(out, lse), arrived, dout, dlse, sums)
        return *grads, sums.distance, sums.key_bias, None
