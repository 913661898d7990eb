"""analysis/loss/kernel_shares.py: kept share and links from the kernels' lse, against those from the probabilities."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_language import ids, llama

import farlight as fl
from farlight.analysis.loss.fidelity import measure_fidelity
from farlight.analysis.loss.kernel_shares import KernelShares, kept_share
from farlight.hf.interface import Observation
from farlight.routing.notation import read_router

NEAR = "window(3, 0) | seen_by_all([0])"
CHOICES = {
    "window": fl.window(3),
    "router": read_router(f"topblocks(2, block=4, causal=True) | {NEAR}"),
    "heads": read_router(f"per_head([topkeys(3, causal=True) | {NEAR}, {NEAR}, full(), topblocks(2, block=2, causal=True)])"),
    "all": fl.full(),
}


def call(own: fl.Pattern, **options: Any) -> Observation:
    torch.manual_seed(3)
    q, k, v = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    return Observation(torch.nn.Identity(), q, k, v, None, own, 0, **options)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("terms", ["plain", "sinks", "softcap"])
@pytest.mark.parametrize("own", [fl.causal(), fl.causal() & fl.padding([17, 20])], ids=["causal", "padded"])
def test_share_and_links_are_those_of_the_probabilities(name: str, terms: str, own: fl.Pattern) -> None:
    more = {"plain": {}, "sinks": {"sinks": torch.randn(4)}, "softcap": {"score": fl.score.softcap(2.0)}}[terms]
    seen = call(own, **more)
    choice, shares = CHOICES[name], KernelShares()
    pattern = choice if isinstance(choice, fl.Pattern) else choice(seen.q, seen.k)
    expected = fl.retention(seen.q, seen.k, pattern, base=own, **more)
    whole, sparse = shares.full(seen), shares.under(seen, choice)
    assert (sparse is None) == (name == "all")
    sparse = sparse or whole
    torch.testing.assert_close(kept_share(sparse.lse, whole.lse), expected.kept.double().mean(2), rtol=0, atol=1e-5)
    assert torch.equal(sparse.links.expand(2, 4).long(), expected.links)
    assert torch.equal(whole.links.expand(2, 4).long(), expected.base_links)


def test_counts_of_patterns_are_kept_and_those_of_choices_are_not() -> None:
    shares, first = KernelShares(), call(fl.causal())
    other = dataclasses.replace(first, q=-first.q)
    for choice in (CHOICES["window"], CHOICES["router"]):
        for seen in (first, other):
            pattern = choice if isinstance(choice, fl.Pattern) else choice(seen.q, seen.k)
            sparse = shares.under(seen, choice)
            assert sparse is not None
            expected = fl.retention(seen.q, seen.k, pattern, base=fl.causal()).links
            assert torch.equal(sparse.links.expand(2, 4).long(), expected)


def test_fidelity_without_the_best_patterns_is_the_same() -> None:
    model, text = llama(), ids()
    routers = [read_router(each) for each in (f"topblocks(2, block=4, causal=True) | {NEAR}", "gist(window(4, 0), block=8)")]
    judged = [fl.window(4, 0), {0: fl.window(1, 0)}, *routers]
    for one, other in zip(
        measure_fidelity(model, text, judged).patterns, measure_fidelity(model, text, judged, best=False).patterns, strict=True
    ):
        assert one.best is not None
        assert other.best is None
        torch.testing.assert_close(other.mass, one.mass, rtol=0, atol=1e-5)
        assert (other.links, other.base_links, other.language) == (one.links, one.base_links, one.language)
