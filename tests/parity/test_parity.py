"""Every case on every backend and dtype against the float64 truth: output, lse and all gradients."""

from __future__ import annotations

import pytest
import torch

from farlight.kernels import registry
from farlight.testing import CASES, Case
from parity import BACKENDS, DTYPES, compare, compared, dtype_name, request_of, skip_unless_supported

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity(backend: str, case: Case, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, request_of(case, dtype, return_lse=False))
    compare(case, backend, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_through_the_lse(backend: str, case: Case) -> None:
    skip_unless_supported(backend, request_of(case, torch.float32, return_lse=True))
    compare(case, backend, torch.float32, with_grad_lse=True)


def test_every_available_backend_was_compared() -> None:
    """Guards against a matrix that skips its way to green; stands last in this file."""
    if not compared:
        pytest.skip("no parity test was selected in this run")
    window = next(case for case in CASES if case.name == "causal")
    available = [name for name in BACKENDS if not registry.reasons(name, request_of(window, torch.float32, return_lse=False))]
    assert set(available) <= set(compared), f"compared: {dict(compared)}"
    assert {"torch", "dense", "reference"} <= set(available)
