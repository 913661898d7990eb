"""Plans are made once: the cache that finds them again by pattern, sizes and tile shape.

It owns everything that is made from a plan: the tables, what backends derive of them (transposed tables, native copies and
schedules, lists on a device) and the pattern with its tables. All of it is counted, and goes with the plan. Plans that a
backend makes of a router's choice are kept beside them, for as long as the choice lives.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from farlight.caching import SizedCache
from farlight.patterns.expression import Pattern
from farlight.plan.footprint import Derived, held_bytes

__all__ = ["keep", "kept_with", "plans"]

# What an entry takes in the cache's own tables, and what the allocator loses between blocks of a plan.
_ENTRY = 4096


class Planned(Protocol):
    """Tables made from a pattern, from which backends derive others."""

    @property
    def derived(self) -> Derived: ...


P = TypeVar("P", bound=Planned)


@dataclass(frozen=True, eq=False)
class _PatternEntry(Generic[P]):
    """What a backend planned of one pattern object; None: the backend does not read it."""

    plan: P | None
    pattern: weakref.ref[Pattern]


def _entry_bytes(value: object) -> int:
    plan = value.plan if isinstance(value, _PatternEntry) else None
    shared = () if plan is None else plan.derived.shared
    return _ENTRY + held_bytes(*shared, value) - held_bytes(*shared)


plans: SizedCache[object] = SizedCache(512 * 2**20, _entry_bytes)


def keep(key: object, value: object, derived: Derived) -> None:
    """Keep a value under `key`, and count from now on what is derived from it."""
    held = weakref.ref(value)  # not the value: it would keep itself alive until the next collection

    def charge(nbytes: int) -> None:
        kept = held()
        if kept is not None:
            plans.charge(key, kept, nbytes)

    derived.charge = charge
    plans.put(key, value)


def kept_with(pattern: Pattern, kind: object, make: Callable[[], P | None]) -> P | None:
    """What `make` plans of this very pattern, kept until the pattern dies; that it plans nothing (None) is kept too.

    kind: the backend and the sizes. The key is the identity of the pattern: digesting a choice's lists would take a tenth of
    the time of planning them, and no other pattern will have the same. What `make` returns must not hold the pattern.
    """
    key, discard = (kind, id(pattern)), plans.discard
    entry = plans.find(key)
    if isinstance(entry, _PatternEntry) and entry.pattern() is pattern:
        kept: P | None = entry.plan
        return kept
    plan = make()
    entry = _PatternEntry(plan, weakref.ref(pattern, lambda _: discard(key)))
    keep(key, entry, Derived() if plan is None else plan.derived)
    return plan
