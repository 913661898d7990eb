"""Plans are made once: the cache that finds them again by pattern, sizes and tile shape."""

from farlight.caching import SizedCache
from farlight.plan.tables import Plan

__all__ = ["PlanCache", "plans"]

PlanCache = SizedCache[Plan]

plans: SizedCache[Plan] = SizedCache(512 * 2**20)
