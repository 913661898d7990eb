"""`Pages`: the keys and values of a store in pages of slots, shared between forks of a cache until one of them writes.

A page holds K and V `(B, heads, capacity, D)` and, for int8, a float32 scale for each row `(B, heads, capacity)`. All pages but
the last have the same number of slots, a power of two, so that slot s is row `s % size` of page `s // size`. Where the native
kernels do not run there is one page of any size: torch and Triton read contiguous keys.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["PAGE_SHIFT", "Page", "Pages", "quantize"]

# log2 of the slots in a page; a fork copies the pages that it writes.
PAGE_SHIFT = 6
_ONE_PAGE_SHIFT = 62
# In small caches the last page is no larger than needed, in steps of this many slots.
_STEP, _SMALL = 16, 256


@dataclass(eq=False)
class Page:
    """arrays: K, V and, for int8, the scales of K and of V. sharers: the `Pages` that hold it, once it was forked."""

    arrays: tuple[Tensor, ...]
    sharers: weakref.WeakSet[Pages] | None = None
    _addresses: tuple[int, ...] | None = None

    @property
    def capacity(self) -> int:
        return self.arrays[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arrays)

    @property
    def is_shared(self) -> bool:
        return self.sharers is not None and len(self.sharers) > 1

    def addresses(self) -> tuple[int, ...]:
        """For the native kernels: addresses of K, V and their scales (0: none), capacity, and 1 where it is shared."""
        if self._addresses is None:
            pointers = [x.data_ptr() for x in self.arrays]
            self._addresses = (*pointers, *[0] * (4 - len(pointers)), self.capacity)
        return (*self._addresses, int(self.is_shared))

    def map(self, function: Callable[[Tensor], Tensor]) -> Page:
        """A page of its own with `function` applied to each array."""
        return Page(tuple(function(x) for x in self.arrays))

    def __getstate__(self) -> dict[str, Any]:
        return {"arrays": self.arrays, "sharers": None, "_addresses": None}


class Pages:
    """The pages of one store. shape: (B, heads, D); dtype: of K and V, torch.int8 included; paged: False = one page."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, paged: bool) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.shift = PAGE_SHIFT if paged else _ONE_PAGE_SHIFT
        self.pages: list[Page] = [] if paged else [self._new_page(0)]

    @property
    def is_paged(self) -> bool:
        return self.shift == PAGE_SHIFT

    @property
    def capacity(self) -> int:
        return sum(page.capacity for page in self.pages[-1:]) + (max(0, len(self.pages) - 1) << self.shift)

    @property
    def nbytes(self) -> int:
        return sum(page.nbytes for page in self.pages)

    def _new_page(self, capacity: int) -> Page:
        batch, heads, dim = self.shape
        # Zeros: unused slots of shorter rows are multiplied by weight 0, which would not remove a NaN.
        k, v = (torch.zeros(batch, heads, capacity, dim, dtype=self.dtype, device=self.device) for _ in range(2))
        if self.dtype != torch.int8:
            return Page((k, v))
        return Page((k, v, *(torch.zeros(batch, heads, capacity, device=self.device) for _ in range(2))))

    # ---- size ------------------------------------------------------------------------------------------------------------
    def resize(self, capacity: int) -> None:
        """Reallocate to at least `capacity` slots; the slots below keep their contents."""
        pages = [
            page if page is not None and page.capacity == size else self._resized(page, size)
            for page, size in self._sizes(capacity)
        ]
        replaced = set(self.pages) - set(pages)
        self.pages = pages
        for page in replaced:
            if page.sharers is not None:
                page.sharers.discard(self)

    def _sizes(self, capacity: int) -> list[tuple[Page | None, int]]:
        """The present page, or None, and the new capacity of each page."""
        if self.shift == _ONE_PAGE_SHIFT:
            return [(self.pages[0], capacity)]
        size = 1 << self.shift
        count = -(-capacity // size)
        rest = capacity - (count - 1) * size
        sizes = [size] * (count - 1) + ([-(-rest // _STEP) * _STEP if capacity <= _SMALL else size] if count else [])
        present: list[Page | None] = [*self.pages[:count], *[None] * (count - len(self.pages))]
        return list(zip(present, sizes, strict=True))

    def _resized(self, page: Page | None, capacity: int) -> Page:
        new = self._new_page(capacity)
        if page is not None:
            copied = min(capacity, page.capacity)
            for to, x in zip(new.arrays, page.arrays, strict=True):
                to[:, :, :copied] = x[:, :, :copied]
        return new

    # ---- reading and writing ---------------------------------------------------------------------------------------------
    def write(self, slots: NDArray[np.int64], values: Sequence[Tensor], row: NDArray[np.int64] | None = None) -> None:
        """Write `values`, one tensor for each array of a page: `(B, heads, slots, …)`, or with row `(slots,)` the batch item
        of each entry `(slots, heads, …)`."""
        for number, entries in self._by_page(slots):
            page = self._own(number)
            within = torch.from_numpy(slots[entries] & ((1 << self.shift) - 1)).to(self.device)
            for to, x in zip(page.arrays, values, strict=True):
                if row is not None:
                    to[torch.from_numpy(row[entries]).to(self.device), :, within] = x[self._index(entries)].to(to.dtype)
                elif entries.size == x.shape[2]:
                    to[:, :, within] = x.to(to.dtype)
                else:
                    to[:, :, within] = x[:, :, self._index(entries)].to(to.dtype)

    def gather(self, slots: NDArray[np.int64], row: NDArray[np.int64] | None = None) -> list[Tensor]:
        """The contents of slots: `(B, heads, slots, …)` for each array, or with row `(slots, heads, …)`."""
        batch, heads, _ = self.shape
        lead = (batch, heads, slots.size) if row is None else (slots.size, heads)
        out = [x.new_empty((*lead, *x.shape[3:])) for x in self._new_page(0).arrays]
        for number, entries in self._by_page(slots):
            within = torch.from_numpy(slots[entries] & ((1 << self.shift) - 1)).to(self.device)
            index = self._index(entries)
            for to, x in zip(out, self.pages[number].arrays, strict=True):
                if row is None:
                    to[:, :, index] = x[:, :, within]
                else:
                    to[index] = x[torch.from_numpy(row[entries]).to(self.device), :, within]
        return out

    def _by_page(self, slots: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
        """(page number, indices into `slots`) of every page that slots are in."""
        if not slots.size:
            return []
        number = slots >> self.shift
        if number[0] == number[-1] and bool((number == number[0]).all()):
            return [(int(number[0]), np.arange(slots.size))]
        order = np.argsort(number, kind="stable")
        starts = np.flatnonzero(np.diff(number[order], prepend=-1))
        return [(int(number[part[0]]), part) for part in np.split(order, starts[1:])]

    def _index(self, entries: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(entries).to(self.device)

    def _own(self, number: int) -> Page:
        """The page, copied first where another fork holds it too."""
        page = self.pages[number]
        if page.is_shared:
            pages = list(self.pages)
            pages[number] = page.map(torch.clone)
            self.pages = pages
            assert page.sharers is not None
            page.sharers.discard(self)
        return self.pages[number]

    def read(self, stop: int, dtype: torch.dtype | None = None, start: int = 0) -> tuple[Tensor, Tensor]:
        """K and V `(B, heads, stop - start, D)` of these slots, in `dtype` (None: as stored; int8 as float32).

        Views where they are in one page and need no conversion.
        """
        first = start >> self.shift
        pages = self.pages[first : (max(start, stop - 1) >> self.shift) + 1] or [self._new_page(0)]
        parts = zip(*(page.arrays for page in pages), strict=True)
        offset = first << self.shift if self.is_paged else 0
        arrays = [(torch.cat(x, 2) if len(x) > 1 else x[0])[:, :, start - offset : stop - offset] for x in parts]
        if self.dtype == torch.int8:
            arrays = [x.float() * scale[..., None] for x, scale in zip(arrays[:2], arrays[2:], strict=True)]
        k, v = (x if dtype is None else x.to(dtype) for x in arrays[:2])
        return k, v

    # ---- copies ----------------------------------------------------------------------------------------------------------
    def select(self, items: Tensor) -> Pages:
        """The pages of these batch items."""
        return self._with([page.map(lambda x: x.index_select(0, items)) for page in self.pages], items.numel())

    def compacted(self, slots: NDArray[np.int64] | list[NDArray[np.int64]]) -> Pages:
        """Pages of these slots only, in order; a list has the slots of each batch item."""
        new = self._with([], self.shape[0])
        if self.shift == _ONE_PAGE_SHIFT:
            new.pages = [self._new_page(0)]
        if isinstance(slots, np.ndarray):
            new.resize(slots.size)
            new.write(np.arange(slots.size), self.gather(slots))
        else:
            new.resize(max(part.size for part in slots))
            row = np.repeat(np.arange(len(slots)), [part.size for part in slots])
            to = np.concatenate([np.arange(part.size) for part in slots])
            new.write(to, self.gather(np.concatenate(slots), row), row)
        return new

    def fork(self) -> Pages:
        """The same pages, copied by whoever writes to one first."""
        new = self._with(list(self.pages), self.shape[0])
        for page in self.pages:
            if page.sharers is None:
                page.sharers = weakref.WeakSet([self])
            page.sharers.add(new)
        return new

    def _with(self, pages: list[Page], batch: int) -> Pages:
        new = Pages.__new__(Pages)
        new.shape, new.dtype, new.device, new.shift = (batch, *self.shape[1:]), self.dtype, self.device, self.shift
        new.pages = pages
        return new


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 `(…, D)`, scale float32 `(…)`) of rows: scale = max |x| / 127, so |x - scale · code| <= scale / 2.

    A row that is not finite gets the scale NaN or inf. Rounds half away from zero, as the native kernels do.
    """
    x = x.float()
    largest = x.abs().amax(-1)
    inverse = torch.where(largest > 0, 127.0 / largest, 0.0)
    is_finite = largest.isfinite() & inverse.isfinite()
    scaled = torch.where(is_finite[..., None], x * inverse[..., None], 0.0)
    codes = (scaled + torch.where(scaled < 0, -0.5, 0.5)).trunc().to(torch.int8)
    return codes, torch.where(largest.isfinite(), largest / 127.0, float("nan"))
