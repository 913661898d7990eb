"""Block sizes, warps and stages: a short list for each pass, and the defaults that are used until a device has been timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["PASSES", "Config", "candidates", "padded"]

PASSES = ("forward", "queries", "keys")


@dataclass(frozen=True)
class Config:
    """`rows` query rows against `keys` keys at a time, by `warps` warps, with loads `stages` iterations ahead."""

    rows: int
    keys: int
    warps: int
    stages: int


def padded(head_dim: int) -> int:
    """The power of two (at least 16) to which head_dim is filled up inside a kernel."""
    return max(16, 1 << (head_dim - 1).bit_length())


def candidates(what: str, head_dim: int, dtype: torch.dtype, *, hopper: bool = True) -> tuple[Config, ...]:
    """The configurations worth timing for a pass, the default first; in 16 bits and up to head_dim 128 none spills registers.

    `hopper`: compute capability 9 or later, where products read their operands from shared memory.
    """
    wide = padded(head_dim)
    if dtype == torch.float32:
        # Products in full float32 run on the ordinary cores, which hold whole rows of head_dim in registers: small blocks.
        return (Config(32, 32, 8, 1) if wide <= 64 else Config(32, 16, 8, 1) if wide <= 128 else Config(16, 16, 8, 1),)
    if what == "forward":
        if wide <= 64:
            return Config(128, 64, 4, 3), Config(128, 64, 8, 3), Config(64, 64, 4, 3)
        if wide <= 128:
            return Config(128, 64, 8, 3), Config(64, 64, 4, 3)
        return Config(64, 32, 8, 2), Config(64, 64, 8, 2)
    if what == "queries":
        if wide <= 64:
            return Config(128, 64, 8, 2), Config(64, 64, 4, 3)
        if wide <= 128:
            return Config(64, 64, 8, 2), Config(64, 32, 4, 2)
        return (Config(64, 32, 8, 1),)
    if wide <= 64:
        small = Config(32, 64, 4, 2)
        return (Config(64, 64, 8, 2), small, Config(64, 128, 8, 2)) if hopper else (small,)
    if wide <= 128:
        small = Config(32, 64, 8, 2)
        return (small,) if hopper else (small, Config(64, 64, 8, 2))
    return (Config(32, 32, 8, 1),)
