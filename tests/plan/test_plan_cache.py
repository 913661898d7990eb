"""The LRU cache of plans: bounded in bytes, thread-safe, keyed by pattern, sizes and tile shape."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import farlight as fl
from farlight.caching import CacheInfo, SizedCache
from farlight.patterns import Sizes
from farlight.plan import Plan, TileShape, plan_for
from farlight.plan.cache import _entry_bytes, plans


def fake(nbytes: int) -> Any:
    return SimpleNamespace(nbytes=nbytes)


def never() -> Any:
    raise AssertionError("the plan is cached already")


def test_a_second_lookup_hits() -> None:
    cache: SizedCache[Any] = SizedCache(100)
    value = fake(10)
    assert cache.get("a", lambda: value) is value
    assert cache.get("a", never) is value
    assert cache.info() == CacheInfo(entries=1, nbytes=10, limit=100, hits=1, misses=1)


def test_the_least_recently_used_plan_is_evicted() -> None:
    cache: SizedCache[Any] = SizedCache(100)
    for name in "abc":
        cache.get(name, lambda: fake(30))
    cache.get("a", never)
    cache.get("d", lambda: fake(30))  # b was used longest ago
    for name in "acd":
        cache.get(name, never)
    assert cache.info().nbytes == 90
    cache.get("b", lambda: fake(80))  # a, c and d must all go
    assert cache.info().entries == 1
    assert cache.info().nbytes == 80


def test_a_plan_larger_than_the_limit_is_not_kept() -> None:
    cache: SizedCache[Any] = SizedCache(100)
    cache.get("small", lambda: fake(60))
    assert cache.get("large", lambda: fake(101)).nbytes == 101
    assert cache.info().entries == 1
    cache.get("small", never)
    assert cache.get("large", lambda: fake(101)).nbytes == 101
    assert cache.info().misses == 3


def test_the_limit_can_be_changed_and_the_cache_emptied() -> None:
    cache: SizedCache[Any] = SizedCache(100)
    for name in "abc":
        cache.get(name, lambda: fake(30))
    cache.limit = 65
    assert cache.info().entries == 2
    assert cache.limit == 65
    cache.get("c", never)
    cache.limit = 0
    assert cache.info().nbytes == 0
    cache.put("x", fake(0))
    cache.clear()
    assert cache.info().entries == 0


def test_put_replaces_the_value_of_a_key() -> None:
    cache: SizedCache[Any] = SizedCache(100)
    cache.put("a", fake(60))
    cache.put("a", fake(50))
    assert cache.info().nbytes == 50
    assert cache.info().entries == 1


def test_a_failed_plan_is_not_kept() -> None:
    cache: SizedCache[Any] = SizedCache(100)
    with pytest.raises(AssertionError, match="the plan is cached already"):
        cache.get("a", never)
    assert cache.info().entries == 0
    assert cache.get("a", lambda: fake(1)).nbytes == 1


def test_many_threads_share_a_cache() -> None:
    cache: SizedCache[Any] = SizedCache(200)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for step in range(300):
                name = (seed * 7 + step * 13) % 17
                assert cache.get(name, lambda name=name: fake(10 + name)).nbytes == 10 + name  # type: ignore[misc]
                if step % 50 == 0:
                    cache.limit = 200 - seed
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    info = cache.info()
    assert info.hits + info.misses == 8 * 300
    assert info.nbytes <= info.limit
    kept = [name for name in range(17) if name in cache._values]
    assert info.entries == len(kept)
    assert info.nbytes == sum(10 + name for name in kept)


def test_concurrent_threads_get_equal_plans(cold_cache: None) -> None:
    pattern = fl.window(5) | fl.strided(7) | fl.random_keys(3)
    made: list[Plan] = []

    def work() -> None:
        made.append(fl.plan(pattern, 300))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 6
    for plan in made:
        assert torch.equal(plan.dense(), pattern.dense(300))


def test_plans_are_keyed_by_pattern_sizes_and_tile_shape(cold_cache: None) -> None:
    def cached(pattern: fl.Pattern, n_q: int, n_k: int | None = None, tile: int = 32, **sizes: int) -> Plan:
        return plan_for(pattern, Sizes.of(n_q, n_k, **sizes), TileShape(tile))

    first = cached(fl.window(3), 50)
    assert cached(fl.parse("window(3)"), 50) is first, "equal patterns share a plan"
    others = [
        cached(fl.window(4), 50),
        cached(fl.window(3), 51),
        cached(fl.window(3), 50, 51),
        cached(fl.window(3), 50, q_offset=1),
        cached(fl.window(3), 50, batch=2),
        cached(fl.window(3), 50, heads=2),
        cached(fl.window(3), 50, tile=8),
    ]
    assert len({id(plan) for plan in (first, *others)}) == 8
    labels = torch.arange(50) % 3
    by_label = cached(fl.clusters(labels), 50)
    assert cached(fl.clusters(labels.clone()), 50) is by_label
    labels[0] = 1
    assert cached(fl.clusters(labels), 50) is not by_label
    fl.plan(fl.window(3), 50)  # made from the one that is kept
    assert plans.info().entries == 10
    assert plans.info().nbytes == sum(_entry_bytes(plan) for plan in plans._values.values())
