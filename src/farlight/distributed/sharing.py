"""Broadcasts of what most ranks need, and sums of what all ranks computed for it, at equal cost for every rank.

`spread`: owners scatter equal chunks, one all-gather completes them. `add_up`: each rank adds a slice of the units in rank
order and sends the sums to their owners.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farlight.distributed.collectives import Channel, Shape, pack, unpack
from farlight.distributed.traffic import Traffic, bounds_of, overlaps, unit_slices

__all__ = ["UnitSet", "add_up", "spread"]

Array = NDArray[np.int64]


@dataclass(frozen=True)
class UnitSet:
    """Contributions of this rank to all broadcast units: tensors `(U, …)`, units in the order of their owners.

    owned `(world,)`: units of each owner. total: the dtype of sums. combine: the tensors of every rank, in rank order, to their
    sums in dtype `total`.
    """

    tensors: list[Tensor]
    owned: Array
    total: torch.dtype
    combine: Callable[[Sequence[Sequence[Tensor]]], list[Tensor]]

    @property
    def count(self) -> int:
        """The number of units."""
        return int(self.owned.sum())


def spread(channel: Channel, name: str, traffic: Traffic, owned: Tensor) -> Tensor:
    """The broadcast bytes of all owners, one after another, from those of this rank."""
    if not traffic.chunk:
        return owned
    to_each, from_each = traffic.scatter[channel.rank].tolist(), traffic.scatter[:, channel.rank].tolist()
    part = channel.exchange(f"{name}, scattered", owned, to_each, from_each)()
    chunk = torch.nn.functional.pad(part, (0, traffic.chunk - part.numel()))
    return channel.gather(f"{name}, gathered", chunk)[: int(traffic.scatter.sum())]


def add_up(channel: Channel, name: str, traffic: Traffic, sets: Sequence[UnitSet], device: torch.device) -> list[list[Tensor]]:
    """The sums of the units that this rank owns, `(owned, …)` in dtype `total`, for each set."""
    rank, world = channel.rank, channel.world
    slices = [unit_slices(units.count, world) for units in sets]
    messages = [
        [x[cut[target] : cut[target + 1]] for units, cut in zip(sets, slices, strict=True) for x in units.tensors]
        for target in range(world)
    ]
    shapes: list[Shape] = [
        ((int(cut[rank + 1] - cut[rank]), *x.shape[1:]), x.dtype)
        for units, cut in zip(sets, slices, strict=True)
        for x in units.tensors
    ]
    to_each, from_each = traffic.reduce[rank].tolist(), traffic.reduce[:, rank].tolist()
    received = unpack(channel.exchange(f"{name}, to be added", pack(messages, device), to_each, from_each)(), [shapes] * world)
    sums: list[Tensor] = []
    owners: list[Array] = []  # for each tensor: the bounds within this rank's slice of the units of each owner
    first = 0
    for units, cut in zip(sets, slices, strict=True):
        last = first + len(units.tensors)
        sums += units.combine([source[first:last] for source in received])
        owners += [bounds_of(overlaps(cut[rank : rank + 2], bounds_of(units.owned))[0])] * len(units.tensors)
        first = last
    outgoing = [
        [x[bounds[owner] : bounds[owner + 1]] for x, bounds in zip(sums, owners, strict=True)] for owner in range(world)
    ]
    incoming: list[list[Shape]] = []
    for source in range(world):
        message: list[Shape] = []
        for units, cut in zip(sets, slices, strict=True):
            share = int(overlaps(cut[source : source + 2], bounds_of(units.owned))[0, rank])
            message += [((share, *x.shape[1:]), units.total) for x in units.tensors]
        incoming.append(message)
    to_each, from_each = traffic.collect[rank].tolist(), traffic.collect[:, rank].tolist()
    parts = unpack(channel.exchange(f"{name}, sums", pack(outgoing, device), to_each, from_each)(), incoming)
    joined = [torch.cat(column) for column in zip(*parts, strict=True)]
    out: list[list[Tensor]] = []
    for units in sets:
        out.append([joined.pop(0) for _ in units.tensors])
    return out
