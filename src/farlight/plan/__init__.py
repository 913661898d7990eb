"""Where the work is: from a pattern and sizes to the tables that kernels, analysis and caches read."""

from __future__ import annotations

import torch

from farlight.patterns.expression import Pattern, Sizes
from farlight.plan.build import build
from farlight.plan.cache import keep, plans
from farlight.plan.tables import Plan, PlanLike, TileShape

__all__ = ["Plan", "PlanLike", "TileShape", "plan_for"]


def plan_for(pattern: Pattern, sizes: Sizes, shape: TileShape) -> Plan:
    """The plan for tiles of this shape: the cached object itself, built where the cache has none."""
    key = pattern.key, sizes, shape
    plan = plans.find(key)
    if not isinstance(plan, Plan):
        # Tables outlive the call that needs them first: they must be ordinary tensors whatever mode that call is in.
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            plan = build(pattern, sizes, shape)
        keep(key, plan, plan.derived)
    return plan
