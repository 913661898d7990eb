"""Running one case on one backend, for the tests that compare. The only door is the public `fl.attention`."""

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

# Triton compiles for GPUs; its kernels meet the same cases in a process that interprets them (tests/kernels/test_triton.py).
BACKENDS = tuple(name for name in registry.names() if name != "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SEED = 0x1234_5678_9ABC

# How many tensors have been compared with the truth, by backend.
compared: Counter[str] = Counter()


def dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def request_of(case: Case, dtype: torch.dtype, *, return_lse: bool) -> Request:
    return Request(
        case.pattern, case.sizes, case.kv_heads, case.head_dim, dtype, torch.device("cpu"), True, case.dropout, return_lse
    )


def skip_where_it_cannot_run(backend: str, request: Request) -> None:
    """Skip with the backend's own words."""
    found = registry.reasons(backend, request)
    if found:
        pytest.skip(f"{backend}: {'; '.join(found)}")


def gives_lse(backend: str, case: Case, dtype: torch.dtype) -> bool:
    return not registry.reasons(backend, request_of(case, dtype, return_lse=True))


def attend(case: Case, given: Inputs, backend: str, *, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    found = fl.attention(
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
    return found if isinstance(found, tuple) else (found, None)


@functools.lru_cache(maxsize=8)
def solution(case: Case, dtype: torch.dtype, with_grad_lse: bool = False) -> Solution:
    return solve(case, inputs(case, dtype), dropout_seed=SEED, with_grad_lse=with_grad_lse)


def answer(case: Case, backend: str, dtype: torch.dtype, *, with_grad_lse: bool = False) -> Answer:
    """What a backend gives for a case. Where it gives no lse the true one stands in its place."""
    given = inputs(case, dtype, requires_grad=True)
    return_lse = gives_lse(backend, case, dtype)
    out, lse = attend(case, given, backend, return_lse=return_lse)
    if with_grad_lse:
        assert lse is not None
        torch.autograd.backward((out, lse), (given.grad_out, given.grad_lse))
    else:
        out.backward(given.grad_out)
    assert given.q.grad is not None
    assert given.k.grad is not None
    assert given.v.grad is not None
    if lse is None:
        lse = solution(case, dtype, with_grad_lse).truth.lse.to(given.grad_lse.dtype)
    return Answer(out, lse, given.q.grad, given.k.grad, given.v.grad)


def compare(case: Case, backend: str, dtype: torch.dtype, *, with_grad_lse: bool = False) -> None:
    """Run, check types and hold the answer against the truth."""
    found = answer(case, backend, dtype, with_grad_lse=with_grad_lse)
    assert {x.dtype for x in (found.out, found.dq, found.dk, found.dv)} == {dtype}
    assert found.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    what = f"{case.name}, {backend}, {dtype_name(dtype)}"
    compared[backend] += assert_answer(found, solution(case, dtype, with_grad_lse), what)


every_backend = pytest.mark.parametrize("backend", BACKENDS)


def outputs(of: Case, backend: str, given: Any = None, **changes: Any) -> list[Tensor]:
    """out, and lse where the backend gives it, of a case without gradients."""
    return_lse = gives_lse(backend, of, torch.float32)
    with torch.no_grad():
        found = attend(dataclasses.replace(of, **changes), given or inputs(of), backend, return_lse=return_lse)
    return [x for x in found if x is not None]


def dense(of: Case) -> Tensor:
    found = of.pattern.dense(of.n_q, of.n_k, batch=of.batch, heads=of.heads, q_offset=of.q_offset)
    return found.expand(of.batch, of.heads, -1, -1)


def same(a: Tensor, b: Tensor, what: str) -> None:
    """Equal to the last bit, NaN at the same places."""
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
    "skip_where_it_cannot_run",
    "solution",
]
