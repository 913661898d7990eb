"""Launch configurations: block sizes, warps and pipeline stages; a short list for each pass, the default first.

The lists were chosen by what ptxas reports (registers, shared memory, spills; `aot`), and are timed on the device (`autotune`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["PASSES", "Config", "candidates", "padded"]

PASSES = ("fwd", "dq", "dkdv")


@dataclass(frozen=True)
class Config:
    """Tiles of `rows` query rows by `keys` keys, `warps` warps for each program, loads pipelined over `stages` iterations."""

    rows: int
    keys: int
    warps: int
    stages: int


def padded(head_dim: int) -> int:
    """The power of two (at least 16) to which head_dim is padded inside a kernel.

    >>> padded(72), padded(8)
    (128, 16)
    """
    return max(16, 1 << (head_dim - 1).bit_length())


def candidates(pass_name: str, head_dim: int, dtype: torch.dtype, *, hopper: bool = True) -> tuple[Config, ...]:
    """The configurations worth timing for a pass, the default first; in 16 bits and up to head_dim 128 none spills registers.

    `hopper`: compute capability 9 or later, where matrix products read their operands from shared memory.
    """
    block_d = padded(head_dim)
    if dtype == torch.float32:
        # Full float32 products run on the FMA units, which hold rows of head_dim in registers: small blocks.
        return (Config(32, 32, 8, 1) if block_d <= 64 else Config(32, 16, 8, 1) if block_d <= 128 else Config(16, 16, 8, 1),)
    if pass_name == "fwd":
        if block_d <= 64:
            return Config(128, 64, 4, 3), Config(128, 64, 8, 3), Config(64, 64, 4, 3)
        if block_d <= 128:
            return Config(128, 64, 8, 3), Config(64, 64, 4, 3)
        return Config(64, 32, 8, 2), Config(64, 64, 8, 2)
    if pass_name == "dq":
        if block_d <= 64:
            return Config(128, 64, 8, 2), Config(64, 64, 4, 3)
        if block_d <= 128:
            return Config(64, 64, 8, 2), Config(64, 32, 4, 2)
        return (Config(64, 32, 8, 1),)
    if block_d <= 64:
        small = Config(32, 64, 4, 2)
        return (Config(64, 64, 8, 2), small, Config(64, 128, 8, 2)) if hopper else (small,)
    if block_d <= 128:
        small = Config(32, 64, 8, 2)
        return (small,) if hopper else (small, Config(64, 64, 8, 2))
    return (Config(32, 32, 8, 1),)
