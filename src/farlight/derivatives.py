"""Derivatives of the operators beyond the kernels' own: forward mode, second and higher orders, by sums over the plan's links.

The fused kernels give `attend`, `attend_scored` and their first gradients. Their derivatives are *link sums*
(`kernels/torch_tiled/link_sums.py`), computed by torch operations over the tiles of the pattern's plan, in memory linear in n,
for every backend: derivatives of the formula at the (out, lse) that the backend gave. With Z the factor of dropout,
P = exp(S - lse), Δ = Σ dO ∘ O - dlse, and e = exp(sink - lse), the share of a row's sink, 0 without sinks:

    lse' = Σ_j P S' + e sink';   O' = Σ_j P Z (S' v + v') - lse' O

for the tangents of the forward operators, and for those of the backward operators the link sum "gradients" differentiated once
more, and the gradient of a sink, -Σ e Δ. What depends on a row alone (Δ, lse' O, e) is written here in torch operations, so
that every result can be differentiated again. A call without score terms is one whose terms are all None.
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
from farlight.kernels.torch_tiled.backward import finite_lse
from farlight.kernels.torch_tiled.forward import acc_dtype
from farlight.kernels.torch_tiled.link_sums import Formula, link_sums
from farlight.kernels.torch_tiled.link_terms import Shape, widths
from farlight.patterns.expression import Sizes
from farlight.patterns.notation import parse
from farlight.plan import plan_for

__all__ = [
    "attend_tangents",
    "gradient_cotangents",
    "gradient_tangents",
    "scored_gradient_cotangents",
    "scored_gradient_tangents",
    "scored_tangents",
]

_Sums: TypeAlias = tuple[Tensor, Tensor, Tensor]
_Maybe: TypeAlias = Tensor | None


# ---- the operator -------------------------------------------------------------------------------------------------------
def _link_sums(
    rows: Tensor,
    keys: Tensor,
    table: Tensor,
    tables: Sequence[Tensor],
    seed: Tensor,
    pattern: str,
    kind: str,
    shape: Sequence[int],
    scale: float,
    q_offset: int,
    dropout: float,
    cap: float,
    first: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One kind of link sum over the pairs that the pattern allows."""
    sizes = Sizes(rows.shape[2], keys.shape[2], q_offset, rows.shape[0], rows.shape[1])
    plan = plan_for(parse(pattern, tuple(tables), limit=None), sizes, torch_tiled.SHAPE)
    formula = Formula(Shape(*shape), scale, dropout, seed, cap, first)
    # The tiles' functions are differentiated in here, whatever mode the operator was called in, and no graph leaves.
    with torch.inference_mode(False), forward_ad._set_fwd_grad_enabled(False):
        rows, keys, table = (x.clone() if x.is_inference() else x.detach() for x in (rows, keys, table))
        with torch.enable_grad():
            sums = link_sums(kind, rows, keys, table, plan, formula)
        return sums[0].detach(), sums[1].detach(), sums[2].detach()


def _link_sums_fake(
    rows: Tensor,
    keys: Tensor,
    table: Tensor,
    tables: Sequence[Tensor],
    seed: Tensor,
    pattern: str,
    kind: str,
    shape: Sequence[int],
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor]:
    n = widths(kind, Shape(*shape))
    sums = zip((rows, keys, table), (n.row_sums, n.key_sums, n.table_sums), strict=True)
    return tuple(x.new_empty((*x.shape[:3], columns)) for x, columns in sums)  # type: ignore[return-value]


# Under the older vmap an operator may take no list: tables and options wait here, under the number that is passed instead.
_waiting: dict[int, tuple[Sequence[Tensor], tuple[Any, ...]]] = {}
_numbers = itertools.count()


def _link_sums_each(rows: Tensor, keys: Tensor, table: Tensor, seed: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """`link_sums` with tables and options found under a number."""
    tables, options = _waiting[number]
    sums: _Sums = _operator(rows, keys, table, tables, seed, *options)
    return sums


def _sums(rows: Tensor, keys: Tensor, table: Tensor, tables: Sequence[Tensor], seed: Tensor, *options: Any) -> _Sums:
    """The operator, under the older vmap too; options: pattern, kind and the rest."""
    sums: _Sums
    if torch.compiler.is_compiling() or not is_batching_gradients():
        sums = _operator(rows, keys, table, tables, seed, *options)
        return sums
    number = next(_numbers)
    _waiting[number] = tables, options
    try:
        sums = _operator_each(rows, keys, table, seed, number)
    finally:
        del _waiting[number]
    return sums


def _sums_cotangents(grads: Sequence[Tensor], inputs: Sequence[Any], _: Sequence[Tensor]) -> _Sums:
    *operands, tables, seed, pattern, kind, shape, scale, q_offset, dropout, cap, first = inputs
    rows, keys, table = (torch.cat(pair, -1) for pair in zip(operands, grads, strict=True))
    return _sums(rows, keys, table, tables, seed, pattern, kind + "r", shape, scale, q_offset, dropout, cap, first)


def _sums_tangents(tangents: Sequence[Tensor | None], inputs: Sequence[Any], _: Sequence[Tensor]) -> _Sums:
    *operands, tables, seed, pattern, kind, shape, scale, q_offset, dropout, cap, first = inputs
    rows, keys, table = (torch.cat((x, _materialized(t, x)), -1) for x, t in zip(operands, tangents, strict=True))
    return _sums(rows, keys, table, tables, seed, pattern, kind + "f", shape, scale, q_offset, dropout, cap, first)


_operator = define("link_sums", _link_sums, _link_sums_fake)
_operator_each = forward_through("link_sums_each", _link_sums_each)
differentiate(_operator, 3, _sums_cotangents, _sums_tangents)
set_vmap(_operator, partial(batched, dropout_at=-3))


# ---- the derivatives of `attend` and `attend_backward` ------------------------------------------------------------------
_NO_TERMS = (None, None, None)
_NO_CAP = (0.0, 0)


def attend_tangents(tangents: Sequence[_Maybe], inputs: Sequence[Any], outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The tangents of (out, lse) from those of q, k and v; `inputs` are those of `attend`."""
    return scored_tangents((*tangents, *_NO_TERMS), (*inputs[:3], *_NO_TERMS, *inputs[3:], *_NO_CAP), outputs)


def gradient_cotangents(grads: Sequence[Tensor], inputs: Sequence[Any], _: Sequence[Tensor]) -> tuple[_Maybe, ...]:
    """The cotangents of dout, dlse, q, k, v, out and lse from those of dq, dk and dv; `inputs`: those of `attend_backward`."""
    found = scored_gradient_cotangents((*grads, *_NO_TERMS), (*inputs[:5], *_NO_TERMS, *inputs[5:], *_NO_CAP), ())
    return *found[:5], *found[8:]


def gradient_tangents(tangents: Sequence[_Maybe], inputs: Sequence[Any], _: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tangents of dq, dk and dv from those of dout, dlse, q, k, v, out and lse."""
    tangents = *tangents[:5], *_NO_TERMS, *tangents[5:]
    return scored_gradient_tangents(tangents, (*inputs[:5], *_NO_TERMS, *inputs[5:], *_NO_CAP), ())[:3]


# ---- the same under score terms -----------------------------------------------------------------------------------------
def scored_tangents(tangents: Sequence[_Maybe], inputs: Sequence[Any], outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The tangents of (out, lse) from those of q, k, v, distance, key_bias and sinks; `inputs` are those of `attend_scored`."""
    q, k, v, distance, key_bias, sinks, tables, seed, *settings = inputs
    out, lse = outputs
    tq, tk, tv, *of_terms = (_materialized(t, x) for t, x in zip(tangents, inputs[:6], strict=True))
    rows = _packed(q, finite_lse(lse), tq)
    keys = _packed(k, v, *_key_columns(key_bias, q, k), tk, tv, *_key_columns(of_terms[1], q, k))
    table = _table(q, distance, of_terms[0])
    sums, *_ = _sums(rows, keys, table, tables, seed, *_options("tangent.", inputs[:5], settings))
    tout, tlse = sums.split((v.shape[-1], 1), -1)
    if sinks is not None:
        tlse = tlse + (_sink_share(sinks, lse) * of_terms[2][:, None]).unsqueeze(-1)
    return (tout - tlse * out.to(tout.dtype)).to(out.dtype), tlse.squeeze(-1).to(lse.dtype)


def scored_gradient_cotangents(grads: Sequence[Any], inputs: Sequence[Any], _: Sequence[Tensor]) -> tuple[_Maybe, ...]:
    """The cotangents of the first ten `inputs` of `attend_scored_backward`, from those of its six outputs."""
    dout, dlse, q, k, v, distance, key_bias, sinks, out, lse, tables, seed, *settings = inputs
    delta = _delta(dout, out) - dlse
    gq, gk, gv, of_distance, of_bias, of_sinks = grads
    rows = _packed(q, finite_lse(lse), dout, delta, gq)
    of_bias = None if key_bias is None else of_bias
    keys = _packed(k, v, *_key_columns(key_bias, q, k), gk, gv, *_key_columns(of_bias, q, k))
    table = _table(q, distance, of_distance)
    sums = _sums(rows, keys, table, tables, seed, *_options("gradients.r", inputs[2:7], settings))
    d, d_v = q.shape[-1], v.shape[-1]
    of_q, of_lse, of_dout, of_delta = sums[0].split((d, 1, d_v, 1), -1)
    of_k, of_v, columns = sums[1].split((d, d_v, sums[1].shape[-1] - d - d_v), -1)
    of_lse, of_delta, grad_sinks = of_lse.squeeze(-1), of_delta.squeeze(-1), None
    if sinks is not None:
        share = _sink_share(sinks, lse) * of_sinks[:, None]
        of_lse, of_delta = of_lse + share * delta, of_delta - share
        grad_sinks = -(share * delta).sum((0, 2))
    of_dout = of_dout + of_delta.unsqueeze(-1) * out.to(of_delta.dtype)
    of_out = of_delta.unsqueeze(-1) * dout.to(of_delta.dtype)
    of_terms = _of_table(sums[2], distance), _of_key_columns(columns, key_bias), grad_sinks
    found = of_dout, -of_delta, of_q, of_k, of_v, *of_terms, of_out, of_lse
    return tuple(None if x is None else x.to(of.dtype) for x, of in zip(found, inputs[:10], strict=True))


def scored_gradient_tangents(tangents: Sequence[_Maybe], inputs: Sequence[Any], _: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tangents of the six outputs of `attend_scored_backward` from those of its first ten `inputs`."""
    dout, dlse, q, k, v, distance, key_bias, sinks, out, lse, tables, seed, *settings = inputs
    tdout, tdlse, tq, tk, tv, of_distance, of_bias, of_sinks, tout, tlse = (
        _materialized(t, x) for t, x in zip(tangents, inputs[:10], strict=True)
    )
    delta, tdelta = _delta(dout, out) - dlse, _delta(tdout, out) + _delta(dout, tout) - tdlse
    rows = _packed(q, finite_lse(lse), dout, delta, tq, tlse, tdout, tdelta)
    keys = _packed(k, v, *_key_columns(key_bias, q, k), tk, tv, *_key_columns(of_bias, q, k))
    table = _table(q, distance, of_distance)
    by_row, by_key, by_distance = _sums(rows, keys, table, tables, seed, *_options("gradients.f", inputs[2:7], settings))
    d, d_v = q.shape[-1], v.shape[-1]
    tdk, tdv, columns = by_key.split((d, d_v, by_key.shape[-1] - d - d_v), -1)
    of_terms = [_of_table(by_distance, distance), _of_key_columns(columns, key_bias), None]
    if sinks is not None:
        of_terms[2] = -(_sink_share(sinks, lse) * ((of_sinks[:, None] - tlse) * delta + tdelta)).sum((0, 2))
    empty = lse.new_empty(0)  # as the operator's output is
    return by_row.to(q.dtype), tdk.to(k.dtype), tdv.to(v.dtype), *(empty if x is None else x.to(lse.dtype) for x in of_terms)


def _options(kind: str, operands: Sequence[_Maybe], settings: Sequence[Any]) -> tuple[Any, ...]:
    """The options of `link_sums`; operands: q, k, v, distance, key_bias."""
    q, k, v, distance, key_bias = operands
    assert q is not None
    assert k is not None
    assert v is not None
    text, scale, q_offset, dropout, _, cap, first = settings
    heads = 0 if key_bias is None else q.shape[1] // k.shape[1]
    shape = q.shape[-1], v.shape[-1], heads, 0 if distance is None else 1
    return text, kind, shape, scale, q_offset, dropout, cap, first


def _packed(*parts: Tensor) -> Tensor:
    """The tensors side by side in the accumulation dtype; those without a last dimension as one column."""
    dims, dtype = parts[0].dim(), acc_dtype(parts[0])
    return torch.cat([(x if x.dim() == dims else x.unsqueeze(-1)).to(dtype) for x in parts], -1)


def _key_columns(bias: _Maybe, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """`(B, H_kv, n_k, heads per key head)` of a bias by key `(B|1, H|1, n_k)`; nothing of None."""
    if bias is None:
        return ()
    # `reshape` has a batching rule under the older vmap, `unflatten` and `flatten` have none.
    shape = q.shape[0], k.shape[1], q.shape[1] // k.shape[1], bias.shape[2]
    return (bias.expand(q.shape[0], q.shape[1], bias.shape[2]).reshape(shape).transpose(2, 3),)


def _of_key_columns(columns: Tensor, bias: _Maybe) -> _Maybe:
    """The inverse of `_key_columns`, summed to the shape of the bias."""
    if bias is None:
        return None
    batch, kv_heads, n_k, per_key = columns.shape
    whole = columns.transpose(2, 3).reshape(batch, kv_heads * per_key, n_k)
    shared = [dim for dim in (0, 1) if bias.shape[dim] == 1]
    return whole.sum(shared, keepdim=True) if shared else whole


def _table(q: Tensor, distance: _Maybe, beside: _Maybe) -> Tensor:
    """`(B, H, L, 2)`: the table `(H, L)` of biases by distance, and what belongs beside it; `(B, H, 1, 0)` without one."""
    batch, heads = q.shape[:2]
    if distance is None or beside is None:
        return q.new_empty((batch, heads, 1, 0), dtype=acc_dtype(q))
    return torch.stack((distance, beside.to(distance.dtype)), -1).expand(batch, -1, -1, -1)


def _of_table(sums: Tensor, distance: _Maybe) -> _Maybe:
    """The inverse of `_table`, of one column."""
    return None if distance is None else sums.squeeze(-1).sum(0)


def _sink_share(sinks: Tensor, lse: Tensor) -> Tensor:
    """e `(B, H, n_q)`."""
    return torch.exp(sinks[:, None] - lse)


def _delta(dout: Tensor, out: Tensor) -> Tensor:
    dtype = acc_dtype(dout)
    return (dout.to(dtype) * out.to(dtype)).sum(-1)


def _materialized(tangent: _Maybe, x: _Maybe) -> Any:
    """The tangent, zeros for one that is not there; None of None."""
    return torch.zeros_like(x) if tangent is None and x is not None else tangent
