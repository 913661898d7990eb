"""`read_router`; gradients, storage and analysis of the patterns that routers return."""

from __future__ import annotations

import pytest
import torch

import farlight as fl
from farlight.routing import LSH, KMeans, TopBlocks, TopKeys, read_router

G = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(2, h, 33, 4, generator=G) for h in (4, 2, 2))


@pytest.mark.parametrize(
    "text, pattern",
    [
        ("topblocks(share=0.1, block=8)", TopBlocks(share=0.1, block=8)(Q, K)),
        ("fl.routing.TopBlocks(2, 8, causal=True) | window(2, 0)", TopBlocks(2, 8, causal=True)(Q, K) | fl.window(2, 0)),
        ("window(2) - topkeys(3)", fl.window(2) - TopKeys(3)(Q, K)),
        (
            "causal() & (lsh(4, 2, seed=3) | topkeys(mass=0.5))",
            fl.causal() & (LSH(4, 2, seed=3)(Q, K) | TopKeys(mass=0.5)(Q, K)),
        ),
        ("~topkeys(3)", fl.full() - TopKeys(3)(Q, K)),
        ("kmeans(4, seed=1) | global_tokens([0])", KMeans(4, 4, 4, seed=1).fit(Q, K).eval()(Q, K) | fl.global_tokens([0])),
        ("window(2) | global_tokens([0, -1])", fl.window(2) | fl.global_tokens([0, -1])),
    ],
)
def test_text_gives_the_router(text: str, pattern: fl.Pattern) -> None:
    assert read_router(text)(Q, K) == pattern


ROUTERS = {
    "kmeans": lambda: KMeans(4, 4, 3).eval(),
    "kmeans, balanced": lambda: KMeans(4, 4, 3, per_cluster=8).eval(),
    "kmeans, causal and bounded": lambda: KMeans(4, 4, 3, per_cluster=5, causal=True).eval(),
    "lsh": lambda: LSH(4, 2),
    "blocks": lambda: TopBlocks(2, 8),
    "keys": lambda: TopKeys(mass=0.5, causal=True),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_and_unions_match_the_dense_mask(name: str) -> None:
    """The pattern goes through the operator as text and tables, alone and united with a window."""
    pattern = ROUTERS[name]()(Q, K) | fl.window(1)
    mask = pattern.dense(33, batch=2, heads=4)
    found = []
    for run in ("torch", "dense"):
        q, k, v = (x.double().requires_grad_() for x in (Q, K, V))
        if run == "torch":
            out = fl.attention(q, k, v, pattern, backend="torch")
        else:
            scores = q @ k.repeat_interleave(2, 1).mT * 0.5
            out = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ROUTERS)
def test_router_patterns_can_be_stored(name: str) -> None:
    pattern = ROUTERS[name]()(Q, K)
    assert fl.Pattern.from_json(pattern.to_json()) == pattern
    assert fl.parse(repr(pattern)) == pattern
    assert pattern.count(33, batch=2, heads=4) == int(pattern.dense(33, batch=2, heads=4).sum())


def test_top_keys_have_the_best_retention() -> None:
    """`fl.retention` of `TopKeys`: the largest scores keep what the best pattern of that size keeps."""
    from farlight.analysis.loss.retention import retention

    found = retention(Q, K, TopKeys(5)(Q, K))
    assert bool((found.mass.double() <= found.best + found.best_slack + 1e-6).all())
    assert float(found.mass.mean()) > 1.3 * float(retention(Q, K, fl.window(2)).mass.mean())


def test_repr_of_read_routers() -> None:
    assert repr(TopBlocks(share=0.1, causal=True)) == "TopBlocks(share=0.1, block=64, query_block=1, causal=True, score='mean')"
    assert repr(TopKeys(3, causal=True)) == "TopKeys(count=3, causal=True)"
    assert repr(LSH(4, 2, shared=True)) == "LSH(4, 2, seed=0, shared=True)"
    assert repr(KMeans(4, 8, 16, per_cluster=3)) == "KMeans(4, 8, 16, per_cluster=3, decay=0.999)"
