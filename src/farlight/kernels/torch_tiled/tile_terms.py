"""Score terms of a batch of tiles: softcap and biases on its scores, and their gradients, summed in a fixed order.

Rows and keys of a tile may be in any order: the index into the table of distances is made from their positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.kernels.backend import Origin
from farlight.kernels.torch_tiled.gather import TileBatch
from farlight.patterns.expression import Sizes
from farlight.score.lowered import ScoreTerms

__all__ = ["TileTerms", "add_at", "distance_index"]


class TileTerms:
    """The terms of one call, and in the backward pass the sums of the gradients of its two tables."""

    def __init__(self, terms: ScoreTerms, sizes: Sizes, origin: Origin | None = None) -> None:
        self.terms, self.q_offset, self.origin = terms, sizes.q_offset, origin
        self._distance = None if terms.distance is None else torch.zeros_like(terms.distance)
        self._key_bias: Tensor | None = None
        if terms.key_bias is not None:
            self._key_bias = terms.key_bias.new_zeros(sizes.batch, sizes.heads, terms.key_bias.shape[2])

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
        if self._distance is not None and self.origin is None:
            add_at(self._distance[heads.q0 : heads.q1], self._index(batch, keys), by_head.sum(0))
        elif self._distance is not None:
            index, width = self._index(batch, keys), self._distance.shape[1]
            cells = self._heads_of_the_whole(batch, keys.device)[:, :, None, None, None] * width + index
            add_at(self._distance.view(1, -1), cells, by_head[None])
        if self._key_bias is not None:
            summed = by_head if keys.shape[1] > 1 else by_head.sum(3, keepdim=True)
            item = heads.batch if isinstance(heads.batch, Tensor) else torch.tensor([heads.batch], device="cpu")
            for n, b in enumerate(item.tolist()):
                add_at(self._key_bias[b, heads.q0 : heads.q1], keys, summed[n])

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
        return distance_index(batch, keys, self.q_offset, self.terms.first, self.terms.distance.shape[1], self.origin)

    def _heads_of_the_whole(self, batch: TileBatch, device: torch.device) -> Tensor:
        """`(items, heads)`: the query heads of a piece as the whole problem numbers them."""
        item, head = batch.items_and_heads(self.origin, device)
        return head.expand(item.shape[0], -1)

    def _distance_bias(self, batch: TileBatch, keys: Tensor) -> Tensor | None:
        """`(1 or items, key heads, tiles, heads per key head, count, m)`."""
        if self.terms.distance is None:
            return None
        heads, index = batch.heads, self._index(batch, keys)
        if self.origin is None:
            bias = self.terms.distance[heads.q0 : heads.q1][:, index][None]
        else:
            bias = self.terms.distance[self._heads_of_the_whole(batch, keys.device)[:, :, None, None, None], index]
        by_head: Tensor = bias.unflatten(1, (heads.k1 - heads.k0, -1))
        return by_head.transpose(2, 3)

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


def distance_index(
    batch: TileBatch, keys: Tensor, q_offset: int, first: int, length: int, origin: Origin | None = None
) -> Tensor:
    """`(tiles, count, m)`: clip(j - i - first, 0, length - 1) of the pairs with keys `(tiles, 1 or count, m)`."""
    i = batch.row_positions(q_offset, origin, keys.device)[..., None] + first
    keys = keys if origin is None else origin.keys.to(keys.device)[keys]
    return (keys - i).clamp(0, length - 1)


def add_at(table: Tensor, index: Tensor, value: Tensor) -> None:
    """table[:, index] += value, where columns repeat; in a fixed order on every device."""
    if table.device.type == "cpu":
        value = value.reshape(table.shape[0], -1, *table.shape[2:])
        table.scatter_add_(1, index.reshape(1, -1, *[1] * (table.dim() - 2)).expand(value.shape), value)
    else:
        rows = torch.arange(table.shape[0], device=table.device).view(-1, *[1] * index.dim())
        table.index_put_((rows, index[None]), value, accumulate=True)
