"""What a router's call is expected to cost: choosing and planning are priced, and the links stay the router's."""

from __future__ import annotations

import pytest
import torch

import farlight as fl
from farlight.kernels import cpu, dense, registry
from farlight.kernels.cost import _CHOICE_FIXED as FIXED
from farlight.kernels.cost import DEFAULT_RATES, Rates, estimate
from farlight.plan.content import ContentPlan
from farlight.requests import read_request, read_sizes
from farlight.routing import LSH, KMeans, PerHeadRouter, Router, TopBlocks, TopKeys

NATIVE = pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the native module")
NEAR = fl.window(32, 0) | fl.seen_by_all(range(4)) & fl.causal()


@pytest.fixture(autouse=True)
def rates_that_come_with_farlight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARLIGHT_CALIBRATE", "0")


@pytest.mark.parametrize(
    ("router", "products"),
    [
        (TopBlocks(2, 8), 2 * 6 * 8 * 8),  # each of 8 query blocks with 8 key blocks, of 64 tokens
        (TopBlocks(2, 8, score="softmax"), 2 * 6 * 64 * 8),
        (TopBlocks(2, 8, 16, causal=True, score="softmax"), 2 * 6 * 64 * 4),
        (TopBlocks(2, 8, score="minmax"), 2 * 2 * 6 * 8 * 8),
        (TopKeys(3), 2 * 6 * 64 * 64),
        (KMeans(6, 8, 5), 2 * 6 * 128 * 5),
        (KMeans(6, 8, 5, shared=True), 2 * 6 * 64 * 5),
        (LSH(4, 3), 2 * 6 * 128 * 3 * 2),
        (PerHeadRouter([TopKeys(3)] * 2 + [fl.window(2)] * 4), 2 * 2 * 64 * 64),
        (TopKeys(3) | fl.window(4) | KMeans(6, 8, 5), 2 * 6 * (64 * 64 + 128 * 5)),
    ],
    ids=repr,
)
def test_products_of_a_choice(router: Router, products: int) -> None:
    assert router.products(read_sizes(torch.empty(2, 6, 64, 8), torch.empty(2, 3, 64, 8), None)) == products


@NATIVE
def test_explain_prices_choosing_planning_and_attending() -> None:
    q, k = torch.randn(1, 6, 512, 64), torch.randn(1, 2, 512, 64)
    router = TopBlocks(2, 8, 16, causal=True, score="softmax") | NEAR
    explained = fl.explain(q, k, k, router)
    sparse, unrouted = explained.sparse, explained.unrouted
    products = 6 * 512 * 32
    assert sparse.choosing == pytest.approx(2 * 64 * products / (DEFAULT_RATES["cpu", torch.float32][0] * 1e9) + FIXED)
    assert sparse.planning > 0
    assert sparse.seconds == pytest.approx(sparse.choosing + sparse.planning + sparse.remaining)
    pattern = fl.explain(q, k, k, fl.window(32, 0))
    assert (pattern.sparse.choosing, pattern.sparse.planning, pattern.unrouted) == (0, 0, None)
    every = fl.explain(q, k, k, fl.causal())  # causal links are compared with all causal ones
    assert unrouted == (every.full if every.backend == "dense" else every.sparse)
    assert "choosing" in explained
    assert "without the router" in explained.splitlines()[-1]
    assert fl.explain(q, k, k, TopBlocks(2, 8)).unrouted.pairs == 6 * 512 * 512  # type: ignore[union-attr]
    with_lse = fl.explain(q, k, k, router, return_lse=True).unrouted  # which torch's full attention does not give
    assert with_lse == fl.explain(q, k, k, fl.causal(), return_lse=True).sparse


@NATIVE
def test_explain_says_where_choosing_does_not_pay() -> None:
    router = TopBlocks(8, 8, 16, causal=True, score="softmax") | NEAR
    for n, pays in ((256, False), (8192, True)):
        q = torch.randn(1, 2, n, 16)
        explained = fl.explain(q, q, q, router)
        assert explained.unrouted is not None
        assert (explained.sparse.seconds < explained.unrouted.seconds) == pays
        assert ("costs more than it saves" in explained.splitlines()[-1]) == (not pays)


@NATIVE
def test_full_attention_that_is_faster_computes_the_links_of_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes torch's full attention where it is expected to be faster, under the mask of the chosen links."""
    rates: Rates = {**DEFAULT_RATES, ("cpu", torch.float32): (160.0, 1.0), ("dense", torch.float32): (1e9, 0.0)}
    monkeypatch.setattr(registry, "estimate", lambda *args, **more: estimate(*args[:3], rates, **more))
    q, k = torch.randn(1, 6, 96, 16), torch.randn(1, 2, 96, 16)
    router = TopBlocks(3, 8, 16, causal=True, score="softmax") | NEAR
    pattern = router(q, k)
    request = read_request(q, k, k, pattern, read_sizes(q, k, None), 0.0, False, None, router.products(read_sizes(q, k, None)))
    assert registry.select(request).backend.name == "dense"
    taken: list[str] = []
    run = dense.attend
    monkeypatch.setattr(dense, "attend", lambda *args, **more: taken.append("dense") or run(*args, **more))
    out = fl.attention(q, k, k, router)
    assert taken == ["dense"]
    torch.testing.assert_close(out, fl.attention(q, k, k, pattern, backend="reference"))
    assert float((out - fl.attention(q, k, k, fl.causal())).abs().max()) > 1e-3


@NATIVE
def test_a_choice_is_counted_where_it_could_change_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of a choice costs more than to attend to every pair: what the choice visits decides nothing."""
    counted: list[int] = []
    run = ContentPlan.expected
    monkeypatch.setattr(ContentPlan, "expected", lambda plan, code: counted.append(code) or run(plan, code))
    q, k = torch.randn(1, 6, 512, 64), torch.randn(1, 2, 512, 64)
    router = TopBlocks(2, 8, 16, causal=True, score="softmax") | NEAR
    fl.attention(q, k, k, router)
    assert not counted
    assert fl.explain(q, k, k, router).sparse.pairs < 6 * 512 * 512
    assert counted
    counted.clear()
    fast: Rates = {**DEFAULT_RATES, ("cpu", torch.float32): (160.0, 1.0), ("dense", torch.float32): (1e9, 0.0)}
    monkeypatch.setattr(registry, "estimate", lambda *args, **more: estimate(*args[:3], fast, **more))
    fl.attention(q, k, k, router)
    assert counted


def test_a_count_that_reaches_every_block_chooses_nothing() -> None:
    for n_q, n_k in ((50, 50), (7, 50), (50, 7)):
        q, k = torch.randn(2, 4, n_q, 8), torch.randn(2, 2, n_k, 8)
        for router, pattern in (
            (TopBlocks(100, 8), fl.full()),
            (TopBlocks(100, 8, 16, causal=True, score="softmax"), fl.causal()),
        ):
            assert router(q, k) == pattern
            padded = torch.ones(2, n_k, dtype=torch.bool)
            chosen = router(q, k, key_mask=padded, query_mask=torch.ones(2, n_q, dtype=torch.bool))
            dense = pattern.dense(n_q, n_k, batch=2, heads=4, q_offset=n_k - n_q).expand(2, 4, n_q, n_k)
            assert torch.equal(chosen.dense(n_q, n_k, batch=2, heads=4).expand(dense.shape), dense)


def test_heads_that_choose_apart_do_not_digest_their_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether heads differ is known from the first two lists: to hash all of them costs as much as to plan them."""
    from farlight.patterns import expression

    digested: list[int] = []
    run = expression.digest
    monkeypatch.setattr(expression, "digest", lambda table: digested.append(1) or run(table))
    q, k = torch.randn(1, 6, 64, 8), torch.randn(1, 2, 64, 8)
    one = TopBlocks(2, 8, causal=True)
    assert PerHeadRouter([one] * 6)(q, k).varies_over_heads
    assert len(digested) == 2
    assert PerHeadRouter([one, TopBlocks(2, 4, causal=True)] * 3)(q, k).varies_over_heads
    assert len(digested) == 2
    assert not fl.per_head([fl.window(3)] * 3).varies_over_heads
