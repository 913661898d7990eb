"""Native labels and plans of labels (csrc/content/labels, label_piece) against torch and the dense mask."""

from __future__ import annotations

import random

import pytest
import torch

import farlight as fl
from farlight.kernels.cpu import SHAPE
from farlight.kernels.cpu.content import content_plan
from farlight.kernels.cpu.labels import nearest_labels, recent_starts
from farlight.kernels.cpu.launch import strided_address
from farlight.kernels.cpu.native import module, unavailable
from farlight.patterns import Pattern
from farlight.patterns.expression import Sizes
from farlight.routing import LSH, KMeans, Router
from farlight.routing.centroids import centroid_scores

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no native module: {unavailable()}")


@pytest.mark.parametrize("count", [1, 5, 32, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_nearest_column_is_that_of_torch(count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(count)
    x, columns = torch.randn(2, 2, 131, 24).to(dtype), torch.randn(6, count, 24)
    mask = torch.rand(2, 131) > 0.3
    expected = centroid_scores(x.float(), columns).argmax(-1)
    assert torch.equal(nearest_labels(x.transpose(0, 1).contiguous().transpose(0, 1), columns, None), expected)
    assert torch.equal(nearest_labels(x, columns, mask), expected.masked_fill(~mask[:, None], -1))


def test_equal_columns_give_the_first_and_numbers_that_are_none_give_some_column() -> None:
    columns = torch.ones(1, 40, 8)
    assert int(nearest_labels(torch.ones(1, 1, 1, 8), columns, None)) == 0
    broken = torch.tensor([float("nan"), float("inf"), float("-inf")])[:, None].expand(1, 1, 3, 8)
    labels = nearest_labels(broken, torch.randn(1, 40, 8), None)
    assert bool(((labels >= 0) & (labels < 40)).all())


def test_recent_starts_are_the_definition() -> None:
    torch.manual_seed(0)
    query, key = torch.randint(-1, 4, (2, 2, 30)), torch.randint(-1, 4, (2, 2, 41))
    starts = recent_starts(query, key, 3)
    for b, h, r in (query >= 0).nonzero().tolist():
        seen = [j for j in range(41 - 30 + r + 1) if int(key[b, h, j]) == int(query[b, h, r])]
        assert int(starts[b, h, r]) == ([0, *seen][0] if not seen else seen[-3:][0])


def _random_router(rng: random.Random, heads: int, is_causal: bool) -> Router:
    clusters = rng.choice([1, 2, 7, 40])
    if rng.random() < 0.4:
        return LSH(2 * clusters, rng.choice([1, 1, 2]), causal=is_causal)
    return KMeans(heads, 16, clusters, causal=is_causal, per_cluster=rng.choice([None, 1, 3, 20]) if is_causal else None).eval()


def _random_union(rng: random.Random, is_causal: bool) -> Pattern | None:
    near = fl.window(3, 0) | fl.seen_by_all([0, 1]) & fl.causal()
    return rng.choice([None, near, fl.window(2)] if is_causal else [None, fl.window(4) | fl.global_tokens([0, -1])])


def check_label_plan(rng: random.Random) -> None:
    """The plan of one random router of labels holds each of its links once."""
    kv_heads, batch, is_causal = rng.choice([1, 2]), rng.choice([1, 2]), rng.random() < 0.6
    heads, n_k = kv_heads * rng.choice([1, 3]), rng.choice([1, 5, 33, 100, 257])
    n_q = rng.choice([n_k, n_k, max(1, n_k // 2)])
    q, k = torch.randn(batch, heads, n_q, 16), torch.randn(batch, kv_heads, n_k, 16)
    router, fixed = _random_router(rng, heads, is_causal), _random_union(rng, is_causal)
    router = router if fixed is None else router | fixed
    pattern = router(q, k, key_mask=torch.rand(batch, n_k) > 0.3 if rng.random() < 0.3 else None)
    expected = pattern.dense(n_q, n_k, batch=batch, heads=heads).expand(batch, heads, n_q, n_k)
    plan = content_plan(pattern, Sizes.of(n_q, n_k, batch=batch, heads=heads), SHAPE)
    if plan is None:  # labels of several rounds in union, and rounds that overlap, are planned in torch
        assert isinstance(router, LSH) or "meets" in repr(pattern), router
        return
    assert torch.equal(plan.dense(), expected), router
    assert plan.pairs == int(expected.sum())


def test_plans_of_labels_hold_each_link_once() -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    for _ in range(40):
        check_label_plan(rng)


@pytest.mark.slow
def test_plans_of_labels_hold_each_link_once_in_two_thousand_problems() -> None:
    torch.manual_seed(1)
    rng = random.Random(1)
    for _ in range(2000):
        check_label_plan(rng)


def test_labels_of_any_size_are_planned() -> None:
    labels = torch.tensor([2**62, 7, 2**62, 7, -5, -1, 2**40, 2**40])
    pattern = fl.clusters(labels) & fl.causal()
    plan = content_plan(pattern, Sizes.of(8), SHAPE)
    assert plan is not None
    assert torch.equal(plan.dense(), pattern.dense(8))


def test_routers_read_16_bits_as_float32() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 64, 16).bfloat16(), torch.randn(1, 2, 64, 16).bfloat16()
    for router in (KMeans(4, 16, 5), LSH(6, causal=True), KMeans(4, 16, 5).eval() | fl.window(2)):
        router.eval()
        assert torch.equal(router(q, k).dense(64, heads=4), router(q.float(), k.float()).dense(64, heads=4))


def test_malformed_numbers_of_labels_are_refused() -> None:
    x = torch.randn(1, 2, 8, 4)
    for sizes in ([2, 1, 2, 2, 8, 4, 3, 1], [0, 1, 3, 2, 8, 4, 3, 1], [0, 1, 2, 0, 8, 4, 3, 1], [0, 1, 2, 2, -8, 4, 3, 1]):
        with pytest.raises(ValueError, match="malformed sizes of nearest labels"):
            module().nearest(sizes, strided_address(x), [0, 0, 0], 1)
    with pytest.raises(ValueError, match="malformed sizes of recent starts"):
        module().recent([1, 4, 4, 0], [0, 0, 0], 1)
    with pytest.raises(ValueError, match="label links have 17 numbers"):
        module().Plan([1, 1, 4, 4, 0], [], 1, [[1, 1]], 1)
    with pytest.raises(ValueError, match="an extent of label links is below 1"):
        module().Plan([1, 1, 4, 4, 0], [], 1, [[0] * 17], 1)
