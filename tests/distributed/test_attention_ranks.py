"""`fl.distributed.attention` in processes of this machine, against the float64 truth of one process."""

from __future__ import annotations

import pytest
import spread_cases
import spread_properties
import torch
from ranks import in_ranks

from farlight.testing import CASES, Case

FAST = [case for case in CASES if not case.dropout and case.n_q * case.n_k < 100_000]


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
    count = spread_properties.split_sizes_are_those_predicted(rank, world)
    spread_properties.the_same_bits_in_every_run(rank, world)
    spread_properties.lengths_say_the_layout(rank, world)
    spread_properties.dtensors_in_and_out(rank, world)
    spread_properties.ranks_that_disagree_all_raise(rank, world)
    spread_properties.sinks_join_every_row(rank, world)
    spread_properties.refusals(rank, world)
    return count + (spread_properties.what_does_not_travel_does_not_matter(rank, world) if world == 2 else 0)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_all_shared_cases(world: int) -> None:
    cases = [case for case in CASES if not case.dropout]
    in_ranks(world, spread_cases.compare_cases, cases, [torch.float32, torch.bfloat16, torch.float64], [8, 0], seconds=600)
