"""Plans are made once: the cache that finds them again by pattern, sizes and tile shape.

It owns everything that is made from a plan: the tables, what backends derive of them (transposed tables, native copies and
schedules, lists on a device) and the pattern with its tables. All of it is counted, and goes with the plan.
"""

from __future__ import annotations

import weakref

from farlight.caching import SizedCache
from farlight.plan.footprint import held_bytes
from farlight.plan.tables import Plan

__all__ = ["PlanCache", "keep", "plans"]

# What an entry takes in the cache's own tables, and what the allocator loses between blocks of a plan.
_ENTRY = 4096


def _entry_bytes(plan: Plan) -> int:
    return _ENTRY + held_bytes(plan)


PlanCache = SizedCache[Plan]

plans: SizedCache[Plan] = SizedCache(512 * 2**20, _entry_bytes)


def keep(key: object, plan: Plan) -> None:
    """Keep the plan under `key`, and count from now on what is derived from it."""
    held = weakref.ref(plan)  # not the plan: it would keep itself alive until the next collection

    def charge(nbytes: int) -> None:
        kept = held()
        if kept is not None:
            plans.charge(key, kept, nbytes)

    plan.derived.charge = charge
    plans.put(key, plan)
