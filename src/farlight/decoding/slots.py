"""Which slot holds which position: the bookkeeping of a compact store, in numbers only, without the keys themselves.

The slots of a row are filled from the left without gaps. A new token takes the slot of a forgotten one (a ring, where tokens
are forgotten in the order in which they came); holes that stay are filled from the right end. Attention does not care in
which order keys lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farlight.patterns.future import FOREVER

__all__ = ["Change", "Numbers", "Slots"]

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Change:
    """What must happen to the stored keys of one row: slots `moved` to other slots, then new tokens `taken` into `slots`."""

    to: Numbers
    moved: Numbers
    slots: Numbers
    taken: Numbers


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

    def split(self, rows: int) -> None:
        """One row becomes `rows` equal ones."""
        for name in ("position", "last", "unbroken"):
            setattr(self, name, np.repeat(getattr(self, name), rows, 0))
        self.count, self.soonest, self.gaps = self.count * rows, self.soonest * rows, self.gaps * rows

    def forgotten(self, row: int, following: int) -> Numbers:
        """The slots whose key no query at a position >= `following` sees, ascending."""
        if self.soonest[row] >= following:
            return _NONE
        return (self.last[row, : self.count[row]] < following).nonzero()[0]

    def put_one(self, position: int, last: int, unbroken: bool) -> int:
        """`put` for the usual step of a single row: one new token, which takes a new slot or that of the one it pushes out.

        Gives that slot, -1 where more or less than that must happen: then nothing was done.
        """
        count, last_of = self.count[0], self.last[0]
        if last < position:
            return -1
        if self.soonest[0] >= position:
            slot = count
            if slot == self.capacity:
                return -1
            self.count[0] = count + 1
            self.gaps[0] += not unbroken
            self.soonest[0] = min(self.soonest[0], last)
            last_of[slot] = last
        else:
            free = (last_of[:count] < position).nonzero()[0]
            if free.size != 1:
                return -1
            slot = int(free[0])
            self.gaps[0] += bool(self.unbroken[0, slot]) - unbroken
            last_of[slot] = last
            self.soonest[0] = int(last_of[:count].min())
        self.position[0, slot] = position
        self.unbroken[0, slot] = unbroken
        return slot

    def put(self, row: int, free: Numbers, start: int, last: Numbers, unbroken: NDArray[np.bool_], following: int) -> Change:
        """Give up the slots `free` and take in the tokens at positions start, start + 1, …, as far as they are needed."""
        count = self.count[row]
        taken = np.flatnonzero(last >= following) if last.size != 1 or last[0] < following else _FIRST
        fresh = max(0, taken.size - free.size)
        slots = free[: taken.size] if not fresh else np.concatenate((free, np.arange(count, count + fresh)))
        holes = free[taken.size :]
        to = moved = _NONE
        self.count[row] = count = count + fresh - holes.size
        if holes.size:
            to = holes[holes < count]
            tail = np.arange(count, count + holes.size)
            moved = tail[~np.isin(tail, holes)]
            for table in (self.position, self.last, self.unbroken):
                table[row, to] = table[row, moved]
        self.position[row, slots] = taken + start
        self.last[row, slots] = last[taken]
        self.unbroken[row, slots] = unbroken[taken]
        if free.size or taken.size:
            self.soonest[row] = int(self.last[row, :count].min()) if count else FOREVER
            self.gaps[row] = count - int(np.count_nonzero(self.unbroken[row, :count]))
        return Change(to, moved, slots, taken)


_NONE = np.zeros(0, np.int64)
_FIRST = np.zeros(1, np.int64)
