"""Derivatives of the operators beyond the kernels' own: forward mode, second and higher orders, by sums over the plan's links.

The fused kernels give `attend` and its first gradients. Their derivatives are *link sums* (`kernels/torch_tiled/link_sums.py`),
computed by torch operations over the tiles of the pattern's plan, in memory linear in n, for every backend: derivatives of the
formula at the (out, lse) that the backend gave. With Z the factor of dropout, P = exp(S - lse), Δ = Σ dO ∘ O - dlse:

    lse' = Σ_j P S';   O' = Σ_j P Z (S' v + v') - lse' O

for the tangents of `attend`, and for those of `attend_backward` the link sum "gradients" differentiated once more. What depends
on a row alone (Δ, lse' O) is written here in torch operations, so that every result can be differentiated again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from farlight.batching import batched
from farlight.dispatcher import define, differentiate, forward_through, is_batching_gradients, set_vmap
from farlight.kernels import torch_tiled
from farlight.kernels.torch_tiled.forward import acc_dtype
from farlight.kernels.torch_tiled.link_sums import link_sums, widths
from farlight.patterns.expression import Sizes
from farlight.patterns.notation import parse
from farlight.plan import plan_for

__all__ = ["attend_tangents", "gradient_cotangents", "gradient_tangents"]

Settings: TypeAlias = tuple[str, float, int, float, str]  # pattern text, scale, q_offset, dropout, backend


# ---- the operator -------------------------------------------------------------------------------------------------------
def _link_sums(
    rows: Tensor,
    keys: Tensor,
    tables: Sequence[Tensor],
    seed: Tensor,
    pattern: str,
    kind: str,
    head_dim: int,
    value_dim: int,
    scale: float,
    q_offset: int,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """One kind of link sum over the pairs that the pattern allows."""
    sizes = Sizes(rows.shape[2], keys.shape[2], q_offset, rows.shape[0], rows.shape[1])
    plan = plan_for(parse(pattern, tuple(tables), limit=None), sizes, torch_tiled.SHAPE)
    # The tiles' functions are differentiated in here, whatever mode the operator was called in, and no graph leaves.
    with torch.inference_mode(False), forward_ad._set_fwd_grad_enabled(False):
        rows, keys = (x.clone() if x.is_inference() else x.detach() for x in (rows, keys))
        with torch.enable_grad():
            sums = link_sums(
                kind, rows, keys, plan, head_dim=head_dim, value_dim=value_dim, scale=scale, dropout=dropout, seed=seed
            )
        return sums[0].detach(), sums[1].detach()


def _link_sums_fake(
    rows: Tensor,
    keys: Tensor,
    tables: Sequence[Tensor],
    seed: Tensor,
    pattern: str,
    kind: str,
    head_dim: int,
    value_dim: int,
    *rest: object,
) -> tuple[Tensor, Tensor]:
    n = widths(kind, head_dim, value_dim)
    return rows.new_empty((*rows.shape[:3], n.row_sums)), keys.new_empty((*keys.shape[:3], n.key_sums))


# Under the older vmap an operator may take no list: tables and options wait here, under the number that is passed instead.
_waiting: dict[int, tuple[Sequence[Tensor], tuple[Any, ...]]] = {}
_numbers = itertools.count()


def _link_sums_each(rows: Tensor, keys: Tensor, seed: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """`link_sums` with tables and options found under a number."""
    tables, options = _waiting[number]
    sums: tuple[Tensor, Tensor] = _operator(rows, keys, tables, seed, *options)
    return sums


def _sums(
    rows: Tensor, keys: Tensor, tables: Sequence[Tensor], seed: Tensor, pattern: str, kind: str, *options: Any
) -> tuple[Tensor, Tensor]:
    """The operator, under the older vmap too."""
    sums: tuple[Tensor, Tensor]
    if torch.compiler.is_compiling() or not is_batching_gradients():
        sums = _operator(rows, keys, tables, seed, pattern, kind, *options)
        return sums
    number = next(_numbers)
    _waiting[number] = tables, (pattern, kind, *options)
    try:
        sums = _operator_each(rows, keys, seed, number)
    finally:
        del _waiting[number]
    return sums


def _sums_cotangents(grads: Sequence[Tensor], inputs: Sequence[Any], _: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    rows, keys, tables, seed, pattern, kind, *options = inputs
    return _sums(torch.cat((rows, grads[0]), -1), torch.cat((keys, grads[1]), -1), tables, seed, pattern, kind + "r", *options)


def _sums_tangents(tangents: Sequence[Tensor | None], inputs: Sequence[Any], _: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    rows, keys, tables, seed, pattern, kind, *options = inputs
    trows, tkeys = (_materialized(t, x) for t, x in zip(tangents, (rows, keys), strict=True))
    return _sums(torch.cat((rows, trows), -1), torch.cat((keys, tkeys), -1), tables, seed, pattern, kind + "f", *options)


_operator = define("link_sums", _link_sums, _link_sums_fake)
_operator_each = forward_through("link_sums_each", _link_sums_each)
differentiate(_operator, 2, _sums_cotangents, _sums_tangents)
set_vmap(_operator, partial(batched, dropout_at=-1))


# ---- the derivatives of `attend` and `attend_backward` ------------------------------------------------------------------
def attend_tangents(
    tangents: Sequence[Tensor | None], inputs: Sequence[Any], outputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The tangents of (out, lse) from those of q, k and v; `inputs` are those of `attend`."""
    q, k, v, tables, seed, *settings = inputs
    out, lse = outputs
    tq, tk, tv = (_materialized(t, x) for t, x in zip(tangents, (q, k, v), strict=True))
    rows, keys = _packed(q, _finite(lse), tq), _packed(k, v, tk, tv)
    sums, _ = _sums(rows, keys, tables, seed, *_options("tangent.", q, v, settings))
    tout, tlse = sums.split((v.shape[-1], 1), -1)
    return (tout - tlse * out.to(tout.dtype)).to(out.dtype), tlse.squeeze(-1).to(lse.dtype)


def gradient_cotangents(grads: Sequence[Tensor], inputs: Sequence[Any], _: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The cotangents of dout, dlse, q, k, v, out and lse from those of dq, dk and dv; `inputs`: those of `attend_backward`."""
    dout, dlse, q, k, v, out, lse, tables, seed, *settings = inputs
    rows, keys = _packed(q, _finite(lse), dout, _delta(dout, out) - dlse), _packed(k, v)
    rows, keys = torch.cat((rows, grads[0].to(rows.dtype)), -1), torch.cat((keys, *(x.to(keys.dtype) for x in grads[1:])), -1)
    by_row, by_key = _sums(rows, keys, tables, seed, *_options("gradients.r", q, v, settings))
    d, d_v = q.shape[-1], v.shape[-1]
    of_q, of_lse, of_dout, of_delta = by_row.split((d, 1, d_v, 1), -1)
    of_k, of_v = by_key.split((d, d_v), -1)
    of_dout = of_dout + of_delta * out.to(of_delta.dtype)
    of_out, of_delta = of_delta * dout.to(of_delta.dtype), of_delta.squeeze(-1)
    found = (of_dout, -of_delta, of_q, of_k, of_v, of_out, of_lse.squeeze(-1))
    return tuple(x.to(of.dtype) for x, of in zip(found, (dout, dlse, q, k, v, out, lse), strict=True))


def gradient_tangents(
    tangents: Sequence[Tensor | None], inputs: Sequence[Any], _: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The tangents of dq, dk and dv from those of dout, dlse, q, k, v, out and lse."""
    dout, dlse, q, k, v, out, lse, tables, seed, *settings = inputs
    tdout, tdlse, tq, tk, tv, tout, tlse = (_materialized(t, x) for t, x in zip(tangents, inputs[:7], strict=True))
    tdelta = _delta(tdout, out) + _delta(dout, tout) - tdlse
    rows = _packed(q, _finite(lse), dout, _delta(dout, out) - dlse, tq, tlse, tdout, tdelta)
    by_row, by_key = _sums(rows, _packed(k, v, tk, tv), tables, seed, *_options("gradients.f", q, v, settings))
    tdk, tdv = by_key.split((q.shape[-1], v.shape[-1]), -1)
    return by_row.to(q.dtype), tdk.to(k.dtype), tdv.to(v.dtype)


def _options(kind: str, q: Tensor, v: Tensor, settings: Sequence[Any]) -> tuple[Any, ...]:
    text, scale, q_offset, dropout, _ = settings
    return text, kind, q.shape[-1], v.shape[-1], scale, q_offset, dropout


def _packed(*parts: Tensor) -> Tensor:
    """The tensors side by side in the accumulation dtype; those without a last dimension as one column."""
    dims, dtype = parts[0].dim(), acc_dtype(parts[0])
    return torch.cat([(x if x.dim() == dims else x.unsqueeze(-1)).to(dtype) for x in parts], -1)


def _finite(lse: Tensor) -> Tensor:
    # A row that sees nothing has no links: its lse is read by none.
    return torch.where(lse == float("-inf"), 0.0, lse)


def _delta(dout: Tensor, out: Tensor) -> Tensor:
    dtype = acc_dtype(dout)
    return (dout.to(dtype) * out.to(dtype)).sum(-1)


def _materialized(tangent: Tensor | None, x: Tensor) -> Tensor:
    return torch.zeros_like(x) if tangent is None else tangent
