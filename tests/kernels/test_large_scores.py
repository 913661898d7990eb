"""Scores of any size up to float32's range: outputs, lse and gradients of every backend against the dense float64 formula."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.decoding.kept_attention import attend_kept
from farlight.kernels import cpu
from farlight.patterns import Sizes
from farlight.plan import TileShape, plan_for
from farlight.testing.oracle import attend, dropout_mask

SETS = cpu.available() if cpu.unavailable() is None else ()
BACKENDS = [*(f"cpu:{name}" for name in SETS), "torch", "reference"]
PATTERNS = {
    "whole runs": fl.full(),
    "masked runs": fl.window(4) & fl.causal(),
    "single pairs": fl.random_keys(3, seed=1),
    "pieces": fl.window(4) | fl.window(3, dilation=8),
}
MAGNITUDES = [1e2, 1e3, 3e4, 1e9, 1e18]
EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}
N, DIM = 96, 40


@pytest.fixture(autouse=True)
def restored_isa() -> Iterator[None]:
    before = cpu.isa() if SETS else None
    yield
    if before is not None:
        cpu.use(before)


def chosen(backend: str) -> str:
    name, _, isa = backend.partition(":")
    if isa:
        cpu.use(isa)
    return name


def inputs(kind: str, magnitude: float, dtype: torch.dtype, n: int = N) -> list[Tensor]:
    """q, k, v, and the gradients of out and lse. "ties": all scores of a row are equal, and exactly so in every dtype."""
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 2, n, DIM, generator=g) for _ in range(4))
    if kind == "ties":
        q = torch.zeros_like(q).index_fill(3, torch.tensor([0]), 1.0)
        k = torch.zeros_like(k).index_fill(3, torch.tensor([0]), -1.0 if magnitude in MAGNITUDES[::2] else 1.0)
    return [
        (q * magnitude).to(dtype),
        (k * magnitude).to(dtype),
        v.to(dtype),
        grad.to(dtype),
        torch.randn(1, 2, n, generator=g),
    ]


def truth(pattern: fl.Pattern, given: list[Tensor], dropout: float) -> tuple[Tensor, ...]:
    q, k, v, grad, grad_lse = (x.double() for x in given)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    n = q.shape[2]
    mask = pattern.dense(n, heads=2)
    sizes = fl.plan(pattern, n, heads=2).sizes
    out, lse = attend(*leaves, mask, scale=DIM**-0.5, keep=dropout_mask(sizes, 7, dropout), dropout=dropout)
    seen = lse > -torch.inf
    return out.detach(), lse.detach(), *torch.autograd.grad([out, lse[seen]], leaves, [grad, grad_lse[seen]])


def answer(pattern: fl.Pattern, given: list[Tensor], dropout: float, backend: str) -> tuple[Tensor, ...]:
    *tensors, grad, grad_lse = given
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, lse = fl.attention(*leaves, pattern, backend=backend, return_lse=True, dropout=dropout, seed=7)
    seen = lse > -torch.inf
    return out.detach(), lse.detach(), *torch.autograd.grad([out, lse[seen]], leaves, [grad, grad_lse.to(lse)[seen]])


def check(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], magnitude: float, unit: float) -> None:
    sizes = (1.0, max(1.0, float(expected[1].abs().max())), magnitude, magnitude, 1.0)
    names = ("out", "lse", "dq", "dk", "dv")
    for name, x, y, size in zip(names, found, expected, sizes, strict=True):
        tolerance = (2.0**-20 if name == "lse" else 8 * unit) * size
        torch.testing.assert_close(x.double(), y, rtol=4 * unit, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_equal_scores_share_a_row_whatever_their_size(pattern: fl.Pattern, dtype: torch.dtype, backend: str) -> None:
    name = chosen(backend)
    for magnitude in MAGNITUDES:
        if 6 * magnitude > torch.finfo(dtype).max:
            continue
        for dropout in (0.0, 0.3):
            given = inputs("ties", magnitude, dtype)
            check(answer(pattern, given, dropout, name), truth(pattern, given, dropout), magnitude, EPS[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_the_largest_score_takes_a_row_whatever_its_size(pattern: fl.Pattern, dtype: torch.dtype, backend: str) -> None:
    """Scores of normal numbers: from 10⁴ on the largest is ahead of the rest by more than float32 rounds."""
    name = chosen(backend)
    for magnitude in MAGNITUDES[2:]:
        if 6 * magnitude > torch.finfo(dtype).max:
            continue
        given = inputs("normal", magnitude, dtype)
        check(answer(pattern, given, 0.0, name), truth(pattern, given, 0.0), magnitude, EPS[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_parts_of_a_split_row_share_it(dtype: torch.dtype, backend: str) -> None:
    """Rows that see a text of several thousand keys are computed in parts."""
    n, name = 600, chosen(backend)
    pattern = fl.sees_all([3, n - 1]) | fl.window(2)
    given: fl.Pattern | fl.Plan = pattern
    if name != "reference":
        given = plan_for(pattern, Sizes.of(n, heads=2), TileShape(128 if name == "torch" else 32, 8, 128))
        assert any(int(piece.parts.max()) > 1 for piece in given.pieces)
    for magnitude in (1e2, 1e9):
        q, k, v, *_ = inputs("ties", magnitude, dtype, n)
        out = fl.attention(q, k, v, given, backend=name)
        torch.testing.assert_close(out[:, :, 3].double(), v.double().mean(2), rtol=0, atol=4 * EPS[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_has_more_digits_but_not_all(backend: str) -> None:
    if backend.startswith("cpu"):
        pytest.skip("the native kernels do not take float64")
    for magnitude in (1e2, 1e9, 1e13):
        given = inputs("ties", magnitude, torch.float64)
        for pattern in PATTERNS.values():
            check(answer(pattern, given, 0.0, backend), truth(pattern, given, 0.0), magnitude, 2.0**-30)


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_decoding_and_merging_share_equal_scores(dtype: torch.dtype) -> None:
    for magnitude in MAGNITUDES:
        if 6 * magnitude > torch.finfo(dtype).max:
            continue
        q, k, v, *_ = inputs("ties", magnitude, dtype)
        q, mean = q[:, :, -1:], v.double().mean(2, keepdim=True)
        out, _ = attend_kept(q, k, v, None, scale=DIM**-0.5, return_lse=True)
        torch.testing.assert_close(out.double(), mean, rtol=0, atol=4 * EPS[dtype])
        half = N // 2
        halves = [
            attend_kept(q, k[:, :, s], v[:, :, s], None, scale=DIM**-0.5, return_lse=True)
            for s in (slice(half), slice(half, N))
        ]
        merged, _ = fl.merge([(out, lse) for out, lse in halves if lse is not None])
        torch.testing.assert_close(merged.double(), mean, rtol=0, atol=4 * EPS[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scores_beyond_float32_give_nan_in_their_rows_alone(dtype: torch.dtype, backend: str) -> None:
    """As torch's own attention does; the specification goes on to the range of float64."""
    name = chosen(backend)
    q, k, v, *_ = inputs("ties", 1e18, dtype)
    k = k.abs()
    q[:, :, 5] *= 1e4
    out, lse = fl.attention(q, k, v, fl.window(4), backend=name, return_lse=True)
    expected = truth(fl.window(4), [q, k, v, v, torch.zeros(1, 2, N)], 0.0)
    others = torch.arange(N) != 5
    torch.testing.assert_close(out.double()[:, :, others], expected[0][:, :, others], rtol=4 * EPS[dtype], atol=4 * EPS[dtype])
    if name == "reference":
        torch.testing.assert_close(out.double(), expected[0], rtol=4 * EPS[dtype], atol=4 * EPS[dtype])
    else:
        assert bool(out[:, :, 5].isnan().all())
        assert not bool((lse[:, :, 5] == -torch.inf).any())


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_the_specification_is_exact_where_keys_share_a_large_component(dtype: torch.dtype) -> None:
    """dq = Σ dS k, and the dS of a row add up to zero: what all keys share must cancel."""
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 2, N, DIM, generator=g) for _ in range(4))
    given = [(q - q.mean(-1, keepdim=True)) / 500, k + 500, v, grad]
    given = [*(x.to(dtype) for x in given), torch.zeros(1, 2, N)]
    found, expected = answer(fl.window(16), given, 0.0, "reference"), truth(fl.window(16), given, 0.0)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=torch.finfo(x.dtype).eps, atol=torch.finfo(x.dtype).tiny)
