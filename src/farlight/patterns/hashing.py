"""Random numbers that are functions of where they are used, not of when.

Every random choice in farlight (random keys, random blocks, dropout) is a pure function of a seed and of absolute
positions, so that any device, rank or chunk draws the same without talking to another. The mixing step is the 32-bit
finalizer of MurmurHash3 (Appleby, public domain); the C++ and Triton kernels implement the same few operations on
unsigned 32-bit integers. Here they run on int64 tensors, which hold such an integer exactly: products wrap modulo 2^64
and the low 32 bits, all that is kept, are right.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_below", "dropout_keep", "dropout_threshold", "hash_words", "mix32"]

_MASK = 0xFFFFFFFF


def mix32(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers in which every input bit reaches every output bit."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def hash_words(*words: Tensor | int) -> Tensor:
    """32-bit hash of integers: `h = mix(h ^ w) * 5 + 0xe6546b64`, word by word, each taken modulo 2^32."""
    h: Tensor = torch.tensor(0x9E3779B9, device="cpu")
    for word in words:
        masked = word & _MASK
        if isinstance(masked, Tensor) and masked.device != h.device:
            h = h.to(masked.device)
        h = (mix32(h ^ masked) * 5 + 0xE6546B64) & _MASK
    return h


def draw_below(h: Tensor, bound: Tensor | int) -> Tensor:
    """A number in `[0, bound)` from a 32-bit hash (multiply and shift; `bound` <= 2^31)."""
    return (h * bound) >> 32


def dropout_threshold(p: float) -> int:
    """A link is dropped when its hash is below this number, that is with probability p."""
    return round(p * 2**32)


def dropout_keep(seed: Tensor | int, p: float, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Which links survive dropout: True with probability 1 - p, by (seed, batch, head, query position, key)."""
    low, high = seed & _MASK, (seed >> 32) & _MASK
    row = hash_words(low, high, b, h, i)
    return mix32(row ^ ((j * 0x9E3779B9) & _MASK)) >= dropout_threshold(p)
