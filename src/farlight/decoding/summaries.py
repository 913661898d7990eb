"""`BlockSummaries`: means or bounds of complete key blocks, kept beside a cache's keys and scored by `TopBlocks`."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from farlight.decoding.native import is_native
from farlight.decoding.pages import quantize
from farlight.decoding.store import KeyStore
from farlight.routing import TopBlocks

__all__ = ["BlockSummaries"]


class BlockSummaries:
    """The summaries of one `TopBlocks`, `(B, H_kv, capacity, D)` float32 or float64 each, for complete blocks 0 … count - 1.

    The last, incomplete block overlaps every query that may still come, so it is never scored and has no summary. Where the
    native kernels choose a count or share of the blocks by means, `codes` holds these rounded to int8 `(B, H_kv, capacity, D)`
    and their scales `(B, H_kv, capacity)`: they bound every score, and most means need not be read.
    """

    def __init__(self, router: TopBlocks) -> None:
        self.router = router
        self.count = 0
        self._arrays: list[Tensor] = []  # of one capacity: the tables, then codes and scales

    @property
    def tables(self) -> list[Tensor]:
        return self._arrays[: self._num_tables]

    @property
    def codes(self) -> list[Tensor]:
        """(codes, scales), or nothing."""
        return self._arrays[self._num_tables :]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

    @property
    def _num_tables(self) -> int:
        return 2 if self.router.score == "minmax" else 1

    def complete(self) -> list[Tensor]:
        """Views of the summaries in use, `(B, H_kv, count, D)` each."""
        return [table[:, :, : self.count] for table in self.tables]

    def select(self, items: Tensor) -> BlockSummaries:
        new = copy.copy(self)
        new._arrays = [array.index_select(0, items) for array in self._arrays]
        return new

    def truncated(self, length: int) -> BlockSummaries:
        new = copy.copy(self)
        new.count = min(self.count, length // self.router.block)
        return new

    def fork(self) -> BlockSummaries:
        new = copy.copy(self)
        new._arrays = [array.clone() for array in self._arrays]
        return new

    def extend(self, store: KeyStore, dtype: torch.dtype) -> None:
        """Add the blocks of the store that are complete, in dtype; the tables grow by an eighth at a time."""
        block = self.router.block
        complete = store.kept // block
        if complete == self.count and self._arrays:
            return
        k, _ = store.pages.read(complete * block, dtype, self.count * block)
        new = self.router.summary(k)
        if self._has_codes(new):
            new += quantize(new[0])
        arrays = self._arrays
        if not arrays or complete > arrays[0].shape[2]:
            capacity = complete + complete // 8 + 8
            grown = [array.new_zeros(*array.shape[:2], capacity, *array.shape[3:]) for array in new]
            for array, old in zip(grown, arrays, strict=False):
                array[:, :, : self.count] = old[:, :, : self.count]
            self._arrays = arrays = grown
        for array, added in zip(arrays, new, strict=True):
            array[:, :, self.count : complete] = added
        self.count = complete

    def _has_codes(self, tables: list[Tensor]) -> bool:
        budget, mean = self.router.budget, tables[0]
        is_ranked = len(tables) == 1 and (budget.count is not None or budget.share is not None)
        return is_ranked and is_native(mean.device, torch.float32, mean.dtype, mean.shape[3])
