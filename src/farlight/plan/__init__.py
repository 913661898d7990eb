"""Where the work is: from a pattern and sizes to the tables that kernels, analysis and caches read."""

from __future__ import annotations

import torch

from farlight.patterns.expression import Pattern, Sizes
from farlight.plan.build import TileShape, build
from farlight.plan.cache import keep, plans
from farlight.plan.tables import Plan

__all__ = ["Plan", "TileShape", "plan", "plan_for"]


def plan(
    pattern: Pattern,
    n_q: int,
    n_k: int | None = None,
    *,
    batch: int = 1,
    heads: int = 1,
    q_offset: int | None = None,
    device: torch.device | str = "cpu",
) -> Plan:
    """The plan of `pattern` for n_q queries and n_k keys (default n_q): which tiles visit which keys, and how.

    Query row r stands at position `q_offset + r`, by default `n_k - n_q + r`. Cost and memory grow with the tiles visited,
    never with n_q · n_k. Plans are cached; `fl.attention` finds them again by pattern and sizes, so that calling this is
    only needed to look at a plan, or to pay for it ahead of time. The tables are in memory of the host, and a copy: writing
    into them changes nobody else's plan. `device` is where attention will run.

    Raises PatternError when the pattern does not fit the sizes.

    >>> import farlight as fl
    >>> plan = fl.plan(fl.presets.longformer(512), 16_384)
    >>> plan.pairs == fl.presets.longformer(512).count(16_384), plan.waste < 1.1
    (True, True)
    """
    torch.device(device)
    return plan_for(pattern, Sizes.of(n_q, n_k, batch=batch, heads=heads, q_offset=q_offset), TileShape()).copied()


def plan_for(pattern: Pattern, sizes: Sizes, shape: TileShape) -> Plan:
    """The plan for tiles of this shape, from the cache where it has been made before."""

    key = pattern.key, sizes, shape
    found = plans.find(key)
    if found is None:
        # Tables outlive the call that needs them first: they must be ordinary tensors whatever mode that call is in.
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            found = build(pattern, sizes, shape)
        keep(key, found)
    return found
