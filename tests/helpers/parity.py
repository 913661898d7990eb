"""Runs a `Case` on a backend through the public `fl.attention` and compares with the float64 truth."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.kernels import registry
from farlight.kernels.backend import Request
from farlight.testing import Answer, Case, Inputs, Solution, assert_answer, assert_matches, inputs, solve

# Triton kernels run on the same cases in the interpreter, in a process of their own (tests/kernels/test_triton.py).
BACKENDS = tuple(name for name in registry.names() if name != "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SEED = 0x1234_5678_9ABC

# Number of tensors compared with the truth, by backend.
compared: Counter[str] = Counter()


def dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def request_of(case: Case, dtype: torch.dtype, *, return_lse: bool) -> Request:
    shapes = case.kv_heads, case.head_dim, case.value_dim, dtype, torch.device("cpu")
    return Request(case.pattern, case.sizes, *shapes, True, case.dropout, return_lse)


def skip_unless_supported(backend: str, request: Request) -> None:
    """Skip the test, with the backend's reasons, where it cannot run the request."""
    result = registry.reasons(backend, request)
    if result:
        pytest.skip(f"{backend}: {'; '.join(result)}")


def gives_lse(backend: str, case: Case, dtype: torch.dtype) -> bool:
    return not registry.reasons(backend, request_of(case, dtype, return_lse=True))


def attend(case: Case, given: Inputs, backend: str, *, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    result = fl.attention(
        given.q,
        given.k,
        given.v,
        case.pattern,
        scale=case.scale,
        q_offset=case.q_offset,
        dropout=case.dropout,
        seed=SEED,
        return_lse=return_lse,
        backend=backend,
    )
    return result if isinstance(result, tuple) else (result, None)


@functools.lru_cache(maxsize=8)
def solution(case: Case, dtype: torch.dtype, with_grad_lse: bool = False) -> Solution:
    return solve(case, inputs(case, dtype), dropout_seed=SEED, with_grad_lse=with_grad_lse)


def answer(case: Case, backend: str, dtype: torch.dtype, *, with_grad_lse: bool = False) -> Answer:
    """Output, lse and gradients of a case on a backend. For a backend without lse, the true lse is filled in."""
    tensors = inputs(case, dtype, requires_grad=True)
    return_lse = gives_lse(backend, case, dtype)
    out, lse = attend(case, tensors, backend, return_lse=return_lse)
    if with_grad_lse:
        assert lse is not None
        torch.autograd.backward((out, lse), (tensors.grad_out, tensors.grad_lse))
    else:
        out.backward(tensors.grad_out)
    assert tensors.q.grad is not None
    assert tensors.k.grad is not None
    assert tensors.v.grad is not None
    if lse is None:
        lse = solution(case, dtype, with_grad_lse).truth.lse.to(tensors.grad_lse.dtype)
    return Answer(out, lse, tensors.q.grad, tensors.k.grad, tensors.v.grad)


def compare(case: Case, backend: str, dtype: torch.dtype, *, with_grad_lse: bool = False) -> None:
    """Run a case, check dtypes, and compare all results with the truth."""
    result = answer(case, backend, dtype, with_grad_lse=with_grad_lse)
    assert {x.dtype for x in (result.out, result.dq, result.dk, result.dv)} == {dtype}
    assert result.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    what = f"{case.name}, {backend}, {dtype_name(dtype)}"
    compared[backend] += assert_answer(result, solution(case, dtype, with_grad_lse), what)


every_backend = pytest.mark.parametrize("backend", BACKENDS)


def outputs(of: Case, backend: str, given: Any = None, **changes: Any) -> list[Tensor]:
    """Output, and lse where the backend returns it, of a case without gradients."""
    return_lse = gives_lse(backend, of, torch.float32)
    with torch.no_grad():
        result = attend(dataclasses.replace(of, **changes), given or inputs(of), backend, return_lse=return_lse)
    return [x for x in result if x is not None]


def dense(of: Case) -> Tensor:
    result = of.pattern.dense(of.n_q, of.n_k, batch=of.batch, heads=of.heads, q_offset=of.q_offset)
    return result.expand(of.batch, of.heads, -1, -1)


def same(a: Tensor, b: Tensor, what: str) -> None:
    """Assert bitwise equality; NaN equals NaN."""
    assert torch.equal(a.isnan(), b.isnan()), what
    assert torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0)), what


__all__ = [
    "BACKENDS",
    "DTYPES",
    "SEED",
    "answer",
    "assert_matches",
    "attend",
    "compare",
    "compared",
    "dense",
    "dtype_name",
    "every_backend",
    "gives_lse",
    "outputs",
    "request_of",
    "same",
    "skip_unless_supported",
    "solution",
]
