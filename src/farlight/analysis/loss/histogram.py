"""Histogram of attention probabilities: the most that L links of a head can keep, in memory independent of the text's length.

The best pattern with L links keeps the L largest probabilities of the head. An exact answer sorts all n_q · n_k of them.
Binning by magnitude takes one pass and 20 KiB per head; its error is bounded by the width of the single bin that the L-th
largest probability falls into, and that bound is returned with the answer.

Bins are cut from the bits of a float32, exponent and the first five bits of the fraction: 32 bins per octave, each 1/64 to 1/32
of its value wide, over the 40 octaves below 1. Smaller values fall into the last bin. Bin 0 holds the largest probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.kernels.cpu.row_measures import add_to_histogram, can_measure

__all__ = ["BINS", "Histogram", "HistogramBuilder"]

_ONE = 0x3F800000  # the bits of 1.0 in float32; for positive floats, bit patterns are ordered as the numbers are
_SHIFT = 23 - 5  # 32 bins per octave
_OCTAVES = 40
BINS = _OCTAVES * 32 + 1


def _edges(device: torch.device) -> tuple[Tensor, Tensor]:
    """(lower, upper) edges of all bins, `(BINS,)` float64 each, in falling order."""
    bits = _ONE - (torch.arange(BINS + 1, device=device, dtype=torch.int32) << _SHIFT)
    edge = bits.view(torch.float32).double()
    lower = edge[1:].clone()
    lower[-1] = 0.0
    return lower, edge[:-1]


@dataclass(frozen=True)
class Histogram:
    """Per batch item and head, the number of links in each bin and the sum of their probabilities.

    `count` int64 and `mass` float64, both `(B, H, BINS)`, largest probabilities first. `rows`: the number of query rows n_q;
    every share is a sum of probabilities divided by it. `sinks` `(B, H)` float64: the sum of the sinks' shares over the rows,
    which is kept whatever the links are.
    """

    count: Tensor
    mass: Tensor
    rows: int
    sinks: Tensor

    def best(self, links: Tensor) -> tuple[Tensor, Tensor]:
        """(share, slack), `(B, H)` float64 each: the sum of the `links` `(B, H)` largest probabilities of each head and of
        its sinks, over n_q.

        Bins above the boundary bin (the one in which `links` are used up) are summed exactly; links from the boundary bin count
        with its mean. Up to rounding, share <= true share <= share + slack.
        """
        count, mass = self.count.cumsum(-1), self.mass.cumsum(-1)
        links = torch.minimum(links.to(count), count[..., -1]).clamp(min=0)
        boundary = torch.searchsorted(count, links.unsqueeze(-1)).clamp(max=BINS - 1)
        bin_mass, bin_count = self.mass.gather(-1, boundary).squeeze(-1), self.count.gather(-1, boundary).squeeze(-1)
        mass_above = mass.gather(-1, boundary).squeeze(-1) - bin_mass
        from_bin = (links - (count.gather(-1, boundary).squeeze(-1) - bin_count)).double()
        lower, upper = (edge[boundary.squeeze(-1)] for edge in _edges(count.device))
        estimate = bin_mass * from_bin / bin_count.clamp(min=1)
        # `from_bin` links are at most at the upper edge, and the links left in the bin are at least at its lower edge.
        bound = torch.minimum(from_bin * upper, bin_mass - (bin_count - from_bin) * lower)
        rows = max(1, self.rows)
        return (self.sinks + mass_above + estimate) / rows, (bound - estimate).clamp(min=0) / rows

    def curve(self) -> tuple[Tensor, Tensor]:
        """(links, share), `(B, H, BINS + 1)` each: the most that a number of links can keep, at the edge of every bin.

        Exact at these points. The true curve is concave, so linear interpolation between them is a lower bound.
        """
        zero = torch.zeros_like(self.count[..., :1])
        links = torch.cat([zero, self.count.cumsum(-1)], -1)
        share = (torch.cat([zero.double(), self.mass.cumsum(-1)], -1) + self.sinks.unsqueeze(-1)) / max(1, self.rows)
        return links, share


class HistogramBuilder:
    """Accumulates tiles of probabilities into a `Histogram`."""

    def __init__(self, batch: int, heads: int, device: torch.device) -> None:
        self._count = torch.zeros(batch, heads, BINS, dtype=torch.int64, device=device)
        self._mass = torch.zeros(batch, heads, BINS, dtype=torch.float64, device=device)

    def add(self, probability: Tensor, batch: slice, heads: slice) -> None:
        """Add a tile `(B', H', …)` of probabilities of the batch items `batch` and heads `heads`.

        The result is the same for any number of threads.
        """
        if can_measure(probability):
            add_to_histogram(probability, self._count[batch, heads], self._mass[batch, heads], _SHIFT)
            return
        lead = probability.shape[:2]
        index = _ONE - probability.to(torch.float32).contiguous().view(torch.int32)
        # Negative: rounding lifted a probability above 1. Beyond the last bin: smaller than 40 octaves below 1.
        index = index.bitwise_right_shift_(_SHIFT).clamp_(0, BINS - 1).flatten(2)
        groups = lead[0] * lead[1]
        index += torch.arange(groups, device=index.device, dtype=torch.int32).view(*lead, 1) * BINS
        flat = index.flatten()
        shape = (*lead, BINS)
        self._count[batch, heads] += torch.bincount(flat, minlength=groups * BINS).view(shape)
        self._mass[batch, heads] += torch.bincount(flat, probability.flatten().double(), groups * BINS).view(shape)

    def finish(self, rows: int, links: Tensor, sinks: Tensor | None = None) -> Histogram:
        """The histogram over `rows` query rows, of which `links` `(B, H)` of the pairs added are links of full attention.

        Pairs outside the base have probability 0 and were counted in the last bin; its count is corrected here.
        """
        count = self._count
        count[..., -1] -= count.sum(-1) - links
        return Histogram(count, self._mass, rows, torch.zeros_like(self._mass[..., 0]) if sinks is None else sinks)
