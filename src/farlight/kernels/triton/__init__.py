"""Backend "triton": fused forward and backward kernels for GPUs, written in Triton and compiled at first use.

The plan is lowered once to lists of blocks (`query_work`, `key_work`), uploaded and kept with the plan; a call then passes
addresses and strides. `device/` holds the kernels; nothing here imports triton before a kernel is about to run.
"""

from __future__ import annotations

from farlight.kernels.checks import refused
from farlight.kernels.request import Request
from farlight.kernels.triton.device_caps import interpreted, missing, not_installed, unfit
from farlight.kernels.triton.launch import backward, forward
from farlight.kernels.triton.lowering_cache import SHAPE
from farlight.kernels.triton.routed import RoutedPlan, routed_plan

__all__ = ["SHAPE", "RoutedPlan", "backward", "forward", "interpreted", "reasons", "routed_plan"]


def reasons(request: Request) -> list[str]:
    """Why these kernels cannot serve the request; empty when they can."""
    found = [why for why in (not_installed(), unfit(request.device)) if why is not None]
    found += refused(request)
    # Importing Triton takes a second: only where it would be used.
    broken = None if found else missing()
    return found if broken is None else [broken]
