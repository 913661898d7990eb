"""Settings for all tests: one thread, reproducible random examples, no uninitialised memory in disguise."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from farlight.plan.cache import plans

hypothesis.settings.register_profile("usual", deadline=None, derandomize=True, max_examples=150)
# FARLIGHT_EXPLORE=1 looks for new examples, as many as ten times; what it finds becomes a case of farlight.testing.CASES.
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1500)
hypothesis.settings.load_profile("explore" if os.environ.get("FARLIGHT_EXPLORE") else "usual")

torch.set_num_threads(1)
# The choice of "auto" must not depend on what this machine happens to measure, nor leave a file behind.
os.environ.setdefault("FARLIGHT_CALIBRATE", "0")


@pytest.fixture(autouse=True)
def _torch_as_found() -> Iterator[None]:
    """No test leaves a seed or a mode behind."""
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


@pytest.fixture
def poison() -> Iterator[None]:
    """`torch.empty` and its kin give NaN (and large integers), so that an output nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def cold_cache() -> Iterator[None]:
    """An empty plan cache, before and after."""
    plans.clear()
    yield
    plans.clear()
