"""Backend "cpu": native C++ kernels, fused forward and backward, for float32, bfloat16 and float16 on any CPU.

A plan's tables are validated and copied into a native object once (`native.native_plan`); a call then passes addresses and
strides (`launch`). The kernels themselves are in csrc/ and described in docs/cpu_kernels.md.
"""

from __future__ import annotations

from farlight.kernels.checks import refused
from farlight.kernels.cpu.launch import backward, forward
from farlight.kernels.cpu.native import available, fma_gflops, isa, unavailable, use, warn_if_missing
from farlight.kernels.request import Request
from farlight.plan.build import TileShape

__all__ = ["SHAPE", "available", "backward", "fma_gflops", "forward", "isa", "reasons", "unavailable", "use", "warn_if_missing"]

SHAPE = TileShape(tile=32, gather=8, longest=16_384)


def reasons(request: Request) -> list[str]:
    """Why the native kernels cannot serve the request; empty when they can."""
    problems = []
    missing = unavailable()
    if missing is not None:
        problems.append(missing)
    if request.device.type != "cpu":
        problems.append(f"the tensors are on {request.device.type}, these kernels run on the CPU")
    problems += refused(request)
    return problems
