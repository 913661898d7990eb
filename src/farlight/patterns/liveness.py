"""Liveness of keys: the last query position that a key is allowed to, for the eviction of KV caches.

    last(j) = max { i : the pair (i, j) is allowed }

The query positions of one key are a column of the pattern. For each primitive `_column_changes` gives the positions at which
the column may change, and its period (see `forms.ColumnChanges`). Between two changes the column of the whole expression is
periodic, with the least common multiple of the periods. So the last allowed query is found by evaluating the specification
`_allows` on the last period before each change, from the last change backwards: for any expression, and over a sequence
without end, without visiting every position. This module knows nothing of caches.

Two kinds of primitives are not tracked, and bounded from above instead, which keeps a key too long but never too short:
random keys in long sequences, and strides whose common period is too long (see `last_use`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.errors import PatternError
from farlight.patterns.algebra import Complement, Difference, Intersection, PerHead, Union
from farlight.patterns.expression import Atom, ColumnChanges, Pattern, Sizes
from farlight.patterns.positional import full

__all__ = ["FOREVER", "LastUse", "for_head", "last_use", "liveness_sizes"]

FOREVER = 2**62
# The length of a sequence without end: beyond every position, and sums of a few of them still fit into int64.
_ENDLESS = 2**41
# Strides are tracked together up to this common period; beyond it the longest ones are bounded from above.
_LONGEST_PERIOD = 2**16
# Columns that may change anywhere are scanned in sequences up to _LONGEST_TRACKED. In longer ones they are bounded from above,
# and scanned where the bound is at most _LONGEST_SCAN behind the key.
_LONGEST_TRACKED = 2**24
_LONGEST_SCAN = 2**16
_PAIRS_AT_ONCE = 2**21


@dataclass(frozen=True)
class LastUse:
    """`last` `(keys,)` int64: the last query position that each key is allowed to; FOREVER = no last one, -1 = none at all.

    `unbroken` `(keys,)` bool: every query from the key's own position to `last` is allowed (False where that is not proven).
    """

    last: Tensor
    unbroken: Tensor


def liveness_sizes(pattern: Pattern, length: int | None, *, batch: int = 1, heads: int = 1) -> Sizes:
    """The sizes of the whole sequence: `length` tokens, or without end where it is None.

    Raises PatternError for a sequence without end whose pattern is defined only for a known length.
    """
    if length is None:
        for atom in pattern.atoms():
            reason = atom._needs_length()
            if reason is not None:
                raise PatternError(
                    f"{reason}, but this text has no known length: the last use of its keys is unknown. Give max_length=…, the "
                    "largest length that the text will have, or a pattern that (i, j) alone decides."
                )
        # `check` is not needed: lists may be shorter than the sequence, and tables of one length were refused above.
        return Sizes(_ENDLESS, _ENDLESS, 0, batch, heads)
    sizes = Sizes.of(length, batch=batch, heads=heads)
    pattern.check(sizes)
    return sizes


def for_head(pattern: Pattern, head: int) -> Pattern:
    """The pattern of one head: each `per_head` replaced by its part for that head."""
    if isinstance(pattern, PerHead):
        return for_head(pattern.parts[head], head)
    if isinstance(pattern, (Union, Intersection, Difference, Complement)):
        return type(pattern)(tuple(for_head(part, head) for part in pattern.parts))
    return pattern


def last_use(pattern: Pattern, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> LastUse:
    """The last use of the keys (batch item b, head h, position j), each `(keys,)` int64, all of one head.

    Exact, with two exceptions that may keep a key longer than needed, never shorter:

    * In a sequence without end, or of more than 2^24 tokens, random keys are taken to be drawn again later (which happens
      with probability 1), unless the rest of the expression ends within 65,536 tokens of the key.
    * Strides whose least common multiple exceeds 65,536 are not tracked together.

    >>> import torch, farlight as fl
    >>> pattern = fl.causal() & (fl.window(3) | fl.seen_by_all([0]))
    >>> zero, j = torch.zeros(3, dtype=torch.int64), torch.arange(3)
    >>> last_use(pattern, liveness_sizes(pattern, None), zero, zero, j).last.tolist()[1:]
    [4, 5]
    """
    changes = [atom._column_changes(sizes, b, h, j) for atom in pattern.atoms()]
    untracked = _untracked(pattern, changes, sizes)
    if untracked:
        return _bounded_last_use(pattern, untracked, sizes, b, h, j)
    if any(change.anywhere for change in changes):
        top = torch.full_like(j, sizes.n_k - 1)
        return LastUse(_scan(pattern, sizes, b, h, j, top), torch.zeros_like(j, dtype=torch.bool))
    period = math.lcm(*(change.period for change in changes))
    positions = [change.positions for change in changes if change.positions is not None]
    # Every column also changes at the end of the sequence, or at its beginning where there is no end.
    positions.append(torch.full_like(j, sizes.n_k if sizes.n_k < _ENDLESS else 0)[:, None])
    table = torch.cat(positions, 1).clamp(0, sizes.n_k)
    table = table.sort(1, descending=True).values
    step = max(1, _PAIRS_AT_ONCE // period)
    chunks = [slice(start, start + step) for start in range(0, max(1, j.numel()), step)]
    uses = [_periodic_last_use(pattern, sizes, b[c], h[c], j[c], table[c], period) for c in chunks]
    return LastUse(torch.cat([use.last for use in uses]), torch.cat([use.unbroken for use in uses]))


def _allowed_at(pattern: Pattern, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """`(keys, m)` bool: whether key j is allowed to each query position of its row of i; False outside the sequence."""
    allowed = pattern._allows(sizes, b[:, None], h[:, None], i, j[:, None]).expand(i.shape)
    return allowed & (i >= 0) & (i < sizes.n_k)


def _periodic_last_use(pattern: Pattern, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor, table: Tensor, period: int) -> LastUse:
    """`last_use` from the changes of each column, `table` `(keys, m)`, descending."""
    steps = torch.arange(period, device=j.device)
    last = torch.full_like(j, -1)
    unbroken = torch.ones_like(j, dtype=torch.bool)
    if sizes.n_k == _ENDLESS:
        # Behind the last change one period decides forever. `unbroken` demands the whole period, also its part before the key.
        tail = _allowed_at(pattern, sizes, b, h, table[:, :1] + steps, j)
        last[tail.any(1)] = FOREVER
        unbroken &= ~tail.any(1) | tail.all(1)
    for m in range(table.shape[1]):
        open_rows = (last < 0).nonzero().squeeze(1)
        if not open_rows.numel():
            break
        i = table[open_rows, m, None] - 1 - steps
        allowed = _allowed_at(pattern, sizes, b[open_rows], h[open_rows], i, j[open_rows])
        latest = allowed.int().argmax(1)
        hit = allowed.any(1)
        last[open_rows[hit]] = i[hit].gather(1, latest[hit, None]).squeeze(1)
    # Each stretch between the key and its last query ends at a change or at that query: check the last period of each.
    for m in range(-1, table.shape[1]):
        rows = (unbroken & (last >= j)).nonzero().squeeze(1)
        if not rows.numel():
            break
        end = table[rows, m] if m >= 0 else torch.where(last[rows] < FOREVER, last[rows] + 1, 0)
        i = end[:, None] - 1 - steps
        between = (i >= j[rows, None]) & (i <= last[rows, None])
        unbroken[rows] = (_allowed_at(pattern, sizes, b[rows], h[rows], i, j[rows]) | ~between).all(1)
    return LastUse(last, unbroken & (last >= j))


def _scan(pattern: Pattern, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor, top: Tensor) -> Tensor:
    """`(keys,)`: the last position <= top that each key is allowed to, -1 = none; evaluates every position backwards."""
    last = torch.full_like(j, -1)
    top, width = top.clone(), 32
    waiting = (top >= 0).nonzero().squeeze(1)
    while waiting.numel():
        rows = waiting[: max(1, _PAIRS_AT_ONCE // width)]
        i = top[rows, None] - torch.arange(width, device=j.device)
        allowed = _allowed_at(pattern, sizes, b[rows], h[rows], i, j[rows])
        hit = allowed.any(1)
        last[rows[hit]] = i[hit].gather(1, allowed[hit].int().argmax(1)[:, None]).squeeze(1)
        top[rows] -= width
        if rows.numel() == waiting.numel():
            width = min(2 * width, 4096)
        done = last[rows] >= 0
        waiting = torch.cat((waiting[rows.numel() :], rows[~done & (top[rows] >= 0)]))
    return last


# ---- primitives that are bounded from above -------------------------------------------------------------------------------
def _untracked(pattern: Pattern, changes: list[ColumnChanges], sizes: Sizes) -> set[Atom]:
    """The primitives to bound: random ones in a sequence too long to scan, and the strides of the longest periods."""
    atoms = list(pattern.atoms())
    out = {atom for atom, change in zip(atoms, changes, strict=True) if change.anywhere and sizes.n_k > _LONGEST_TRACKED}
    periods = {atom: change.period for atom, change in zip(atoms, changes, strict=True)}
    while math.lcm(*(periods[atom] for atom in periods.keys() - out)) > _LONGEST_PERIOD:
        out.add(max(periods.keys() - out, key=periods.__getitem__))
    return out


def _bounded_last_use(pattern: Pattern, untracked: set[Atom], sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> LastUse:
    """The last use in `upper_bound`, refined to the exact one by a scan where the bound is near the key."""
    bound = last_use(upper_bound(pattern, untracked), sizes, b, h, j).last
    near = (bound < FOREVER) & (bound - j <= _LONGEST_SCAN)
    last = bound.clone()
    last[near] = _scan(pattern, sizes, b[near], h[near], j[near], bound[near])
    return LastUse(last, torch.zeros_like(near))


def upper_bound(pattern: Pattern, untracked: set[Atom]) -> Pattern:
    """A superset of `pattern` without the untracked primitives: each becomes all pairs, under a negation none."""

    def bound(part: Pattern, above: bool) -> Pattern:
        if isinstance(part, Atom):
            return part if part not in untracked else full() if above else ~full()
        if isinstance(part, Complement):
            return Complement((bound(part.parts[0], not above),))
        if isinstance(part, Difference):
            return Difference((bound(part.parts[0], above), bound(part.parts[1], not above)))
        assert isinstance(part, (Union, Intersection, PerHead))
        return type(part)(tuple(bound(inner, above) for inner in part.parts))

    return bound(pattern, True)
