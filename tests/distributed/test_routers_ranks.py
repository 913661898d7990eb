"""Routers over ranks: the links, and so the results, of one process."""

from __future__ import annotations

import pytest
import spread_routers
import torch
from ranks import in_ranks

import farlight as fl


@pytest.mark.parametrize("world, kind", [(2, "even"), pytest.param(3, "several pieces", marks=pytest.mark.slow)])
def test_the_links_are_those_of_one_process(world: int, kind: str) -> None:
    """In two training calls: after the first, k-means has centroids from the tokens of all ranks."""
    found = in_ranks(world, spread_routers.links_over_ranks, kind)
    q, k, _ = spread_routers.operands()
    for name, router in spread_routers.routers().items():
        for call in range(2):
            expected = router(q, k).dense(spread_routers.N, batch=2, heads=4)
            for patterns in found:
                actual = patterns[name][call].dense(spread_routers.N, batch=2, heads=4)
                assert torch.equal(actual.expand_as(expected), expected), f"{name}, call {call}"


@pytest.mark.parametrize("name", ["clusters", "joined"])
def test_results_are_those_of_one_process(name: str) -> None:
    found = in_ranks(2, spread_routers.answers_over_ranks, name)
    leaves = [x.requires_grad_() for x in spread_routers.operands()]
    out = fl.attention(*leaves, spread_routers.routers()[name])
    out.square().sum().backward()
    for actual, expected in zip(found[1], [out.detach(), *(x.grad for x in leaves)], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_every_rank_refuses_a_choice_that_needs_every_key() -> None:
    """Also the rank without queries, which would wait for the others."""
    found = in_ranks(2, spread_routers.refusal_over_ranks)
    assert all(text.startswith("attention over ranks: TopBlocks(") and "use count, share or mass" in text for text in found)
