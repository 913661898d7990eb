"""What a call is expected to cost: a rate for the pairs that are computed, and a fixed price for the call.

The rates decide nothing but speed. Those written here are of one machine (2 cores of an AMD EPYC with AVX-512) and serve
while the choice is clear; where it is close, `kernels/calibrate.py` measures the machine at hand, once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from farlight.kernels.backend import Request

__all__ = ["ACCELERATOR_RATES", "DEFAULT_RATES", "Estimate", "Rates", "estimate", "known_rates", "rates_by_threads"]

# (backend, dtype) -> GFLOP/s of the forward pass on computed pairs (4 · D each), and seconds for each call.
Rates = dict[tuple[str, torch.dtype], tuple[float, float]]

DEFAULT_RATES: Rates = {
    ("cpu", torch.float32): (160.0, 50e-6),
    ("cpu", torch.bfloat16): (280.0, 50e-6),
    ("torch", torch.float32): (60.0, 1500e-6),
    ("torch", torch.bfloat16): (45.0, 1500e-6),
    ("dense", torch.float32): (110.0, 60e-6),
    ("dense", torch.bfloat16): (120.0, 60e-6),
}
# On accelerators no rate has been measured yet. These say only that a computed pair costs the fused kernels and full
# attention alike and the torch backend twenty times as much: the choice falls on whoever computes fewer pairs.
ACCELERATOR_RATES: Rates = {
    ("triton", torch.float32): (200_000.0, 30e-6),
    ("torch", torch.float32): (10_000.0, 1500e-6),
    ("dense", torch.float32): (200_000.0, 20e-6),
}
# The rates of this machine by the number of threads, once `calibrated` has read or measured them in this process.
rates_by_threads: dict[int, Rates] = {}
# Forward and backward together against forward alone.
_WITH_BACKWARD = {"cpu": 3.3, "triton": 3.5, "torch": 3.5, "dense": 3.5}

# Choices, plans of choices and masks of choices: seconds beside their work, and the float32 operations in whose time a visited
# pair is planned, or written into a mask.
_CHOICE_FIXED, _PLAN_FIXED = 200e-6, 100e-6
_PLANNED_PAIR, _MASKED_PAIR = 20.0, 300.0


def known_rates(device: torch.device) -> Rates:
    """The best rates at hand, without measuring any."""
    return ACCELERATOR_RATES if device.type != "cpu" else rates_by_threads.get(torch.get_num_threads(), DEFAULT_RATES)


class Estimate(NamedTuple):
    """Expected seconds of one call and the pairs that it computes. Of the seconds, those that a router takes to choose and
    those that its choice takes to be planned, both in every call; 0 for a pattern, whose plan is cached.
    """

    seconds: float
    pairs: int
    choosing: float = 0.0
    planning: float = 0.0

    @property
    def remaining(self) -> float:
        """Seconds that a call still takes once its links are chosen and planned."""
        return self.seconds - self.choosing - self.planning


def estimate(
    backend: str, request: Request, visited: int | None, rates: Rates, *, is_plan_of_one_call: bool = False
) -> Estimate:
    """The expected cost of a call; `visited` is the plan's, None for all pairs.

    is_plan_of_one_call: the plan, or for full attention the mask, is made in this call and used in no other.
    """
    sizes = request.sizes
    pairs = sizes.batch * sizes.heads * sizes.n_q * sizes.n_k if visited is None else visited
    # A backend without rates of its own is priced like the torch backend.
    rated = backend if (backend, torch.float32) in rates else "torch"
    rate, fixed = rates.get((rated, request.dtype), rates[rated, torch.float32])
    attending = 2 * (request.head_dim + request.value_dim) * pairs / (rate * 1e9) + fixed
    attending *= _WITH_BACKWARD[rated] if request.needs_grad else 1.0
    choosing = _choosing(request.choice, request.head_dim, rates) if request.choice else 0.0
    planning = _planning(backend, request, pairs, rates) if is_plan_of_one_call else 0.0
    return Estimate(choosing + planning + attending, pairs, choosing, planning)


def _choosing(products: int, head_dim: int, rates: Rates) -> float:
    """Seconds of a router's choice: products of head_dim in float32, whatever the dtype."""
    rate, _ = rates.get(("cpu", torch.float32), rates["torch", torch.float32])
    return 2 * head_dim * products / (rate * 1e9) + _CHOICE_FIXED


def _planning(backend: str, request: Request, visited: int, rates: Rates) -> float:
    """Seconds of the native planner for the visited pairs; for full attention, of forming the mask, one for the items and heads
    that share it.
    """
    rate, _ = rates.get(("cpu", torch.float32), rates["torch", torch.float32])
    if backend != "dense":
        return _PLANNED_PAIR * visited / (rate * 1e9) + _PLAN_FIXED
    sizes, pattern = request.sizes, request.pattern
    masks = (sizes.batch if pattern.varies_over_batch else 1) * (sizes.heads if pattern.varies_over_heads else 1)
    return _MASKED_PAIR * masks * sizes.n_q * sizes.n_k / (rate * 1e9) + _PLAN_FIXED
