"""Router choices planned on the device: work lists equal to the pattern and to the host planner's, with one read of counts.

`triton_interpreted.py` runs the kernels on these lists.
"""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import torch
from routed_cases import ROUTED
from torch import Tensor
from triton_lists import pairs_of_key_work, pairs_of_query_work
from waits import SyncCounter

import farlight as fl
from farlight.kernels import triton as backend
from farlight.kernels.backend import Request
from farlight.kernels.triton import routed as on_device
from farlight.kernels.triton import work_partition
from farlight.kernels.triton.configs import Config
from farlight.kernels.triton.launches import KeyWork, QueryWork
from farlight.kernels.triton.lower_kv import lower_keys
from farlight.kernels.triton.lower_q import lower_queries
from farlight.kernels.triton.routed_lower_kv import RoutedKeyLowering
from farlight.kernels.triton.routed_lower_q import RoutedQueryLowering
from farlight.patterns import Pattern, Sizes
from farlight.patterns.membership import rooms
from farlight.patterns.multi_label import meets
from farlight.patterns.notation import parse
from farlight.plan.build import build
from farlight.plan.cache import plans
from farlight.plan.footprint import held_bytes
from farlight.plan.routed import chosen_links
from farlight.plan.routed_union import split_routed
from farlight.routing import LSH, KMeans, TopBlocks, TopKeys, from_indices
from farlight.testing import Case
from farlight.testing.cases import table
from parity import request_of

# Rows and keys of the passes over queries, and of the pass over keys.
SHAPES = [((128, 64), (32, 64)), ((64, 64), (64, 128)), ((32, 16), (32, 16))]
every_case = pytest.mark.parametrize("of", ROUTED, ids=str)


def made(of: Case, queries: tuple[int, int], keys: tuple[int, int]) -> tuple[QueryWork, KeyWork]:
    found = split_routed(of.pattern, of.sizes)
    assert found is not None
    group, after = of.heads // of.kv_heads, found.fixed is not None
    first = RoutedQueryLowering(found.pieces, of.sizes, *queries, group, 8, after=after)
    second = RoutedKeyLowering(found.pieces, of.sizes, *keys, group, 8, after=after)
    by_queries, by_keys = first.build(on_device.read_counts(first.counts)), second.build(on_device.read_counts(second.counts))
    if found.fixed is None:
        return by_queries, by_keys
    plan = build(found.fixed, of.sizes, backend.SHAPE)
    earlier = lower_queries(plan, *queries, group, 8), lower_keys(plan, *keys, group, 8)
    return dataclasses.replace(by_queries, earlier=earlier[0]), dataclasses.replace(by_keys, earlier=earlier[1])


def is_the_pattern(of: Case, queries: tuple[int, int], keys: tuple[int, int]) -> None:
    wanted = of.pattern.dense(of.n_q, of.n_k, batch=of.batch, heads=of.heads, q_offset=of.q_offset)
    wanted = wanted.expand(of.batch, of.heads, -1, -1).long()
    by_queries, by_keys = made(of, queries, keys)
    assert torch.equal(pairs_of_query_work(by_queries, of.sizes, queries[1]), wanted)
    assert torch.equal(pairs_of_key_work(by_keys, of.sizes, of.heads // of.kv_heads), wanted)


# ---- the tables are the pattern ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("queries, keys", SHAPES, ids=str)
@every_case
def test_each_pair_comes_up_once(of: Case, queries: tuple[int, int], keys: tuple[int, int]) -> None:
    is_the_pattern(of, queries, keys)


@every_case
def test_each_pair_comes_up_once_when_all_is_cut_in_parts(of: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_partition, "MIN_BLOCKS", 1)
    monkeypatch.setattr(work_partition, "PARTS_PER_PROCESSOR", 1000)
    is_the_pattern(of, (64, 16), (32, 16))


def differing_fields(left: Any, right: Any) -> list[str]:
    """The names of the fields in which two dataclasses of tables differ."""
    names = []
    for field in dataclasses.fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, Tensor):
            names += [] if torch.equal(a, b) and a.dtype == b.dtype else [field.name]
        elif isinstance(a, tuple):
            assert len(a) == len(b)
            names += [f"{field.name}: {name}" for x, y in zip(a, b, strict=True) for name in differing_fields(x, y)]
        elif a != b:
            names.append(field.name)
    return names


BY_LABEL = [
    of for of in ROUTED if "causal" not in of.pattern.text and of.pattern.text.startswith(("clusters", "meets"))
    and "agree with nothing" not in of.name and chosen_links(of.pattern, of.sizes) is not None
]  # fmt: skip


@pytest.mark.parametrize("queries, keys", SHAPES, ids=str)
@pytest.mark.parametrize("of", BY_LABEL, ids=str)
def test_tables_equal_those_of_the_host_planner(of: Case, queries: tuple[int, int], keys: tuple[int, int]) -> None:
    """Bit for bit, for labels. With a choice per head or item the host aligns blocks of sorted keys to the first slot of all,
    so that the dk/dv tables are compared for a common choice only.
    """
    group = of.heads // of.kv_heads
    plan = build(of.pattern, of.sizes, backend.SHAPE)
    by_queries, by_keys = made(of, queries, keys)
    assert differing_fields(by_queries, lower_queries(plan, *queries, group, 8)) == []
    if not (of.pattern.varies_over_batch or of.pattern.varies_over_heads):
        assert differing_fields(by_keys, lower_keys(plan, *keys, group, 8)) == []


def test_the_comparison_sees_one_wrong_number() -> None:
    of = BY_LABEL[0]
    one, two = made(of, *SHAPES[0])[0], made(of, *SHAPES[0])[0]
    assert differing_fields(one, two) == []
    two.whole[0] += 1
    assert differing_fields(one, two) == ["whole"]


# ---- nothing is read ---------------------------------------------------------------------------------------------------
@every_case
def test_only_sums_are_read(of: Case) -> None:
    """On the "meta" device there are no values at all: whoever asks for one, or mixes devices, raises."""
    nowhere = parse(of.pattern.text, tuple(table.to("meta") for table in of.pattern.tables))
    here, there = split_routed(of.pattern, of.sizes), split_routed(nowhere, of.sizes)
    assert here is not None
    assert there is not None
    assert here.fixed == there.fixed
    group, after = of.heads // of.kv_heads, here.fixed is not None
    for make, shape in ((RoutedQueryLowering, (128, 64)), (RoutedKeyLowering, (32, 64))):
        real = make(here.pieces, of.sizes, *shape, group, 8, after=after)
        work = make(there.pieces, of.sizes, *shape, group, 8, after=after)
        found = work.build(on_device.read_counts(real.counts))
        assert found.rows.device.type == "meta"
        assert all(launch.work.device.type == "meta" for launch in found.launches)


def test_what_counts_as_waiting() -> None:
    x = torch.arange(3)
    with SyncCounter() as syncs:
        torch.tensor([1, 2])
        x.tolist()
        x[x > 0]
        bool(x.any())
        x.repeat_interleave(x)
        x.to("meta")
        x.repeat_interleave(x, output_size=3).sort()
    assert syncs.calls == ["lift_fresh", "tolist of 3", "index", "_local_scalar_dense", "repeat_interleave", "_to_copy"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU are treated as those of a GPU are."""
    monkeypatch.setattr(on_device, "allow_cpu", True)


@every_case
def test_a_plan_is_made_with_one_read_for_all_passes(of: Case, here: None) -> None:
    earlier, request = (
        request_of(of, torch.float32, return_lse=True)._replace(pattern=parse(of.pattern.text, of.pattern.tables))
        for _ in range(2)
    )
    # The fixed part of a union is planned on the host, with the first choice that it meets.
    on_device.routed_plan(earlier)
    with SyncCounter() as syncs:
        plan = on_device.routed_plan(request)
        assert plan is not None
        assert on_device.routed_plan(request) is plan
    assert [what.split()[0] for what in syncs.calls] == ["tolist"]
    assert int(syncs.calls[0].split()[-1]) <= 100 * len(plan.pieces)


def test_what_routers_answer_is_planned_on_the_device(here: None) -> None:
    q, k = torch.randn(2, 4, 200, 16), torch.randn(2, 2, 200, 16)
    mask = torch.arange(200) < torch.tensor([[200], [150]])

    def serves(router: Any, key_mask: Tensor | None = None) -> bool:
        pattern = router(q, k, key_mask=key_mask)
        return on_device.routed_plan(request_for(pattern, Sizes.of(200, batch=2, heads=4), 2)) is not None

    for router in (
        KMeans(4, 16, 8).eval(),
        KMeans(4, 16, 8, causal=True).eval(),
        LSH(8, causal=True),
        TopBlocks(3, 16, causal=True),
        TopKeys(4, causal=True),
    ):
        assert serves(router), router
        assert serves(router, mask), router
        assert serves(router | fl.window(3) | fl.global_tokens([0])), router
    assert serves(TopBlocks(3, 16, 32, causal=True))
    # The others are planned on the host, see docs/gpu.md; LSH of several rounds too where its labels are on a device.
    router = KMeans(4, 16, 8, per_cluster=20).eval()
    assert not serves(router), router
    assert not serves(TopBlocks(3, 16, 32), mask)


def test_routers_that_take_a_count_choose_without_asking() -> None:
    q, k = torch.randn(2, 4, 200, 16), torch.randn(2, 2, 200, 16)
    mask = torch.arange(200) < torch.tensor([[200], [150]])
    for router in (
        KMeans(4, 16, 8, causal=True).eval(),
        TopBlocks(3, 16),
        TopBlocks(3, 16, causal=True),
        TopBlocks(3, 16, 40, causal=True),
        TopKeys(4, causal=True),
    ):
        for key_mask in (None, mask):
            with SyncCounter() as syncs:
                router(q, k, key_mask=key_mask)
            assert syncs.calls == [], router


def request_for(pattern: Pattern, sizes: Sizes, kv_heads: int) -> Request:
    return Request(pattern, sizes, kv_heads, 16, 16, torch.float32, torch.device("cpu"))


# ---- unsupported patterns and errors ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "pattern",
    [
        fl.window(3),
        fl.causal(),
        fl.clusters([0, 1]) & fl.window(1),
        fl.clusters([0, 1]) & fl.clusters([1, 1]),
        fl.clusters([0, 1]) - fl.causal(),
        fl.chosen_keys(torch.zeros(2, 0, dtype=torch.int64)),
        fl.chosen_blocks(torch.zeros(1, 1, 1, 0, dtype=torch.int64), block=2),
        fl.chosen_blocks([[[[0]]]], block=2, query_block=16) & fl.padding([1]),
        rooms(torch.ones(2, 3, dtype=torch.bool)),
        meets([[0, 1], [1, 1]]),
    ],
    ids=repr,
)
def test_other_patterns_are_planned_on_the_host(pattern: Pattern) -> None:
    assert split_routed(pattern, Sizes.of(2)) is None


def test_no_tokens_are_planned_on_the_host() -> None:
    nothing = fl.clusters(torch.zeros(0, dtype=torch.int64))
    for pattern in (nothing, nothing | fl.window(1)):
        assert split_routed(pattern, Sizes.of(0)) is None


def test_tensors_on_the_cpu_are_planned_on_the_host() -> None:
    assert on_device.routed_plan(request_for(fl.clusters([0, 1]), Sizes.of(2), 1)) is None


def test_tables_on_another_device_are_planned_on_the_host(here: None) -> None:
    elsewhere = fl.clusters(torch.zeros(2, dtype=torch.int64, device="meta"))
    assert on_device.routed_plan(request_for(elsewhere, Sizes.of(2), 1)) is None


@pytest.mark.parametrize(
    "pattern, message",
    [
        (fl.chosen_keys([[0, 7]] * 4), r"chosen_keys: indices: 7 is not one of the 4 keys; use 0 … 3, or -1 for none"),
        (fl.chosen_keys([[0, -2]] * 4), r"chosen_keys: indices: -2 is not one of the 4 keys"),
        (fl.chosen_blocks([[[[0, 2]]]], block=2, query_block=16), r"chosen_blocks: indices: 2 is not one of the 2 key blocks"),
        (from_indices(torch.full((1, 4, 1), 9), block=2), r"chosen_blocks: indices: 9 is not one of the 2 key blocks"),
        (fl.chosen_keys([[0]] * 3), r"chosen_keys: indices: it has 3 rows, but there are 4 queries"),
        (fl.clusters([0, 1, 2]), r"clusters: query_labels: it has 3 rows, but there are 4 queries"),
        (fl.clusters([0] * 4) & fl.padding(torch.ones(3, dtype=torch.bool)), r"padding: the mask has 3 keys, but there are 4"),
        (fl.clusters(torch.zeros(1, 3, 4, dtype=torch.int64)), r"its head dimension is 3, but there are 1 heads"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_choice_that_does_not_fit_is_refused_as_by_the_host(pattern: Pattern, message: str, here: None) -> None:
    sizes = Sizes.of(4)
    with pytest.raises(fl.PatternError, match=message):
        pattern.check(sizes)
    with pytest.raises(fl.PatternError, match=message):
        on_device.routed_plan(request_for(pattern, sizes, 1))


def test_too_many_blocks_are_refused(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "read_counts", lambda numbers: [2**30] * len(numbers))
    with pytest.raises(fl.PlanError, match=r"the plan has more than 2\^31 blocks; split the queries over several calls"):
        on_device.routed_plan(request_for(fl.clusters([0, 1]), Sizes.of(2), 1))


def test_a_plan_is_kept_counted_and_released_with_its_pattern(here: None, cold_cache: None) -> None:
    pattern, sizes = fl.window(3) | fl.clusters(table(80, 50, high=3)), Sizes.of(50)
    plan = on_device.routed_plan(request_for(pattern, sizes, 1))
    assert plan is not None
    assert on_device.routed_plan(request_for(pattern, sizes, 1)) is plan
    kept = plans.info()
    assert kept.entries == 2, "the fixed part has an entry of its own"
    assert kept.nbytes > held_bytes(plan.pieces)
    work = plan.keys(Config(32, 16, 4, 1), 1)
    assert plans.info().nbytes - kept.nbytes > held_bytes(work.launches, work.earlier), "work tables count when they are made"
    gc.disable()
    try:
        del pattern
        assert plans.info().entries == 1, "the plan goes with its pattern, without a collection"
    finally:
        gc.enable()


def test_a_pattern_that_the_device_does_not_plan_is_read_once(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = fl.clusters(table(80, 50, high=3)) & fl.strided(2)
    asked: list[Pattern] = []
    monkeypatch.setattr(on_device, "split_routed", lambda pattern, sizes: asked.append(pattern))
    for _ in range(3):
        assert on_device.routed_plan(request_for(pattern, Sizes.of(50), 1)) is None
    assert len(asked) == 1
