"""Slot tables of a key store: the position that each slot holds and its last use. Integers only; keys and values are elsewhere.

Each row (a batch item, or one row for the whole batch) fills its slots 0 … count - 1 without gaps. New tokens are written to
the slots of expired keys first; where keys expire in order of arrival (windows) the row is a ring buffer. Slots that stay empty
are filled from the right end (compaction). Slots are in no order of position, on which attention does not depend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farlight.patterns.liveness import FOREVER

__all__ = ["IntArray", "SlotUpdate", "Slots"]

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class SlotUpdate:
    """The writes of one append to one row, in order: copy slots `move_from` to `move_to`, write new tokens, set the count.

    new_tokens: the indices, among the appended tokens, of those that are stored; write_to: their slots. Only slots of expired
    keys and slots from the old count on are overwritten. most: slots in use at any moment.
    """

    move_to: IntArray
    move_from: IntArray
    write_to: IntArray
    new_tokens: IntArray
    count: int
    most: int


class Slots:
    """Per-slot tables `(rows, capacity)` and per-row numbers (lists of length `rows`).

    position: int64, the position of the slot's key; last_use: int64, the last query position that sees it (FOREVER: no end);
    gapless: bool, whether every query from the key's own position to last_use sees it. Per row: count, slots in use;
    min_last_use, the smallest last_use in use, so that most steps find nothing expired without a scan; num_gapped, slots in use
    that are not gapless; horizon, 1 + the greatest last use of an evicted key. These four are the columns of `state`
    `(rows, 4)` int64, which the native append reads and writes.
    """

    _TABLES = (("position", -1), ("last_use", -1), ("gapless", False))

    def __init__(self, rows: int) -> None:
        self.position = np.full((rows, 0), -1, np.int64)
        self.last_use = np.full((rows, 0), -1, np.int64)
        self.gapless = np.zeros((rows, 0), np.bool_)
        self.state = np.tile(np.array([0, FOREVER, 0, 0], np.int64), (rows, 1))

    @property
    def rows(self) -> int:
        return len(self.state)

    @property
    def count(self) -> list[int]:
        """Slots in use in each row."""
        counts: list[int] = self.state[:, 0].tolist()
        return counts

    @property
    def capacity(self) -> int:
        return self.position.shape[1]

    @property
    def nbytes(self) -> int:
        return self.position.nbytes + self.last_use.nbytes + self.gapless.nbytes + self.state.nbytes

    def resize(self, capacity: int) -> None:
        """Reallocate the tables with `capacity` slots, at least as many as are in use."""
        for name, fill in self._TABLES:
            old = getattr(self, name)
            new = np.full((self.rows, capacity), fill, old.dtype)
            copied = min(capacity, old.shape[1])
            new[:, :copied] = old[:, :copied]
            setattr(self, name, new)

    def expired(self, row: int, position: int) -> IntArray:
        """The slots whose key no query at `position` or later sees, ascending."""
        if self.state[row, 1] >= position:
            return _EMPTY
        return (self.last_use[row, : self.state[row, 0]] < position).nonzero()[0]

    def every_slot_is_seen(self, row: int, position: int) -> bool:
        """Whether a query at `position` sees every slot in use: all gapless, none past its last use."""
        return bool(not self.state[row, 2] and self.state[row, 1] >= position >= 0)

    # ---- one token in one row: the fast path of a decoding step (decode.cpp has the native one) --------------------------
    def slot_for_token(self, position: int, last_use: int) -> int:
        """The slot for one new token of row 0: a new slot, or that of the only key expired before `position`. Changes nothing.

        -1 where this needs the general path: the token is not stored, several keys expired, or the capacity is used up.
        """
        count, min_last_use, _, _ = self.state[0].tolist()
        if last_use < position:
            return -1
        if min_last_use >= position:
            return count if count < self.capacity else -1
        expired = (self.last_use[0, :count] < position).nonzero()[0]
        return int(expired[0]) if expired.size == 1 else -1

    def write_token(self, slot: int, position: int, last_use: int, gapless: bool) -> None:
        """Enter one token into the slot of `slot_for_token`, in the order of writes of `commit`."""
        count, min_last_use, num_gapped, horizon = self.state[0].tolist()
        last_uses = self.last_use[0]
        is_new = slot == count
        horizon = horizon if is_new else max(horizon, int(last_uses[slot]) + 1)
        num_gapped += (1 if is_new else bool(self.gapless[0, slot])) - gapless
        self.position[0, slot] = position
        self.gapless[0, slot] = gapless
        last_uses[slot] = last_use
        min_last_use = min(min_last_use, last_use) if is_new else int(last_uses[:count].min())
        self.state[0] = count + is_new, min_last_use, num_gapped, horizon

    # ---- append ----------------------------------------------------------------------------------------------------------
    def plan(self, row: int, expired: IntArray, last_use: IntArray, position: int) -> SlotUpdate:
        """The update that frees the slots `expired` and stores those new tokens that a query at `position` or later sees.

        last_use: of the new tokens. Changes nothing.
        """
        count = self.count[row]
        new_tokens = np.flatnonzero(last_use >= position) if last_use.size != 1 or last_use[0] < position else _ZERO
        num_new_slots = max(0, new_tokens.size - expired.size)
        if num_new_slots:
            write_to = np.concatenate((expired, np.arange(count, count + num_new_slots)))
        else:
            write_to = expired[: new_tokens.size]
        holes = expired[new_tokens.size :]
        move_to = move_from = _EMPTY
        count = count + num_new_slots - holes.size
        if holes.size:
            move_to = holes[holes < count]
            tail = np.arange(count, count + holes.size)
            move_from = tail[~np.isin(tail, holes)]
        return SlotUpdate(move_to, move_from, write_to, new_tokens, count, max(count, int(self.state[row, 0])))

    def commit(self, row: int, update: SlotUpdate, start: int, last_use: IntArray, gapless: NDArray[np.bool_]) -> None:
        """Enter an update whose keys and values have been written; the new tokens have positions start, start + 1, ….

        `last_use` is written after `position`, and `count` after both: interrupted at any line, `live` still returns exactly
        the keys from before the append.
        """
        for table in (self.position, self.gapless, self.last_use):
            table[row, update.move_to] = table[row, update.move_from]
        self.position[row, update.write_to] = update.new_tokens + start
        self.gapless[row, update.write_to] = gapless[update.new_tokens]
        self.last_use[row, update.write_to] = last_use[update.new_tokens]
        old_count, count = int(self.state[row, 0]), update.count
        self.state[row, 0] = count
        if update.write_to.size or count < old_count:
            self._summarize(row)

    def raise_horizon(self, row: int, evicted: IntArray) -> None:
        """Enter that keys of these last uses are evicted from a row, or not stored."""
        self.state[row, 3] = max(int(self.state[row, 3]), int(evicted.max(initial=-1)) + 1)

    def _summarize(self, row: int) -> None:
        """Recompute min_last_use and num_gapped of a row from its tables."""
        count = int(self.state[row, 0])
        self.state[row, 1] = self.last_use[row, :count].min() if count else FOREVER
        self.state[row, 2] = count - np.count_nonzero(self.gapless[row, :count])

    def live(self, row: int, length: int, position: int) -> IntArray:
        """The slots of the first `length` tokens that some query at or after `position` sees, each token once.

        An interrupted compaction may leave a token in two slots.
        """
        count = self.count[row]
        slots = ((self.position[row, :count] < length) & (self.last_use[row, :count] >= position)).nonzero()[0]
        return np.sort(slots[np.unique(self.position[row, slots], return_index=True)[1]])

    def ring_order(self, position: int, step: int) -> IntArray | None:
        """The slots of row 0 in the order in which the keys of one residue mod `step` are neighbours; None where they are so
        already, or cannot be.

        Full rings only: m keys at consecutive positions, of which the next append evicts the oldest. Key p goes to the slot
        p · step⁻¹ mod m of the ring, its neighbour p - step to the slot before. Key p + m takes the same slot, so the order
        lasts. Keys without end keep their slots. position: of the newest key.
        """
        count, min_last_use, _, _ = self.state[0].tolist()
        ring = np.flatnonzero(self.last_use[0, :count] < FOREVER)
        size, held = ring.size, self.position[0, ring]
        if min_last_use > position or size < 2 * step or math.gcd(step, size) > 1 or held.max() - held.min() >= size:
            return None
        place = held * pow(step, -1, size) % size
        if bool((place == np.arange(size)).all()):
            return None
        order = np.arange(count)
        order[ring[place]] = ring
        return order

    def compacted(self, slots: list[IntArray]) -> Slots:
        """New tables of these slots of each row only."""
        new = Slots(self.rows)
        new.state[:, 3] = self.state[:, 3]
        new.resize(max(row_slots.size for row_slots in slots))
        for row, row_slots in enumerate(slots):
            count = new.state[row, 0] = row_slots.size
            for name, _ in self._TABLES:
                getattr(new, name)[row, :count] = getattr(self, name)[row, row_slots]
            new._summarize(row)
        return new

    def select_rows(self, rows: list[int]) -> Slots:
        """New tables of these rows, in this order; rows may repeat."""
        new = Slots(len(rows))
        for name in (*(name for name, _ in self._TABLES), "state"):
            setattr(new, name, getattr(self, name)[rows])
        return new


_EMPTY = np.zeros(0, np.int64)
_ZERO = np.zeros(1, np.int64)
