"""Counter-based random numbers: a hash of seed and absolute positions, without generator state.

Random keys, random blocks and dropout are pure functions of (seed, head, position, …), so every device, rank and chunk draws
the same numbers without communication. The mixing step is the 32-bit finalizer of MurmurHash3 (Appleby, public domain). The
C++ and Triton kernels compute it on uint32; here it runs on int64 tensors: products wrap modulo 2^64, which leaves their low
32 bits, the only ones kept, correct.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_below", "dropout_keep", "dropout_threshold", "hash_words", "mix32"]

_MASK = 0xFFFFFFFF


def mix32(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer: a bijection of 32-bit integers (as int64) in which each input bit affects each output bit."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def hash_words(*words: Tensor | int) -> Tensor:
    """32-bit hash (as int64) of integers modulo 2^32, broadcast: `h = mix32(h ^ word) * 5 + 0xe6546b64`, word by word."""
    h: Tensor = torch.tensor(0x9E3779B9, device="cpu")
    for word in words:
        masked = word & _MASK
        if isinstance(masked, Tensor) and masked.device != h.device:
            h = h.to(masked.device)
        h = (mix32(h ^ masked) * 5 + 0xE6546B64) & _MASK
    return h


def draw_below(h: Tensor, bound: Tensor | int) -> Tensor:
    """A 32-bit hash mapped to `[0, bound)` by multiply and shift, `h * bound >> 32`; bound <= 2^31."""
    return (h * bound) >> 32


def dropout_threshold(p: float) -> int:
    """The hash below which a pair is dropped: p · 2^32."""
    return round(p * 2**32)


def dropout_keep(seed: Tensor | int, p: float, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Keep mask of dropout, bool, broadcast: True with probability 1 - p, a function of (seed, b, h, query i, key j)."""
    low, high = seed & _MASK, (seed >> 32) & _MASK
    row = hash_words(low, high, b, h, i)
    return mix32(row ^ ((j * 0x9E3779B9) & _MASK)) >= dropout_threshold(p)
