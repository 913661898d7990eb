"""How much of the text has a token heard of after each layer, and through how many vectors?"""

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
    """What `fl.reach` found: the receptive field layer by layer.

    `share[layer, t]` is the share of the n tokens that the token at `positions[t]` has heard of after so many layers, itself
    included (so `share[0]` is 1 / n). `mean[layer]` and `worst[layer]` are over all tokens when `exact`, else the mean's
    estimate, with `margin[layer]` as half the width of its confidence interval, and the least met.
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
        """The first layer after which a token has heard of this share of the text on average; None when none of these."""
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

    def __str__(self) -> str:
        how = (
            "every token"
            if self.exact
            else f"{self.positions.size:,} tokens drawn, margins at {self.confidence:.0%} confidence"
        )
        lines = [f"{self.pattern!r} over {self.n:,} tokens ({how})", "layer   mean heard of   worst"]
        for layer in _shown(self.layers):
            mean, margin = self.mean[layer], self.margin[layer]
            said = f"{_share(mean)}" + (f" ± {_share(margin)}" if margin else "")
            lines.append(f"{layer:>5}   {said:>13}   {_share(self.worst[layer])}")
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
    """Share of the text that a token has heard of after 0, 1, … `layers` layers, and how many tokens share a relay.

    A token keeps what it knows and in each layer hears what its keys knew before. Args: `n` tokens; `batch`, `head`;
    `targets`, how many tokens to ask (None: all where that is affordable; n: all), drawn by `seed` with margins at
    `confidence`; `readers`, for how many the loads of relays are worked out (0: for none), see `Capacity`.

    Raises PatternError when the pattern does not fit n tokens, ArgumentError for anything else that cannot be.

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
    asked = LazyLinks(pattern, n, batch, head)
    n, links = asked.n, asked.all()
    hops = survey(links, targets=targets, layers=layers, most_hops=layers, seed=seed)
    share = hops.cumulative / n
    drawn, rest = share[:, hops.sure :], (n - hops.sure) / n
    # The sure ones count as they are, the drawn ones for all others; one layer is known from the number of links.
    mean = share[:, : hops.sure].sum(1) / n + rest * drawn.mean(1)
    mean[1:2] = (links.degree.sum() + n) / n**2
    margin = [
        0.0 if layer < 2 else rest * margin_of_mean(drawn[layer], n - hops.sure, confidence, max(row, 1 - row))
        for layer, row in enumerate(mean.tolist())
    ]
    return Reach(
        pattern,
        n,
        layers,
        hops.targets,
        share,
        tuple(mean.tolist()),
        tuple(margin),
        tuple(share.min(1).tolist()),
        hops.exact,
        confidence,
        capacity(links, readers=readers, seed=seed) if readers else None,
    )


def _shown(layers: int) -> list[int]:
    """All layers when few, else 0, 1, 2, 4, 8 … and the last."""
    if layers <= 12:
        return list(range(layers + 1))
    return sorted({0, layers, *(2**k for k in range(int(math.log2(layers)) + 1))})


def _share(share: float) -> str:
    return f"{100 * share:.2f}%" if share >= 0.0095 or not share else f"{100 * share:.2g}%"
