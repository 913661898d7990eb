"""What attention promises beyond the numbers of the parity matrix, on every backend."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.testing import CASES, Answer, Case, assert_answer, assert_matches, case, inputs
from parity import attend, dense, every_backend, outputs, request_of, same, skip_unless_supported, solution

# One of each way in which work is laid out: runs, masks, bits, orders, points, parts, per head, per item, grouped heads.
NAMES = [
    "window and a lighthouse, n=65",
    "scattered lighthouses and a window",
    "dilated window",
    "strided, phase by head",
    "a mask with holes",
    "clusters per item",
    "skim, causal",
    "per head, some empty",
    "padding of everything",
    "window, rows before the text",
    "long row",
    "grouped heads, three to one",
    "nothing at all",
]
SOME = [case(name) for name in NAMES]


# ---- the same answer however it is asked ------------------------------------------------------------------------------
@pytest.mark.parametrize("of", SOME, ids=str)
@every_backend
def test_with_and_without_gradients_the_output_is_the_same(backend: str, of: Case) -> None:
    skip_unless_supported(backend, request_of(of, torch.float32, return_lse=False))
    plain = outputs(of, backend)
    tracked = attend(of, inputs(of, requires_grad=True), backend, return_lse=len(plain) > 1)
    with torch.inference_mode():
        inferred = attend(of, inputs(of), backend, return_lse=len(plain) > 1)
    for n, one in enumerate(plain):
        same(one, tracked[n].detach(), "tracked")  # type: ignore[union-attr]
        same(one, inferred[n].clone(), "inferred")  # type: ignore[union-attr]


@pytest.mark.parametrize("of", SOME, ids=str)
@every_backend
def test_twice_the_same_is_the_same_to_the_last_bit(backend: str, of: Case) -> None:
    skip_unless_supported(backend, request_of(of, torch.float32, return_lse=False))
    found = []
    for _ in range(2):
        given = inputs(of, requires_grad=True)
        before = [x.detach().clone() for x in (given.q, given.k, given.v)]
        out, _ = attend(of, given, backend, return_lse=False)
        out.backward(given.grad_out)
        for x, kept in zip((given.q, given.k, given.v), before, strict=True):
            assert torch.equal(x, kept), "an input was written to"
        found.append([out.detach(), given.q.grad, given.k.grad, given.v.grad])
    for a, b in zip(*found, strict=True):
        same(a, b, "again")


@pytest.mark.parametrize("of", SOME, ids=str)
@every_backend
def test_a_plan_serves_as_well_as_its_pattern(backend: str, of: Case) -> None:
    skip_unless_supported(backend, request_of(of, torch.float32, return_lse=False))
    s, given = of.sizes, inputs(of)
    plan = fl.plan(of.pattern, s.n_q, s.n_k, batch=s.batch, heads=s.heads, q_offset=s.q_offset)
    out = fl.attention(given.q, given.k, given.v, plan, scale=of.scale, q_offset=of.q_offset, backend=backend)
    assert isinstance(out, Tensor)
    same(out, outputs(of, backend)[0], "by plan")


@every_backend
def test_rows_computed_in_chunks_are_the_rows_of_the_whole(backend: str) -> None:
    pattern = fl.window(9) | fl.global_tokens([0, 50]) | fl.random_keys(3) | fl.strided(11)
    q, k, v = torch.randn(3, 2, 2, 100, 16).unbind(0)
    whole = fl.attention(q, k, v, pattern, backend=backend)
    parts = [
        fl.attention(q[:, :, a:b], k, v, pattern, q_offset=a, backend=backend)
        for a, b in ((0, 1), (1, 40), (40, 99), (99, 100))
    ]
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=2e-6, rtol=2e-6)


@every_backend
def test_an_item_does_not_notice_its_batch(backend: str) -> None:
    pattern = fl.window(5) | fl.random_keys(2)
    q, k, v = torch.randn(3, 4, 2, 50, 16).unbind(0)
    whole = fl.attention(q, k, v, pattern, backend=backend)
    for b in range(4):
        alone = fl.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], pattern, backend=backend)
        torch.testing.assert_close(alone, whole[b : b + 1], atol=1e-6, rtol=1e-6)


@every_backend
def test_grouped_heads_are_repeated_heads(backend: str) -> None:
    pattern = fl.window(5) | fl.random_keys(2)
    q, k, v = torch.randn(2, 6, 50, 16), torch.randn(2, 2, 50, 16), torch.randn(2, 2, 50, 16)
    grouped = fl.attention(q, k, v, pattern, backend=backend)
    repeated = fl.attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), pattern, backend=backend)
    torch.testing.assert_close(grouped, repeated, atol=1e-6, rtol=1e-6)


def test_the_choice_of_auto_is_as_exact_as_the_others() -> None:
    for of in CASES:
        given = inputs(of)
        out, lse = attend(of, given, "auto", return_lse=True)
        truth = solution(of, torch.float32)
        assert_matches(out, truth.truth.out, truth.baseline.out, of.name, magnitude=truth.magnitude.out)
        assert lse is not None
        assert_matches(lse, truth.truth.lse, truth.baseline.lse, of.name, magnitude=truth.magnitude.lse)
        assert_matches(
            attend(of, given, "auto", return_lse=False)[0],
            truth.truth.out,
            truth.baseline.out,
            of.name,
            magnitude=truth.magnitude.out,
        )


# ---- who cannot be seen cannot be felt --------------------------------------------------------------------------------
@pytest.mark.parametrize("of", SOME, ids=str)
@every_backend
def test_a_key_that_a_row_does_not_see_changes_nothing_in_it(backend: str, of: Case) -> None:
    """To the last bit: rows that see the key may change, all others may not."""
    skip_unless_supported(backend, request_of(of, torch.float32, return_lse=False))
    before, given = outputs(of, backend), inputs(of)
    allowed = dense(of)
    for key in {0, of.n_k // 2, of.n_k - 1}:
        other = dataclasses.replace(given, k=given.k.clone(), v=given.v.clone())
        other.k[:, :, key] = 7.0
        other.v[:, :, key] = -300.0
        blind = ~allowed[..., key]
        for a, b in zip(before, outputs(of, backend, other), strict=True):
            same(a[blind], b[blind], f"key {key}")


@pytest.mark.parametrize("of", SOME, ids=str)
@every_backend
def test_a_query_changes_no_row_but_its_own(backend: str, of: Case) -> None:
    skip_unless_supported(backend, request_of(of, torch.float32, return_lse=False))
    before, given = outputs(of, backend), inputs(of)
    for value in (float("nan"), 300.0):
        row = of.n_q // 2
        other = dataclasses.replace(given, q=given.q.clone())
        other.q[:, :, row] = value
        found = outputs(of, backend, other)
        others = torch.arange(of.n_q) != row
        seeing = dense(of)[:, :, row].any(2)
        for a, b in zip(before, found, strict=True):
            same(a[:, :, others], b[:, :, others], f"row {row} is {value}")
            assert b[:, :, row][seeing].isnan().all() or value == value


@every_backend
def test_a_nan_in_a_row_stays_out_of_the_gradients_of_others(backend: str) -> None:
    of = case("window and a lighthouse, n=65")
    clean, given = inputs(of, requires_grad=True), inputs(of)
    with torch.no_grad():
        given.q[0, 0, 40] = float("nan")
    for x in (given.q, given.k, given.v):
        x.requires_grad_()
    for one in (clean, given):
        attend(of, one, backend, return_lse=False)[0].backward(one.grad_out)
    assert given.q.grad is not None
    assert clean.q.grad is not None
    others = torch.arange(65) != 40
    same(given.q.grad[0, 0, others], clean.q.grad[0, 0, others], "dq of other rows")
    same(given.q.grad[0, 1], clean.q.grad[0, 1], "dq of the other head")
    for a, b in ((given.k.grad, clean.k.grad), (given.v.grad, clean.v.grad)):
        assert a is not None
        assert b is not None
        same(a[0, 1], b[0, 1], "the other head")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_backend
def test_scores_beyond_what_exp_can_hold(backend: str, dtype: torch.dtype) -> None:
    """Scores of ± 3000: one key takes everything, and nothing overflows."""
    n = 70
    q = torch.zeros(1, 1, n, 8, dtype=dtype)
    q[..., 0] = torch.where(torch.arange(n) % 2 == 0, 55.0, -55.0).to(dtype)
    k = torch.zeros(1, 1, n, 8, dtype=dtype)
    k[0, 0, :, 0] = torch.arange(n).to(dtype) - 35
    v = torch.randn(1, 1, n, 8).to(dtype)
    out = fl.attention(q, k, v, fl.window(5), scale=1.5, backend=backend)
    best = torch.tensor([min(i + 5, n - 1) if i % 2 == 0 else max(i - 5, 0) for i in range(n)])
    torch.testing.assert_close(out, v[:, :, best], atol=0, rtol=1e-2 if dtype != torch.float32 else 1e-6)


# ---- scale, offsets, one lonely gradient -------------------------------------------------------------------------------
@every_backend
def test_a_scale_of_zero_is_the_mean(backend: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 40, 8).unbind(0)
    allowed = fl.window(3).dense(40).float()
    out = fl.attention(q, k, v, fl.window(3), scale=0.0, backend=backend)
    torch.testing.assert_close(out, (allowed / allowed.sum(3, keepdim=True)) @ v)


@pytest.mark.parametrize("of", SOME, ids=str)
@every_backend
def test_a_gradient_that_comes_through_the_lse_alone(backend: str, of: Case) -> None:
    skip_unless_supported(backend, request_of(of, torch.float32, return_lse=True))
    given = inputs(of, requires_grad=True)
    _, lse = attend(of, given, backend, return_lse=True)
    assert lse is not None
    lse.backward(given.grad_lse)
    wanted = inputs(of, torch.float64, requires_grad=True)
    _, exact = attend(of, wanted, "reference", return_lse=True)
    assert exact is not None
    exact.backward(given.grad_lse.double())
    for a, b in ((given.q.grad, wanted.q.grad), (given.k.grad, wanted.k.grad)):
        assert a is not None
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)
    assert given.v.grad is None or not given.v.grad.any(), "the lse does not depend on v"


@pytest.mark.parametrize("which", ["q", "k", "v"])
@every_backend
def test_only_one_input_asks_for_a_gradient(backend: str, which: str) -> None:
    of = case("skim")
    given, full = inputs(of), inputs(of, requires_grad=True)
    getattr(given, which).requires_grad_()
    for one in (given, full):
        attend(of, one, backend, return_lse=False)[0].backward(one.grad_out)
    for name in ("q", "k", "v"):
        grad = getattr(given, name).grad
        assert (grad is not None) == (name == which)
    same(getattr(given, which).grad, getattr(full, which).grad, which)


def test_the_torch_backend_serves_every_case_without_the_operator_too() -> None:
    """The plain path (no gradient) and the operator must not drift apart: out and lse of all cases, to the last bit."""
    for of in CASES:
        plain = outputs(of, "torch")
        tracked = attend(of, inputs(of, requires_grad=True), "torch", return_lse=True)
        for a, b in zip(plain, tracked, strict=True):
            assert b is not None
            same(a, b.detach(), of.name)


def test_answers_can_be_compared_as_a_whole() -> None:
    """`assert_answer` takes what a backend gives, grads and all (the shape third-party backends are tested in)."""
    of = case("causal")
    given = inputs(of, requires_grad=True)
    out, lse = attend(of, given, "reference", return_lse=True)
    out.backward(given.grad_out)
    found = Answer(out, lse, given.q.grad, given.k.grad, given.v.grad)  # type: ignore[arg-type]
    assert assert_answer(found, solution(of, torch.float32), of.name) == 5
