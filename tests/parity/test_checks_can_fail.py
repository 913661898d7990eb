"""The checks themselves: each kind of damage that a backend or a plan could do must be rejected.

A helper that compares two things and asserts nothing has been seen in the field for years; this file is the cure.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.errors import PlanError
from farlight.kernels import torch_tiled as blocked
from farlight.plan import Plan
from farlight.plan.build import build
from farlight.plan.tables import BITS, BOUNDS
from farlight.testing import Answer, Case, assert_answer, assert_matches, case, inputs, kept_links, solve
from farlight.testing.tolerance import assert_matches as the_same_helper
from parity import SEED, answer, dense, solution

SKIM = case("skim")
HOLES = case("a mask with holes")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def damaged(found: Answer, name: str, harm: Callable[[Tensor], None]) -> Answer:
    table = getattr(found, name).detach().clone()
    harm(table)
    return dataclasses.replace(found, **{name: table})


def one_element(x: Tensor) -> None:
    flat = x.view(-1)
    flat[flat.numel() // 2] += 0.3


def one_nan(x: Tensor) -> None:
    x.view(-1)[5] = math.nan


def one_infinity(x: Tensor) -> None:
    x.view(-1)[5] = math.inf


def swapped_rows(x: Tensor) -> None:
    x[0, 0, [20, 50]] = x[0, 0, [50, 20]].clone()


def swapped_heads(x: Tensor) -> None:
    x[:, [0, 1]] = x[:, [1, 0]].clone()


def negated(x: Tensor) -> None:
    x.neg_()


def shifted_rows(x: Tensor) -> None:
    x.copy_(x.roll(1, 2))


def doubled(x: Tensor) -> None:
    x.mul_(2)


def zero(x: Tensor) -> None:
    x.zero_()


HARMS = [one_element, one_nan, one_infinity, swapped_rows, swapped_heads, negated, shifted_rows, doubled, zero]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Answer)])
@pytest.mark.parametrize("harm", HARMS, ids=lambda f: f.__name__)
def test_a_damaged_answer_is_rejected(harm: Callable[[Tensor], None], name: str, dtype: torch.dtype) -> None:
    found = answer(SKIM, "reference", dtype)
    assert assert_answer(found, solution(SKIM, dtype), "unharmed") == 5
    with pytest.raises(AssertionError, match=rf"^harmed: {name}: "):
        assert_answer(damaged(found, name, harm), solution(SKIM, dtype), "harmed")


def test_a_small_error_in_one_small_row_is_rejected() -> None:
    """The row's numbers are a thousandth of the others'; its error is far below theirs in size, and still seen."""
    torch.manual_seed(1)
    truth = torch.randn(1, 1, 40, 16, dtype=torch.float64)
    truth[0, 0, 7] *= 1e-3
    sound = truth.float()
    assert_matches(sound, truth, sound, "sound")
    sound[0, 0, 7, 3] *= 1 + 1e-4
    with pytest.raises(
        AssertionError, match=r"out: 1 of 40 rows are wrong, the worst at \(0, 0, 7\): got .*, truth .*, error .*, allowed "
    ):
        assert_matches(sound, truth, truth.float(), "out")


def test_a_bias_in_every_row_is_rejected_by_the_mean() -> None:
    """Each row stays within the bound of the worst row, but all of them are off."""
    torch.manual_seed(2)
    truth = torch.randn(1, 2, 50, 16, dtype=torch.float64)
    yardstick = truth.float()
    yardstick[0, 0, 0, 0] *= 1 + 1e-4  # plain torch is bad in one place
    actual = (truth * (1 + 5e-5)).float()
    with pytest.raises(AssertionError, match=r"out: the mean error is .* of the magnitude, allowed"):
        assert_matches(actual, truth, yardstick, "out")


def test_what_is_exactly_zero_must_be_exactly_zero() -> None:
    truth = torch.zeros(1, 1, 4, 3, dtype=torch.float64)
    truth[0, 0, 0] = 1.0
    actual = truth.float()
    assert_matches(actual, truth, actual, "sound")
    actual[0, 0, 2, 1] = 1e-30
    with pytest.raises(AssertionError, match=r"1 of 4 rows are wrong, the worst at \(0, 0, 2\)"):
        assert_matches(actual, truth, truth.float(), "out")


@pytest.mark.parametrize(
    ("truth", "actual"),
    [
        (-math.inf, -1e30),
        (-math.inf, 0.0),
        (-math.inf, math.inf),
        (-math.inf, math.nan),
        (0.0, -math.inf),
        (0.0, math.nan),
        (0.0, math.inf),
    ],
)
def test_infinities_must_stand_where_they_stand(truth: float, actual: float) -> None:
    right = torch.tensor([[[1.0, truth, 2.0]]], dtype=torch.float64)
    wrong = torch.tensor([[[1.0, actual, 2.0]]])
    assert_matches(right.float(), right, right.float(), "lse")
    with pytest.raises(AssertionError, match=r"lse: 1 elements are NaN, or infinite where .* at \(0, 0, 1\) got"):
        assert_matches(wrong, right, right.float(), "lse")


def test_a_wrong_shape_is_rejected() -> None:
    with pytest.raises(AssertionError, match=r"out: the shape is \(1, 2\), it must be \(2, 1\)"):
        assert_matches(torch.zeros(1, 2), torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, 1), "out")
    assert_matches(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, 3), "out")


def test_a_bad_yardstick_does_not_excuse_a_dropped_link() -> None:
    """At bfloat16 too, one link of a short row is more than rounding."""
    for dtype in DTYPES:
        given = inputs(HOLES, dtype)
        allowed = HOLES.pattern.dense(70, heads=2)
        allowed = allowed.expand(1, 2, -1, -1).clone()
        row, key = 3, int(allowed[0, 0, 3].nonzero()[0])
        allowed[0, 0, row, key] = False
        without = solve(HOLES, given, allowed=allowed).yardstick
        with pytest.raises(AssertionError, match=r"out: 1 of 140 rows are wrong, the worst at \(0, 0, 3\)"):
            assert_answer(without, solution(HOLES, dtype), "one link less")


def test_the_public_helper_is_the_one_that_parity_uses() -> None:
    assert assert_matches is the_same_helper


# ---- damage in a plan ------------------------------------------------------------------------------------------------
def computed(plan: Plan, of: Case) -> Answer:
    """A case computed by the torch backend with this very plan."""
    given = inputs(of, torch.float32)
    options = {"scale": of.scale_value, "dropout": of.dropout, "seed": torch.tensor(SEED)}
    out, lse = blocked.forward(given.q, given.k, given.v, plan, **options)
    grads = blocked.backward(given.grad_out, torch.zeros_like(lse), given.q, given.k, given.v, out, lse, plan, **options)
    return Answer(out, lse, *grads)


def must_fail(plan: Plan, of: Case, *, twice: bool = False) -> None:
    with pytest.raises(AssertionError, match=r"rows are wrong|elements are NaN|the mean error"):
        assert_answer(computed(plan, of), solution(of, torch.float32), "damaged")
    if twice:
        with pytest.raises(PlanError, match="is covered 2 times"):
            plan.dense()
    else:
        assert not torch.equal(plan.dense(), dense(of))


def first_layer(plan: Plan, piece: int = 0, **changes: Tensor) -> Plan:
    pieces = list(plan.pieces)
    layer = dataclasses.replace(pieces[piece].layers[0], **changes)
    pieces[piece] = dataclasses.replace(pieces[piece], layers=(layer, *pieces[piece].layers[1:]))
    return dataclasses.replace(plan, pieces=tuple(pieces))


def with_data(plan: Plan, at: int, value: int) -> Plan:
    data = plan.masks.data.clone()
    data[at] = value
    return dataclasses.replace(plan, masks=dataclasses.replace(plan.masks, data=data))


def test_an_undamaged_plan_passes() -> None:
    for of in (SKIM, HOLES, case("strided"), case("dropout")):
        assert_answer(computed(build(of.pattern, of.sizes, blocked.SHAPE), of), solution(of, torch.float32), "sound")


def test_one_flipped_bit_of_a_mask_fails() -> None:
    plan = build(HOLES.pattern, HOLES.sizes, blocked.SHAPE)
    mask = int((plan.masks.kind == BITS).nonzero()[0])
    at = int(plan.masks.start[mask]) + 2
    must_fail(with_data(plan, at, int(plan.masks.data[at]) ^ 1), HOLES)


def test_one_moved_bound_of_a_mask_fails() -> None:
    of = case("causal")
    plan = build(of.pattern, of.sizes, blocked.SHAPE)
    mask = int((plan.masks.kind == BOUNDS).nonzero()[0])
    at = int(plan.masks.start[mask]) + 2 * 40 + 1
    must_fail(with_data(plan, at, int(plan.masks.data[at]) - 1), of)


def test_a_dropped_mask_fails() -> None:
    of = case("causal")
    plan = build(of.pattern, of.sizes, blocked.SHAPE)
    layer = plan.pieces[0].layers[0]
    assert int(layer.mask.max()) >= 0
    must_fail(first_layer(plan, mask=torch.full_like(layer.mask, -1)), of)


def test_a_run_one_key_too_long_or_too_short_fails() -> None:
    of = case("seen by all, consecutive")
    plan = build(of.pattern, of.sizes, blocked.SHAPE)
    layer = plan.pieces[0].layers[0]
    for change in (1, -1):
        hi = layer.hi.clone()
        hi[0] += change
        must_fail(first_layer(plan, hi=hi), of)


def test_two_keys_exchanged_in_a_sorted_order_fail() -> None:
    of = case("clusters")
    plan = build(of.pattern, of.sizes, blocked.SHAPE)
    keys = plan.pieces[0].layers[0].keys
    assert keys is not None
    keys = keys.clone()
    keys[[0, -1]] = keys[[-1, 0]]
    must_fail(first_layer(plan, keys=keys), of)


def test_a_gathered_key_off_by_one_fails() -> None:
    of = case("random keys")
    plan = build(of.pattern, of.sizes, blocked.SHAPE)
    keys = plan.pieces[0].layers[0].point_keys
    assert keys is not None
    keys = keys.clone()
    keys[-1] = 0 if int(keys[-1]) != 0 else 1
    must_fail(first_layer(plan, point_keys=keys), of)


def test_a_piece_counted_twice_fails() -> None:
    of = case("strided")
    plan = build(of.pattern, of.sizes, blocked.SHAPE)
    must_fail(dataclasses.replace(plan, pieces=plan.pieces * 2, overlapping=True), of, twice=True)


def test_dropout_of_another_seed_fails() -> None:
    of = case("dropout")
    truth = solution(of, torch.float32)
    other = solve(of, inputs(of, torch.float32), dropout_seed=SEED + 1).yardstick
    with pytest.raises(AssertionError, match="rows are wrong"):
        assert_answer(other, truth, "another seed")


# ---- the oracle ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["skim", "grouped heads, three to one", "window, rows before the text", "nothing at all", "no key"]
)
def test_the_truth_agrees_with_a_loop_over_single_links(name: str) -> None:
    """The oracle itself, against attention written with Python floats, row by row."""
    of = case(name)
    given, s = inputs(of, torch.float64), of.sizes
    truth = solution(of, torch.float64).truth
    group = of.heads // of.kv_heads
    allowed = of.pattern.dense(s.n_q, s.n_k, batch=s.batch, heads=s.heads, q_offset=s.q_offset).expand(s.batch, s.heads, -1, -1)
    for b, h, r in ((b, h, r) for b in range(of.batch) for h in range(of.heads) for r in range(0, of.n_q, 7)):
        keys = allowed[b, h, r].nonzero().view(-1).tolist()
        scores = [
            sum(x * y for x, y in zip(given.q[b, h, r].tolist(), given.k[b, h // group, j].tolist(), strict=True))
            * of.scale_value
            for j in keys
        ]
        lse = math.log(sum(math.exp(x) for x in scores)) if keys else -math.inf
        assert float(truth.lse[b, h, r]) == pytest.approx(lse, abs=1e-12)
        out = [
            sum(math.exp(x - lse) * float(given.v[b, h // group, j, d]) for x, j in zip(scores, keys, strict=True))
            for d in range(of.head_dim)
        ]
        assert truth.out[b, h, r].tolist() == pytest.approx(out, abs=1e-12)


def test_the_gradients_of_the_truth_are_those_of_finite_differences() -> None:
    of = dataclasses.replace(
        case("dropout, grouped heads"), n_q=6, n_k=8, pattern=fl.window(2) | fl.random_keys(1), name="small"
    )
    truth = solve(of, inputs(of, torch.float64), dropout_seed=SEED, with_grad_lse=True).truth
    for name in ("q", "k", "v"):
        grad = getattr(truth, f"d{name}")
        for flat in range(0, grad.numel(), 37):
            sides = []
            for step in (1e-5, -1e-5):
                given = inputs(of, torch.float64)
                getattr(given, name).view(-1)[flat] += step
                found = solve(of, given, dropout_seed=SEED).truth
                sides.append(float((found.out * given.grad_out).sum() + (found.lse * given.grad_lse).sum()))
            assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(float(grad.view(-1)[flat]), abs=1e-6, rel=1e-6)


def test_kept_links_are_the_documented_hash() -> None:
    keep = kept_links(case("dropout").sizes, SEED, 0.1)
    assert keep is not None
    assert keep.shape == (2, 2, 80, 80)
    assert 0.87 < float(keep.double().mean()) < 0.93
    assert kept_links(case("dropout").sizes, SEED, 0.0) is None


def test_the_cases_hold_what_they_promise() -> None:
    from farlight.testing import CASES

    atoms = {type(atom).__name__ for one in CASES for atom in one.pattern.atoms()}
    assert atoms >= set(fl.patterns.CONSTRUCTORS) - {"per_head"}
    sizes = {one.n_q for one in CASES}
    assert {0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129} <= sizes
    assert any(one.n_q != one.n_k for one in CASES)
    assert any(one.sizes.q_offset < 0 for one in CASES)
    assert any(one.kv_heads == 1 < one.heads for one in CASES)
    assert any(1 < one.kv_heads < one.heads for one in CASES)
    assert {one.layout for one in CASES} == {"contiguous", "tokens first", "every other", "packed", "backwards", "repeated"}
    assert len({one.name for one in CASES}) == len(CASES)
    for one in (case("nothing at all"), case("nothing, by padding")):
        assert not one.pattern.dense(one.n_q, batch=one.batch).any()
    partly = [one for one in CASES if one.n_k and one.n_q]
    empty_rows = [
        not one.pattern.dense(one.n_q, one.n_k, batch=one.batch, heads=one.heads, q_offset=one.q_offset).any(3).all()
        for one in partly
    ]
    assert sum(empty_rows) > 20
