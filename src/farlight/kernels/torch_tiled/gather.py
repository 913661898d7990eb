"""Gather and scatter of a batch of tiles: rows of q, k, v into stacked tiles, and outputs and gradients back.

A `TileBatch` is a range of tiles of one group for a range of heads. Its tensors have shape `(c, tiles, …)`, c = key heads over
all its batch items; query heads of one key head are stacked along the rows, `(c, tiles, heads per key head · count, …)`, so
that one matrix product serves them all (GQA).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farlight.kernels.backend import Origin
from farlight.kernels.torch_tiled.schedule import Schedule, TileGroup
from farlight.patterns.hashing import dropout_keep

__all__ = ["TileBatch", "tile_batches"]

# Bytes of float32 scores computed at a time: small enough for the L2 cache, large enough for efficient matrix products.
_SCORE_BYTES = 4 * 2**20


@dataclass(frozen=True)
class HeadRange:
    """Query heads `[q0, q1)` over key heads `[k0, k1)` of one batch item (int) or of several (int64 tensor)."""

    batch: int | Tensor
    q0: int
    q1: int
    k0: int
    k1: int


@dataclass
class TileBatch:
    """Tiles `[first, last)` of a group for some heads; rows: their query rows, tile after tile."""

    heads: HeadRange
    group: TileGroup
    first: int
    last: int
    rows: Tensor | slice

    @property
    def tiles(self) -> int:
        return self.last - self.first

    @property
    def key_heads(self) -> int:
        """c: key heads over all batch items."""
        items = 1 if isinstance(self.heads.batch, int) else self.heads.batch.numel()
        return items * (self.heads.k1 - self.heads.k0)

    def _key_runs(self) -> Iterator[Tensor | slice]:
        """The keys of each run of each tile."""
        for runs in self.group.tiles[self.first : self.last]:
            for (lo, hi), keys in zip(runs, self.group.keys, strict=True):
                yield slice(lo, hi) if keys is None else keys[lo:hi]

    def _take(self, x: Tensor, first: int, last: int, tokens: Tensor | slice) -> Tensor:
        """`(items · heads, tokens, …)` of heads `[first, last)` of `x` `(B, H, N, …)`."""
        item = self.heads.batch
        if isinstance(item, int):
            return x[item, first:last][:, tokens]
        return x[_item_index(item, first, last, tokens)].flatten(0, 1)

    def _put(self, x: Tensor, first: int, last: int, tokens: Tensor | slice, value: Tensor, add: bool) -> None:
        """The inverse of `_take`, into `x`; `tokens` are distinct."""
        item = self.heads.batch
        index: Any = (slice(None), tokens)
        if isinstance(item, int):
            x = x[item, first:last]
        else:
            index = _item_index(item, first, last, tokens)
            value = value.unflatten(0, (item.numel(), -1))
        if add:
            x[index] += value
        else:
            x[index] = value

    def take_queries(self, x: Tensor) -> Tensor:
        """`(c, tiles, heads per key head · count, …)` of a `(B, H, n_q, …)` tensor."""
        rows = self._take(x, self.heads.q0, self.heads.q1, self.rows)
        c = self.key_heads
        shape = (c, rows.shape[0] // c, self.tiles, self.group.count, *rows.shape[2:])
        return rows.reshape(shape).transpose(1, 2).flatten(2, 3)

    def put_queries(self, x: Tensor, value: Tensor, *, add: bool = False) -> None:
        """The inverse of `take_queries`, into `x`."""
        value = value.unflatten(2, (-1, self.group.count)).transpose(1, 2)
        value = value.reshape(-1, self.tiles * self.group.count, *value.shape[4:])
        self._put(x, self.heads.q0, self.heads.q1, self.rows, value.to(x.dtype), add)

    def take_keys(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`(c, tiles, width, D)` of a `(B, H_kv, n_k, D)` tensor."""
        parts = [self._take(x, self.heads.k0, self.heads.k1, keys) for keys in self._key_runs()]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return whole.to(dtype).reshape(self.key_heads, self.tiles, self.group.width, x.shape[-1])

    def add_keys(self, x: Tensor, value: Tensor) -> None:
        """Accumulate `(c, tiles, width, D)` into the keys of `take_keys`; the keys of one run are distinct."""
        value, begin = value.flatten(1, 2), 0
        widths = (hi - lo for runs in self.group.tiles[self.first : self.last] for lo, hi in runs)
        for keys, width in zip(self._key_runs(), widths, strict=True):
            self._put(x, self.heads.k0, self.heads.k1, keys, value[:, begin : begin + width], True)
            begin += width

    def take_points(self, x: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """`(c, *keys.shape, D)`: gathered keys or values."""
        rows = self._take(x, self.heads.k0, self.heads.k1, keys.flatten())
        return rows.view(rows.shape[0], *keys.shape, x.shape[-1]).to(dtype)

    def add_points(self, x: Tensor, keys: Tensor, value: Tensor) -> None:
        """Accumulate `(c, keys, D)` into keys `(keys,)`, which may repeat."""
        item = self.heads.batch
        heads = x[item, self.heads.k0 : self.heads.k1]
        sums = heads if isinstance(item, int) else heads.flatten(0, 1)
        sums.index_add_(1, keys, value)
        if not isinstance(item, int):
            x[item, self.heads.k0 : self.heads.k1] = sums.view(heads.shape)

    def mask_scores(self, scores: Tensor) -> None:
        """Set the pairs that are not allowed to -inf in `(c, tiles, heads · count, width)`."""
        view = scores.unflatten(2, (-1, self.group.count))
        for c0, c1, hidden in self.group.hidden:
            view[..., c0:c1].masked_fill_(hidden, float("-inf"))

    def points(self) -> tuple[Tensor, Tensor] | None:
        """`(tiles, count, m)` gathered keys, padded with 0, and their validity; None without any."""
        points = self.group.points[self.first : self.last]
        if not points:
            return None
        width = max(keys.shape[1] for keys, _ in points)
        keys, valid = (
            torch.stack([torch.nn.functional.pad(table, (0, width - table.shape[1])) for table in column])
            for column in zip(*points, strict=True)
        )
        return keys, valid

    def key_indices(self, device: torch.device) -> Tensor:
        """`(tiles, width)` int64: the keys of each tile."""
        parts = [torch.arange(k.start, k.stop, device=device) if isinstance(k, slice) else k for k in self._key_runs()]
        return torch.cat(parts).view(self.tiles, self.group.width)

    def row_positions(self, q_offset: int, origin: Origin | None, device: torch.device) -> Tensor:
        """`(tiles, count)`: the positions of the query rows; in the whole problem where there is an `origin`."""
        rows = self.rows
        row = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
        row = row.to(device) + q_offset if origin is None else origin.rows.to(device)[row.to(device)]
        return row.view(self.tiles, self.group.count)

    def items_and_heads(self, origin: Origin | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Batch items and query heads, each broadcastable to `(items, heads)`."""
        head = torch.arange(self.heads.q0, self.heads.q1, device=device)[None]
        item = torch.as_tensor(self.heads.batch, device=device).view(-1, 1)
        if origin is None:
            return item, head
        return origin.items.to(device)[item, head], origin.heads.to(device)[item, head]

    def dropout_factor(
        self, seed: Tensor, p: float, q_offset: int, keys: Tensor, dtype: torch.dtype, origin: Origin | None = None
    ) -> Tensor:
        """`(c, tiles, heads · count, m)`: 1 / (1 - p) for kept links, else 0, of keys `(tiles, 1 or count, m)`."""
        heads, device = self.heads, keys.device
        i = self.row_positions(q_offset, origin, device).view(1, self.tiles, 1, -1, 1)
        item, head = self.items_and_heads(origin, device)
        by_key_head = (-1, heads.k1 - heads.k0, 1, (heads.q1 - heads.q0) // (heads.k1 - heads.k0), 1, 1)
        head = head.reshape(by_key_head)
        batch = item.view(-1, 1, 1, 1, 1, 1) if item.shape[1] == 1 else item.reshape(by_key_head)
        keys = keys if origin is None else origin.keys.to(device)[keys]
        keep = dropout_keep(seed.to(device), p, batch, head, i, keys[None, :, None]).flatten(3, 4).flatten(0, 1)
        return keep.to(dtype) / (1 - p or 1.0)  # p = 1 keeps no link


def tile_batches(schedule: Schedule, heads: int, kv_heads: int, head_dim: int) -> Iterator[TileBatch]:
    """All tiles of a schedule in batches of at most _SCORE_BYTES, in a fixed order.

    Batch items whose heads are all in one class, and that together fit the budget, share a batch. Otherwise heads are batched
    per item, as far as they fit, and tiles per head range.
    """
    per_key = heads // kv_heads
    for pairs, groups in schedule.classes:
        heads_of: dict[int, list[int]] = {}
        for b, h in pairs:
            heads_of.setdefault(b, []).append(h)
        complete = [b for b, listed in heads_of.items() if len(listed) == heads]
        for group in groups:
            tiles = len(group.starts)
            points = max((keys.shape[1] for keys, _ in group.points), default=0)
            tile_bytes = 4 * group.count * (group.width + points * (head_dim + 1))
            items = _SCORE_BYTES // max(1, tile_bytes * heads * tiles)
            stacked = complete if items > 1 else []
            for first in range(0, len(stacked), max(1, items)):
                item = torch.tensor(stacked[first : first + items], device="cpu")
                yield _batch(schedule, HeadRange(item, 0, heads, 0, kv_heads), group, 0, tiles)
            for b, listed in heads_of.items():
                if len(listed) < heads:
                    ranges = [HeadRange(b, h, h + 1, h // per_key, h // per_key + 1) for h in listed]
                elif stacked:
                    continue
                else:
                    step = max(1, min(kv_heads, _SCORE_BYTES // (tile_bytes * per_key)))
                    bounds = [(k, min(k + step, kv_heads)) for k in range(0, kv_heads, step)]
                    ranges = [HeadRange(b, k0 * per_key, k1 * per_key, k0, k1) for k0, k1 in bounds]
                for head_range in ranges:
                    step = max(1, _SCORE_BYTES // max(1, tile_bytes * (head_range.q1 - head_range.q0)))
                    for first in range(0, tiles, step):
                        yield _batch(schedule, head_range, group, first, min(first + step, tiles))


def _item_index(items: Tensor, first: int, last: int, tokens: Tensor | slice) -> Any:
    """The index of `tokens` of heads `[first, last)` of several batch items, with result `(items, heads, tokens, …)`."""
    if isinstance(tokens, slice):
        return items, slice(first, last), tokens
    items, heads = items.to(tokens.device), torch.arange(first, last, device=tokens.device)
    return items[:, None, None], heads[:, None], tokens


def _batch(schedule: Schedule, heads: HeadRange, group: TileGroup, first: int, last: int) -> TileBatch:
    starts, count, order = group.starts[first:last], group.count, schedule.rows[group.piece]
    is_contiguous = starts[-1] - starts[0] == count * (len(starts) - 1)
    rows: Tensor | slice = slice(starts[0], starts[-1] + count)
    if order is not None:
        rows = order[rows] if is_contiguous else torch.cat([order[start : start + count] for start in starts])
    elif not is_contiguous:
        rows = (torch.tensor(starts)[:, None] + torch.arange(count)).view(-1)
    return TileBatch(heads, group, first, last, rows)
