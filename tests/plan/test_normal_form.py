"""The normal form: large expressions stay partly unexpanded; plans stay exact, and the work is bounded."""

from __future__ import annotations

import functools
import operator
import random

import pytest
import torch

import farlight as fl
from farlight.errors import PatternError, PlanError
from farlight.patterns import Pattern, Sizes
from farlight.plan import TileShape
from farlight.plan.build import build
from farlight.plan.normal_form import expanded, terms_of

PRIMES = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53]
HEADS = 2
LABELS = torch.arange(70) * 7 % 5


def factors(count: int) -> str:
    """`(a | b) & (c | d) & …`: twice as many conjunctions with every factor."""
    return " & ".join(f"(strided({PRIMES[2 * i]}) | strided({PRIMES[2 * i + 1]}))" for i in range(count))


LARGE = {
    "7 factors": factors(7),
    "8 factors": factors(8),
    "complement of a product": f"~({factors(6)})",
    "product of differences": " & ".join(f"(strided({p}) - window({p}))" for p in PRIMES[:9]),
    "windows united in 9 factors": " & ".join(f"(window({p}) | window({3 * p}, {p}))" for p in PRIMES[:9]),
    "windows and strides": f"(window(9) | global_tokens([3, -1])) & {factors(6)}",
    "random keys": " & ".join(f"(random_keys({3 + k}, seed={k}) | random_keys(20, seed={k + 50}))" for k in range(6)),
    "100 strides united": " | ".join(f"strided({p})" for p in range(2, 102)),
    "300 windows united": " | ".join(f"window({p % 7}, {p})" for p in range(300)),
    "windows within a product": f"causal() & window(12) & ({factors(7)})",
    "heads": f"per_head([{', '.join(f'strided({p}) | window({p})' for p in PRIMES[:2])}]) & {factors(3)}",
}


@pytest.mark.parametrize("text", LARGE.values(), ids=LARGE)
def test_large_expressions_are_planned_exactly(text: str) -> None:
    pattern = fl.parse(text)
    for n_q, n_k in ((64, 64), (37, 90)):
        dense = pattern.dense(n_q, n_k, heads=HEADS)
        plan = build(pattern, Sizes.of(n_q, n_k, heads=HEADS), TileShape())
        plan.check()
        assert torch.equal(plan.dense(), dense.expand(1, HEADS, n_q, n_k))
    assert pattern.count(64, heads=HEADS) == int(pattern.dense(64, heads=HEADS).expand(1, HEADS, 64, 64).sum())


@pytest.mark.parametrize("text", LARGE.values(), ids=LARGE)
def test_terms_are_bounded_in_number(text: str) -> None:
    sizes = Sizes.of(64, heads=HEADS)
    assert len(expanded(fl.parse(text), sizes)) <= 258
    assert len(terms_of(fl.parse(text), sizes)) <= 68


def random_expression(rng: random.Random, depth: int) -> Pattern:
    if not depth:
        n = rng.randrange(1, 12)
        atoms = [
            fl.window(n, rng.randrange(9)), fl.window(3, dilation=n), fl.strided(n), fl.random_keys(n, seed=n), fl.causal(),
            fl.global_tokens([n, -n]), fl.landmarks(n), fl.offsets([n, -n, n + 1]), fl.clusters(LABELS % n),
            fl.blocked_window(1, block=n), fl.random_blocks(2, block=n, causal=True), fl.seen_by_all([n, 3, 40]),
        ]  # fmt: skip
        return rng.choice(atoms)
    left, right = random_expression(rng, depth - 1), random_expression(rng, rng.randrange(depth))
    sign = rng.randrange(8)
    if sign == 0:
        return ~left
    if sign == 1:
        return fl.per_head([left, right])
    return left | right if sign < 4 else left & right if sign < 7 else left - right


@pytest.mark.parametrize("seed", range(12))
def test_random_expressions_are_planned_exactly(seed: int) -> None:
    rng = random.Random(seed)
    pattern = random_expression(rng, 3 + seed % 3)
    plan = build(pattern, Sizes.of(70, heads=2), TileShape())
    plan.check()
    assert torch.equal(plan.dense(), pattern.dense(70, heads=2).expand(1, 2, 70, 70))
    assert pattern.count(70, heads=2) == int(plan.dense().sum())


def test_windows_stay_intervals_beside_a_product() -> None:
    """A whole literal is evaluated inside the windows only, not over all pairs: 2^20 keys can be planned."""
    pattern = fl.window(40) & fl.parse("&".join(f"(strided({k}) | strided({k + 1}) | strided({k + 2}))" for k in range(2, 7)))
    sizes = Sizes.of(500, 2**20)
    i = (torch.arange(500) + sizes.q_offset)[:, None]
    j = i + torch.arange(-40, 41)
    zero = torch.zeros((), dtype=torch.int64)
    expected = pattern._allows(sizes, zero, zero, i, j) & (j < sizes.n_k)
    assert build(pattern, sizes, TileShape()).pairs == int(expected.sum()) > 1000


@pytest.mark.parametrize("text", ["~strided(2)", f"~({factors(6)})", "full() - clusters(table)"], ids=lambda text: text[:20])
def test_too_many_pairwise_evaluations_are_refused(text: str) -> None:
    n = 2**18
    pattern = fl.full() - fl.clusters(torch.arange(n) % 3) if "table" in text else fl.parse(text)
    with pytest.raises(
        PlanError, match=r"is no union of intervals here: it would take [0-9,]+ evaluations of single pairs, more than 17,179,8"
    ):
        pattern.count(n)
    with pytest.raises(PlanError, match="Bound it by a window, or unite fewer patterns inside an intersection"):
        build(pattern, Sizes.of(n), TileShape())


def test_many_parts_side_by_side_are_not_deep() -> None:
    pattern: Pattern = fl.window(0)
    for offset in range(1000):
        pattern = pattern | fl.offsets([offset * 3 % 64])
    assert pattern.count(64) == int(pattern.dense(64).sum())
    assert fl.parse(repr(pattern)) == pattern
    assert fl.Pattern.from_json(pattern.to_json()) == pattern
    with pytest.raises(PatternError, match=r"joins 1025 parts by '\|', more than 1024; name many tokens or distances in one"):
        functools.reduce(operator.or_, [pattern, *(fl.offsets([offset]) for offset in range(100))])


def test_depth_is_bounded_where_a_pattern_is_built() -> None:
    pattern: Pattern = fl.window(0)
    for k in range(100):
        pattern = (pattern | fl.window(k % 5)) & fl.window(9, k)
    assert pattern.count(30) == int(pattern.dense(30).sum())
    with pytest.raises(
        PatternError, match=r"nested 201 deep, more than 200; write a \| b \| c, whose parts stand side by side"
    ):
        pattern | fl.window(1)
    with pytest.raises(PatternError, match="nested 201 deep"):
        functools.reduce(lambda one, _: ~one, range(201), fl.window(1))


def test_lists_of_distances_are_read_by_stretches() -> None:
    """Distances that follow one another are one interval of each row, not one for each of them."""
    assert fl.offsets(range(-5000, 5000)).count(20_000) == sum(20_000 - abs(d) for d in range(-5000, 5000))


@pytest.mark.parametrize("causal", [False, True])
def test_many_random_keys_are_distinct_and_the_same_in_any_chunk(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import farlight.patterns.random as drawing

    pattern = fl.random_keys(70, seed=5, causal=causal)
    marked = pattern.dense(130, heads=2)
    monkeypatch.setattr(drawing, "_MOST_MARKS", 1000)
    assert torch.equal(pattern.dense(130, heads=2), marked)
    monkeypatch.setattr(drawing, "_FEW_DRAWS", 10**9)  # told apart by comparing
    assert torch.equal(pattern.dense(130, heads=2), marked)
    assert marked.sum(-1)[0, 0].tolist() == [min(70, i + 1) if causal else 70 for i in range(130)]


@pytest.mark.parametrize("part", [fl.causal(), fl.window(1, 0), ~fl.strided(2)], ids=repr)
def test_a_per_head_that_is_not_rewritten_varies_over_heads(part: Pattern) -> None:
    """Beside two label atoms `per_head` stays whole: its heads must still be told apart, not only its atoms."""
    named = fl.global_tokens(torch.tensor([[True, False, False, True]]))
    pattern = named & fl.strided(2) & fl.per_head([fl.full(), part, fl.strided(1)])
    assert torch.equal(build(pattern, Sizes.of(4, heads=3), TileShape()).dense(), pattern.dense(4, heads=3))
