"""Eviction rules: the last use of each key, evaluated by `last_use` for chunks of future positions and served token by token.

A key may be evicted at step t when no query at position >= t sees it. Grouped query heads share a key head, whose keys live as
long as any of these query heads needs them. Key heads whose query heads have equal patterns share one rule, and with it one
store, one slot table and one mask.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray

from farlight.decoding.visibility import Program, compile_program
from farlight.patterns.expression import Pattern, Sizes
from farlight.patterns.liveness import LastUse, for_head, last_use
from farlight.patterns.positional import strided, window

__all__ = ["EvictionRule", "eviction_rules"]

# Positions evaluated at a time: without an end of the text, and below a known max_length.
_CHUNK = 1024
_CHUNK_KNOWN_LENGTH = 2**16


class EvictionRule:
    """The last use of the keys of some key heads.

    kv_heads: the key heads under this rule; heads: the query heads that read them, in order; pattern: what those queries see.
    The tables `_last_use` (int64) and `_gapless` (bool) `(items, n)` hold positions _start … _stop - 1; items is the batch size
    where the pattern differs between batch items, else 1.
    """

    def __init__(
        self, pattern: Pattern, sizes: Sizes, kv_heads: tuple[int, ...], heads: tuple[int, ...], endless: bool
    ) -> None:
        self.kv_heads, self.heads = kv_heads, heads
        self.sizes, self.endless = sizes, endless
        # One evaluation for query heads of one group with equal patterns.
        distinct: dict[object, tuple[Pattern, int]] = {}
        for head in heads[: len(heads) // len(kv_heads)]:
            head_pattern = for_head(pattern, head)
            distinct.setdefault((head_pattern.key, _table_indices(head_pattern, sizes, head)), (head_pattern, head))
        self._head_patterns = list(distinct.values())
        patterns = {head_pattern for head_pattern, _ in self._head_patterns}
        self.pattern = patterns.pop() if len(patterns) == 1 else pattern
        varies = any(head_pattern.varies_over_batch for head_pattern, _ in self._head_patterns)
        self.items = sizes.batch if varies else 1
        self._start = self._stop = 0
        self._last_use = np.zeros((self.items, 0), np.int64)
        self._gapless = np.zeros((self.items, 0), np.bool_)

    def liveness(self, item: int, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(last_use, gapless) of the keys at positions start … stop - 1 in one batch item, each `(stop - start,)`."""
        if start < self._start:  # the text was cropped to a position before the tables
            empty = self._last_use[:, :0], self._gapless[:, :0]
            vars(self).update(_last_use=empty[0], _gapless=empty[1], _start=start, _stop=start)
        if stop > self._stop:
            self._extend(stop)
        window = slice(start - self._start, stop - self._start)
        item = item if self.items > 1 else 0
        return self._last_use[item, window], self._gapless[item, window]

    def tables(self) -> tuple[NDArray[np.int64], NDArray[np.bool_], int, int]:
        """(last_use, gapless, start, stop) of the positions start … stop - 1 that are evaluated, of the first batch item."""
        return self._last_use[0], self._gapless[0], self._start, self._stop

    @functools.cached_property
    def program(self) -> Program | None:
        """What the queries see, for the native kernels; None where the pattern has no such form."""
        return compile_program(self.pattern, self.sizes)

    @functools.cached_property
    def residue_step(self) -> int:
        """The largest dilation or stride of the pattern: a query sees mostly keys of its own residue by it; 1: none."""
        steps = [1]
        for atom in self.pattern.atoms():
            if isinstance(atom, window):
                steps.append(atom.dilation)
            elif isinstance(atom, strided) and atom.phase is None:
                steps.append(atom.stride)
        return max(steps)

    def discard_before(self, position: int) -> None:
        """Drop table entries before `position`, which no later call reads; amortised over 2048 positions."""
        if position - self._start > 2 * _CHUNK:
            offset = position - self._start
            last_use, gapless = self._last_use[:, offset:].copy(), self._gapless[:, offset:].copy()
            # One call, so that no signal handler runs between the tables and their bounds.
            vars(self).update(_last_use=last_use, _gapless=gapless, _start=position)

    def _extend(self, stop: int) -> None:
        """Evaluate the positions up to `stop`, and the rest of their chunk."""
        chunk = _CHUNK if self.endless else _CHUNK_KNOWN_LENGTH
        stop = min(max(stop, self._stop + chunk), self.sizes.n_k)
        j = torch.arange(self._stop, stop, device="cpu").repeat(self.items)
        b = torch.arange(self.items, device="cpu").repeat_interleave(stop - self._stop)
        by_head = [last_use(pattern, self.sizes, b, torch.full_like(j, head), j) for pattern, head in self._head_patterns]
        last = torch.stack([use.last for use in by_head]).amax(0)
        # Where one head's last use is before the group's, its later queries do not see the key.
        gapless = torch.stack([_gapless_until(use, last) for use in by_head]).all(0)
        shape = (self.items, -1)
        all_last_use = np.concatenate((self._last_use, last.view(shape).numpy()), 1)
        all_gapless = np.concatenate((self._gapless, gapless.view(shape).numpy()), 1)
        vars(self).update(_last_use=all_last_use, _gapless=all_gapless, _stop=stop)


def _gapless_until(use: LastUse, last: torch.Tensor) -> torch.Tensor:
    return use.unbroken & (use.last == last)


def _table_indices(pattern: Pattern, sizes: Sizes, head: int) -> tuple[tuple[int, ...], ...]:
    """Which tables of its atoms the pattern reads for this head; equal for two heads that see the same links."""
    indices = []
    for atom in pattern.atoms():
        table = atom._variation(sizes)
        indices.append(tuple(table[:, head if table.shape[1] > 1 else 0].tolist()))
    return tuple(indices)


def eviction_rules(pattern: Pattern, sizes: Sizes, kv_heads: int, endless: bool) -> list[EvictionRule]:
    """The distinct rules of the key heads; each key head is under exactly one. endless: the text has no max_length."""
    group = sizes.heads // kv_heads
    members_of: dict[object, list[int]] = {}
    for kv_head in range(kv_heads):
        by_head = [(head, for_head(pattern, head)) for head in range(kv_head * group, (kv_head + 1) * group)]
        key = tuple((head_pattern.key, _table_indices(head_pattern, sizes, head)) for head, head_pattern in by_head)
        members_of.setdefault(key, []).append(kv_head)
    rules = []
    for members in members_of.values():
        heads = tuple(head for member in members for head in range(member * group, (member + 1) * group))
        rules.append(EvictionRule(pattern, sizes, tuple(members), heads, endless))
    return rules
