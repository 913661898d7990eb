"""Taking queries, keys and values of some tiles and putting gradients back: by slices, by index where tokens are sorted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farlight.kernels.torch_tiled.schedule import Group, Lanes, Schedule
from farlight.patterns.hashing import dropout_keep

__all__ = ["Batch", "batches"]

# Bytes of scores computed at a time. Small enough to stay near the core, large enough for the matrix products.
_BUDGET = 4 * 2**20


@dataclass
class Batch:
    """Some tiles of a group, for some heads: shapes are (key heads c of all batch items, tiles g, …)."""

    lanes: Lanes
    group: Group
    first: int
    last: int
    rows: Tensor | slice  # query rows of the tiles, tile after tile

    @property
    def tiles(self) -> int:
        return self.last - self.first

    @property
    def key_heads(self) -> int:
        """c."""
        items = 1 if isinstance(self.lanes.batch, int) else self.lanes.batch.numel()
        return items * (self.lanes.k1 - self.lanes.k0)

    def _take(self, x: Tensor, first: int, last: int, at: Tensor | slice) -> Tensor:
        """`(items · heads, …)`: rows `at` of heads `[first, last)`."""
        item = self.lanes.batch
        return x[item, first:last][:, at] if isinstance(item, int) else x[_several(item, first, last, at)].flatten(0, 1)

    def _put(self, x: Tensor, first: int, last: int, at: Tensor | slice, value: Tensor, add: bool) -> None:
        """The reverse of `_take`; `at` names no row twice."""
        item = self.lanes.batch
        if isinstance(item, int):
            place: Any = (slice(None), at)
            x = x[item, first:last]
        else:
            place = _several(item, first, last, at)
            value = value.unflatten(0, (item.numel(), -1))
        if add:
            x[place] += value
        else:
            x[place] = value

    def take_queries(self, x: Tensor) -> Tensor:
        """`(c, tiles, heads per key head · count, …)` of a `(B, H, n_q, …)` tensor."""
        picked = self._take(x, self.lanes.q0, self.lanes.q1, self.rows)
        c = self.key_heads
        shape = (c, picked.shape[0] // c, self.tiles, self.group.count, *picked.shape[2:])
        return picked.reshape(shape).transpose(1, 2).flatten(2, 3)

    def put_queries(self, x: Tensor, value: Tensor, *, add: bool = False) -> None:
        """The reverse of `take_queries`, into `x`."""
        value = value.unflatten(2, (-1, self.group.count)).transpose(1, 2)
        value = value.reshape(-1, self.tiles * self.group.count, *value.shape[4:])
        self._put(x, self.lanes.q0, self.lanes.q1, self.rows, value.to(x.dtype), add)

    def take_keys(self, x: Tensor, kind: torch.dtype) -> Tensor:
        """`(c, tiles, width, D)` of a `(B, H_kv, n_k, D)` tensor."""
        parts = []
        for runs in self.group.tiles[self.first : self.last]:
            for (lo, hi), keys in zip(runs, self.group.keys, strict=True):
                at = slice(lo, hi) if keys is None else keys[lo:hi]
                parts.append(self._take(x, self.lanes.k0, self.lanes.k1, at))
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return whole.to(kind).reshape(self.key_heads, self.tiles, self.group.width, x.shape[-1])

    def add_keys(self, x: Tensor, value: Tensor) -> None:
        """Add `(c, tiles, width, D)` to the places that `take_keys` took; a run names no key twice."""
        for tile, runs in enumerate(self.group.tiles[self.first : self.last]):
            at = 0
            for (lo, hi), keys in zip(runs, self.group.keys, strict=True):
                part = value[:, tile, at : at + hi - lo]
                self._put(x, self.lanes.k0, self.lanes.k1, slice(lo, hi) if keys is None else keys[lo:hi], part, True)
                at += hi - lo

    def take_points(self, x: Tensor, keys: Tensor) -> Tensor:
        """`(c, *keys.shape, D)`: gathered keys or values."""
        taken = self._take(x, self.lanes.k0, self.lanes.k1, keys.flatten())
        return taken.view(taken.shape[0], *keys.shape, x.shape[-1])

    def add_points(self, x: Tensor, keys: Tensor, value: Tensor) -> None:
        """Add `(c, keys, D)` to keys `(keys,)` of which some may stand twice."""
        item = self.lanes.batch
        heads = x[item, self.lanes.k0 : self.lanes.k1]
        sums = heads if isinstance(item, int) else heads.flatten(0, 1)
        sums.index_add_(1, keys, value)
        if not isinstance(item, int):
            x[item, self.lanes.k0 : self.lanes.k1] = sums.view(heads.shape)

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
        head = torch.arange(lanes.q0, lanes.q1, device=device).view(1, lanes.k1 - lanes.k0, 1, -1, 1, 1)
        i = row.view(1, self.tiles, 1, count, 1) + q_offset
        batch = torch.as_tensor(lanes.batch, device=device).view(-1, 1, 1, 1, 1, 1)
        return dropout_keep(seed.to(device), p, batch, head, i, keys[None, :, None]).flatten(3, 4).flatten(0, 1)


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
            together = _BUDGET // max(1, one * heads * len(group.starts))  # batch items of which all fits
            full = [b for b, listed in by_batch.items() if len(listed) == heads] if together > 1 else []
            for at in range(0, len(full), max(1, together)):
                items = torch.tensor(full[at : at + together], device="cpu")
                lane = Lanes(items, 0, heads, 0, kv_heads)
                yield Batch(lane, group, 0, len(group.starts), _rows(schedule, group, 0, len(group.starts)))
            for b, listed in by_batch.items():
                if len(listed) == heads and together > 1:
                    continue
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


def _several(items: Tensor, first: int, last: int, at: Tensor | slice) -> Any:
    """The index of rows `at` of heads `[first, last)` of several batch items; what it takes is `(items, heads, rows, …)`."""
    if isinstance(at, slice):
        return items, slice(first, last), at
    items, heads = items.to(at.device), torch.arange(first, last, device=at.device)
    return items[:, None, None], heads[:, None], at


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
