"""Backend "torch": a plan executed tile by tile with plain torch operations, on any device.

Tiles that look alike (same widths, same masks) are computed together, as many as a small budget of memory allows; keys are
taken by slices or by index, scores live for one such group only, and the backward pass computes them again.
"""

from farlight.kernels.request import Request
from farlight.kernels.torch_tiled.backward import backward
from farlight.kernels.torch_tiled.forward import forward
from farlight.plan.build import TileShape

__all__ = ["SHAPE", "backward", "forward", "reasons"]

SHAPE = TileShape(tile=128, gather=8, longest=4096)


def reasons(request: Request) -> list[str]:
    return []
