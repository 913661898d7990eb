"""`fl.distributed.attention`: check the arguments, agree on them, compute this rank's part."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from farlight import ops
from farlight.distributed.agreement import agree, agree_on_seed, layout_of_lengths
from farlight.distributed.collectives import Channel
from farlight.distributed.communication import problem_of
from farlight.distributed.computation import Run, SpreadAttention
from farlight.distributed.dtensors import local_operands, spread_result
from farlight.distributed.exchange import Problem
from farlight.distributed.layout import Layout
from farlight.distributed.routers import choose_over_ranks, text_of
from farlight.distributed.routes import route_of
from farlight.distributed.traffic import TravelWidths
from farlight.errors import ArgumentError, FarlightError, UnsupportedError, refuse_tracing
from farlight.inputs import autocast_inputs, check_tensors, read_dropout, read_offset, read_scale, read_seed, without_autocast
from farlight.kernels import registry
from farlight.kernels.backend import Request
from farlight.patterns import full
from farlight.patterns.chooser import Chooser
from farlight.patterns.expression import Pattern, Sizes
from farlight.routing.base import Router
from farlight.score.lowered import ScoreTerms, lower
from farlight.score.terms import NAMES, Score

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["attention"]

# What the ranks of a group have agreed on already, by group.
_agreed: weakref.WeakKeyDictionary[Any, set[int]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Request:
    """The arguments of a call beside its tensors and ranks."""

    pattern: Pattern | Chooser
    layout: Layout | None
    q_layout: Layout | None
    scale: float | None
    q_offset: int | None
    dropout: float
    seed: int | Tensor | None
    backend: str
    move: str
    score: Score | None = None

    def fields(self, q: Tensor, k: Tensor) -> dict[str, object]:
        """What the ranks must have in common, by name; the layouts are agreed by now."""
        return {
            "pattern": self.pattern.key if isinstance(self.pattern, Pattern) else text_of(self.pattern),
            "layout of the keys": self.layout,
            "layout of the queries": self.q_layout,
            "batch, heads and head_dim": (q.shape[:2], k.shape[1:2], q.shape[-1:]),
            "dtype": q.dtype,
            "scale": self.scale,
            "q_offset": self.q_offset,
            "dropout": self.dropout,
            "choice of what moves": self.move,
            "score": _shape_of_score(self.score),
        }


class _CheckedCall(NamedTuple):
    """What a rank knows of a call before the first exchange."""

    problem: Problem
    widths: TravelWidths
    scale: float
    terms: ScoreTerms | None


def _shape_of_score(score: object) -> str:
    """The terms of a score by name, numbers and shapes of tensors; their values may be anything."""
    if not isinstance(score, Score):
        return repr(score)
    fields = [(NAMES[type(term)], *vars(term).values()) for term in score.terms]
    return repr([[tuple(x.shape) if isinstance(x, Tensor) else x for x in values] for values in fields])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Chooser,
    *,
    mesh: DeviceMesh | None = None,
    group: ProcessGroup | None = None,
    layout: Layout | None = None,
    q_layout: Layout | None = None,
    scale: float | None = None,
    q_offset: int | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    move: str = "cheapest",
    sinks: Tensor | None = None,
    score: Score | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fl.attention` of a sequence that is spread over the ranks of a process group; exact, differentiable. Collective.

    Every rank passes its own tokens and gets the output of its own queries. The pattern is that of the whole sequence,
    positions are absolute. Every rank derives from it which keys or queries travel, and only these do: windows move the keys at
    the borders of the shards, global tokens their queries, which bring back partial results that are merged exactly. Gradients
    travel back the same way, summed in float32 in rank order: the same bits in every run.

    Args:
        q: `(B, H, n_q_local, D)`; k, v: `(B, H_kv, n_k_local, D)`, H a multiple of H_kv; a shard may be empty. Or DTensors
            `Shard(2)` on a mesh of one dimension; the output is one then.
        pattern: as for `fl.attention`, made for the whole sequence (padding, documents, per-head patterns included); or a
            router, `KMeans`, `LSH` or `TopBlocks`, alone or joined with others and with patterns: it chooses the links that it
            would choose in one process.
        mesh, group: the ranks: a `DeviceMesh` of one dimension, or a process group; neither: the default group. gloo or NCCL.
        layout: who owns which keys; None: contiguous shards in rank order, whose lengths are gathered in each call.
        q_layout: who owns which query rows, where there are others than keys; None: `layout`, or by the local lengths.
        scale, q_offset, dropout, seed, return_lse: as for `fl.attention`. `seed=None` with dropout takes the seed of the first
            rank's default generator. Dropout and random keys are functions of absolute positions: the same for every layout.
        backend: "auto" or a backend that executes plans; one that is named never falls back.
        move: "cheapest", keys or queries, whichever are fewer bytes; or "keys", so that every rank computes the pairs of its
            own queries: more bytes, but balanced where dense rows dominate, as in plain causal attention.
        sinks: `(H,)`, as for `fl.attention`; equal on all ranks. Its gradient is that of the local rows.
        score: terms on the scores, as for `fl.attention`, for the whole sequence (`key_bias` has all n_k keys); equal on all
            ranks. Distances are those of absolute positions. The gradient of a table is that of the pairs that this rank
            computes: sum it over the ranks, as the gradients of all weights.

    Returns:
        out `(B, H, n_q_local, D)`; with `return_lse` also lse `(B, H, n_q_local)`.

    Raises ArgumentError on all ranks where they ask for different attentions, PatternError, UnsupportedError, DistributedError
    where a rank is lost or does not answer within the group's time-out.
    """
    refuse_tracing("fl.distributed.attention")
    if dist.is_available() and any(type(x).__name__ == "DTensor" for x in (q, k, v)):
        local, mesh = local_operands(q, k, v, mesh, group)
        result = attention(
            *local, pattern, mesh=mesh, layout=layout, q_layout=q_layout, scale=scale, q_offset=q_offset,
            dropout=dropout, seed=seed, return_lse=return_lse, backend=backend, move=move, sinks=sinks, score=score,
        )  # fmt: skip
        spread: Tensor | tuple[Tensor, Tensor] = spread_result(result, q, mesh)
        return spread
    channel = Channel(_group(mesh, group))
    request = _Request(pattern, layout, q_layout, scale, q_offset, dropout, seed, backend, move, score)
    if isinstance(q, Tensor) and not q.is_meta and torch.is_autocast_enabled(q.device.type):
        q, k, v = autocast_inputs(q, k, v)
        with without_autocast(q):
            out, lse = _attend(channel, q, k, v, request)
    else:
        out, lse = _attend(channel, q, k, v, request)
    if sinks is not None:
        out, lse = _with_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) with one more key of score `sinks[h]` and value 0 in each row: out · σ(lse - sinks)."""
    if sinks.shape != out.shape[1:2]:
        raise ArgumentError(f"sinks have shape {tuple(sinks.shape)}; pass one logit for each of the {out.shape[1]} heads.")
    logits = sinks.to(lse.dtype).view(1, -1, 1)
    share = torch.sigmoid(lse - logits)
    return (out.to(lse.dtype) * share.unsqueeze(-1)).to(out.dtype), torch.logaddexp(lse, logits.expand_as(lse))


def _attend(channel: Channel, q: Tensor, k: Tensor, v: Tensor, request: _Request) -> tuple[Tensor, Tensor]:
    """(out, lse) of plain tensors, after the ranks have agreed on the arguments."""
    device = q.device if isinstance(q, Tensor) else torch.device("cpu")
    request = _with_layouts(channel, q, k, request, device)
    local_error, checked = None, None
    router = request.pattern if isinstance(request.pattern, Router) else None
    try:
        checked = _problem(channel, q, k, v, request if router is None else _checked_router(request))
    except FarlightError as error:
        local_error = error
    agreed = _agreed.setdefault(dist.group.WORLD if channel.group is None else channel.group, set())
    checksum = 0
    if checked is not None:
        shared = replace(request, seed=None, pattern=full() if router is not None else request.pattern)
        checksum = hash((checked[:3], shared, None if router is None else text_of(router), q.dtype, q.device.type))
    if checksum not in agreed or local_error is not None:
        agree(channel, request.fields(q, k), local_error, device)
        agreed.add(checksum)
    if router is not None:
        assert request.layout is not None
        assert request.q_layout is not None
        pattern = choose_over_ranks(router, q, k, request.q_layout, request.layout, channel)
        checked = _problem(channel, q, k, v, replace(request, pattern=pattern))
    assert checked is not None
    problem, widths, scale, terms = checked
    seed = read_seed(request.seed, request.dropout)
    if request.dropout:
        seed = agree_on_seed(channel, seed, request.seed is not None, device)
    tables = (None, None) if terms is None else (terms.distance, terms.key_bias)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, *tables))
    route = route_of(problem, channel.rank, widths)
    run = Run(route, channel, scale, request.dropout, seed, request.backend, needs_grad, terms)
    out, lse = SpreadAttention.apply(q, k, v, *tables, run)
    return out, lse


def _checked_router(request: _Request) -> _Request:
    """The request with any pattern, by which all but the router's choice is checked. Raises ArgumentError with q_offset."""
    if request.q_offset is not None:
        raise ArgumentError("q_offset was given with a router, which takes the queries for the last tokens; leave it out.")
    return replace(request, pattern=full())


def _group(mesh: DeviceMesh | None, group: ProcessGroup | None) -> ProcessGroup | None:
    """The process group of the ranks."""
    if mesh is None:
        return group
    if group is not None:
        raise ArgumentError("pass a mesh or a group, not both: each says which ranks share the sequence.")
    if mesh.ndim != 1:
        raise ArgumentError(
            f"the mesh has {mesh.ndim} dimensions {mesh.mesh_dim_names}; pass that over which the sequence is spread, as in "
            "mesh['cp']."
        )
    return mesh.get_group()


def _with_layouts(channel: Channel, q: Tensor, k: Tensor, request: _Request, device: torch.device) -> _Request:
    """The request with both layouts; without one, the lengths of all ranks say it."""
    if request.layout is not None:
        return request if request.q_layout is not None else replace(request, q_layout=request.layout)
    has_tokens = isinstance(q, Tensor) and isinstance(k, Tensor) and q.dim() == k.dim() == 4
    lengths = (q.shape[2], k.shape[2]) if has_tokens else (0, 0)
    keys, queries = layout_of_lengths(channel, *lengths, device)
    return replace(request, layout=keys, q_layout=queries if request.q_layout is None else request.q_layout)


def _problem(channel: Channel, q: Tensor, k: Tensor, v: Tensor, request: _Request) -> _CheckedCall:
    """The whole problem, from this rank's tensors and the layouts. Raises what is wrong on this rank."""
    check_tensors(q, k, v)
    registry.check_name(request.backend)
    if request.backend != "auto" and request.backend not in registry.plan_backends():
        raise UnsupportedError(
            f"backend {request.backend!r} attends under a dense mask and gives no partial results to merge; use 'auto' or "
            f"one of {', '.join(map(repr, registry.plan_backends()))}."
        )
    if not ops.is_plain(q, k, v):
        raise UnsupportedError(
            "fl.distributed.attention was called on traced, transformed or wrapped tensors; its collectives cannot be traced. "
            "Call it outside torch.compile and torch.func (torch.compiler.disable)."
        )
    if not isinstance(request.pattern, Pattern):
        raise ArgumentError(f"the pattern is {type(request.pattern).__name__}; pass a pattern such as fl.window(256).")
    if not q.shape[0]:
        raise ArgumentError("a batch of no items has nothing to spread; skip the call on all ranks.")
    keys, queries = request.layout, request.q_layout
    assert keys is not None
    assert queries is not None
    for what, layout, n in (("queries", queries, q.shape[2]), ("keys", keys, k.shape[2])):
        if layout.world != channel.world:
            raise ArgumentError(f"the layout is for {layout.world} ranks, but the group has {channel.world}; make one for it.")
        if layout.lengths[channel.rank] != n:
            raise ArgumentError(
                f"rank {channel.rank} has {n} {what}, but the layout gives it {layout.lengths[channel.rank]}; pass the shard "
                "of layout.shard(x, 2, rank), or the layout of the tensors."
            )
    offset = keys.n - queries.n if request.q_offset is None else read_offset(request.q_offset)
    sizes = Sizes(queries.n, keys.n, offset, q.shape[0], q.shape[1])
    request.pattern.check(sizes)
    widths = TravelWidths(k.shape[3], v.shape[3], q.dtype.itemsize, 8 if q.dtype == torch.float64 else 4)
    problem = problem_of(request.pattern, sizes, k.shape[1], queries, keys, widths, request.move)
    terms = lower(request.score, None, sizes, q.device, q.dtype)
    # Every rank serves every kind of piece: a backend that is named must honour them all, or all ranks raise here.
    dropout, names = read_dropout(request.dropout), frozenset() if terms is None else terms.names
    at_positions = bool(dropout) or "bias by distance" in names
    shapes = k.shape[1], q.shape[3], v.shape[3], q.dtype, q.device
    options = request.pattern, sizes, *shapes, True, dropout, True, names, at_positions
    registry.plan_backend(Request(*options), request.backend)
    return _CheckedCall(problem, widths, read_scale(request.scale, q.shape[-1]), terms)
