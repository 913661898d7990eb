"""Returned tables and masks are copies: writing into them changes no later result."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.patterns import Pattern
from farlight.plan import TileShape, plan_for
from farlight.testing import CASES

TABLED = [case for case in CASES if case.pattern.tables]


def spoil(table: Tensor) -> None:
    """Write through torch, and through numpy, which torch does not notice."""
    if table.numel():
        table.fill_(1)
        table.numpy()[...] = 0


def all_tables(pattern: Pattern) -> list[Tensor]:
    parts = getattr(pattern, "parts", ())
    return [*pattern.tables, *(table for part in parts for table in all_tables(part))]


@pytest.mark.parametrize("case", TABLED, ids=lambda case: case.name)
def test_tables_of_a_pattern_are_copies(case) -> None:  # type: ignore[no-untyped-def]
    s = case.sizes
    pattern = Pattern.from_json(case.pattern.to_json())
    size = {"batch": s.batch, "heads": s.heads, "q_offset": s.q_offset}
    wanted = pattern.dense(s.n_q, s.n_k, **size)
    for table in all_tables(pattern):
        spoil(table)
    assert torch.equal(pattern.dense(s.n_q, s.n_k, **size), wanted)
    for other in (copy.copy(pattern), copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
        assert other == case.pattern
        for table in all_tables(other):
            spoil(table)
        assert torch.equal(other.dense(s.n_q, s.n_k, **size), wanted)
    assert pattern.to_json() == case.pattern.to_json()


@pytest.mark.parametrize(
    "pattern", [fl.window(4), fl.strided(5) | fl.window(3), fl.documents([0] * 20 + [1] * 30), fl.random_keys(3)], ids=str
)
def test_tables_of_a_plan_are_copies(pattern: Pattern) -> None:
    q, k, v = torch.randn(3, 1, 2, 50, 8).unbind(0)
    wanted = {backend: fl.attention(q, k, v, pattern, backend=backend) for backend in ("auto", "torch", "reference")}
    plan = fl.plan(pattern, 50, heads=2)
    plan.transposed()
    for table in plan.tensors:
        spoil(table)
    for table in (plan.masks.data, *(piece.start for piece in plan.pieces)):
        spoil(table)
    for backend, out in wanted.items():
        assert torch.equal(fl.attention(q, k, v, pattern, backend=backend), out)
    again = fl.plan(pattern, 50, heads=2)
    again.check()
    assert torch.equal(again.dense(), pattern.dense(50, heads=2).expand(1, 2, 50, 50))
    kept = plan_for(pattern, again.sizes, TileShape())
    mine = {table.data_ptr() for table in again.tensors if table.numel()}
    assert not mine & {table.data_ptr() for table in kept.tensors if table.numel()}
    assert again.derived is not kept.derived


def test_a_mask_given_and_a_mask_received_are_not_shared() -> None:
    mask = torch.eye(6, dtype=torch.bool)
    pattern = fl.pairs(mask)
    mask.fill_(True)
    assert pattern.count(6) == 6
    pattern.dense(6).fill_(True)
    assert pattern.count(6) == 6
    real = torch.arange(6) < 4
    for named in (fl.global_tokens(real), fl.padding(real), fl.documents(real.long())):
        wanted = named.count(6)
        named.dense(6).logical_not_()
        for table in named.tables:
            spoil(table)
        assert Pattern.from_json(named.to_json()).count(6) == wanted == int(named.dense(6).sum())
