"""Unions of a router's choice with a fixed pattern: each link occurs once, the fixed part is planned once for all choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routed_cases import UNIONS
from test_routed import is_the_pattern, request_for
from waits import SyncCounter

import farlight as fl
from farlight.kernels.triton import routed as on_device
from farlight.kernels.triton.configs import Config
from farlight.patterns import Pattern, Sizes
from farlight.plan import routed_union
from farlight.plan.chosen_links import ChosenLinks, ExcludedLinks
from farlight.plan.routed import links_of_conjunction
from farlight.plan.routed_union import split_routed
from farlight.routing import from_indices
from farlight.testing import Case
from farlight.testing.cases import table

SHAPE = (64, 32), (32, 64)
# The fixed part holds nothing that the choice has.
APART = ("window or no clusters",)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU are treated as those of a GPU are."""
    monkeypatch.setattr(on_device, "allow_cpu", True)


# ---- each link once ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("of", [of for of in UNIONS if of.name not in APART], ids=str)
def test_shared_links_must_be_excluded(of: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case fails when no links are excluded from the choice."""

    def exclude_nothing(atoms: Sequence[Any], sizes: Sizes, excluded: ExcludedLinks) -> list[ChosenLinks] | None:
        return links_of_conjunction(atoms, sizes, ExcludedLinks())

    monkeypatch.setattr(routed_union, "links_of_conjunction", exclude_nothing)
    with pytest.raises(AssertionError):
        is_the_pattern(of, *SHAPE)


@pytest.mark.parametrize("field", ["band", "rows", "keys"])
def test_each_excluded_part_matters(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = next(of for of in UNIONS if of.name == "window, lighthouses or clusters")
    is_the_pattern(of, *SHAPE)

    def exclude_less(atoms: Sequence[Any], sizes: Sizes, excluded: ExcludedLinks) -> list[ChosenLinks] | None:
        return links_of_conjunction(atoms, sizes, dataclasses.replace(excluded, **{field: None}))

    monkeypatch.setattr(routed_union, "links_of_conjunction", exclude_less)
    with pytest.raises(AssertionError):
        is_the_pattern(of, *SHAPE)


@st.composite
def unions(draw: st.DrawFn) -> Case:
    """A choice in union with windows and named tokens, nested in any way, the whole or its parts under causal()."""
    n_k = draw(st.integers(1, 150))
    n_q = draw(st.sampled_from([n_k, draw(st.integers(1, 150))]))
    batch, kv_heads, group = (draw(st.integers(1, 2)) for _ in range(3))
    heads = kv_heads * group
    lead = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))
    seed, block, unit = draw(st.integers(0, 999)), draw(st.integers(3, 40)), draw(st.integers(16, 90))
    blocks = -(-n_k // block)
    kind = draw(st.sampled_from(["clusters", "keys", "lists", "blocks"]))
    choice: Pattern
    if kind == "clusters":
        choice = fl.clusters(table(seed, *lead, n_q, low=-1, high=3), table(seed + 1, *lead, n_k, low=-1, high=3))
    elif kind == "keys":
        choice = fl.chosen_keys(table(seed, *lead, n_q, 5, low=-1, high=n_k))
    elif kind == "lists":
        choice = fl.chosen_blocks(table(seed, *lead, n_q, 3, low=-1, high=blocks), block=block, query_block=1)
    else:
        lists = table(seed, *lead, -(-n_q // unit), 4, low=-1, high=blocks)
        choice = fl.chosen_blocks(lists, block=block, query_block=unit)
    past, all_past = draw(st.booleans()), draw(st.booleans())
    parts = [choice & fl.causal() if past else choice]
    reach = st.sampled_from([0, 1, 5, 30, 200])
    for _ in range(draw(st.integers(0 if kind != "blocks" else 1, 2))):
        one: Pattern = fl.window(draw(reach), draw(st.none() | reach))
        parts.append(one & fl.causal() if draw(st.booleans()) else one)
    if kind != "blocks":
        for _ in range(draw(st.integers(0 if len(parts) > 1 else 1, 2))):
            named = draw(st.sampled_from([fl.global_tokens, fl.sees_all, fl.seen_by_all]))
            one = named(draw(st.lists(st.integers(-n_k - 3, max(n_q, n_k) + 8), max_size=4)))
            parts.append(fl.causal() & one if past and draw(st.booleans()) else one)
    parts = draw(st.permutations(parts))
    while len(parts) > 1:
        at = draw(st.integers(0, len(parts) - 2))
        parts[at : at + 2] = [parts[at] | parts[at + 1]]
    whole = fl.causal() & parts[0] if all_past else parts[0]
    q_offset = draw(st.sampled_from([None, None, 0, -7, 5]))
    return Case("drawn", whole, n_q, n_k, batch, heads, kv_heads, q_offset=q_offset)


@given(unions())
def test_each_link_of_a_random_union_occurs_once(of: Case) -> None:
    is_the_pattern(of, *SHAPE)


# ---- the fixed part ----------------------------------------------------------------------------------------------------
def test_the_fixed_part_is_lowered_once_for_all_choices(here: None) -> None:
    sizes = Sizes.of(150, batch=2, heads=4)
    config = Config(64, 32, 4, 2)
    found, asked = [], []
    for seed in range(3):
        choice = fl.window(11) | fl.global_tokens([0, 9]) | fl.clusters(table(seed, 2, 4, 150, high=3))
        with SyncCounter() as syncs:
            plan = on_device.routed_plan(request_for(choice, sizes, 2))
            assert plan is not None
            found.append((plan, plan.queries(config, 2), plan.keys(config, 2)))
        asked.append([what.split()[0] for what in syncs.calls])
    assert asked[1] == asked[2] == ["tolist", "tolist", "tolist"]  # one for the passes to come, one for each requested here
    (first, *works), *others = found
    for other, *more in others:
        assert other.fixed is first.fixed
        for one, two in zip(works, more, strict=True):
            assert one.earlier is not None
            assert one.earlier is two.earlier
            assert one is not two


def test_named_tokens_are_uploaded_once() -> None:
    sizes = Sizes.of(20)
    for seed in range(3):
        before = routed_union._mask.cache_info().misses
        split_routed(fl.global_tokens([0, 5, -1]) | fl.clusters(table(seed, 20)), sizes)
    assert routed_union._mask.cache_info().misses == before


def test_the_fixed_part_of_a_union() -> None:
    c, sizes = fl.clusters(table(1, 20)), Sizes.of(20)

    def fixed(pattern: Pattern) -> Pattern | None:
        split = split_routed(pattern, sizes)
        assert split is not None
        return split.fixed

    causal = fl.causal()
    assert fixed(c) is None
    assert fixed(c & causal) is None
    assert fixed(c | fl.window(3)) == fl.window(3)
    assert fixed(fl.window(3, 5) | (c | fl.window(4, 1))) == fl.window(4, 5)
    assert fixed(causal & (c | fl.window(3))) == fl.window(3, 0)
    assert fixed(causal & ((causal & fl.global_tokens([1])) | c)) == fl.global_tokens([1]) & causal
    assert fixed((fl.window(2) | fl.sees_all([1])) | (c | fl.seen_by_all([2]))) == (
        fl.window(2) | fl.sees_all([1]) | fl.seen_by_all([2])
    )


def test_pairs_that_are_visited_are_those_of_both_parts(here: None) -> None:
    plan = on_device.routed_plan(request_for(fl.window(3) | fl.clusters(torch.arange(200) // 100), Sizes.of(200), 1))
    assert plan is not None
    assert plan.fixed is not None
    # Each cluster of 100 rows has a tile before the window and one behind it.
    assert plan.visited == plan.fixed.visited + 2 * 2 * 96 * 100
    assert plan.overlapping


# ---- unsupported unions and errors ------------------------------------------------------------------------------------
few = fl.clusters([0, 1])


@pytest.mark.parametrize(
    "pattern",
    [
        few | fl.window(1, dilation=2),
        few | fl.causal(),
        few | fl.full(),
        few | fl.strided(2),
        few | fl.clusters([1, 1]),
        few | (fl.window(1) & fl.strided(2)),
        few | (fl.window(1) & fl.window(2)),
        few | ~fl.window(1),
        few | fl.global_tokens(torch.tensor([True, False])),
        few | (fl.causal() & fl.global_tokens([0])),
        fl.padding([1]) & (few | fl.window(1)),
        fl.padding(torch.tensor([True, False])) & (few | fl.window(1)),
        (few & fl.window(1)) | fl.window(0),
        (few - fl.causal()) | fl.window(1),
        fl.per_head([few | fl.window(1)]),
        fl.chosen_blocks([[[[0]]]], block=2, query_block=16) | fl.global_tokens([0]),
        fl.chosen_keys(torch.zeros(2, 0, dtype=torch.int64)) | fl.window(1),
        (fl.window(0) | fl.window(1)) & (fl.window(2) | fl.window(3)),
        fl.window(1) | fl.global_tokens([0]),
    ],
    ids=repr,
)
def test_other_unions_are_planned_on_the_host(pattern: Pattern) -> None:
    assert split_routed(pattern, Sizes.of(2)) is None


def test_an_expression_of_many_terms_is_planned_on_the_host() -> None:
    several = fl.window(0) | fl.window(1) | fl.causal() | fl.full()
    assert split_routed((several & several & several) | few, Sizes.of(2)) is None


@pytest.mark.parametrize(
    "pattern, message",
    [
        (fl.chosen_keys([[0, 7]] * 4) | fl.window(1), r"chosen_keys: indices: 7 is not one of the 4 keys"),
        (fl.window(9) | from_indices(torch.full((1, 4, 1), 9), block=2), r"chosen_blocks: indices: 9 is not one of the 2 key"),
        (fl.clusters([0] * 3) | fl.window(1), r"clusters: query_labels: it has 3 rows, but there are 4 queries"),
        (fl.clusters([0] * 4) & fl.padding([[True] * 5]) | fl.window(1), r"padding: the mask has 5 keys, but there are 4"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_union_that_does_not_fit_is_refused_as_by_the_host(pattern: Pattern, message: str, here: None) -> None:
    sizes = Sizes.of(4)
    with pytest.raises(fl.PatternError, match=message):
        pattern.check(sizes)
    with pytest.raises(fl.PatternError, match=message):
        on_device.routed_plan(request_for(pattern, sizes, 1))
