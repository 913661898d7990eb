"""How many to take of what was scored: a count, a share of what is visible, or the mass of an estimated softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.errors import ArgumentError, show
from farlight.patterns.arguments import whole

__all__ = ["Amount"]


@dataclass(frozen=True)
class Amount:
    """Exactly one of these is given.

    count: that many (all, where there are fewer); share: ⌈share · visible⌉; mass: the smallest set, taken from the largest
    down, whose part of Σ exp(score) over the scored ones reaches `mass`.
    """

    count: int | None = None
    share: float | None = None
    mass: float | None = None

    @staticmethod
    def read(name: str, count: int | None, share: float | None, mass: float | None) -> Amount:
        given = [what for what, value in (("count", count), ("share", share), ("mass", mass)) if value is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "nothing"
            raise ArgumentError(f"{name}: {found} given; say how much to take by exactly one of count, share and mass.")
        if count is not None:
            whole(f"{name}: count", count, 1)
        for what, value in (("share", share), ("mass", mass)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0):
                raise ArgumentError(f"{name}: {what} = {show(value)}: it must be a number in 0 < {what} <= 1.")
        return Amount(count, share, mass)

    def __str__(self) -> str:
        return ", ".join(f"{what}={value:g}" for what, value in self.__dict__.items() if value is not None)

    def take(
        self, scores: Tensor, forced: Tensor | None = None, counted: Tensor | None = None, most: int | None = None
    ) -> Tensor:
        """Indices into the last dimension of `scores`, ascending, -1 pads: `(…, most)`.

        A score of -inf cannot be taken. `forced` (bool, the shape of scores) are taken whatever happens; their scores must
        be -inf, and they count as visible and as taken in count and share (as `counted` of them, `(…)`, where that is
        given), not in the mass. `most`, where it is known, is how many are forced at the most: then a count is taken without
        asking the device for anything.
        """
        width = scores.shape[-1]
        visible = (scores > float("-inf")).sum(-1)
        there = torch.zeros_like(visible) if forced is None else forced.sum(-1)
        counted = there if counted is None else counted
        most = 0 if forced is None else _largest(there) if most is None else min(most, width)
        if self.mass is not None:
            ordered, order = scores.sort(dim=-1, descending=True, stable=True)
            number = reaching(ordered, self.mass)
            order = order[..., : _largest(number)]
        else:
            number = torch.full_like(visible, self.count or 0)
            if self.share is not None:
                # A product that should be whole may lie a rounding above it.
                number = ((visible + counted).double() * self.share - 1e-9).ceil().long()
            number = torch.minimum((number - counted).clamp(min=0), visible)
            at_most = _largest(number) if self.count is None else min(self.count, width)
            order = scores.topk(at_most, -1).indices
        rank = torch.arange(order.shape[-1], device=scores.device)
        chosen = torch.where(rank < number.unsqueeze(-1), order, width)
        if forced is not None:
            is_forced, place = forced.to(torch.uint8).topk(most, -1)
            chosen = torch.cat((torch.where(is_forced > 0, place, width), chosen), -1)
        longest = _largest(number + there) if self.count is None else min(max(self.count, most), width)
        chosen = chosen.sort(-1).values[..., :longest]
        return torch.where(chosen < width, chosen, -1)


def _largest(numbers: Tensor) -> int:
    return int(numbers.max()) if numbers.numel() else 0


def reaching(ordered: Tensor, mass: float) -> Tensor:
    """How many of the descending scores make `mass` of their softmax: up to the first whose cumulated part is not below it."""
    finite = ordered > float("-inf")
    top = torch.where(finite, ordered, 0.0)[..., :1]
    weight = torch.where(finite, (ordered - top).exp(), 0.0)
    before = weight.cumsum(-1) - weight
    return (finite & (before < mass * weight.sum(-1, keepdim=True))).sum(-1)
