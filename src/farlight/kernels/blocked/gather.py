"""Taking queries, keys and values of some tiles and putting gradients back: by slices, by index where tokens are sorted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.kernels.blocked.schedule import Group, Lanes, Schedule
from farlight.patterns.hashing import dropout_keep

__all__ = ["Batch", "batches"]

# Bytes of scores computed at a time. Small enough to stay near the core, large enough for the matrix products.
_BUDGET = 4 * 2**20


@dataclass
class Batch:
    """Some tiles of a group, for some heads: shapes are (key heads c, tiles g, …)."""

    lanes: Lanes
    group: Group
    first: int
    last: int
    rows: Tensor | slice  # query rows of the tiles, tile after tile

    @property
    def tiles(self) -> int:
        return self.last - self.first

    def take_queries(self, x: Tensor) -> Tensor:
        """`(c, tiles, heads per key head · count, …)` of a `(B, H, n_q, …)` tensor."""
        heads = x[self.lanes.batch, self.lanes.q0 : self.lanes.q1]
        picked = heads[:, self.rows]
        c = self.lanes.k1 - self.lanes.k0
        shape = (c, picked.shape[0] // c, self.tiles, self.group.count, *picked.shape[2:])
        return picked.reshape(shape).transpose(1, 2).flatten(2, 3)

    def put_queries(self, x: Tensor, value: Tensor, *, add: bool = False) -> None:
        """The reverse of `take_queries`, into `x`."""
        c = self.lanes.k1 - self.lanes.k0
        heads = (self.lanes.q1 - self.lanes.q0) // c
        value = value.unflatten(2, (heads, self.group.count)).transpose(1, 2)
        value = value.reshape(c * heads, self.tiles * self.group.count, *value.shape[4:])
        target = x[self.lanes.batch, self.lanes.q0 : self.lanes.q1]
        if add:
            target[:, self.rows] += value.to(x.dtype)
        else:
            target[:, self.rows] = value.to(x.dtype)

    def take_keys(self, x: Tensor, kind: torch.dtype) -> Tensor:
        """`(c, tiles, width, D)` of a `(B, H_kv, n_k, D)` tensor."""
        heads = x[self.lanes.batch, self.lanes.k0 : self.lanes.k1]
        parts = []
        for runs in self.group.tiles[self.first : self.last]:
            for (lo, hi), keys in zip(runs, self.group.keys, strict=True):
                parts.append(heads[:, lo:hi] if keys is None else heads[:, keys[lo:hi]])
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return whole.to(kind).reshape(heads.shape[0], self.tiles, self.group.width, x.shape[-1])

    def add_keys(self, x: Tensor, value: Tensor) -> None:
        """Add `(c, tiles, width, D)` to the places that `take_keys` took; a run names no key twice."""
        heads = x[self.lanes.batch, self.lanes.k0 : self.lanes.k1]
        for tile, runs in enumerate(self.group.tiles[self.first : self.last]):
            at = 0
            for (lo, hi), keys in zip(runs, self.group.keys, strict=True):
                part = value[:, tile, at : at + hi - lo]
                if keys is None:
                    heads[:, lo:hi] += part
                else:
                    heads[:, keys[lo:hi]] += part
                at += hi - lo

    def hide(self, scores: Tensor, value: float) -> None:
        """Set what no row may see in `(c, tiles, heads · count, width)`."""
        view = scores.unflatten(2, (-1, self.group.count))
        for c0, c1, unseen in self.group.hidden:
            view[..., c0:c1].masked_fill_(unseen, value)

    def points(self) -> tuple[Tensor, Tensor] | None:
        """Gathered keys `(tiles, count, m)` and which are real."""
        found = self.group.points[self.first : self.last]
        if not found:
            return None
        most = max(keys.shape[1] for keys, _ in found)
        pad = [(0, most - keys.shape[1]) for keys, _ in found]
        keys = torch.stack([torch.nn.functional.pad(k, p) for (k, _), p in zip(found, pad, strict=True)])
        real = torch.stack([torch.nn.functional.pad(r, p) for (_, r), p in zip(found, pad, strict=True)])
        return keys, real

    def key_numbers(self, device: torch.device) -> Tensor:
        """The keys of each tile, `(tiles, width)`."""
        parts = []
        for runs in self.group.tiles[self.first : self.last]:
            for (lo, hi), keys in zip(runs, self.group.keys, strict=True):
                parts.append(torch.arange(lo, hi, device=device) if keys is None else keys[lo:hi])
        return torch.cat(parts).view(self.tiles, self.group.width)

    def kept(self, seed: Tensor, p: float, q_offset: int, keys: Tensor, device: torch.device) -> Tensor:
        """Which links survive dropout, for keys `(tiles, 1 or count, m)`: `(c, tiles, heads · count, m)`."""
        lanes, count = self.lanes, self.group.count
        rows = self.rows
        row = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
        head = torch.arange(lanes.q0, lanes.q1, device=device).view(lanes.k1 - lanes.k0, 1, -1, 1, 1)
        i = row.view(1, self.tiles, 1, count, 1) + q_offset
        batch = torch.tensor(lanes.batch, device=device)
        return dropout_keep(seed.to(device), p, batch, head, i, keys[None, :, None]).flatten(2, 3)


def batches(schedule: Schedule, heads: int, kv_heads: int, head_dim: int) -> Iterator[Batch]:
    """All the work of a schedule, in an order that does not change from call to call."""
    per_key = heads // kv_heads
    for pairs, groups in schedule.classes:
        by_batch: dict[int, list[int]] = {}
        for b, h in pairs:
            by_batch.setdefault(b, []).append(h)
        for group in groups:
            points = max((keys.shape[1] for keys, _ in group.points), default=0)
            one = 4 * group.count * (group.width + points * (head_dim + 1))
            for b, listed in by_batch.items():
                if len(listed) == heads:
                    step = max(1, min(kv_heads, _BUDGET // (one * per_key)))
                    lanes = [
                        Lanes(b, k * per_key, min(k + step, kv_heads) * per_key, k, min(k + step, kv_heads))
                        for k in range(0, kv_heads, step)
                    ]
                else:
                    lanes = [Lanes(b, h, h + 1, h // per_key, h // per_key + 1) for h in listed]
                for lane in lanes:
                    many = max(1, _BUDGET // max(1, one * (lane.q1 - lane.q0)))
                    for first in range(0, len(group.starts), many):
                        last = min(first + many, len(group.starts))
                        yield Batch(lane, group, first, last, _rows(schedule, group, first, last))


def _rows(schedule: Schedule, group: Group, first: int, last: int) -> Tensor | slice:
    starts, count, order = group.starts[first:last], group.count, schedule.rows[group.piece]
    together = starts[-1] - starts[0] == count * (len(starts) - 1)
    if order is None:
        if together:
            return slice(starts[0], starts[-1] + count)
        return (torch.tensor(starts)[:, None] + torch.arange(count)).view(-1)
    if together:
        return order[starts[0] : starts[-1] + count]
    return torch.cat([order[s : s + count] for s in starts])
