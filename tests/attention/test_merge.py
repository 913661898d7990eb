"""`fl.merge`: attention over disjoint sets of keys, joined exactly, with weights and gradients."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.patterns import Pattern
from farlight.testing import Answer, Case, assert_answer, assert_matches, case, inputs, solve
from parity import SEED, solution

Piece = tuple[Tensor, Tensor]

NAMES = [
    "skim",
    "causal, last queries",
    "clusters per item",
    "grouped heads",
    "padding of everything",
    "nothing at all",
    "a mask with holes",
]


def attend(of: Case, given: object, pattern: Pattern, backend: str = "torch", **options: float) -> Piece:
    q, k, v = (getattr(given, name) for name in "qkv")
    found = fl.attention(
        q, k, v, pattern, q_offset=of.sizes.q_offset, scale=of.scale, return_lse=True, backend=backend, **options
    )
    assert isinstance(found, tuple)
    return found


def cut(of: Case, parts: int) -> list[Pattern]:
    """The case's pattern as disjoint pieces, by key."""
    edges = [round(part * of.n_k / parts) for part in range(parts + 1)]
    return [of.pattern & fl.seen_by_all(range(a, b)) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("of", [case(name) for name in NAMES], ids=str)
def test_disjoint_pieces_are_the_whole(of: Case, parts: int, dtype: torch.dtype) -> None:
    given = inputs(of, dtype, requires_grad=True)
    out, lse = fl.merge([attend(of, given, pattern) for pattern in cut(of, parts)])
    torch.autograd.backward((out, lse), (given.grad_out, given.grad_lse))
    grads = [x.grad for x in (given.q, given.k, given.v)]
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype != torch.bfloat16:
        assert_answer(Answer(out, lse, *grads), solution(of, dtype, with_grad_lse=True), of.name)  # type: ignore[arg-type]
        return
    # Each piece's output and gradient is rounded to bfloat16 before they are added: judged with a coarser row.
    truth = solution(of, dtype, with_grad_lse=True)
    for found, exact, size in zip(
        (out, lse, *grads), *(dataclasses.astuple(x) for x in (truth.truth, truth.magnitude)), strict=True
    ):
        near = torch.where(exact.isfinite(), found.detach().double() - exact, 0.0).abs()  # type: ignore[union-attr]
        assert bool((near <= 0.05 * torch.where(exact.isfinite(), size, 1.0)).all())


def test_terms_of_an_expression_are_pieces_too() -> None:
    """What a ring step, a cached prefix or a router would compute apart."""
    of = dataclasses.replace(case("skim"), dropout=0.25)
    near, far = fl.window(8), of.pattern - fl.window(8)
    given = inputs(of, requires_grad=True)
    out, lse = fl.merge([attend(of, given, p, dropout=0.25, seed=SEED) for p in (near, far)])
    torch.autograd.backward((out,), (given.grad_out,))
    found = Answer(out, lse, given.q.grad, given.k.grad, given.v.grad)  # type: ignore[arg-type]
    assert_answer(found, solve(of, inputs(of), dropout_seed=SEED), "skim with dropout")


def test_pieces_of_several_backends_meet() -> None:
    of = case("causal")
    given = inputs(of)
    pieces = [attend(of, given, p, backend) for p, backend in zip(cut(of, 3), ("reference", "torch", "auto"), strict=True)]
    truth = solution(of, torch.float32)
    for found, name in zip(fl.merge(pieces), ("out", "lse"), strict=True):
        assert_matches(
            found, *(getattr(x, name) for x in (truth.truth, truth.baseline)), name, magnitude=getattr(truth.magnitude, name)
        )


def pieces_of(count: int, rows: int = 6, dim: int = 4, seed: int = 0) -> list[Piece]:
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(2, 3, rows, dim, generator=g, dtype=torch.float64),
            torch.randn(2, 3, rows, generator=g, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def test_merging_is_associative_and_commutative() -> None:
    a, b, c = pieces_of(3)
    whole = fl.merge([a, b, c])
    for other in (fl.merge([fl.merge([a, b]), c]), fl.merge([a, fl.merge([b, c])]), fl.merge([c, a, b])):
        torch.testing.assert_close(other, whole)
    torch.testing.assert_close(fl.merge([a]), a)


def test_a_weight_counts_a_piece_so_often() -> None:
    a, b = pieces_of(2)
    torch.testing.assert_close(fl.merge([a, b], [3, 1]), fl.merge([a, a, a, b]))
    torch.testing.assert_close(fl.merge([a, b], [0, 1]), b)
    torch.testing.assert_close(fl.merge([a, b], [0.5, 0.5])[0], fl.merge([a, b])[0])
    torch.testing.assert_close(fl.merge([a, b], [0.5, 0.5])[1], fl.merge([a, b])[1] - math.log(2))


def test_the_formula() -> None:
    a, b = pieces_of(2)
    out, lse = fl.merge([a, b], [2.0, 0.25])
    x, y = 2.0 * a[1].exp(), 0.25 * b[1].exp()
    torch.testing.assert_close(lse, (x + y).log())
    torch.testing.assert_close(out, (x[..., None] * a[0] + y[..., None] * b[0]) / (x + y)[..., None])


def test_rows_that_no_piece_sees_give_zero_and_no_gradient() -> None:
    a, b = ((out.requires_grad_(), lse) for out, lse in pieces_of(2))
    lses = [piece[1].clone() for piece in (a, b)]
    lses[0][:, :, :3] = -math.inf
    lses[1][:, :, 2:4] = -math.inf
    tracked = [x.requires_grad_() for x in lses]
    out, lse = fl.merge([(a[0], tracked[0]), (b[0], tracked[1])])
    assert not out[:, :, 2].any()
    assert bool((lse[:, :, 2] == -math.inf).all())
    torch.testing.assert_close(out[:, :, 0], b[0][:, :, 0])
    torch.testing.assert_close(out[:, :, 3], a[0][:, :, 3])
    torch.autograd.backward((out, lse), (torch.randn_like(out), torch.randn_like(lse)))
    for x in (a[0], b[0], *tracked):
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())
        assert not x.grad[:, :, 2].any()


def test_everything_empty() -> None:
    out, lse = torch.zeros(1, 1, 3, 2), torch.full((1, 1, 3), -math.inf)
    merged = fl.merge([(out, lse), (out, lse)])
    assert not merged[0].any()
    assert bool((merged[1] == -math.inf).all())
    none = fl.merge([(torch.zeros(1, 1, 0, 2), torch.zeros(1, 1, 0))])
    assert none[0].shape == (1, 1, 0, 2)


def test_gradients_of_weights_and_pieces_by_finite_differences() -> None:
    tensors = [x.requires_grad_() for piece in pieces_of(3, rows=2, dim=2) for x in piece]

    def merged(*flat: Tensor) -> Piece:
        return fl.merge([(flat[0], flat[1]), (flat[2], flat[3]), (flat[4], flat[5])], [1.0, 0.0, 2.5])

    assert torch.autograd.gradcheck(merged, tensors)
    assert torch.autograd.gradgradcheck(merged, tensors)


def test_large_and_far_apart_lse() -> None:
    a, b = pieces_of(2)
    for shift in (1e4, -1e4, 700.0):
        moved = fl.merge([(a[0], a[1] + shift), (b[0], b[1] + shift)])
        torch.testing.assert_close(moved[0], fl.merge([a, b])[0], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(moved[1], fl.merge([a, b])[1] + shift)
    torch.testing.assert_close(fl.merge([(a[0], a[1] + 5000), b]), (a[0], a[1] + 5000))


def test_a_nan_is_not_hidden_and_stays_in_its_row() -> None:
    a, b = pieces_of(2)
    a[1][0, 0, 1] = math.nan
    out, lse = fl.merge([a, b])
    assert bool(out[0, 0, 1].isnan().all())
    assert bool(lse[0, 0, 1].isnan())
    assert int(lse.isnan().sum()) == 1


def test_merge_compiles() -> None:
    a, b = pieces_of(2)
    compiled = torch.compile(lambda x, y: fl.merge([x, y], [1.0, 2.0]), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(a, b), fl.merge([a, b], [1.0, 2.0]))
