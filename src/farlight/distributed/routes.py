"""`Route`: one rank's view of an exchange, as index tensors: what it sends and receives, and the pieces that it computes.

A rank computes three pieces: its own queries on its own keys (`local`); those of its queries that see arrived keys, on these
(`border`, per class of heads); and queries of other ranks on its own keys (`guest`, per class), without the links whose
key travels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farlight.caching import SizedCache
from farlight.distributed.exchange import BROADCAST_ABOVE, ClassExchange, Exchange, Moves, Problem, exchange_of
from farlight.distributed.layout import Layout
from farlight.distributed.selection import Places, except_served, select
from farlight.distributed.traffic import Traffic, TravelWidths, backward_traffic, bounds_of, forward_traffic
from farlight.patterns.expression import Pattern, Sizes

__all__ = ["ClassRoute", "PieceProblem", "Route", "Travel", "route_of"]

Array = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PieceProblem:
    """A pattern on the rows and keys of one piece, and where these stand in the whole problem."""

    pattern: Pattern
    places: Places

    @property
    def sizes(self) -> Sizes:
        return self.places.sizes


@dataclass(frozen=True, eq=False)
class Travel:
    """Keys, or query rows, of one class from and to a rank.

    send: local indices for each target. everyone: local indices of the broadcast ones that the rank owns. counts: how many
    arrive directly from each source; shared_counts: how many each rank broadcasts. What arrives, `[direct of rank 0, 1, …, used
    broadcast ones]`, is brought to ascending positions by `order`; `used` indexes the broadcast ones. positions: those of what
    arrived, ascending; places_of: for each source, where its direct ones stand among them; places_shared: the used broadcast
    ones.
    """

    send: list[Tensor]
    everyone: Tensor
    counts: list[int]
    shared_counts: list[int]
    used: Tensor
    order: Tensor
    positions: Tensor
    places_of: list[Tensor]
    places_shared: Tensor


@dataclass(frozen=True, eq=False)
class ClassRoute:
    """The route of one class: items and kv_heads `(R,)` say which heads it is; border_rows are local query rows."""

    items: Tensor
    kv_heads: Tensor
    keys: Travel
    rows: Travel
    border_rows: Tensor
    border: PieceProblem | None
    guest: PieceProblem | None

    @property
    def heads(self) -> int:
        """Key heads of the class, over all batch items."""
        return self.items.numel()


@dataclass(frozen=True, eq=False)
class Route:
    """Everything that a rank needs to take part in one attention."""

    problem: Problem
    rank: int
    widths: TravelWidths
    local: PieceProblem
    classes: tuple[ClassRoute, ...]
    forward: Traffic
    backward: Traffic

    @property
    def nbytes(self) -> int:
        """Memory of the index tensors, for the cache."""
        travels = [t for c in self.classes for t in (c.keys, c.rows)]
        return 4096 + sum(64 * t.positions.numel() + 8 * sum(x.numel() for x in t.send) for t in travels)


_routes: SizedCache[Route] = SizedCache(256 * 2**20)


def route_of(problem: Problem, rank: int, widths: TravelWidths) -> Route:
    """The route of a rank, kept: its patterns are the keys under which their plans are found again."""
    return _routes.get((problem, rank, widths, BROADCAST_ABOVE), lambda: _route(exchange_of(problem), rank, widths))


def _route(exchange: Exchange, rank: int, widths: TravelWidths) -> Route:
    problem = exchange.problem
    sizes, group = problem.sizes, problem.group
    own_rows, own_keys = problem.queries.position_ids(rank), problem.keys.position_ids(rank)
    item, head = torch.arange(sizes.batch).view(-1, 1), torch.arange(sizes.heads).view(1, -1)
    everywhere = item.expand(-1, sizes.heads), head.expand(sizes.batch, -1)
    local = _piece(problem, own_rows, own_keys, *everywhere)
    classes = []
    for moved in exchange.classes:
        heads = torch.tensor(moved.heads.rows)
        items, kv_heads = heads // problem.kv_heads, heads % problem.kv_heads
        members = items.view(-1, 1).expand(-1, group), kv_heads.view(-1, 1) * group + torch.arange(group)
        keys = _travel(moved.keys, moved.everyone_keys, problem.keys, rank)
        rows = _travel(moved.rows, moved.everyone_rows, problem.queries, rank)
        border_rows, border = _border(problem, own_rows, keys.positions, *members)
        guest = None
        if rows.positions.numel() and own_keys.numel():
            guest = _piece(problem, rows.positions, own_keys, *members)
            guest = PieceProblem(_without_served(guest.pattern, moved, problem, rank, rows.positions, own_keys), guest.places)
        classes.append(ClassRoute(items, kv_heads, keys, rows, border_rows, border, guest))
    traffic = forward_traffic(exchange, widths), backward_traffic(exchange, widths)
    return Route(problem, rank, widths, local, tuple(classes), *traffic)


def _piece(problem: Problem, rows: Tensor, keys: Tensor, items: Tensor, heads: Tensor) -> PieceProblem:
    places = Places(rows, keys, items.contiguous(), heads.contiguous(), problem.sizes)
    return PieceProblem(select(problem.pattern, places), places)


def _border(
    problem: Problem, own_rows: Tensor, keys: Tensor, items: Tensor, heads: Tensor
) -> tuple[Tensor, PieceProblem | None]:
    """The local rows that see some of the arrived keys, and their piece."""
    nothing = torch.zeros(0, dtype=torch.int64), None
    if not keys.numel() or not own_rows.numel():
        return nothing
    whole = _piece(problem, own_rows, keys, items, heads)
    sees = torch.zeros(own_rows.numel(), dtype=torch.bool)
    i = torch.arange(own_rows.numel())
    variation = torch.zeros(1, 1, dtype=torch.int64)
    for atom in dict.fromkeys(whole.pattern.atoms()):
        table = atom._variation(whole.sizes)
        if table.numel() > 1:
            variation = torch.unique(variation * (int(table.max()) + 1) + table, return_inverse=True)[1]
    for number in variation.unique().tolist():
        b, h = (variation == number).nonzero()[0].tolist()
        sees |= whole.pattern._spans(whole.sizes, torch.full_like(i, b), torch.full_like(i, h), i).per_row() > 0
    rows = sees.nonzero().squeeze(1)
    return (rows, _piece(problem, own_rows[rows], keys, items, heads)) if rows.numel() else nothing


def _without_served(
    pattern: Pattern, moved: ClassExchange, problem: Problem, rank: int, rows: Tensor, own_keys: Tensor
) -> Pattern:
    """Guest rows do not see the keys that travelled to their own rank."""
    sent = moved.keys.between(rank, None)
    reader = problem.queries.owner_of(rows.numpy())
    readers, group = np.unique(reader, return_inverse=True)
    kept = np.isin(sent.target, readers)
    target, lo, hi = sent.target[kept], sent.lo[kept], sent.hi[kept]
    first = np.searchsorted(target, np.append(readers, problem.world))
    slots = [torch.searchsorted(own_keys, torch.from_numpy(edge)) for edge in (lo, hi)]
    return except_served(pattern, torch.from_numpy(group), torch.from_numpy(first), *slots)


def _travel(moves: Moves, everyone: Array, layout: Layout, rank: int) -> Travel:
    world = layout.world
    sent = moves.between(rank, None)
    targets, out = _expanded(sent.target, sent.lo, sent.hi)
    direct = ~np.isin(out, everyone)
    out_local, targets = layout.local_index(out[direct]), targets[direct]
    send = torch.from_numpy(out_local).split(np.bincount(targets, minlength=world).tolist())
    # Broadcast ones in the order of their owners, then of positions.
    owner = layout.owner_of(everyone)
    shared = everyone[np.argsort(owner, kind="stable")]
    owned = layout.local_index(everyone[owner == rank])

    got = moves.between(None, rank)
    sources, arrived = _expanded(got.source, got.lo, got.hi)
    direct = ~np.isin(arrived, everyone)
    counts = np.bincount(sources[direct], minlength=world)
    used = np.flatnonzero(np.isin(shared, arrived[~direct]))
    positions = np.concatenate((arrived[direct], shared[used]))
    order = np.argsort(positions, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    places = torch.from_numpy(place)
    return Travel(
        send=list(send),
        everyone=torch.from_numpy(owned),
        counts=counts.tolist(),
        shared_counts=np.bincount(owner, minlength=world).tolist(),
        used=torch.from_numpy(used),
        order=torch.from_numpy(order),
        positions=torch.from_numpy(positions[order]),
        places_of=list(places[: int(counts.sum())].split(counts.tolist())),
        places_shared=places[int(counts.sum()) :],
    )


def _expanded(peer: Array, lo: Array, hi: Array) -> tuple[Array, Array]:
    """(peer, position) of every position of the intervals."""
    length = hi - lo
    start = np.repeat(lo - bounds_of(length)[:-1], length)
    return np.repeat(peer, length), start + np.arange(int(length.sum()))
