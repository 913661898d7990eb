"""Until when a key is needed: the last query position that sees it.

A text grows; a cache must know which keys no later query can see. The question goes to the specification itself. Every atom
says where the column of a key may change and with which period (`Atom._changes`). Between two such places the column repeats
itself, so asking `_allows` just before each of them, and once after the last, finds the last query that sees the key: for any
expression, over an endless text, without visiting it. Nothing here knows what a cache is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.errors import PatternError
from farlight.patterns.algebra import Complement, Difference, Intersection, PerHead, Union
from farlight.patterns.expression import Atom, Changes, Pattern, Sizes
from farlight.patterns.positional import full

__all__ = ["FOREVER", "Sight", "for_head", "last_seen", "sizes_of_future"]

FOREVER = 2**62
# The length of a text without end: further than any position, and sums of such still fit into int64.
_ENDLESS = 2**41
# Strides are followed together up to this common multiple; beyond it the longest are taken to see everything.
_LONGEST_PERIOD = 2**16
# Columns that may change anywhere are followed in texts up to this length; in longer ones, and in those without end, only so
# far back from the last position that could see the key.
_LONGEST_FOLLOWED = 2**24
_LONGEST_SCAN = 2**16
# Pairs asked at a time.
_PAIRS = 2**21


@dataclass(frozen=True)
class Sight:
    """`last`: the last position that sees each key, FOREVER where there is none, -1 where nobody sees it.

    `unbroken`: every query from the key's own position to that last one sees it (False where that was not shown).
    """

    last: Tensor
    unbroken: Tensor


def sizes_of_future(pattern: Pattern, length: int | None, *, batch: int = 1, heads: int = 1) -> Sizes:
    """The sizes under which the whole text is asked about: `length` tokens, or no end.

    Raises PatternError when there is no end and the pattern means something only in a text of known length.
    """
    if length is None:
        for atom in pattern.atoms():
            why = atom._needs_length()
            if why is not None:
                raise PatternError(
                    f"{why}, but this text has no known length: which keys a later token may see cannot be told. Give "
                    "max_length=…, the length that the text will have at most, or a pattern that (i, j) alone decides."
                )
        # Lists shorter than the text always fit; what must agree with its length was refused above.
        return Sizes(_ENDLESS, _ENDLESS, 0, batch, heads)
    sizes = Sizes.of(length, batch=batch, heads=heads)
    pattern.check(sizes)
    return sizes


def for_head(pattern: Pattern, head: int) -> Pattern:
    """The pattern with every choice by head made."""
    if isinstance(pattern, PerHead):
        return for_head(pattern.parts[head], head)
    if isinstance(pattern, (Union, Intersection, Difference, Complement)):
        return type(pattern)(tuple(for_head(part, head) for part in pattern.parts))
    return pattern


def last_seen(pattern: Pattern, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> Sight:
    """When each key `(batch item b, head h, position j)` is seen for the last time; 1-D int64 tensors, one head.

        last(j) = max { i : the pair (i, j) is allowed }

    Exact, with exceptions that may keep a key longer than needed, never shorter. In a text without end (or of more than 2^24
    tokens) random keys are taken to be drawn again some day, which comes true with probability 1, unless the rest of the
    expression ends within 65 536 tokens. Strides whose least common multiple exceeds 65 536 are not followed together.

    >>> import torch, farlight as fl
    >>> pattern = fl.causal() & (fl.window(3) | fl.seen_by_all([0]))
    >>> zero, j = torch.zeros(3, dtype=torch.int64), torch.arange(3)
    >>> last_seen(pattern, sizes_of_future(pattern, None), zero, zero, j).last.tolist()[1:]
    [4, 5]
    """
    changes = [atom._changes(sizes, b, h, j) for atom in pattern.atoms()]
    ignored = _ignored(pattern, changes, sizes)
    if ignored:
        return _with_ignored(pattern, ignored, sizes, b, h, j)
    if any(change.every for change in changes):
        return Sight(_scan(pattern, sizes, b, h, j, torch.full_like(j, sizes.n_k - 1)), torch.zeros_like(j, dtype=torch.bool))
    period = math.lcm(*(change.period for change in changes))
    at = [change.at for change in changes if change.at is not None]
    # The text has an end, where every column stops, and a beginning.
    at.append(torch.full_like(j, sizes.n_k if sizes.n_k < _ENDLESS else 0)[:, None])
    table = torch.cat(at, 1).clamp(0, sizes.n_k)
    table = table.sort(1, descending=True).values
    step = max(1, _PAIRS // period)
    parts = [
        _by_changes(pattern, sizes, b[part], h[part], j[part], table[part], period)
        for part in (slice(start, start + step) for start in range(0, max(1, j.numel()), step))
    ]
    return Sight(torch.cat([p.last for p in parts]), torch.cat([p.unbroken for p in parts]))


def _asked(pattern: Pattern, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """`(keys, m)`: whether key j is seen by each query position in its row of i; positions outside the text never see."""
    seen = pattern._allows(sizes, b[:, None], h[:, None], i, j[:, None]).expand(i.shape)
    return seen & (i >= 0) & (i < sizes.n_k)


def _by_changes(pattern: Pattern, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor, table: Tensor, period: int) -> Sight:
    """`table` `(keys, m)`: where each column changes, from the last to the first."""
    steps = torch.arange(period, device=j.device)
    last = torch.full_like(j, -1)
    unbroken = torch.ones_like(j, dtype=torch.bool)
    if sizes.n_k == _ENDLESS:
        tail = _asked(pattern, sizes, b, h, table[:, :1] + steps, j)
        last[tail.any(1)] = FOREVER
        # A key that stands behind its last change has only the tail to look at; asking all of it asks a little too much.
        unbroken &= ~tail.any(1) | tail.all(1)
    for m in range(table.shape[1]):
        open_ = (last < 0).nonzero().squeeze(1)
        if not open_.numel():
            break
        i = table[open_, m, None] - 1 - steps
        seen = _asked(pattern, sizes, b[open_], h[open_], i, j[open_])
        first = seen.int().argmax(1)
        found = seen.any(1)
        last[open_[found]] = i[found].gather(1, first[found, None]).squeeze(1)
    # Every stretch between the key and its last query ends at a change or at that query: ask each stretch's last period.
    for m in range(-1, table.shape[1]):
        rows = (unbroken & (last >= j)).nonzero().squeeze(1)
        if not rows.numel():
            break
        end = table[rows, m] if m >= 0 else torch.where(last[rows] < FOREVER, last[rows] + 1, 0)
        i = end[:, None] - 1 - steps
        matters = (i >= j[rows, None]) & (i <= last[rows, None])
        unbroken[rows] = (_asked(pattern, sizes, b[rows], h[rows], i, j[rows]) | ~matters).all(1)
    return Sight(last, unbroken & (last >= j))


def _scan(pattern: Pattern, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor, top: Tensor) -> Tensor:
    """The last position <= top that sees each key, asking every one."""
    last = torch.full_like(j, -1)
    top, width = top.clone(), 32
    waiting = (top >= 0).nonzero().squeeze(1)
    while waiting.numel():
        rows = waiting[: max(1, _PAIRS // width)]
        i = top[rows, None] - torch.arange(width, device=j.device)
        seen = _asked(pattern, sizes, b[rows], h[rows], i, j[rows])
        found = seen.any(1)
        last[rows[found]] = i[found].gather(1, seen[found].int().argmax(1)[:, None]).squeeze(1)
        top[rows] -= width
        if rows.numel() == waiting.numel():
            width = min(2 * width, 4096)
        done = last[rows] >= 0
        waiting = torch.cat((waiting[rows.numel() :], rows[~done & (top[rows] >= 0)]))
    return last


# ---- what is not followed exactly -----------------------------------------------------------------------------------------
def _ignored(pattern: Pattern, changes: list[Changes], sizes: Sizes) -> set[Atom]:
    """The atoms whose columns are not followed: random ones in an endless text, and strides with too long a period."""
    atoms = list(pattern.atoms())
    out = {atom for atom, change in zip(atoms, changes, strict=True) if change.every and sizes.n_k > _LONGEST_FOLLOWED}
    periods = {atom: change.period for atom, change in zip(atoms, changes, strict=True)}
    while math.lcm(*(periods[atom] for atom in periods.keys() - out)) > _LONGEST_PERIOD:
        out.add(max(periods.keys() - out, key=periods.__getitem__))
    return out


def _with_ignored(pattern: Pattern, ignored: set[Atom], sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> Sight:
    """At most as long as if the ignored atoms saw whatever would let the key be seen; exact below that where few ask."""
    bound = last_seen(at_most(pattern, ignored), sizes, b, h, j).last
    near = (bound < FOREVER) & (bound - j <= _LONGEST_SCAN)
    last = bound.clone()
    last[near] = _scan(pattern, sizes, b[near], h[near], j[near], bound[near])
    return Sight(last, torch.zeros_like(near))


def at_most(pattern: Pattern, ignored: set[Atom]) -> Pattern:
    """A pattern without the ignored atoms that allows every pair which `pattern` allows."""

    def bound(part: Pattern, above: bool) -> Pattern:
        if isinstance(part, Atom):
            return part if part not in ignored else full() if above else ~full()
        if isinstance(part, Complement):
            return Complement((bound(part.parts[0], not above),))
        if isinstance(part, Difference):
            return Difference((bound(part.parts[0], above), bound(part.parts[1], not above)))
        assert isinstance(part, (Union, Intersection, PerHead))
        return type(part)(tuple(bound(p, above) for p in part.parts))

    return bound(pattern, True)
