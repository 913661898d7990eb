"""Backend "cpu": the native kernels, fused forward and backward for float32, bfloat16 and float16 on any CPU.

A plan's tables are checked and copied into a native object once (`native.handle`); a call then passes addresses and strides.
How the kernels work is told in csrc/ and docs; this package only checks what it is given and allocates results.
"""

from __future__ import annotations

from farlight.kernels.checks import refused
from farlight.kernels.cpu.launch import backward, forward
from farlight.kernels.cpu.native import available, fma_gflops, isa, unavailable, use, warn_if_missing
from farlight.kernels.request import Request
from farlight.plan.tables import TileShape

__all__ = ["SHAPE", "available", "backward", "fma_gflops", "forward", "isa", "reasons", "unavailable", "use", "warn_if_missing"]

SHAPE = TileShape(tile=32, gather=8, longest=16_384)


def reasons(request: Request) -> list[str]:
    """Why the native kernels cannot serve the request; empty when they can."""
    found = []
    missing = unavailable()
    if missing is not None:
        found.append(missing)
    if request.device.type != "cpu":
        found.append(f"the tensors are on {request.device.type}, these kernels run on the CPU")
    found += refused(request)
    return found
