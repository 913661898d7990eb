"""Receptive field by layer: the share of the text whose information has reached a token, and the load of relays.

After ℓ layers a token has information of all tokens within distance ℓ (`graph/distances.py`), itself included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farlight.analysis.graph.capacity import Capacity, capacity
from farlight.analysis.graph.distances import survey
from farlight.analysis.graph.links import Array, LazyLinks
from farlight.analysis.graph.sampling import check_confidence, margin_of_mean
from farlight.analysis.graph.small_world import check_targets
from farlight.errors import ArgumentError
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Reach", "reach"]


@dataclass(frozen=True, eq=False)
class Reach:
    """The receptive field by layer, the result of `fl.reach`.

    positions: (T,) tokens searched. share: (layers + 1, T), the share of the n tokens within distance `layer` of
    `positions[t]`, itself included (so `share[0]` is 1 / n). mean, worst: per layer, over all tokens when `exact`; else the
    estimated mean, with `margin` as half the width of its confidence interval, and the minimum over the sample.
    """

    pattern: Pattern
    n: int
    layers: int
    positions: Array
    share: Array
    mean: tuple[float, ...]
    margin: tuple[float, ...]
    worst: tuple[float, ...]
    exact: bool
    confidence: float
    capacity: Capacity | None

    def depth(self, share: float = 1.0) -> int | None:
        """The first layer at which the mean reaches this share of the text; None when no layer does."""
        return next((layer for layer, mean in enumerate(self.mean) if mean >= share - 1e-12), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the pattern as its expression, shares by layer and then by position."""
        return {
            "pattern": repr(self.pattern),
            "n": self.n,
            "layers": self.layers,
            "mean": list(self.mean),
            "margin": list(self.margin),
            "worst": list(self.worst),
            "exact": self.exact,
            "confidence": self.confidence,
            "positions": self.positions.tolist(),
            "share": self.share.tolist(),
            "capacity": None if self.capacity is None else self.capacity.to_dict(),
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw mean and worst share against the layer."""
        from farlight.analysis.plot import plot_reach

        return plot_reach(self, ax=ax)

    def _repr_html_(self) -> str:
        from farlight.analysis.notebook import reach_html

        return reach_html(self)

    def rows(self) -> list[tuple[str, str, str]]:
        """(layer, mean with its margin, worst), as printed."""
        return [
            (
                str(layer),
                _percent(self.mean[layer]) + (f" ± {_percent(self.margin[layer])}" if self.margin[layer] else ""),
                _percent(self.worst[layer]),
            )
            for layer in _printed_layers(self.layers)
        ]

    def __str__(self) -> str:
        method = (
            "every token"
            if self.exact
            else f"{self.positions.size:,} tokens drawn, margins at {self.confidence:.0%} confidence"
        )
        lines = [f"{self.pattern} over {self.n:,} tokens ({method})", "layer   mean heard of   worst"]
        lines += [f"{layer:>5}   {mean:>13}   {worst}" for layer, mean, worst in self.rows()]
        return "\n".join([*lines, *([] if self.capacity is None else [str(self.capacity)])])


def reach(
    pattern: Pattern,
    n: int,
    layers: int,
    *,
    batch: int = 0,
    head: int = 0,
    targets: int | None = None,
    readers: int = 64,
    confidence: float = 0.95,
    seed: int = 0,
) -> Reach:
    """Share of the text whose information has reached a token after 0, 1, … `layers` layers, and the load of relays.

    A token keeps its own information (the residual stream) and in each layer receives what its keys had the layer before.

    Args:
        n: tokens, as queries and as keys. batch, head: for patterns that vary over them.
        targets: tokens to search from. None: all where the budget allows it, else a sample drawn by `seed`; n: all.
        readers: sampled readers for the loads of relays, see `Capacity`; 0: no capacity.
        confidence: of the margins when tokens are sampled.

    Raises PatternError when the pattern does not fit n tokens, ArgumentError for any other argument out of range.

    >>> import farlight as fl
    >>> far = reach(fl.window(5), 100, 4)
    >>> [round(mean, 3) for mean in far.mean], round(far.worst[4], 3)
    ([0.01, 0.107, 0.199, 0.286, 0.368], 0.21)
    """
    try:
        layers, readers = whole("layers", layers, 0), whole("readers", readers, 0)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    confidence, targets = check_confidence(confidence), check_targets(targets)
    lazy = LazyLinks(pattern, n, batch, head)
    n, links = lazy.n, lazy.all()
    distances = survey(links, targets=targets, layers=layers, max_depth=layers, seed=seed)
    share = distances.cumulative / n
    fixed, population = distances.fixed, n - distances.fixed
    sampled = share[:, fixed:]
    # Fixed targets count once, the sample stands for all others; the mean after one layer follows from the number of links.
    mean = share[:, :fixed].sum(1) / n + population / n * sampled.mean(1)
    mean[1:2] = (links.in_degree.sum() + n) / n**2
    margin = [
        0.0 if layer < 2 else population / n * margin_of_mean(sampled[layer], population, confidence, max(x, 1 - x))
        for layer, x in enumerate(mean.tolist())
    ]
    return Reach(
        pattern,
        n,
        layers,
        distances.targets,
        share,
        tuple(mean.tolist()),
        tuple(margin),
        tuple(share.min(1).tolist()),
        distances.exact,
        confidence,
        capacity(links, readers=readers, seed=seed) if readers else None,
    )


def _printed_layers(layers: int) -> list[int]:
    """All layers up to 12, else 0, 1, 2, 4, 8 … and the last."""
    if layers <= 12:
        return list(range(layers + 1))
    return sorted({0, layers, *(2**k for k in range(int(math.log2(layers)) + 1))})


def _percent(share: float) -> str:
    """A percentage with two decimals, or two significant digits below 1 %."""
    return f"{100 * share:.2f}%" if share >= 0.0095 or not share else f"{100 * share:.2g}%"
