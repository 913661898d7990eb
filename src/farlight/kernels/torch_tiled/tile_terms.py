"""Score terms of a batch of tiles: softcap and biases on its scores, and their gradients, summed in a fixed order.

Rows and keys of a tile may be in any order: the index into the table of distances is made from their positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.kernels.torch_tiled.gather import TileBatch
from farlight.score.lowered import ScoreTerms

__all__ = ["TileTerms"]


class TileTerms:
    """The terms of one call, and in the backward pass the sums of the gradients of its two tables."""

    def __init__(self, terms: ScoreTerms, batch: int, heads: int, q_offset: int) -> None:
        self.terms, self.q_offset = terms, q_offset
        self._distance = None if terms.distance is None else torch.zeros_like(terms.distance)
        self._key_bias: Tensor | None = None
        if terms.key_bias is not None:
            self._key_bias = terms.key_bias.new_zeros(batch, heads, terms.key_bias.shape[2])

    def apply(self, batch: TileBatch, scores: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """(S, dS/dx) of x = `scores` `(c, tiles, heads · count, m)`; keys `(tiles, 1 or count, m)`; dS/dx None: 1."""
        slope = None
        if self.terms.cap:
            ratio = torch.tanh(scores / self.terms.cap)
            scores, slope = ratio * self.terms.cap, 1 - ratio.square()
        heads = batch.heads
        shape = (-1, heads.k1 - heads.k0, batch.tiles, (heads.q1 - heads.q0) // (heads.k1 - heads.k0), batch.group.count)
        for bias in (self._distance_bias(batch, keys), self._bias_of_keys(batch, keys)):
            if bias is not None:
                scores = (scores.view(*shape, scores.shape[-1]) + bias).view(scores.shape)
        return scores, slope

    def add_gradients(self, batch: TileBatch, ds: Tensor, keys: Tensor) -> None:
        """Accumulate the gradients of the tables from `ds` `(c, tiles, heads · count, m)`."""
        heads = batch.heads
        items = batch.key_heads // (heads.k1 - heads.k0)
        ds = ds.view(items, heads.k1 - heads.k0, batch.tiles, -1, batch.group.count, ds.shape[-1])
        by_head = ds.transpose(2, 3).flatten(1, 2)  # (items, heads, tiles, count, m)
        if self._distance is not None:
            _add_at(self._distance[heads.q0 : heads.q1], self._index(batch, keys), by_head.sum(0))
        if self._key_bias is not None:
            summed = by_head if keys.shape[1] > 1 else by_head.sum(3, keepdim=True)
            item = heads.batch if isinstance(heads.batch, Tensor) else torch.tensor([heads.batch], device="cpu")
            for n, b in enumerate(item.tolist()):
                _add_at(self._key_bias[b, heads.q0 : heads.q1], keys, summed[n])

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of `distance` and `key_bias`, in their shapes."""
        of_keys, given = self._key_bias, self.terms.key_bias
        if of_keys is not None and given is not None:
            shared = tuple(d for d in (0, 1) if given.shape[d] == 1)
            of_keys = of_keys.sum(shared, keepdim=True) if shared else of_keys
        return self._distance, of_keys

    def _index(self, batch: TileBatch, keys: Tensor) -> Tensor:
        """`(tiles, count, m)`: the column of the table of distances for each pair."""
        assert self.terms.distance is not None
        rows = batch.rows
        row = torch.arange(rows.start, rows.stop, device=keys.device) if isinstance(rows, slice) else rows
        i = row.view(batch.tiles, batch.group.count, 1) + (self.q_offset + self.terms.first)
        return (keys - i).clamp(0, self.terms.distance.shape[1] - 1)

    def _distance_bias(self, batch: TileBatch, keys: Tensor) -> Tensor | None:
        """`(1, key heads, tiles, heads per key head, count, m)`."""
        if self.terms.distance is None:
            return None
        heads, index = batch.heads, self._index(batch, keys)
        bias = self.terms.distance[heads.q0 : heads.q1][:, index]
        by_head: Tensor = bias.unflatten(0, (heads.k1 - heads.k0, -1))
        return by_head.transpose(1, 2)[None]

    def _bias_of_keys(self, batch: TileBatch, keys: Tensor) -> Tensor | None:
        """`(items or 1, key heads or 1, tiles, heads per key head or 1, 1 or count, m)`."""
        bias = self.terms.key_bias
        if bias is None:
            return None
        heads = batch.heads
        if bias.shape[0] > 1:
            item = heads.batch
            bias = bias[item][None] if isinstance(item, int) else bias[item.to(bias.device)]
        if bias.shape[1] > 1:
            bias = bias[:, heads.q0 : heads.q1].unflatten(1, (heads.k1 - heads.k0, -1))
        else:
            bias = bias.unsqueeze(1)
        return bias[..., keys].transpose(2, 3)


def _add_at(table: Tensor, index: Tensor, value: Tensor) -> None:
    """table[:, index] += value, where columns repeat; in a fixed order on every device."""
    if table.device.type == "cpu":
        value = value.reshape(table.shape[0], -1)
        table.scatter_add_(1, index.reshape(1, -1).expand(table.shape[0], -1), value)
    else:
        rows = torch.arange(table.shape[0], device=table.device).view(-1, *[1] * index.dim())
        table.index_put_((rows, index[None]), value, accumulate=True)
