"""Timing of one attention layer: what it leaves behind in the process."""

from __future__ import annotations

import sys

import pytest
import torch

import farlight as fl
from farlight.analysis.cost import AttentionShape, cost_in_passages
from farlight.plan.cache import plans
from farlight.routing import TopBlocks, TopKeys
from farlight.routing.base import Router

SHAPE = AttentionShape(2, 2, 8, 8, torch.float32, torch.device("cpu"), fl.full())


@pytest.mark.parametrize("router", [TopKeys(4), TopBlocks(2, 8)], ids=["keys", "blocks"])
def test_timing_a_router_keeps_the_plan_cache(router: Router) -> None:
    q = torch.randn(1, 2, 512, 8)
    fl.attention(q, q, q, fl.window(9), backend="torch")
    before = plans.info()
    cost = cost_in_passages(SHAPE, router, SHAPE.random(64), backend="torch", least=0.01)
    assert cost.seconds > 0
    # The plans of the first call (of the cost model's backend and of "torch") stay, those of the repetitions do not.
    assert 0 <= plans.info().entries - before.entries <= 2
    misses = plans.info().misses
    fl.attention(q, q, q, fl.window(9), backend="torch")
    assert plans.info().misses == misses, "an unrelated plan was dropped"


def test_every_repetition_of_a_router_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is the same each time; its plan must not come from the cache."""
    built: list[fl.Pattern] = []
    planning = sys.modules["farlight.plan"]
    build = planning.build

    def counted(pattern: fl.Pattern, *rest: object) -> object:
        built.append(pattern)
        return build(pattern, *rest)

    monkeypatch.setattr(planning, "build", counted)
    cost_in_passages(SHAPE, TopKeys(4), SHAPE.random(64, seed=1), backend="torch", least=0.01)
    assert len(built) >= 5, "the first call, the warm-up and three repetitions"
    assert len(set(built)) == 1
