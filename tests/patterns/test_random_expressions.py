"""Random expressions over all primitives: dense mask, spans, plan, count and text agree; attention is exact on each backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from test_plan import expected_overlapping, expected_visited

import farlight as fl
from farlight.kernels import registry
from farlight.patterns import Pattern, Sizes, parse
from farlight.plan import TileShape
from farlight.plan.build import build, count_pairs
from farlight.testing import Case
from farlight.testing.strategies import PRIMITIVES, cases, problems
from parity import BACKENDS, compare, gives_lse, request_of


def test_the_strategies_know_every_primitive() -> None:
    """A new primitive is not finished before random expressions hold it."""
    assert set(PRIMITIVES) == set(fl.patterns.CONSTRUCTORS)


@given(problems())
def test_dense_spans_plans_count_and_text_agree(problem: tuple[Pattern, Sizes]) -> None:
    pattern, s = problem
    found = pattern.dense(s.n_q, s.n_k, batch=s.batch, heads=s.heads, q_offset=s.q_offset)
    wanted = found.expand(s.batch, s.heads, -1, -1)
    rows = torch.cartesian_prod(torch.arange(s.batch), torch.arange(s.heads), torch.arange(s.n_q)).view(-1, 3)
    if s.n_k:  # the planner asks for no row of an empty text
        spans = pattern._spans(s, rows[:, 0], rows[:, 1], rows[:, 2] + s.q_offset)
        assert torch.equal(spans.mask(), wanted.flatten(0, 2))
    for shape in (TileShape(), TileShape(8, 4, 16)):
        plan = build(pattern, s, shape)
        plan.check()
        assert torch.equal(plan.dense(), wanted)
        assert plan.pairs == int(wanted.sum())
        assert plan.visited == expected_visited(plan) >= plan.pairs
        assert plan.overlapping == expected_overlapping(plan)
    assert count_pairs(pattern, s) == int(wanted.sum())
    assert parse(repr(pattern)) == pattern


@settings(max_examples=25)
@given(problems(90))
def test_longer_sequences(problem: tuple[Pattern, Sizes]) -> None:
    pattern, s = problem
    plan = build(pattern, s, TileShape(32, 8, 64))
    plan.check()
    found = pattern.dense(s.n_q, s.n_k, batch=s.batch, heads=s.heads, q_offset=s.q_offset)
    assert torch.equal(plan.dense(), found.expand(s.batch, s.heads, -1, -1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poison")
def test_attention_is_exact(backend: str) -> None:
    ran = 0

    @settings(max_examples=settings().max_examples * 2 // 3)
    @given(cases())
    def check(case: Case) -> None:
        nonlocal ran
        if not registry.reasons(backend, request_of(case, torch.float32, return_lse=False)):
            ran += 1
            compare(case, backend, torch.float32, with_grad_lse=gives_lse(backend, case, torch.float32))

    check()
    assert ran > 20, f"too few examples could run on {backend}"
