"""Kept probability, number of links and largest lost probability of each row of a tile, under the masks of patterns.

On the CPU in float32 one native pass over the tile (`farlight.kernels.cpu.row_measures`); else torch operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.kernels.cpu import row_measures as native_measures

__all__ = ["RowMeasures", "measure_rows"]


@dataclass(frozen=True)
class RowMeasures:
    """Measures of the rows of a tile under one mask, `(B', H', rows)` each.

    `kept`: the sum of probability over allowed keys, float64 or the dtype of the probabilities. `beyond`, float64: the same
    without the first keys; None where it is not measured. `links`, int64: the number of allowed keys. `lost`, in the dtype of
    the probabilities: the largest probability of a key that is not allowed, 0 where there is none; None where it is not
    measured.
    """

    kept: Tensor
    beyond: Tensor | None
    links: Tensor
    lost: Tensor | None


def measure_rows(probability: Tensor, masks: Sequence[Tensor], first_keys: int | None, *, with_lost: bool) -> list[RowMeasures]:
    """The measures of each mask.

    Args:
        probability: `(B', H', rows, keys)`.
        masks: allowed pairs, bool, broadcastable to `probability`.
        first_keys: the number of keys that `beyond` leaves out; None = `beyond` is not measured.
        with_lost: measure `lost`.
    """
    if not masks:
        return []
    if native_measures.can_measure(probability):
        return [
            RowMeasures(*each) for each in native_measures.measure_rows(probability, masks, first_keys, with_lost=with_lost)
        ]
    return [_measured_by_torch(probability, mask, first_keys, with_lost) for mask in masks]


def _measured_by_torch(probability: Tensor, mask: Tensor, first_keys: int | None, with_lost: bool) -> RowMeasures:
    kept = probability * mask
    beyond = None if first_keys is None else kept[..., first_keys:].sum(-1, dtype=torch.float64)
    links, lost = mask.expand(probability.shape).sum(-1), None
    if with_lost:
        outside = probability.masked_fill(mask, 0.0)
        lost = outside.amax(-1) if outside.shape[-1] else outside.sum(-1)
    return RowMeasures(kept.sum(-1), beyond, links, lost)
