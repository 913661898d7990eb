"""`SlotQueries`: the newest queries of a cache, and what they see of the slots of a store."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from farlight.decoding.cache import KVCache
from farlight.decoding.slots import IntArray
from farlight.decoding.store import KeyStore
from farlight.decoding.terms import DecodeTerms, KeptTerms
from farlight.patterns.expression import Pattern, Sizes

__all__ = ["SlotQueries", "positions_of_columns"]


@dataclass(frozen=True, eq=False, slots=True)
class SlotQueries:
    """Queries at positions i `(rows, n)`, -1 = no token, under the cache's rules & `extra`, with the terms on their scores."""

    cache: KVCache
    i: IntArray
    scale: float
    return_lse: bool
    extra: Pattern | None
    terms: DecodeTerms | None

    def pattern_of(self, store: KeyStore) -> Pattern:
        """What the queries of a store's heads see."""
        return store.rule.pattern if self.extra is None else self.extra & store.rule.pattern

    def rows(self, first: int, step: int) -> SlotQueries:
        """The queries first … first + step - 1."""
        return replace(self, i=self.i[:, first : first + step])

    def sees_every_slot(self, store: KeyStore) -> bool:
        """Whether the single query of each row sees slots 0 … kept - 1: all in use, all gapless, none past its last use."""
        slots, i = store.slots, self.i
        return slots.count == [store.kept] * slots.rows and all(
            slots.every_slot_is_seen(row, int(i[row, 0])) for row in range(slots.rows)
        )

    def mask(self, store: KeyStore) -> Tensor:
        """`(B or 1, H or 1, n, kept)` bool: which slots the queries see."""
        cache, slots, kept = self.cache, store.slots, store.kept
        i, j = self._positions(store)
        mask = _allowed(store.rule.pattern, cache._sizes, store, i, j.clamp(min=0)) & (i >= 0)
        if self.extra is not None:
            width, length = cache._last_width, cache.length
            sizes = Sizes(width, length, length - width, cache._sizes.batch, cache._sizes.heads)
            self.extra.check(sizes)
            mask = mask & _allowed(self.extra, sizes, store, i, j)
        if len(set(slots.count)) > 1:
            count = torch.tensor(slots.count, device=i.device).view(-1, 1, 1, 1)
            mask = mask & (torch.arange(kept, device=i.device) < count)
        return mask.expand(torch.broadcast_shapes(mask.shape, (1, 1, i.shape[2], kept)))

    def terms_of(self, store: KeyStore, index: Tensor | None = None) -> KeptTerms | None:
        """The terms on the scores of all slots of a store, or of those listed; None without any."""
        if self.terms is None:
            return None
        i, j = self._positions(store)
        return self.terms.at(i, j if index is None else j[..., index])

    def _positions(self, store: KeyStore) -> tuple[Tensor, Tensor]:
        """(query, key) positions, `(rows, 1, n, 1)` and `(rows, 1, 1, kept)` int64; -1 = no token."""
        device = store.pages.device
        of_queries = torch.from_numpy(np.ascontiguousarray(self.i)).to(device)[:, None, :, None]
        return of_queries, torch.from_numpy(store.slots.position[:, : store.kept]).to(device)[:, None, None, :]


def positions_of_columns(cache: KVCache, start: int) -> IntArray:
    """`(rows, n)`: the positions of the queries of columns start … of the last append; -1 = no token."""
    if cache._last_columns is None:
        first = np.array(cache._last_start)[:, None]
        return first + np.arange(start, cache._last_width)
    out = np.full((len(cache._last_start), cache._last_width), -1, np.int64)
    for row, columns in enumerate(cache._last_columns):
        out[row, columns] = cache._last_start[row] + np.arange(columns.size)
    return out[:, start:]


def _allowed(pattern: Pattern, sizes: Sizes, store: KeyStore, i: Tensor, j: Tensor) -> Tensor:
    """The pattern's definition at the pairs (i, j), for the batch items and query heads of the store that it tells apart."""
    b = torch.arange(sizes.batch if pattern.varies_over_batch else 1, device=i.device).view(-1, 1, 1, 1)
    h = torch.tensor(store.rule.heads if pattern.varies_over_heads else (0,), device=i.device).view(1, -1, 1, 1)
    return pattern._allows(sizes, b, h, i, j)
