"""Which slot holds which position: the bookkeeping of a compact store, in numbers only, without the keys themselves.

The slots of a row are filled from the left without gaps. A new token takes the slot of a forgotten one (a ring, where tokens
are forgotten in the order in which they came); holes that stay are filled from the right end. Attention does not care in
which order keys lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farlight.patterns.liveness import FOREVER

__all__ = ["Change", "Numbers", "Slots"]

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Change:
    """What must happen to one row: slots `moved` are copied to `to`, new tokens `taken` into `slots`, and `count` remain.

    Only slots whose key is forgotten, and those from the old count on, are written to.
    """

    to: Numbers
    moved: Numbers
    slots: Numbers
    taken: Numbers
    count: int


class Slots:
    """`rows` rows (batch items, or one for all) of slots. `position`, `last` `(rows, capacity)`, `count` `(rows,)`."""

    def __init__(self, rows: int) -> None:
        self.position = np.full((rows, 0), -1, np.int64)
        self.last = np.full((rows, 0), -1, np.int64)
        self.unbroken = np.zeros((rows, 0), np.bool_)
        self.count = [0] * rows
        self.soonest = [FOREVER] * rows
        self.gaps = [0] * rows

    @property
    def rows(self) -> int:
        return len(self.count)

    @property
    def capacity(self) -> int:
        return self.position.shape[1]

    @property
    def nbytes(self) -> int:
        return self.position.nbytes + self.last.nbytes + self.unbroken.nbytes

    def resize(self, capacity: int) -> None:
        """Room for `capacity` slots, at least as many as are used."""
        for name, fill in (("position", -1), ("last", -1), ("unbroken", False)):
            old = getattr(self, name)
            new = np.full((self.rows, capacity), fill, old.dtype)
            kept = min(capacity, old.shape[1])
            new[:, :kept] = old[:, :kept]
            setattr(self, name, new)

    def forgotten(self, row: int, following: int) -> Numbers:
        """The slots whose key no query at a position >= `following` sees, ascending."""
        if self.soonest[row] >= following:
            return _NONE
        return (self.last[row, : self.count[row]] < following).nonzero()[0]

    def slot_of_one(self, position: int, last: int) -> int:
        """Where the one new token of a single row goes: a new slot, or that of the one key that it pushes out; -1 where
        more or less than that must happen. Nothing is changed.
        """
        count = self.count[0]
        if last < position:
            return -1
        if self.soonest[0] >= position:
            return count if count < self.capacity else -1
        free = (self.last[0, :count] < position).nonzero()[0]
        return int(free[0]) if free.size == 1 else -1

    def take_one(self, slot: int, position: int, last: int, unbroken: bool) -> None:
        """Enter a token into the slot that `slot_of_one` gave. The order of the writes is that of `take`."""
        count, last_of = self.count[0], self.last[0]
        fresh = slot == count
        gaps = self.gaps[0] - unbroken + (1 if fresh else bool(self.unbroken[0, slot]))
        self.position[0, slot] = position
        self.unbroken[0, slot] = unbroken
        last_of[slot] = last
        self.count[0] = count + fresh
        self.gaps[0] = gaps
        self.soonest[0] = min(self.soonest[0], last) if fresh else int(last_of[:count].min())

    def change(self, row: int, free: Numbers, last: Numbers, following: int) -> Change:
        """What gives up the slots `free` and takes in new tokens, as far as they are needed. Nothing is changed yet."""
        count = self.count[row]
        taken = np.flatnonzero(last >= following) if last.size != 1 or last[0] < following else _FIRST
        fresh = max(0, taken.size - free.size)
        slots = free[: taken.size] if not fresh else np.concatenate((free, np.arange(count, count + fresh)))
        holes = free[taken.size :]
        to = moved = _NONE
        count = count + fresh - holes.size
        if holes.size:
            to = holes[holes < count]
            tail = np.arange(count, count + holes.size)
            moved = tail[~np.isin(tail, holes)]
        return Change(to, moved, slots, taken, count)

    def take(self, row: int, change: Change, start: int, last: Numbers, unbroken: NDArray[np.bool_]) -> None:
        """Enter a change whose keys have been written: tokens at positions start, start + 1, ….

        `last` is written after `position`, and `count` after both: stopped anywhere, `live` still finds what was there.
        """
        for table in (self.position, self.unbroken, self.last):
            table[row, change.to] = table[row, change.moved]
        self.position[row, change.slots] = change.taken + start
        self.unbroken[row, change.slots] = unbroken[change.taken]
        self.last[row, change.slots] = last[change.taken]
        before, count = self.count[row], change.count
        self.count[row] = count
        if change.slots.size or count < before:
            self.soonest[row] = int(self.last[row, :count].min()) if count else FOREVER
            self.gaps[row] = count - int(np.count_nonzero(self.unbroken[row, :count]))

    def live(self, row: int, length: int) -> Numbers:
        """The slots of the first `length` tokens that some query at a position >= `length` sees, each token once."""
        count = self.count[row]
        slots = ((self.position[row, :count] < length) & (self.last[row, :count] >= length)).nonzero()[0]
        return np.sort(slots[np.unique(self.position[row, slots], return_index=True)[1]])

    def only(self, slots: list[Numbers]) -> Slots:
        """New tables with these slots of each row alone, from the left."""
        new = Slots(self.rows)
        new.resize(max(row.size for row in slots))
        for row, own in enumerate(slots):
            count = new.count[row] = own.size
            for name in ("position", "last", "unbroken"):
                getattr(new, name)[row, :count] = getattr(self, name)[row, own]
            if count:
                new.soonest[row] = int(new.last[row, :count].min())
            new.gaps[row] = count - int(np.count_nonzero(new.unbroken[row, :count]))
        return new

    def rows_of(self, rows: list[int]) -> Slots:
        """New tables with these rows, in this order, repeated or not."""
        new = Slots(len(rows))
        for name in ("position", "last", "unbroken"):
            setattr(new, name, getattr(self, name)[rows])
        for name in ("count", "soonest", "gaps"):
            setattr(new, name, [getattr(self, name)[row] for row in rows])
        return new


_NONE = np.zeros(0, np.int64)
_FIRST = np.zeros(1, np.int64)
