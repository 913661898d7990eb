"""The keys and values of the heads that obey one rule, in slots, each row as long as it must be."""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farlight.decoding.last_use import Rule
from farlight.decoding.slots import Change, Slots

__all__ = ["Store"]

# A store that grows token by token takes this much more room than it needs: one part in so many.
_SLACK = 8


class Store:
    """`k`, `v` `(B, kv heads of the rule, capacity, D)`; slots of one row serve the whole batch, or each item has its own."""

    def __init__(self, rule: Rule, like: Tensor, rows: int) -> None:
        self.rule, self.slots = rule, Slots(rows)
        shape = (like.shape[0], len(rule.kv_heads), 0, like.shape[3])
        self.k, self.v = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        heads = rule.kv_heads
        # A view where the heads stand together, which is nearly always.
        together = heads == tuple(range(heads[0], heads[0] + len(heads)))
        self._heads: slice | list[int] = slice(heads[0], heads[0] + len(heads)) if together else list(heads)

    @property
    def kept(self) -> int:
        """Slots in use, in the fullest row."""
        return max(self.slots.count)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes + self.slots.nbytes

    def append(self, k: Tensor, v: Tensor, start: list[int], new: list[int], columns: list[NDArray[np.int64]] | None) -> None:
        """Take in tokens at positions start … start + new - 1 of each row, and drop what no query from `start` on sees.

        `columns`: for each row, which columns of k and v those tokens are (None: the first `new`). Stopped anywhere by an
        exception, `cut` to the lengths `start` gives what there was.
        """
        slots = self.slots
        if slots.rows == new[0] == 1 and columns is None:
            last, unbroken = self.rule.sight(0, start[0], start[0] + 1)
            slot = slots.slot_of_one(start[0], int(last[0]))
            if slot >= 0:
                self.k.narrow(2, slot, 1).copy_(self._own(k))
                self.v.narrow(2, slot, 1).copy_(self._own(v))
                slots.take_one(slot, start[0], int(last[0]), bool(unbroken[0]))
                return
        free = [slots.forgotten(row, start[row]) for row in range(slots.rows)]
        sights = [self.rule.sight(row, start[row], start[row] + new[row]) for row in range(slots.rows)]
        needed = max(slots.count[row] - free[row].size + new[row] for row in range(slots.rows))
        # Holes are filled before anything is cut off, so the old slots must all exist until then.
        if max(needed, self.kept) > slots.capacity:
            # A first long piece gets the room it needs; what grows little by little must not be copied every time.
            most = max(needed, self.kept)
            self._resize(most if max(new) > self.kept else most + most // _SLACK + 8)
        changes = [slots.change(row, free[row], sights[row][0], start[row]) for row in range(slots.rows)]
        self._move(changes)
        self._write(k, v, changes, columns)
        for row, change in enumerate(changes):
            slots.take(row, change, start[row], *sights[row])
        if slots.capacity > self.kept + self.kept // (_SLACK // 2) + 32:
            self._resize(self.kept + self.kept // _SLACK + 8)

    def select(self, items: Tensor) -> Store:
        """A store with these batch items, in this order, repeated or not."""
        rows = self.slots if self.slots.rows == 1 else self.slots.rows_of(items.tolist())
        return self._with(self.k.index_select(0, items), self.v.index_select(0, items), rows)

    def split(self, rows: int) -> Store:
        """This store, where its one row has become `rows` equal ones."""
        return self if self.slots.rows == rows else self._with(self.k, self.v, self.slots.rows_of([0] * rows))

    def cut(self, lengths: list[int]) -> Store:
        """A store of the first `lengths` tokens of each row alone, as far as a query after them sees them."""
        live = [self.slots.live(row, length) for row, length in enumerate(lengths)]
        slots = self.slots.only(live)
        if len(live) == 1:
            k, v = (x[:, :, torch.from_numpy(live[0]).to(x.device)] for x in (self.k, self.v))
        else:
            k, v = (x.new_zeros(*x.shape[:2], slots.capacity, x.shape[3]) for x in (self.k, self.v))
            item, old = _items(live, k.device), _joined(live, k.device)
            to = _joined([np.arange(own.size) for own in live], k.device)
            for new, x in ((k, self.k), (v, self.v)):
                new[item, :, to] = x[item, :, old]
        return self._with(k, v, slots)

    def _with(self, k: Tensor, v: Tensor, slots: Slots) -> Store:
        new = copy.copy(self)
        new.k, new.v, new.slots = k, v, slots
        return new

    def _own(self, x: Tensor) -> Tensor:
        """The heads that are stored here."""
        return x if len(self.rule.kv_heads) == x.shape[1] else x[:, self._heads]

    def _resize(self, capacity: int) -> None:
        used = min(self.k.shape[2], capacity)
        for name in ("k", "v"):
            old = getattr(self, name)
            # Zeros, since a slot that a shorter row leaves empty passes through the arithmetic with weight 0.
            new = old.new_zeros((*old.shape[:2], capacity, old.shape[3]))
            new[:, :, :used] = old[:, :, :used]
            setattr(self, name, new)
        self.slots.resize(capacity)

    def _move(self, changes: list[Change]) -> None:
        if not any(change.to.size for change in changes):
            return
        for x in (self.k, self.v):
            if len(changes) == 1:
                to, moved = (torch.from_numpy(n).to(x.device) for n in (changes[0].to, changes[0].moved))
                x[:, :, to] = x[:, :, moved]
            else:
                item = _items([change.to for change in changes], x.device)
                to, moved = (_joined([getattr(change, name) for change in changes], x.device) for name in ("to", "moved"))
                x[item, :, to] = x[item, :, moved]

    def _write(self, k: Tensor, v: Tensor, changes: list[Change], columns: list[NDArray[np.int64]] | None) -> None:
        first = changes[0]
        for x, new in ((self.k, k), (self.v, v)):
            given = self._own(new)
            if len(changes) > 1:
                taken = [c.taken if columns is None else columns[row][c.taken] for row, c in enumerate(changes)]
                item, slots = _items(taken, x.device), _joined([c.slots for c in changes], x.device)
                x[item, :, slots] = given[item, :, _joined(taken, x.device)]
            elif first.slots.size:
                # Every batch item has the same tokens, in the same columns; those need not be all, even of a batch of one.
                column = first.taken if columns is None else columns[0][first.taken]
                slots, taken_all = (torch.from_numpy(n).to(x.device) for n in (first.slots, column))
                x[:, :, slots] = given if column.size == given.shape[2] else given[:, :, taken_all]


def _joined(parts: list[NDArray[np.int64]], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(device)


def _items(parts: list[NDArray[np.int64]], device: torch.device) -> Tensor:
    """The row that each entry of the joined parts belongs to."""
    return torch.from_numpy(np.repeat(np.arange(len(parts)), [part.size for part in parts])).to(device)
