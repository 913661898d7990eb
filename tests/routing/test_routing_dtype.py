"""Centroids and router scores are float32 at least, in models cast to 16 bits and under autocast."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from farlight.routing import LSH, KMeans, Router, TopBlocks, TopKeys

CASTS: dict[str, Callable[[nn.Module], object]] = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to": lambda m: m.to(torch.bfloat16),
    "to-device": lambda m: m.to("cpu", torch.float16),
    "twice": lambda m: m.half().bfloat16(),
}


def tokens(n: int = 600, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(1, 2, n, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def trained(router: KMeans, dtype: torch.dtype, calls: int = 3) -> Tensor:
    for seed in range(calls):
        router(tokens(dtype=dtype, seed=seed), tokens(dtype=dtype, seed=seed + 9))
    return router.centroids


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_a_cast_model_learns_the_centroids_of_a_float32_one(cast: Callable[[nn.Module], object]) -> None:
    router = KMeans(2, 8, 2, decay=0.999)
    model = nn.Sequential(nn.Linear(8, 8), copy.deepcopy(router))
    cast(model)
    learner = model[1]
    assert isinstance(learner, KMeans)
    assert {p.itemsize for p in model.parameters()} == {2}
    torch.testing.assert_close(learner.centroids, router.centroids, rtol=0, atol=0)
    torch.testing.assert_close(trained(learner, torch.bfloat16), trained(router, torch.bfloat16), rtol=0, atol=0)


def test_a_default_dtype_of_16_bits_leaves_centroids_in_float32() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        router = KMeans(2, 8, 3)
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(router.centroids, KMeans(2, 8, 3).centroids, rtol=0, atol=0)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trips_and_is_widened(assign: bool) -> None:
    router, other = KMeans(2, 8, 3, seed=1), KMeans(2, 8, 3, seed=2).bfloat16()
    other.load_state_dict(router.state_dict(), assign=assign)
    torch.testing.assert_close(other.centroids, router.centroids, rtol=0, atol=0)
    narrow = {name: x.bfloat16() if x.is_floating_point() else x for name, x in router.state_dict().items()}
    other.load_state_dict(narrow, assign=assign)
    torch.testing.assert_close(other.centroids, narrow["centroids"].float(), rtol=0, atol=0)
    assert narrow["centroids"].dtype == torch.bfloat16


def test_a_replaced_buffer_is_widened_at_the_next_call() -> None:
    router = KMeans(2, 8, 3)
    router.centroids = router.centroids.bfloat16()
    router(tokens(), tokens())
    assert router.centroids.dtype == torch.float32


def test_casts_to_devices_and_wider_dtypes_apply() -> None:
    assert KMeans(2, 8, 3).double().centroids.dtype == torch.float64
    assert KMeans(2, 8, 3).double().float().centroids.dtype == torch.float32
    on_meta = KMeans(2, 8, 3).to("meta", torch.bfloat16).centroids
    assert (on_meta.device.type, on_meta.dtype) == ("meta", torch.float32)


ROUTERS: dict[str, Callable[[], Router]] = {
    "kmeans": lambda: KMeans(2, 8, 16).eval(),
    "kmeans-balanced": lambda: KMeans(2, 8, 16, per_cluster=20).eval(),
    "lsh": lambda: LSH(16, 2),
    "top-keys": lambda: TopKeys(5),
    "top-blocks": lambda: TopBlocks(3, 16),
}


@pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS.keys())
def test_autocast_does_not_round_scores(make: Callable[[], Router]) -> None:
    router, q, k = make(), tokens(seed=3), tokens(seed=4)
    plain = router(q, k).dense(600, heads=2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = router(q, k).dense(600, heads=2)
    assert torch.equal(plain, inside)


def test_autocast_does_not_round_labels_and_fitted_centroids() -> None:
    q, k = tokens(seed=3), tokens(seed=4)
    plain, inside = KMeans(2, 8, 16), KMeans(2, 8, 16)
    expected = plain.fit(q, k).labels(q, k)
    with torch.autocast("cpu", torch.bfloat16):
        labels = inside.fit(q, k).labels(q, k)
    torch.testing.assert_close(inside.centroids, plain.centroids, rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(labels, expected, strict=True))
