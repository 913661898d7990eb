"""Score terms and sinks on every backend and dtype against a dense float64 formula: outputs, lse and every gradient."""

from __future__ import annotations

import pytest
import torch
from score_formula import CASES, SETS, TERMS, compare_scored, make_terms, supports

import farlight as fl
from farlight.kernels import cpu
from farlight.testing import Case
from parity import BACKENDS, DTYPES, dtype_name

pytestmark = pytest.mark.usefixtures("poison")

LONG = Case("scored, split rows", fl.sees_all([-1]) | fl.window(2), 3, 20_011, head_dim=8, heads=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_every_term_and_pair(names: tuple[str, ...], backend: str, dtype: torch.dtype) -> None:
    """Each set of terms on the cases in turn; single terms and all together on every case."""
    at = SETS.index(names)
    chosen = CASES if len(names) != 2 else CASES[at % len(CASES) :: 5]
    seen = 0
    for of in chosen:
        return_lse = supports(backend, names, of, dtype)
        if return_lse or supports(backend, names, of, dtype, return_lse=False):
            compare_scored(of, make_terms(names, of, bidirectional=at % 2 == 0), backend, dtype, return_lse=return_lse)
            seen += 1
    if not seen:
        pytest.skip(f"{backend} does not compute {' + '.join(names)} in {dtype_name(dtype)}")


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_split_rows(backend: str) -> None:
    names = TERMS if supports(backend, TERMS, LONG, torch.float32) else ("sinks",)
    if supports(backend, names, LONG, torch.float32):
        compare_scored(LONG, make_terms(names, LONG), backend, torch.float32)


def test_every_backend_with_a_kernel_takes_sinks() -> None:
    assert all(supports(name, ("sinks",), CASES[0], torch.float32) for name in BACKENDS if name not in ("dense",))


@pytest.mark.parametrize("isa", cpu.available() if cpu.unavailable() is None else [])
def test_every_isa_computes_every_term(isa: str) -> None:
    """Rows in order and sorted, gathered pairs, masks; both dtypes."""
    before = cpu.isa()
    cpu.use(isa)
    try:
        for of in (CASES[0], CASES[3], CASES[8], CASES[13]):
            for dtype in (torch.float32, torch.bfloat16):
                compare_scored(of, make_terms(TERMS, of), "cpu", dtype)
    finally:
        cpu.use(before)
