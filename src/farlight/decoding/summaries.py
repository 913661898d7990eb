"""`BlockSummaries`: means or bounds of complete key blocks, kept beside a cache's keys and scored by `TopBlocks`."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from farlight.decoding.store import KeyStore
from farlight.routing import TopBlocks

__all__ = ["BlockSummaries"]


class BlockSummaries:
    """The summaries of one `TopBlocks`, `(B, H_kv, capacity, D)` float32 or float64 each, for complete blocks 0 … count - 1.

    The last, incomplete block overlaps every query that may still come, so it is never scored and has no summary.
    """

    def __init__(self, router: TopBlocks) -> None:
        self.router = router
        self.tables: list[Tensor] = []
        self.count = 0

    def complete(self) -> list[Tensor]:
        """Views of the summaries in use, `(B, H_kv, count, D)` each."""
        return [table[:, :, : self.count] for table in self.tables]

    def select(self, items: Tensor) -> BlockSummaries:
        new = copy.copy(self)
        new.tables = [table.index_select(0, items) for table in self.tables]
        return new

    def truncated(self, length: int) -> BlockSummaries:
        new = copy.copy(self)
        new.count = min(self.count, length // self.router.block)
        return new

    def fork(self) -> BlockSummaries:
        new = copy.copy(self)
        new.tables = [table.clone() for table in self.tables]
        return new

    def extend(self, store: KeyStore, dtype: torch.dtype) -> None:
        """Add the blocks of the store that are complete, in dtype; the tables grow by an eighth at a time."""
        block = self.router.block
        complete = store.kept // block
        if complete == self.count and self.tables:
            return
        k, _ = store.pages.read(complete * block, dtype, self.count * block)
        new = self.router.summary(k)
        if not self.tables or complete > self.tables[0].shape[2]:
            capacity = complete + complete // 8 + 8
            grown = [table.new_zeros(*table.shape[:2], capacity, table.shape[3]) for table in new]
            for table, old in zip(grown, self.tables, strict=False):
                table[:, :, : self.count] = old[:, :, : self.count]
            self.tables = grown
        for table, added in zip(self.tables, new, strict=True):
            table[:, :, self.count : complete] = added
        self.count = complete
