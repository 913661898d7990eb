"""`KeyStore`: the keys and values of the key heads under one eviction rule, in the slots of growing and shrinking pages."""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farlight.decoding.last_use import EvictionRule
from farlight.decoding.pages import Pages, quantize
from farlight.decoding.slots import Slots, SlotUpdate

__all__ = ["KeyStore"]

# A single page that grows token by token is allocated with 1 / _SLACK more slots than are in use.
_SLACK = 8


class KeyStore:
    """`Pages` of keys and values, `(B, key heads of the rule, slots, D)`, and the `Slots` that say what each slot holds.

    The slot table has one row where all batch items have the same tokens, else one row per item. Eviction happens on `append`:
    an evicted key's slot is overwritten by a new token or by compaction. keep_back: keys are evicted that many tokens later.
    """

    def __init__(self, rule: EvictionRule, pages: Pages, rows: int, keep_back: int) -> None:
        self.rule, self.pages, self.slots, self.keep_back = rule, pages, Slots(rows), keep_back
        heads = rule.kv_heads
        # A slice, hence a view, where the heads are adjacent, which they nearly always are.
        adjacent = heads == tuple(range(heads[0], heads[0] + len(heads)))
        self._heads: slice | list[int] = slice(heads[0], heads[0] + len(heads)) if adjacent else list(heads)

    @property
    def kept(self) -> int:
        """Slots in use, in the fullest row."""
        return max(self.slots.count)

    @property
    def horizon(self) -> int:
        """The length of text from which on nothing that a query sees is missing, whatever the pattern."""
        return int(self.slots.state[:, 3].max())

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes + self.slots.nbytes

    def read(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """K and V of the slots in use, `(B, key heads of the rule, kept, D)`."""
        return self.pages.read(self.kept, dtype)

    # ---- append ----------------------------------------------------------------------------------------------------------
    def append(self, k: Tensor, v: Tensor, start: list[int], new: list[int], columns: list[NDArray[np.int64]] | None) -> None:
        """Store tokens at positions start … start + new - 1 of each row; evict keys that no query from `start` on sees.

        k, v: `(B, H_kv, n, D)`; columns: for each row the columns of k and v that are its tokens (None: the first `new`).
        Interrupted at any line, `truncated(start)` restores the store from before the call.
        """
        slots = self.slots
        is_token = slots.rows == new[0] == 1 and columns is None
        if not (is_token and self._append_token(k, v, start[0])):
            self._append(k, v, start, new, columns)
        if is_token and self.pages.is_paged and self.rule.residue_step > 1:
            self._order_ring(start[0])

    def _append(self, k: Tensor, v: Tensor, start: list[int], new: list[int], columns: list[NDArray[np.int64]] | None) -> None:
        """`append`, whatever the tokens."""
        slots = self.slots
        oldest = [max(0, position - self.keep_back) for position in start]  # the first query that keys are kept for
        expired = [slots.expired(row, oldest[row]) for row in range(slots.rows)]
        liveness = [self.rule.liveness(row, start[row], start[row] + new[row]) for row in range(slots.rows)]
        updates = [slots.plan(row, expired[row], liveness[row][0], oldest[row]) for row in range(slots.rows)]
        needed = max(self.kept, *(update.most for update in updates))
        # Compaction reads the old slots, so the pages may not shrink before it.
        if needed > slots.capacity:
            # A prompt is allocated exactly; token-by-token growth gets slack, so that its copies are amortised.
            self._resize(needed if max(new) > self.kept or len(self.pages.pages) != 1 else needed + needed // _SLACK + 8)
        for row, evicted in enumerate(expired):
            slots.raise_horizon(row, slots.last_use[row, evicted])
            slots.raise_horizon(row, np.delete(liveness[row][0], updates[row].new_tokens))
        self._move(updates)
        self._write(k, v, updates, columns)
        for row, update in enumerate(updates):
            slots.commit(row, update, start[row], *liveness[row])
        if slots.capacity > self.kept + self.kept // (_SLACK // 2) + 32:
            self._resize(self.kept + self.kept // _SLACK + 8)

    def _append_token(self, k: Tensor, v: Tensor, position: int) -> bool:
        """Append one token of one row where that is one write to one page that is not shared; else False."""
        slots, pages = self.slots, self.pages
        liveness, gapless = self.rule.liveness(0, position, position + 1)
        last_use = int(liveness[0])
        slot = slots.slot_for_token(max(0, position - self.keep_back), last_use)
        if slot < 0:
            return False
        page = pages.pages[slot >> pages.shift]
        if page.is_shared:
            return False
        for to, x in zip(page.arrays, self._stored(k, v), strict=True):
            to.narrow(2, slot & ((1 << pages.shift) - 1), 1).copy_(x)
        slots.write_token(slot, position, last_use, bool(gapless[0]))
        return True

    def _order_ring(self, position: int) -> None:
        """Order a full ring by residues, so that a step of a dilated window reads runs of slots. Once: the order lasts."""
        order = self.slots.ring_order(max(0, position - self.keep_back), self.rule.residue_step)
        if order is None:
            return
        pages, slots = self.pages.compacted(order), self.slots.compacted([order])
        slots.resize(pages.capacity)
        # One call, so that no signal handler runs between these assignments.
        vars(self).update(pages=pages, slots=slots)

    def _stored(self, k: Tensor, v: Tensor) -> list[Tensor]:
        """What the arrays of a page hold of the stored heads of k and v: themselves, or codes and scales."""
        k, v = (x if len(self.rule.kv_heads) == x.shape[1] else x[:, self._heads] for x in (k, v))
        if self.pages.dtype != torch.int8:
            return [k, v]
        (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
        return [k, v, k_scale, v_scale]

    def _resize(self, capacity: int) -> None:
        self.pages.resize(capacity)
        self.slots.resize(self.pages.capacity)

    def _move(self, updates: list[SlotUpdate]) -> None:
        """Compaction: the copies `move_from` to `move_to` of every row."""
        if not any(update.move_to.size for update in updates):
            return
        target, source = (np.concatenate([getattr(u, name) for u in updates]) for name in ("move_to", "move_from"))
        row = None if len(updates) == 1 else _row_ids([update.move_to for update in updates])
        self.pages.write(target, self.pages.gather(source, row), row)

    def _write(self, k: Tensor, v: Tensor, updates: list[SlotUpdate], columns: list[NDArray[np.int64]] | None) -> None:
        """Write the stored ones of the new tokens to their slots."""
        tokens = [u.new_tokens if columns is None else columns[row][u.new_tokens] for row, u in enumerate(updates)]
        write_to = np.concatenate([update.write_to for update in updates])
        if not write_to.size:
            return
        if len(updates) > 1:
            row = _row_ids(tokens)
            index, column = (torch.from_numpy(ids).to(k.device) for ids in (row, np.concatenate(tokens)))
            self.pages.write(write_to, [x[index, :, column] for x in self._stored(k, v)], row)
        else:
            # One row: every batch item has its tokens in the same columns, possibly not in all of them.
            column = torch.from_numpy(tokens[0]).to(k.device)
            k, v = (x if tokens[0].size == x.shape[2] else x[:, :, column] for x in (k, v))
            self.pages.write(write_to, self._stored(k, v))

    # ---- copies ----------------------------------------------------------------------------------------------------------
    def select(self, items: Tensor) -> KeyStore:
        """A store of these batch items, in this order; items may repeat."""
        slots = self.slots if self.slots.rows == 1 else self.slots.select_rows(items.tolist())
        return self._with(self.pages.select(items), slots)

    def with_rows(self, rows: int) -> KeyStore:
        """This store with one slot row per batch item; a shared row is repeated `rows` times."""
        return self if self.slots.rows == rows else self._with(self.pages, self.slots.select_rows([0] * rows))

    def fork(self) -> KeyStore:
        """A store of the same keys, which shares the pages that neither store writes."""
        new = self._with(self.pages.fork(), self.slots.select_rows(list(range(self.slots.rows))))
        new.rule = copy.copy(self.rule)
        return new

    def truncated(self, lengths: list[int]) -> KeyStore:
        """A new store of those of the first `lengths[row]` tokens of each row that a later query sees."""
        live = [self.slots.live(row, length, max(0, length - self.keep_back)) for row, length in enumerate(lengths)]
        pages = self.pages.compacted(live[0] if len(live) == 1 else live)
        slots = self.slots.compacted(live)
        slots.resize(pages.capacity)
        for row, length in enumerate(lengths):
            last_use = self.slots.last_use[row, : self.slots.count[row]]
            slots.raise_horizon(row, last_use[last_use < length])
        return self._with(pages, slots)

    def cropped(self, lengths: list[int]) -> KeyStore:
        """`truncated` of a store that no exception interrupted: copies the pages that it changes only."""
        new = self.fork()
        slots, updates = new.slots, []
        for row, length in enumerate(lengths):
            count = slots.count[row]
            position, last_use = slots.position[row, :count], slots.last_use[row, :count]
            dead = last_use < max(0, length - self.keep_back)
            slots.raise_horizon(row, last_use[dead & (position < length)])
            nothing = np.zeros(0, np.int64)
            updates.append(slots.plan(row, np.flatnonzero(dead | (position >= length)), nothing, 0))
        new._move(updates)
        for row, update in enumerate(updates):
            slots.commit(row, update, 0, np.zeros(0, np.int64), np.zeros(0, np.bool_))
        new._resize(new.kept)
        return new

    def missing(self, lengths: list[int]) -> bool:
        """Whether a key that a query at a position >= `lengths[row]` sees, of those before, has been evicted."""
        if self.horizon <= min(lengths):
            return False
        rule = copy.copy(self.rule)
        for row, length in enumerate(lengths):
            last_use, _ = rule.liveness(row, 0, length)
            count = self.slots.count[row]
            if np.setdiff1d(np.flatnonzero(last_use >= length), self.slots.position[row, :count]).size:
                return True
        return False

    def _with(self, pages: Pages, slots: Slots) -> KeyStore:
        new = copy.copy(self)
        new.pages, new.slots = pages, slots
        return new


def _row_ids(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The row of each entry of the concatenated parts."""
    return np.repeat(np.arange(len(parts)), [part.size for part in parts])
