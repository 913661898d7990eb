"""`TopBlocks(lost=…)`: blocks are added until the missed share of every row is proven to be small, natively and in torch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from content_cases import assert_same_choice, links, random_masks, true_loss
from torch import Tensor

import farlight as fl
from farlight.kernels import cpu
from farlight.routing import TopBlocks, topblocks
from farlight.routing.base import check_inputs

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the native module")


def random_problem(rng: random.Random) -> tuple[TopBlocks, Tensor, Tensor, dict[str, Tensor | None]]:
    """A router by `lost`, with queries, keys and masks; in half of them keys are alike within groups of 8."""
    kv_heads, n_k = rng.choice([1, 2]), rng.choice([1, 5, 31, 64, 100, 257, 300])
    n_q, batch = rng.choice([n_k, n_k, 1, max(1, n_k - 7), n_k + 3]), rng.choice([1, 2])
    dtype, spread = rng.choice([torch.float32, torch.bfloat16]), rng.choice([0.05, 0.3, 1.0, 6.0])
    q, k = (torch.randn(batch, h, n, 24) * spread for h, n in ((kv_heads * rng.choice([1, 3]), n_q), (kv_heads, n_k)))
    if rng.random() < 0.5:
        k = k[:, :, ::8].repeat_interleave(8, 2)[:, :, :n_k] + torch.randn_like(k) * 0.03
    router = TopBlocks(
        lost=rng.choice([0.5, 0.1, 0.02, 0.001]),
        block=rng.choice([1, 3, 4, 8, 16, 64]),
        query_block=rng.choice([1, 1, 2, 5, 8, 16, 32, 64]),
        causal=rng.random() < 0.6,
        per=rng.choice(["head", "group"]),
        scale=rng.choice([None, 0.5, -0.3]),
    )
    return router, q.to(dtype), k.to(dtype), random_masks(rng, batch, n_q, n_k)


def missed(router: TopBlocks, q: Tensor, k: Tensor, seen: Tensor, masks: dict[str, Tensor | None]) -> Tensor:
    """The share of full attention that each real row has missed."""
    full = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if router.causal:
        full = full.tril(k.shape[2] - q.shape[2])
    full = full.expand(q.shape[0], q.shape[1], -1, -1)
    if masks:
        full = full & masks["key_mask"][:, None, None]  # type: ignore[index]
    loss = true_loss(q, k, seen, full, 24**-0.5 if router.scale is None else router.scale)
    return loss * masks["query_mask"][:, None] if masks else loss  # type: ignore[index]


def check_problems(seeds: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof holds for the exact shares, torch chooses the same blocks, and some lists leave much out."""
    saved = rows = 0
    for seed in seeds:
        torch.manual_seed(seed)
        router, q, k, masks = random_problem(random.Random(seed))
        seen = links(router, q, k, **masks)
        with monkeypatch.context() as patch:
            patch.setattr(topblocks, "can_choose", lambda q: False)
            other = links(router, q, k, **masks)
        assert_same_choice(seen, other, router, q, k, **masks)
        loss = missed(router, q, k, seen.expand(*q.shape[:3], k.shape[2]), masks)
        assert float(loss.max()) <= router.budget.lost, (seed, router)  # type: ignore[operator]
        rows += loss.numel()
        saved += float(loss.max()) > 1e-6
    assert saved > len(seeds) // 6
    assert rows > 100 * len(seeds)


def test_the_missed_share_is_at_most_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    check_problems(range(60), monkeypatch)


@pytest.mark.slow
def test_the_missed_share_over_many_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    check_problems(range(1000, 3000), monkeypatch)


def test_the_list_ends_with_the_block_that_proves_it() -> None:
    """In the order of the bounds, one block fewer leaves some row without proof; the order is that of the class."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 64, 16), torch.randn(1, 1, 32, 16).repeat_interleave(4, 2)
    router, t = TopBlocks(lost=0.1, block=4, query_block=16), 0.1 / 0.9
    exact = (q[0, 0].double() @ k[0, 0, ::4].double().T) * 0.25 + torch.tensor(4.0).log()  # bounds are the scores: equal keys
    seen = links(router, q, k)[0, 0, :, ::4]
    for u in range(4):
        rows, chosen = exact[16 * u : 16 * (u + 1)], seen[16 * u]
        order = rows.softmax(-1).sum(0).argsort(descending=True)
        count = int(chosen.sum())
        assert sorted(order[:count].tolist()) == chosen.nonzero().flatten().tolist()
        weight = rows.exp()[:, order]
        left = weight.flip(1).cumsum(1).flip(1)
        assert bool((left[:, count] <= t * weight[:, :count].sum(1)).all())
        assert bool((left[:, count - 1] > t * weight[:, : count - 1].sum(1) * (1 - 1e-4)).any())


def test_everything_is_seen_where_nothing_is_proven() -> None:
    """Values that bound nothing: every block is taken, and the pattern is that of full attention."""
    q = k = torch.randn(1, 1, 64, 8)
    for value in (float("nan"), float("inf")):
        broken = k.clone()
        broken[0, 0, 5] = value
        chosen = TopBlocks(lost=0.5, block=8, query_block=16, causal=True)(q, broken)
        assert torch.equal(chosen.dense(64)[0, 0], torch.ones(64, 64, dtype=torch.bool).tril())


def test_later_query_blocks_change_no_choice_and_every_isa_proves_it() -> None:
    torch.manual_seed(3)
    q, k = torch.randn(1, 4, 128, 24), torch.randn(1, 2, 16, 24).repeat_interleave(8, 2) + 0.05 * torch.randn(1, 2, 128, 24)
    usual = cpu.isa()
    try:
        for isa in cpu.available():
            cpu.use(isa)
            for query_block in (1, 16):
                router = TopBlocks(lost=0.3, block=8, query_block=query_block, causal=True)
                before = links(router, q, k)
                assert int(before.sum()) < 0.95 * 4 * fl.causal().count(128)
                assert float(missed(router, q, k, before, {}).max()) <= 0.3
                for position in (16, 112):
                    changed = [x.clone() for x in (q, k)]
                    for x in changed:
                        x[:, :, position:] = torch.randn_like(x[:, :, position:]) * 5
                    assert torch.equal(links(router, *changed)[:, :, :position], before[:, :, :position])
    finally:
        cpu.use(usual)


def test_threads_and_attention_choose_the_same() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 200, 16) * 3, torch.randn(1, 2, 25, 16).repeat_interleave(8, 2)
    router = TopBlocks(lost=0.05, block=8, query_block=16, causal=True) | fl.window(4, 0)
    threads, chosen = torch.get_num_threads(), []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            chosen.append(links(router, q, k))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*chosen)
    out, lost = fl.attention(q, k, k, router, return_lost=True)
    assert torch.equal(out, fl.attention(q, k, k, router(q, k), backend="cpu"))
    assert 0 < float(lost.max()) <= 0.05
    assert int(chosen[0].sum()) < fl.causal().count(200) * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lost": 1.0}, "TopBlocks: lost = 1.0: it must be a number in 0 < lost < 1."),
        ({"lost": 0.02, "score": "softmax"}, "lost = 0.02 with score = 'softmax': only bounds prove what is lost"),
        (
            {"lost": 0.02, "count": 3},
            "count and lost given; say how much to take by exactly one of count, share, mass and lost.",
        ),
    ],
)
def test_arguments_that_prove_nothing(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(fl.errors.ArgumentError) as error:
        TopBlocks(**arguments)
    assert message in str(error.value)


def test_a_cache_refuses_it() -> None:
    with pytest.raises(
        fl.errors.ArgumentError, match="KVCache: TopBlocks.* reads every key to prove what is lost, but only summaries"
    ):
        fl.KVCache(TopBlocks(lost=0.02, block=8, causal=True))
    router, x = TopBlocks(lost=0.02, block=8, causal=True), torch.randn(1, 1, 32, 8)
    with pytest.raises(fl.errors.ArgumentError, match="a choice from summaries: TopBlocks.* reads every key"):
        router.select_lists(check_inputs(x, x), router.summary(x))
