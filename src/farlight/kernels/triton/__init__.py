"""Backend "triton": fused forward and backward kernels for GPUs, written in Triton and compiled at first use.

The plan is lowered once to lists of blocks (`query_work`, `key_work`), uploaded and kept with the plan; a call then passes
addresses and strides. `device/` holds the kernels; nothing here imports triton before a kernel is about to run.
"""

from __future__ import annotations

import torch

from farlight.kernels.request import Request
from farlight.kernels.triton.call import backward, forward
from farlight.kernels.triton.machine import MOST_DIMS, interpreted, missing, not_installed, unfit
from farlight.plan.build import TileShape

__all__ = ["SHAPE", "backward", "forward", "interpreted", "reasons"]

# A gathered pair costs about as much as half a row of a block; long rows are cut when the device is known.
SHAPE = TileShape(tile=128, gather=32, longest=2**30)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reasons(request: Request) -> list[str]:
    """Why these kernels cannot serve the request; empty when they can."""
    found = [why for why in (not_installed(), unfit(request.device)) if why is not None]
    if request.dtype not in _DTYPES:
        found.append(f"{str(request.dtype).removeprefix('torch.')} is not one of float32, bfloat16, float16")
    if not 1 <= request.head_dim <= MOST_DIMS:
        found.append(f"head_dim {request.head_dim} is outside 1 … {MOST_DIMS}")
    # Importing Triton takes a second: only where it would be used.
    broken = None if found else missing()
    return found if broken is None else [broken]
