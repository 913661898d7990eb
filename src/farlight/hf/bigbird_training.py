"""The random blocks that Hugging Face's BigBird reads in training, drawn by its own code."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["training_blocks"]

# The draw goes through numpy's global generator: one thread at a time.
_NUMPY_LOCK = threading.Lock()


def training_blocks(original: Any, n: int) -> Tensor:
    """The random blocks of Hugging Face's module in training, `(1, H, n, r)` int64, -1 in the first and last row.

    The module draws from numpy's global generator, seeded with the layer's number, so the blocks are the same at every step.
    The generator's state is restored.
    """
    block, count, heads = original.block_size, original.num_random_blocks, original.num_attention_heads
    tokens, longest = n * block, original.max_seqlen
    with _NUMPY_LOCK:
        state, training = np.random.get_state(), original.training
        try:
            original.training = True
            np.random.seed(original.seed)
            if tokens in (1024, 3072, 4096):
                rows = [
                    original._bigbird_block_rand_mask(longest, longest, block, block, count, last_idx=1024)[: n - 2]
                    for _ in range(heads)
                ]
            else:
                lengths, counts = original._get_rand_attn_plan(tokens, block, count)
                rows = original._bigbird_block_rand_mask_with_head(tokens, tokens, block, block, heads, lengths, counts)
        finally:
            original.training = training
            np.random.set_state(state)
    drawn = torch.full((1, heads, n, count), -1, dtype=torch.int64)
    drawn[0, :, 1:-1] = torch.from_numpy(np.stack(rows).astype(np.int64))
    return drawn
