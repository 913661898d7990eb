"""`Budget`: how many scored entries a row selects, by count, share of the visible ones, probability mass, or proven loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.errors import ArgumentError, show
from farlight.patterns.arguments import whole

__all__ = ["Budget", "concat_selections"]


@dataclass(frozen=True)
class Budget:
    """The size of a selection; exactly one field is set.

    count: that many entries (all, where fewer are visible); share: ⌈share · visible⌉ entries; mass: the fewest entries, in
    descending order of score, whose softmax probabilities over the scored entries sum to at least `mass`; lost: entries until
    the share of attention left out is proven to be at most `lost` (`routing.until_proven`; `select` does not know it).
    """

    count: int | None = None
    share: float | None = None
    mass: float | None = None
    lost: float | None = None

    @staticmethod
    def checked(name: str, **budgets: float | None) -> Budget:
        """The budget of the router `name`. Raises ArgumentError unless exactly one budget is given and in range."""
        fields = [field for field, value in budgets.items() if value is not None]
        if len(fields) != 1:
            actual, names = " and ".join(fields) if fields else "nothing", list(budgets)
            choices = f"{', '.join(names[:-1])} and {names[-1]}"
            raise ArgumentError(f"{name}: {actual} given; say how much to take by exactly one of {choices}.")
        count, share, mass, lost = (budgets.get(field) for field in ("count", "share", "mass", "lost"))
        if count is not None:
            whole(f"{name}: count", count, 1)
        for field, value in (("share", share), ("mass", mass)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0):
                raise ArgumentError(f"{name}: {field} = {show(value)}: it must be a number in 0 < {field} <= 1.")
        if lost is not None and (isinstance(lost, bool) or not isinstance(lost, int | float) or not 0.0 < lost < 1.0):
            raise ArgumentError(f"{name}: lost = {show(lost)}: it must be a number in 0 < lost < 1.")
        return Budget(None if count is None else int(count), share, mass, lost)

    def __str__(self) -> str:
        return ", ".join(f"{field}={value:g}" for field, value in self.__dict__.items() if value is not None)

    def select(
        self,
        scores: Tensor,
        forced: Tensor | None = None,
        num_forced: Tensor | None = None,
        max_forced: int | None = None,
    ) -> Tensor:
        """Indices into the last dimension of `scores`, ascending, padded with -1: `(…, m)` int64.

        scores: `(…, W)`; an entry of -inf is invisible and never selected by score.
        forced: `(…, W)` bool, entries selected whatever the budget; their scores must be -inf. Count and share include them (as
            `num_forced` `(…,)` of them where given), mass does not.
        max_forced: an upper bound of forced entries in a row, where known: a count then selects without a device sync.
        """
        width = scores.shape[-1]
        num_visible = (scores > float("-inf")).sum(-1)
        present = torch.zeros_like(num_visible) if forced is None else forced.sum(-1)
        num_forced = present if num_forced is None else num_forced
        max_forced = 0 if forced is None else _max(present) if max_forced is None else min(max_forced, width)
        if self.mass is not None:
            descending, order = scores.sort(dim=-1, descending=True, stable=True)
            num_selected = count_for_mass(descending, self.mass)
            order = order[..., : _max(num_selected)]
        else:
            num_selected = torch.full_like(num_visible, self.count or 0)
            if self.share is not None:
                # Rounding may lift a whole product just above its integer; 1e-9 keeps ceil from counting one more.
                num_selected = ((num_visible + num_forced).double() * self.share - 1e-9).ceil().long()
            num_selected = torch.minimum((num_selected - num_forced).clamp(min=0), num_visible)
            max_selected = _max(num_selected) if self.count is None else min(self.count, width)
            order = scores.topk(max_selected, -1).indices
        rank = torch.arange(order.shape[-1], device=scores.device)
        selected = torch.where(rank < num_selected.unsqueeze(-1), order, width)  # width pads: it sorts to the end
        if forced is not None:
            is_forced, index = forced.to(torch.uint8).topk(max_forced, -1)
            selected = torch.cat((torch.where(is_forced > 0, index, width), selected), -1)
        columns = _max(num_selected + present) if self.count is None else min(max(self.count, max_forced), width)
        selected = selected.sort(-1).values[..., :columns]
        return torch.where(selected < width, selected, -1)


def _max(counts: Tensor) -> int:
    return int(counts.max()) if counts.numel() else 0


def count_for_mass(descending: Tensor, mass: float) -> Tensor:
    """`(…,)` int64: the fewest leading scores of `(…, W)` descending ones whose softmax probabilities sum to `mass` or more."""
    finite = descending > float("-inf")
    max_score = torch.where(finite, descending, 0.0)[..., :1]
    weight = torch.where(finite, (descending - max_score).exp(), 0.0)
    weight_before = weight.cumsum(-1) - weight
    return (finite & (weight_before < mass * weight.sum(-1, keepdim=True))).sum(-1)


def concat_selections(chunks: list[Tensor]) -> Tensor:
    """`(…, rows, m)`: the selections of consecutive row chunks, at least one, padded with -1 to the widest m."""
    width = max(chunk.shape[-1] for chunk in chunks)
    return torch.cat([torch.nn.functional.pad(chunk, (0, width - chunk.shape[-1]), value=-1) for chunk in chunks], -2)
