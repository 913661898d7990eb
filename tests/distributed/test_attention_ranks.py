"""`fl.distributed.attention` in processes of this machine, against the float64 truth of one process."""

from __future__ import annotations

import itertools

import hypothesis
import pytest
import spread_cases
import spread_properties
import spread_scores
import spread_travel
import torch
from ranks import in_ranks
from score_formula import TERMS

import farlight as fl
from farlight.testing import CASES, Case, case, strategies

FAST = [of for of in CASES if of.n_q * of.n_k < 100_000]


TRAVELLING = [
    Case("over ranks: window", fl.window(4), 60, head_dim=8),
    Case("over ranks: window and global tokens", fl.window(3) | fl.global_tokens([0, 31]), 60, head_dim=8),
    Case("over ranks: causal window", fl.causal() & (fl.window(5) | fl.seen_by_all([2])), 60, head_dim=8),
    Case("over ranks: random keys", fl.random_keys(2) | fl.window(1), 60, head_dim=8),
    Case("over ranks: windows per head", fl.per_head([fl.window(2), fl.window(9, dilation=2)]), 60, head_dim=8),
]


def of_every(step: int, first: int = 0) -> list[Case]:
    return FAST[first::step]


@pytest.mark.parametrize("world, cases", [(2, of_every(7)), (4, of_every(40, 1))])
def test_shared_cases_on_even_and_random_layouts(world: int, cases: list[Case]) -> None:
    """float32 everywhere; bfloat16, which travels as bytes, for every fifth."""
    compared = in_ranks(world, in_two_dtypes, cases)
    assert compared[0] == 2 * 5 * (len(cases) + len(cases[::5]))


def in_two_dtypes(rank: int, world: int, cases: list[Case]) -> int:
    compared = spread_cases.compare_cases(rank, world, cases, [torch.float32], [8, 0])
    return compared + spread_cases.compare_cases(rank, world, cases[::5], [torch.bfloat16], [8, 0])


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_properties(world: int) -> None:
    assert min(in_ranks(world, everything)) > 0


def everything(rank: int, world: int) -> int:
    """All properties in one group of processes."""
    spread_properties.the_same_bits_in_every_run(rank, world)
    spread_properties.lengths_say_the_layout(rank, world)
    spread_properties.dtensors_in_and_out(rank, world)
    spread_properties.ranks_that_disagree_all_raise(rank, world)
    spread_properties.sinks_join_every_row(rank, world)
    spread_properties.refusals(rank, world)
    checks = (
        spread_travel.split_sizes_are_those_predicted,
        spread_travel.unsent_keys_do_not_matter,
        spread_travel.sent_keys_matter,
    )
    return min(check(rank, world, TRAVELLING) for check in checks) if world == 2 else 1


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_all_shared_cases(world: int) -> None:
    in_ranks(world, spread_cases.compare_cases, CASES, [torch.float32, torch.bfloat16, torch.float64], [8, 0], seconds=600)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4, 8])
@hypothesis.given(strategies.cases())
@hypothesis.settings(max_examples=300)
def test_random_expressions(world: int, of: Case) -> None:
    """On an even and on a random layout, with all gradients."""
    assert in_ranks(world, spread_cases.compare_cases, [of], [torch.float32], [8, 0], seconds=600)[0] == 2 * 5


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("check", ["split_sizes_are_those_predicted", "unsent_keys_do_not_matter", "sent_keys_matter"])
def test_what_travels_for_all_shared_cases(world: int, check: str) -> None:
    """Split sizes as predicted and of the least weight; every unsent key NaN; every sent key changed, one by one."""
    small = [of for of in CASES if of.n_q * of.n_k < (8_000 if check == "sent_keys_matter" else 100_000)]
    assert min(in_ranks(world, getattr(spread_travel, check), [*TRAVELLING, *small], seconds=600)) > 0


SCORED = [case(name) for name in ("window and a lighthouse, n=65", "random keys, causal", "many heads and items")]
SCORED.append(Case("scored, over ranks", fl.window(5) | fl.sees_all([0]), 60, 70, heads=4, kv_heads=2, batch=2, dropout=0.3))


def test_score_terms_and_dropout_with_all_gradients() -> None:
    """One term of each kind, and all; the gradients of their tensors are summed over the ranks."""
    names = [("alibi",), ("relative", "softcap"), ("t5",), ("key_bias",), TERMS]
    problems = [*zip(itertools.cycle(SCORED), names, strict=False), (SCORED[3], TERMS), (SCORED[0], ("alibi",))]
    assert in_ranks(2, spread_scores.compare_scores, problems, torch.float32)[0] >= 6 * len(problems)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_combination_of_terms(world: int, dtype: torch.dtype) -> None:
    sets = [names for size in (1, 2) for names in itertools.combinations(TERMS, size)]
    in_ranks(world, spread_scores.compare_scores, list(itertools.product(SCORED, sets)), dtype, seconds=600)
