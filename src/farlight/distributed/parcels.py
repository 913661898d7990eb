"""What travels in one direction, as fields: tensors over keys or query rows, packed per pair of ranks and class of heads.

`ship` sends the listed tokens of local tensors and gives, per class, what arrived, ascending by position. `give_back` returns
results over what arrived to the ranks that it came from, for the tokens that they sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farlight.distributed.collectives import Channel, Shape, pack, unpack
from farlight.distributed.routes import ClassRoute, Route, Travel
from farlight.distributed.sharing import UnitSet, add_up, spread
from farlight.distributed.traffic import Traffic

__all__ = ["Field", "Returned", "add_tokens", "all_keys", "give_back", "put_tokens", "ship", "take"]


@dataclass(frozen=True)
class Field:
    """A tensor over keys, `(R, m, width)` for the R key heads of a class, or over query rows, `(R, G, m, width)`.

    width 0: no last dimension.
    """

    is_rows: bool
    width: int
    dtype: torch.dtype

    def shape(self, of: ClassRoute, group: int, count: int) -> Shape:
        """Shape and dtype of the field of `count` tokens."""
        lead = (of.heads, group, count) if self.is_rows else (of.heads, count)
        return (*lead, self.width) if self.width else lead, self.dtype

    def travel(self, of: ClassRoute) -> Travel:
        """The lists of the tokens."""
        return of.rows if self.is_rows else of.keys

    @property
    def dim(self) -> int:
        """The dimension of the tokens."""
        return 2 if self.is_rows else 1


@dataclass(frozen=True)
class Returned:
    """Results that came back for one class. direct: for each rank, the tensors of the tokens sent to it; shared: those of the
    broadcast tokens, summed over the ranks; None where none is broadcast.
    """

    direct: list[list[Tensor]]
    shared: list[Tensor] | None


# ---- tokens of a class in local tensors -----------------------------------------------------------------------------------
def take(x: Tensor, of: ClassRoute, index: Tensor, group: int) -> Tensor:
    """Tokens `index` of a class: `(R, m, …)` of keys `(B, H_kv, n, …)`; for group > 0 `(R, G, m, …)` of rows `(B, H, n, …)`.

    A view where the class has all heads and the tokens are a run.
    """
    view = _as_view(x, of, index, group)
    if view is not None:
        return view.flatten(0, 1)
    if group:
        return _of_class(x.unflatten(1, (-1, group)).movedim(2, 3), of, index).movedim(2, 1)
    return _of_class(x, of, index)


def _as_view(x: Tensor, of: ClassRoute, index: Tensor, group: int) -> Tensor | None:
    """`(B, H_kv, m, …)`, or `(B, H_kv, G, m, …)`, without a copy; None where the tokens or heads are no run."""
    x = x.unflatten(1, (-1, group)) if group else x
    count = index.numel()
    if of.heads != x.shape[0] * x.shape[1] or not count or int(index[-1] - index[0]) != count - 1:
        return None
    return x.narrow(3 if group else 2, int(index[0]), count)


def _place(x: Tensor, of: ClassRoute, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return of.items[:, None].to(x.device), of.kv_heads[:, None].to(x.device), index.to(x.device)


def _of_class(x: Tensor, of: ClassRoute, index: Tensor) -> Tensor:
    return x[_place(x, of, index)]


def add_tokens(x: Tensor, of: ClassRoute, index: Tensor, part: Tensor, group: int) -> None:
    """Add what `take` would take: `(R, m, …)` or `(R, G, m, …)`, in place."""
    view = _as_view(x, of, index, group)
    if view is not None:
        view += part.unflatten(0, view.shape[:2])
        return
    if group:
        x, part = x.unflatten(1, (-1, group)).movedim(2, 3), part.movedim(1, 2)
    place = _place(x, of, index)
    x[place] = x[place] + part


def put_tokens(x: Tensor, of: ClassRoute, index: Tensor, part: Tensor, group: int) -> None:
    """Write what `take` would take, in place."""
    view = _as_view(x, of, index, group)
    if view is not None:
        view.copy_(part.unflatten(0, view.shape[:2]))
        return
    if group:
        x, part = x.unflatten(1, (-1, group)).movedim(2, 3), part.movedim(1, 2)
    x[_place(x, of, index)] = part.to(x.dtype)


def all_keys(x: Tensor, of: ClassRoute) -> Tensor:
    """All local keys of the class as heads of one key head each: `(R, 1, n, D)`."""
    if of.heads == x.shape[0] * x.shape[1]:
        return x.flatten(0, 1).unsqueeze(1)
    return x[of.items.to(x.device), of.kv_heads.to(x.device)].unsqueeze(1)


# ---- there ----------------------------------------------------------------------------------------------------------------
def ship(
    route: Route, channel: Channel, name: str, traffic: Traffic, fields: Sequence[Field], sources: Sequence[Tensor]
) -> Callable[[], list[list[Tensor]]]:
    """Start sending tokens of the local tensors `sources`; the result waits and gives, per class, one tensor a field."""
    device, group = sources[0].device, route.problem.group

    def message(target: int | None) -> list[Tensor]:
        """The tensors for a rank; None: those that are broadcast."""
        parts = []
        for c in route.classes:
            for field, x in zip(fields, sources, strict=True):
                travel = field.travel(c)
                index = travel.everyone if target is None else travel.send[target]
                parts.append(take(x, c, index, group if field.is_rows else 0))
        return parts

    wait: Callable[[], Tensor] = lambda: pack([], device)  # noqa: E731
    if traffic.direct.any():
        sizes = traffic.direct[route.rank].tolist(), traffic.direct[:, route.rank].tolist()
        wait = channel.exchange(name, pack([message(target) for target in range(channel.world)], device), *sizes)

    def receive() -> list[list[Tensor]]:
        everyone: list[list[Shape]] = []
        arriving: list[list[Shape]] = []
        for rank in range(channel.world):
            travels = [(c, field, field.travel(c)) for c in route.classes for field in fields]
            everyone.append([field.shape(c, group, travel.shared_counts[rank]) for c, field, travel in travels])
            arriving.append([field.shape(c, group, travel.counts[rank]) for c, field, travel in travels])
        shared = unpack(spread(channel, name, traffic, pack([message(None)], device)), everyone)
        direct = unpack(wait(), arriving)
        out: list[list[Tensor]] = []
        for number, c in enumerate(route.classes):
            tensors = []
            for place, field in enumerate(fields):
                at, travel = number * len(fields) + place, field.travel(c)
                broadcast = torch.cat([part[at] for part in shared], field.dim)
                used = broadcast.index_select(field.dim, travel.used.to(device))
                joined = torch.cat([*(part[at] for part in direct), used], field.dim)
                tensors.append(joined.index_select(field.dim, travel.order.to(device)))
            out.append(tensors)
        return out

    return receive


# ---- and back -------------------------------------------------------------------------------------------------------------
def give_back(
    route: Route,
    channel: Channel,
    name: str,
    traffic: Traffic,
    fields: Sequence[Field],
    results: Sequence[Sequence[Tensor]],
    *,
    total: torch.dtype,
    fill: Sequence[float],
    combine: Callable[[Sequence[Sequence[Tensor]]], list[Tensor]],
) -> Callable[[], list[Returned]]:
    """Start returning `results[class][field]`, tensors over what arrived, to where it came from.

    Of broadcast tokens the results of all ranks are combined in rank order, in dtype `total`; `fill` stands in a field for
    tokens that a rank did not use.
    """
    device, group, ranks = (
        results[0][0].device if route.classes else torch.device("cpu"),
        route.problem.group,
        range(channel.world),
    )
    wait: Callable[[], Tensor] = lambda: pack([], device)  # noqa: E731
    if traffic.results.any():
        messages = [
            [
                x.index_select(field.dim, field.travel(c).places_of[target].to(device))
                for c, tensors in zip(route.classes, results, strict=True)
                for field, x in zip(fields, tensors, strict=True)
            ]
            for target in ranks
        ]
        sizes = traffic.results[route.rank].tolist(), traffic.results[:, route.rank].tolist()
        wait = channel.exchange(name, pack(messages, device), *sizes)

    def receive() -> list[Returned]:
        shared = (
            _combined(route, channel, name, traffic, fields, results, total, fill, combine) if traffic.reduce.any() else None
        )
        shapes = [
            [
                field.shape(c, group, field.travel(c).send[rank].numel() if traffic.results.any() else 0)
                for c in route.classes
                for field in fields
            ]
            for rank in ranks
        ]
        direct = unpack(wait(), shapes)
        width = len(fields)
        return [
            Returned(
                [part[number * width : (number + 1) * width] for part in direct], None if shared is None else shared[number]
            )
            for number in range(len(route.classes))
        ]

    return receive


def _combined(
    route: Route,
    channel: Channel,
    name: str,
    traffic: Traffic,
    fields: Sequence[Field],
    results: Sequence[Sequence[Tensor]],
    total: torch.dtype,
    fill: Sequence[float],
    combine: Callable[[Sequence[Sequence[Tensor]]], list[Tensor]],
) -> list[list[Tensor]]:
    """Per class and field, the combined results of the broadcast tokens that this rank owns, as `take` takes them."""
    group, device = route.problem.group, results[0][0].device
    sets, members = [], []
    for is_rows in (False, True):
        chosen = [place for place, field in enumerate(fields) if field.is_rows == is_rows]
        if chosen:
            tensors = [_units(route, fields[p], [r[p] for r in results], fill[p], channel.world) for p in chosen]
            sets.append(UnitSet(tensors, _owned_units(route, is_rows), total, combine))
            members.append(chosen)
    sums = add_up(channel, name, traffic, sets, device)
    out: list[list[Tensor]] = [[torch.empty(0)] * len(fields) for _ in route.classes]
    for chosen, tensors in zip(members, sums, strict=True):
        for place, units in zip(chosen, tensors, strict=True):
            first, field = 0, fields[place]
            for number, c in enumerate(route.classes):
                count = field.travel(c).everyone.numel()
                part = units[first : first + c.heads * count]
                first += c.heads * count
                shape = (c.heads, count, *((group,) if field.is_rows else ()), *((field.width,) if field.width else ()))
                part = part.reshape(shape)
                out[number][place] = part.movedim(2, 1) if field.is_rows else part
    return out


def _owned_units(route: Route, is_rows: bool) -> NDArray[np.int64]:
    """`(world,)`: broadcast units of each rank."""
    total = np.zeros(route.problem.world, dtype=np.int64)
    for c in route.classes:
        total += c.heads * np.array((c.rows if is_rows else c.keys).shared_counts, dtype=np.int64)
    return total


def _units(route: Route, field: Field, tensors: Sequence[Tensor], fill: float, world: int) -> Tensor:
    """`(U, …)`: a field over all broadcast tokens, ordered by owner, class, key head and token."""
    group, by_class = route.problem.group, []
    for c, x in zip(route.classes, tensors, strict=True):
        travel = field.travel(c)
        full = x.new_full((*x.shape[: field.dim], sum(travel.shared_counts), *x.shape[field.dim + 1 :]), fill)
        full.index_copy_(field.dim, travel.used.to(x.device), x.index_select(field.dim, travel.places_shared.to(x.device)))
        by_class.append((full.movedim(1, 2) if field.is_rows else full).split(travel.shared_counts, 1))
    width = (group if field.is_rows else 1) * max(1, field.width)
    return torch.cat([part[rank].reshape(-1, width) for rank in range(world) for part in by_class])
