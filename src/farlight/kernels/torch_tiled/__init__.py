"""Backend "torch": block-sparse attention over a plan in plain torch operations, on any device and dtype.

Tiles with equal row counts, run widths and masks are stacked and computed as one batched matrix product, as many as a fixed
score budget allows. K/V rows are taken by slices, or gathered where tokens are sorted. Scores live for one such batch of
tiles only; the backward pass recomputes them.
"""

from farlight.kernels.request import Request
from farlight.kernels.torch_tiled.backward import backward
from farlight.kernels.torch_tiled.forward import forward
from farlight.plan.tables import TileShape

__all__ = ["SHAPE", "backward", "forward", "reasons"]

SHAPE = TileShape(tile=128, gather=8, longest=4096)


def reasons(request: Request) -> list[str]:
    """Why this backend cannot run the request: never."""
    return []
