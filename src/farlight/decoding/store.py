"""`KeyStore`: the keys and values of the key heads under one eviction rule, in slots of a growing and shrinking buffer."""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farlight.decoding.last_use import EvictionRule
from farlight.decoding.slots import Slots, SlotUpdate

__all__ = ["KeyStore"]

# A buffer that grows token by token is allocated with 1 / _SLACK more slots than are in use.
_SLACK = 8


class KeyStore:
    """Buffers k and v, `(B, key heads of the rule, capacity, D)`, and the `Slots` that say what each slot holds.

    The slot table has one row where all batch items have the same tokens, else one row per item. Eviction happens on `append`:
    an evicted key's slot is overwritten by a new token or by compaction. Each step costs O(1) tensor writes and O(count)
    integer comparisons at most; a reallocation copies the buffer and is amortised over count / 8 steps.
    """

    def __init__(self, rule: EvictionRule, like: Tensor, rows: int) -> None:
        self.rule, self.slots = rule, Slots(rows)
        shape = (like.shape[0], len(rule.kv_heads), 0, like.shape[3])
        self.k, self.v = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        heads = rule.kv_heads
        # A slice, hence a view, where the heads are adjacent, which they nearly always are.
        adjacent = heads == tuple(range(heads[0], heads[0] + len(heads)))
        self._heads: slice | list[int] = slice(heads[0], heads[0] + len(heads)) if adjacent else list(heads)

    @property
    def kept(self) -> int:
        """Slots in use, in the fullest row."""
        return max(self.slots.count)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes + self.slots.nbytes

    def append(self, k: Tensor, v: Tensor, start: list[int], new: list[int], columns: list[NDArray[np.int64]] | None) -> None:
        """Store tokens at positions start … start + new - 1 of each row; evict keys that no query from `start` on sees.

        k, v: `(B, H_kv, n, D)`; columns: for each row the columns of k and v that are its tokens (None: the first `new`).
        Interrupted at any line, `truncated(start)` restores the store from before the call.
        """
        slots = self.slots
        if slots.rows == new[0] == 1 and columns is None:
            last_use, gapless = self.rule.liveness(0, start[0], start[0] + 1)
            slot = slots.slot_for_token(start[0], int(last_use[0]))
            if slot >= 0:
                self.k.narrow(2, slot, 1).copy_(self._stored_heads(k))
                self.v.narrow(2, slot, 1).copy_(self._stored_heads(v))
                slots.write_token(slot, start[0], int(last_use[0]), bool(gapless[0]))
                return
        expired = [slots.expired(row, start[row]) for row in range(slots.rows)]
        liveness = [self.rule.liveness(row, start[row], start[row] + new[row]) for row in range(slots.rows)]
        needed = max(slots.count[row] - expired[row].size + new[row] for row in range(slots.rows))
        # Compaction reads the old slots, so the buffer may not shrink before it.
        if max(needed, self.kept) > slots.capacity:
            # A prompt is allocated exactly; token-by-token growth gets slack, so that its copies are amortised.
            size = max(needed, self.kept)
            self._resize(size if max(new) > self.kept else size + size // _SLACK + 8)
        updates = [slots.plan(row, expired[row], liveness[row][0], start[row]) for row in range(slots.rows)]
        self._move(updates)
        self._write(k, v, updates, columns)
        for row, update in enumerate(updates):
            slots.commit(row, update, start[row], *liveness[row])
        if slots.capacity > self.kept + self.kept // (_SLACK // 2) + 32:
            self._resize(self.kept + self.kept // _SLACK + 8)

    def select(self, items: Tensor) -> KeyStore:
        """A store of these batch items, in this order; items may repeat."""
        slots = self.slots if self.slots.rows == 1 else self.slots.select_rows(items.tolist())
        return self._with(self.k.index_select(0, items), self.v.index_select(0, items), slots)

    def with_rows(self, rows: int) -> KeyStore:
        """This store with one slot row per batch item; a shared row is repeated `rows` times."""
        return self if self.slots.rows == rows else self._with(self.k, self.v, self.slots.select_rows([0] * rows))

    def truncated(self, lengths: list[int]) -> KeyStore:
        """A new store of those of the first `lengths[row]` tokens of each row that a later query sees."""
        live = [self.slots.live(row, length) for row, length in enumerate(lengths)]
        slots = self.slots.compacted(live)
        if len(live) == 1:
            k, v = (x[:, :, torch.from_numpy(live[0]).to(x.device)] for x in (self.k, self.v))
        else:
            k, v = (x.new_zeros(*x.shape[:2], slots.capacity, x.shape[3]) for x in (self.k, self.v))
            row, old_slot = _row_ids(live, k.device), _concat(live, k.device)
            new_slot = _concat([np.arange(row_slots.size) for row_slots in live], k.device)
            for new, old in ((k, self.k), (v, self.v)):
                new[row, :, new_slot] = old[row, :, old_slot]
        return self._with(k, v, slots)

    def _with(self, k: Tensor, v: Tensor, slots: Slots) -> KeyStore:
        new = copy.copy(self)
        new.k, new.v, new.slots = k, v, slots
        return new

    def _stored_heads(self, x: Tensor) -> Tensor:
        """The key heads of x that are stored here."""
        return x if len(self.rule.kv_heads) == x.shape[1] else x[:, self._heads]

    def _resize(self, capacity: int) -> None:
        copied = min(self.k.shape[2], capacity)
        for name in ("k", "v"):
            old = getattr(self, name)
            # Zeros: unused slots of shorter rows are multiplied by weight 0, which would not remove a NaN.
            new = old.new_zeros((*old.shape[:2], capacity, old.shape[3]))
            new[:, :, :copied] = old[:, :, :copied]
            setattr(self, name, new)
        self.slots.resize(capacity)

    def _move(self, updates: list[SlotUpdate]) -> None:
        """Compaction: the copies `move_from` to `move_to` of every row."""
        if not any(update.move_to.size for update in updates):
            return
        for x in (self.k, self.v):
            if len(updates) == 1:
                target, source = (torch.from_numpy(ids).to(x.device) for ids in (updates[0].move_to, updates[0].move_from))
                x[:, :, target] = x[:, :, source]
            else:
                row = _row_ids([update.move_to for update in updates], x.device)
                target = _concat([update.move_to for update in updates], x.device)
                source = _concat([update.move_from for update in updates], x.device)
                x[row, :, target] = x[row, :, source]

    def _write(self, k: Tensor, v: Tensor, updates: list[SlotUpdate], columns: list[NDArray[np.int64]] | None) -> None:
        """Write the stored ones of the new tokens to their slots."""
        tokens = [u.new_tokens if columns is None else columns[row][u.new_tokens] for row, u in enumerate(updates)]
        for buffer, appended in ((self.k, k), (self.v, v)):
            x, device = self._stored_heads(appended), buffer.device
            if len(updates) > 1:
                row, slots = _row_ids(tokens, device), _concat([u.write_to for u in updates], device)
                buffer[row, :, slots] = x[row, :, _concat(tokens, device)]
            elif tokens[0].size:
                # One row: every batch item has its tokens in the same columns, possibly not in all of them.
                slots, column = (torch.from_numpy(ids).to(device) for ids in (updates[0].write_to, tokens[0]))
                buffer[:, :, slots] = x if tokens[0].size == x.shape[2] else x[:, :, column]


def _concat(parts: list[NDArray[np.int64]], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(device)


def _row_ids(parts: list[NDArray[np.int64]], device: torch.device) -> Tensor:
    """The row of each entry of the concatenated parts."""
    return torch.from_numpy(np.repeat(np.arange(len(parts)), [part.size for part in parts])).to(device)
