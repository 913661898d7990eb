"""When each key may be forgotten: the answers of `last_use`, asked ahead of time in bulk and handed out token by token.

Heads that share one head of keys (grouped queries) need a key for as long as any of them does. Heads of keys whose queries
follow equal patterns obey one rule and share everything that is derived from it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from farlight.patterns.expression import Pattern, Sizes
from farlight.patterns.liveness import LastUse, for_head, last_use

__all__ = ["Rule", "rules"]

# Positions asked about at a time.
_AHEAD = 1024
_AHEAD_KNOWN_LENGTH = 2**16


class Rule:
    """Until when the keys of some heads are needed.

    `kv_heads` obey it; `heads` are the query heads that read them, in order; `pattern` is what those follow.
    """

    def __init__(
        self, pattern: Pattern, sizes: Sizes, kv_heads: tuple[int, ...], heads: tuple[int, ...], endless: bool
    ) -> None:
        self.kv_heads, self.heads = kv_heads, heads
        self.sizes, self.endless = sizes, endless
        asked: dict[object, tuple[Pattern, int]] = {}
        for head in heads[: len(heads) // len(kv_heads)]:
            own = for_head(pattern, head)
            asked.setdefault((own.key, _variation(own, sizes, head)), (own, head))
        self._asked = list(asked.values())
        alike = {own for own, _ in self._asked}
        self.pattern = alike.pop() if len(alike) == 1 else pattern
        self.items = sizes.batch if any(own.varies_over_batch for own, _ in self._asked) else 1
        self._start = self._stop = 0
        self._last = np.zeros((self.items, 0), np.int64)
        self._unbroken = np.zeros((self.items, 0), np.bool_)

    def sight(self, item: int, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(last, unbroken) of the keys at positions start … stop - 1 in one batch item."""
        if stop > self._stop:
            self._ask(stop)
        at = slice(start - self._start, stop - self._start)
        item = item if self.items > 1 else 0
        return self._last[item, at], self._unbroken[item, at]

    def drop_before(self, position: int) -> None:
        """Nothing before `position` will be asked for again."""
        if position - self._start > 2 * _AHEAD:
            at = position - self._start
            last, unbroken = self._last[:, at:].copy(), self._unbroken[:, at:].copy()
            # One call, which no signal divides: tables that do not match their bounds would tell lies.
            vars(self).update(_last=last, _unbroken=unbroken, _start=position)

    def _ask(self, stop: int) -> None:
        ahead = _AHEAD if self.endless else _AHEAD_KNOWN_LENGTH
        stop = min(max(stop, self._stop + ahead), self.sizes.n_k)
        j = torch.arange(self._stop, stop, device="cpu").repeat(self.items)
        b = torch.arange(self.items, device="cpu").repeat_interleave(stop - self._stop)
        found = [last_use(own, self.sizes, b, torch.full_like(j, head), j) for own, head in self._asked]
        last = torch.stack([one.last for one in found]).amax(0)
        # One head's view may end before another's: then some query sees a gap.
        unbroken = torch.stack([_whole(one, last) for one in found]).all(0)
        shape = (self.items, -1)
        last_seen_by = np.concatenate((self._last, last.view(shape).numpy()), 1)
        vars(self).update(
            _last=last_seen_by, _unbroken=np.concatenate((self._unbroken, unbroken.view(shape).numpy()), 1), _stop=stop
        )


def _whole(one: LastUse, last: torch.Tensor) -> torch.Tensor:
    return one.unbroken & (one.last == last)


def _variation(pattern: Pattern, sizes: Sizes, head: int) -> tuple[tuple[int, ...], ...]:
    """Equal for two heads that see the same links of one pattern."""
    found = []
    for atom in pattern.atoms():
        table = atom._variation(sizes)
        found.append(tuple(table[:, head if table.shape[1] > 1 else 0].tolist()))
    return tuple(found)


def rules(pattern: Pattern, sizes: Sizes, kv_heads: int, endless: bool) -> list[Rule]:
    """The distinct rules of the heads of keys; each head of keys obeys one."""
    group = sizes.heads // kv_heads
    alike: dict[object, list[int]] = {}
    for kv_head in range(kv_heads):
        each = [(head, for_head(pattern, head)) for head in range(kv_head * group, (kv_head + 1) * group)]
        alike.setdefault(tuple((own.key, _variation(own, sizes, head)) for head, own in each), []).append(kv_head)
    out = []
    for members in alike.values():
        heads = tuple(head for member in members for head in range(member * group, (member + 1) * group))
        out.append(Rule(pattern, sizes, tuple(members), heads, endless))
    return out
