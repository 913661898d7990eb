"""Second derivatives and tangents of every case against the float64 formula: of q, k, v and the gradients of out and lse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.testing import CASES, Case, Inputs, case, inputs, oracle
from parity import SEED, dtype_name

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")  # torch's own formulas of forward mode
NAMES = ("q", "k", "v", "dout", "dlse", "tangent of out", "tangent of lse")
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def on(case: Case, backend: str) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        options: Any = {"scale": case.scale, "q_offset": case.q_offset, "dropout": case.dropout, "backend": backend}
        found = fl.attention(q, k, v, case.pattern, seed=SEED, return_lse=True, **options)
        return found[0], torch.where(found[1] == -torch.inf, 0.0, found[1])

    return attend


def by_the_book(case: Case) -> Attend:
    s = case.sizes
    allowed = case.pattern.dense(s.n_q, s.n_k, batch=s.batch, heads=s.heads, q_offset=s.q_offset)
    keep = oracle.dropout_mask(s, SEED, case.dropout)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = oracle.attend(q, k, v, allowed, scale=case.scale_value, keep=keep, dropout=case.dropout)
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    return attend


def derivatives(attend: Attend, given: Inputs, directions: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Gradients of Σ directions · (dq, dk, dv), in the order of NAMES, and the tangents of (out, lse) along the directions."""
    q, k, v, dout = (x.detach().to(dtype).requires_grad_() for x in (given.q, given.k, given.v, given.grad_out))
    a = [x.to(dtype) for x in directions]
    out, lse = attend(q, k, v)
    dlse = given.grad_lse.to(lse.dtype).requires_grad_()
    grads = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse), create_graph=True, materialize_grads=True)
    total = torch.stack([(x.to(lse.dtype) * y.to(lse.dtype)).sum() for x, y in zip(grads, a, strict=True)]).sum()
    found = torch.autograd.grad(total, (q, k, v, dout, dlse), materialize_grads=True)
    return *found, *torch.func.jvp(attend, tuple(x.detach().contiguous() for x in (q, k, v)), tuple(a))[1]


def compare(case: Case, backend: str, dtype: torch.dtype) -> None:
    given = inputs(case, dtype)
    generator = torch.Generator().manual_seed(case.seed + 1)
    directions = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype) for x in (given.q, given.k, given.v)]
    found = derivatives(on(case, backend), given, directions, dtype)
    truth, plain = (derivatives(by_the_book(case), given, directions, of) for of in (torch.float64, dtype))
    # The terms of these sums cancel more than those of first gradients: all are held to the size of the largest of them.
    size = max([1.0, *(float(x.abs().max()) for x in truth if x.numel())])
    rounding = max((float((x.double() - y).abs().max()) for x, y in zip(plain, truth, strict=True) if x.numel()), default=0.0)
    allowed = 4 * rounding + 64 * torch.finfo(dtype).eps * size
    for name, x, true, near in zip(NAMES, found, truth, plain, strict=True):
        assert (x.dtype, x.shape) == (near.dtype, true.shape)
        error = float((x.double() - true).abs().max()) if x.numel() else 0.0
        assert error <= allowed, (
            f"{case.name}, {backend}, {dtype_name(dtype)}: {name}: error {error:.3g}, allowed {allowed:.3g}"
        )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_double_precision(case: Case) -> None:
    compare(case, "torch", torch.float64)


# The tiles are those of the other test: what differs is the out and lse that are given.
FEW = [pytest.param(case, marks=[] if place % 4 == 0 else pytest.mark.slow) for place, case in enumerate(CASES)]


@pytest.mark.parametrize("case", FEW, ids=str)
def test_the_native_kernels(case: Case) -> None:
    compare(case, "cpu", torch.float32)


SOME = [case(name) for name in ("skim", "dropout, grouped heads", "per head", "one item empty", "clusters and a window")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_half_precision(backend: str, case: Case, dtype: torch.dtype) -> None:
    compare(case, backend, dtype)
