"""How probability is spread over the links of a head, in memory that does not grow with the text.

The best pattern with L links keeps the L largest probabilities of the head. Finding them exactly needs every
probability at once, n² numbers. Sorting them into bins by size needs one pass and a few kilobytes per head, and is off
by no more than the width of the one bin that L falls into. The bound on that error is returned with the answer.

The bins are cut from the bits of a float32: its exponent and the first five bits of its fraction, so 32 bins per
octave, each 1/32 to 1/64 of its own value wide, over the 40 octaves below 1. Anything smaller falls into the last bin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BINS", "Histogram", "HistogramBuilder"]

_ONE = 0x3F800000  # the bits of 1.0 in float32; the bits of smaller positive numbers are smaller, in the same order
_SHIFT = 23 - 5  # 32 bins per octave
_OCTAVES = 40
BINS = _OCTAVES * 32 + 1


def _edges(device: torch.device) -> tuple[Tensor, Tensor]:
    """(lower, upper) edge of every bin in float64, from the largest probabilities down."""
    bits = _ONE - (torch.arange(BINS + 1, device=device, dtype=torch.int32) << _SHIFT)
    edge = bits.view(torch.float32).double()
    lower = edge[1:].clone()
    lower[-1] = 0.0
    return lower, edge[:-1]


@dataclass(frozen=True)
class Histogram:
    """Per batch item and head: how many links fall into each bin of probability, and what they add up to.

    `count` is int64 and `mass` float64, both `(B, H, BINS)`, from the largest probabilities down. `rows` is the number
    of query rows, over which every share is averaged.
    """

    count: Tensor
    mass: Tensor
    rows: int

    def best(self, links: Tensor) -> tuple[Tensor, Tensor]:
        """(share, slack): what the `links` largest probabilities of each head add up to, per query row.

        The bins above the one that `links` falls into are summed exactly; in that one bin each link is given the bin's
        mean. So the share is never above the true one, and the true one is never above `share + slack`, apart from
        rounding. `links` is `(B, H)`; both results are `(B, H)` in float64.
        """
        count, total = self.count.cumsum(-1), self.mass.cumsum(-1)
        links = torch.minimum(links.to(count), count[..., -1]).clamp(min=0)
        # The first bin at which the links are used up; everything before it is taken whole.
        at = torch.searchsorted(count, links.unsqueeze(-1)).clamp(max=BINS - 1)
        here, inside = self.mass.gather(-1, at).squeeze(-1), self.count.gather(-1, at).squeeze(-1)
        before = total.gather(-1, at).squeeze(-1) - here
        taken = (links - (count.gather(-1, at).squeeze(-1) - inside)).double()
        lower, upper = (edge[at.squeeze(-1)] for edge in _edges(count.device))
        part = here * taken / inside.clamp(min=1)
        # At most `taken` links at the upper edge, and at least the lower edge for those that stay behind.
        most = torch.minimum(taken * upper, here - (inside - taken) * lower)
        rows = max(1, self.rows)
        return (before + part) / rows, (most - part).clamp(min=0) / rows

    def curve(self) -> tuple[Tensor, Tensor]:
        """(links, share): the most that any number of links can keep, at the edge of every bin; `(B, H, BINS + 1)` each.

        Exact at these points; a straight line between two of them never lies above the truth.
        """
        zero = torch.zeros_like(self.count[..., :1])
        links = torch.cat([zero, self.count.cumsum(-1)], -1)
        share = torch.cat([zero.double(), self.mass.cumsum(-1)], -1) / max(1, self.rows)
        return links, share


class HistogramBuilder:
    """Collects probabilities tile by tile and becomes a `Histogram`."""

    def __init__(self, batch: int, heads: int, device: torch.device) -> None:
        self._count = torch.zeros(batch, heads, BINS, dtype=torch.int64, device=device)
        self._mass = torch.zeros(batch, heads, BINS, dtype=torch.float64, device=device)

    def add(self, probability: Tensor, batch: slice, heads: slice) -> None:
        """Add a tile `(B', H', …)` of probabilities of these batch items and heads; zeros carry nothing."""
        lead = probability.shape[:2]
        index = _ONE - probability.to(torch.float32).contiguous().view(torch.int32)
        # Below zero: a probability that rounding lifted above 1. Beyond the end: too small to have a bin of its own.
        index = index.bitwise_right_shift_(_SHIFT).clamp_(0, BINS - 1).flatten(2)
        groups = lead[0] * lead[1]
        index += torch.arange(groups, device=index.device, dtype=torch.int32).view(*lead, 1) * BINS
        flat = index.flatten()
        shape = (*lead, BINS)
        self._count[batch, heads] += torch.bincount(flat, minlength=groups * BINS).view(shape)
        self._mass[batch, heads] += torch.bincount(flat, probability.flatten().double(), groups * BINS).view(shape)

    def finish(self, rows: int, links: Tensor) -> Histogram:
        """The histogram of `rows` query rows in which only `links` (B, H) of the pairs added were links at all.

        The others have probability zero and lie in the last bin; they are taken out of its count.
        """
        count = self._count
        count[..., -1] -= count.sum(-1) - links
        return Histogram(count, self._mass, rows)
