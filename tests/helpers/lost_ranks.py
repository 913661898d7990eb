"""A rank that is killed in the middle of training steps, and what the others hear of it; run by processes of
`test_lost_rank`.
"""

from __future__ import annotations

import datetime
import time
from typing import Any

import torch
import torch.distributed as dist

import farlight as fl
from farlight.distributed import Layout, attention

__all__ = ["train_until_lost"]


def train_until_lost(rank: int, world: int, store: str, seconds: float, queue: Any) -> None:
    """Forward and backward passes without end; puts (rank, name of the error, seconds since the last step) when one raises."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    layout, pattern = Layout.even(60, world), fl.window(4) | fl.global_tokens([0])
    tensors = [torch.randn(1, 2, 60, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    queue.put((rank, "ready", 0.0))
    began = time.monotonic()
    try:
        while True:
            began = time.monotonic()
            q, k, v = (layout.shard(x, 2, rank).detach().requires_grad_() for x in tensors)
            out = attention(q, k, v, pattern, layout=layout)
            assert isinstance(out, torch.Tensor)
            assert bool(out.isfinite().all())
            out.sum().backward()
    except BaseException as error:
        queue.put((rank, type(error).__name__, time.monotonic() - began))
