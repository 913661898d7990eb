"""Calls of the native measures of probability tiles (csrc/analysis): kept shares of rows under masks, and histograms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farlight.kernels.cpu.native import module, unavailable

__all__ = ["add_to_histogram", "can_measure", "measure_rows"]


def can_measure(probability: Tensor) -> bool:
    """Whether the native measures take this tile: float32 in memory of the host."""
    return probability.device.type == "cpu" and probability.dtype == torch.float32 and unavailable() is None


def measure_rows(
    probability: Tensor, masks: Sequence[Tensor], first_keys: int | None, *, with_lost: bool
) -> list[tuple[Tensor, Tensor | None, Tensor, Tensor | None]]:
    """(kept, beyond, links, lost) of each mask, `(B, H, rows)` each: the sum of the allowed probabilities (float64), the same
    without the first `first_keys` keys, the number of allowed keys (int64), the largest probability not allowed (float32).

    probability: `(B, H, rows, keys)` float32; masks: bool, broadcastable to it. `beyond` is None
    without `first_keys`, `lost` without `with_lost`.
    """
    probability = probability.contiguous()
    shape = probability.shape[:3]
    views = [_with_contiguous_keys(mask, probability) for mask in masks]
    results = []
    for _ in masks:
        kept, links = torch.empty(shape, dtype=torch.float64, device="cpu"), torch.empty(shape, dtype=torch.int64, device="cpu")
        beyond = None if first_keys is None else torch.empty_like(kept)
        lost = torch.empty(shape, dtype=torch.float32, device="cpu") if with_lost else None
        results.append((kept, beyond, links, lost))
    outputs = [[0 if output is None else output.data_ptr() for output in result] for result in results]
    inputs = [[view.data_ptr(), *view.stride()[:3]] for view in views]
    module().measure_rows(_tile(probability), inputs, outputs, first_keys or 0, torch.get_num_threads())
    return results


def add_to_histogram(probability: Tensor, count: Tensor, mass: Tensor, shift: int) -> None:
    """Add a tile `(B, H, …)` to the histograms `count` (int64) and `mass` (float64), `(B, H, bins)` each, in place.

    The bin of p is (bits of 1.0 - bits of p) >> shift, clamped to the bins. Equal sums for any number of threads.
    """
    batch, heads = probability.shape[:2]
    tile = probability.contiguous().view(batch, heads, -1, probability.shape[-1]) if probability.numel() else None
    if tile is not None:
        to = [count.data_ptr(), mass.data_ptr(), *count.stride()[:2]]
        module().add_to_histogram(_tile(tile), to, [count.shape[2], shift], torch.get_num_threads())


def _tile(probability: Tensor) -> list[int]:
    """The numbers of a contiguous tile: see csrc/analysis/binding.cpp."""
    return [probability.data_ptr(), *probability.shape]


def _with_contiguous_keys(mask: Tensor, probability: Tensor) -> Tensor:
    """The mask, broadcast to the tile by strides of 0, its keys contiguous."""
    if mask.shape[3] != probability.shape[3] or (mask.shape[3] > 1 and mask.stride(3) != 1):
        mask = mask.expand(*mask.shape[:3], probability.shape[3]).contiguous()
    return mask.expand(probability.shape)
