"""Small-world metrics of a pattern's link graph, beside the baselines of a random graph and a ring lattice."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from farlight.analysis.graph import baselines
from farlight.analysis.graph.clustering import clustering, mean_degree
from farlight.analysis.graph.distances import survey
from farlight.analysis.graph.links import LazyLinks
from farlight.analysis.graph.sampling import check_confidence
from farlight.analysis.graph.spectrum import spectral_gap
from farlight.errors import ArgumentError
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SmallWorld", "check_targets", "smallworld"]


@dataclass(frozen=True)
class SmallWorld:
    """Metrics of one head of a pattern over n tokens, the result of `fl.smallworld`.

    Distance: token i is at distance h from token j ≠ i when the shortest path of links from j to i has h hops (layers).
    hops: mean over the ordered reachable pairs; unreachable: share of the n (n - 1) ordered pairs without a path;
    histogram[h - 1]: share of the reachable pairs at h hops; diameter: the largest h (a lower bound unless `exact`).

    clustering, spectral_gap: of the undirected graph (`graph/clustering.py`, `graph/spectrum.py`). sigma, omega: against a
    random graph and a ring lattice of the same degree, whose own numbers are the `random_…` and `lattice_…` fields
    (`graph/baselines.py`).

    …_margin: half the width of the confidence interval at `confidence`, 0 for an exact value; `spectral_gap_margin` is the
    distance of the estimate from an eigenvalue, and the gap then an upper bound. links: self-loops included, as in
    `Pattern.count`; full_links: n², or n (n + 1) / 2 for a pattern in which no token sees a later one (`causal`). degree: keys
    per token without self-loops. targets: number of tokens searched from.
    """

    pattern: Pattern
    n: int
    batch: int
    head: int
    causal: bool
    links: int
    full_links: int
    degree: float
    hops: float
    hops_margin: float
    diameter: int
    unreachable: float
    unreachable_margin: float
    histogram: tuple[float, ...]
    clustering: float
    clustering_margin: float
    spectral_gap: float
    spectral_gap_margin: float
    random_hops: float
    random_clustering: float
    lattice_hops: float
    lattice_clustering: float
    sigma: float
    omega: float
    exact: bool
    targets: int
    confidence: float

    @property
    def density(self) -> float:
        """Links as a share of n²."""
        return self.links / self.n**2

    @property
    def saving(self) -> float:
        """Ratio of the links of full attention (causal for a causal pattern) to those of the pattern."""
        return self.full_links / self.links if self.links else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: None where a number is undefined, the pattern as its expression."""
        out: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            out[field.name] = None if isinstance(value, float) and not math.isfinite(value) else value
        out["pattern"], out["histogram"], out["density"] = repr(self.pattern), list(self.histogram), self.density
        return out

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the share of pairs within h hops against h."""
        from farlight.analysis.plot import plot_hops

        return plot_hops(self, ax=ax)

    def _repr_html_(self) -> str:
        from farlight.analysis.notebook import world_html

        return world_html(self)

    def rows(self) -> list[tuple[str, str, str]]:
        """(metric, value, what to compare it with), as printed."""
        return [
            (
                "links",
                f"{self.links:,}",
                f"{self._full_text()}: {_times(self.saving)} fewer; {self.degree:,.1f} keys for each token",
            ),
            (
                "average hops",
                _with_margin(self.hops, self.hops_margin),
                f"random graph {self.random_hops:.2f}, lattice {self.lattice_hops:,.2f}",
            ),
            ("diameter", f"{'' if self.exact else '>= '}{self.diameter:,}", _histogram_text(self.histogram)),
            ("unreachable", _percent(self.unreachable, self.unreachable_margin), self._unreachable_note()),
            (
                "clustering",
                _with_margin(self.clustering, self.clustering_margin, 3),
                f"random graph {self.random_clustering:.2g}, lattice {self.lattice_clustering:.3f}",
            ),
            ("spectral gap", _gap(self.spectral_gap, self.spectral_gap_margin), "0 = falls apart, 1 = mixes in one step"),
            ("sigma", f"{self.sigma:,.4g}", "far above 1 in a small world"),
            ("omega", f"{self.omega:z.2f}", "near 0 in a small world, 1 random, -1 lattice"),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        method = "every token" if self.exact else f"{self.targets:,} tokens drawn, margins at {self.confidence:.0%} confidence"
        width = max(len(row[1]) for row in rows)
        lines = [f"{name:<13} {value:>{width}}   {note}" for name, value, note in rows]
        return "\n".join([f"{self.pattern} over {self.n:,} tokens ({method})", *lines])

    def _full_text(self) -> str:
        name = "causal attention" if self.causal else "full attention"
        return f"{name} {self.full_links:,}"

    def _unreachable_note(self) -> str:
        return "of ordered pairs; half must be where no token sees a later one" if self.causal else "of ordered pairs"


def smallworld(
    pattern: Pattern,
    n: int,
    *,
    batch: int = 0,
    head: int = 0,
    targets: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> SmallWorld:
    """Path lengths, clustering and mixing of a pattern's links, and the small-world indices sigma and omega.

    Args:
        n: tokens, as queries and as keys.
        batch, head: for patterns that vary over them.
        targets: tokens to search from. None: all where about 15 seconds allow it, else a sample drawn by `seed`; n: all.
        confidence: of the margins when tokens are sampled.

    Memory and time follow the number of runs of keys, never n². Raises PatternError when the pattern does not fit n tokens,
    ArgumentError for any other argument out of range.

    >>> import farlight as fl
    >>> world = smallworld(fl.window(4) | fl.global_tokens([0]), 1000)
    >>> round(world.hops, 3), world.diameter, world.exact
    (1.99, 2, True)
    >>> smallworld(fl.window(4), 1000).diameter
    250
    """
    confidence, targets = check_confidence(confidence), check_targets(targets)
    lazy = LazyLinks(pattern, n, batch, head)
    n, links = lazy.n, lazy.all()
    distances = survey(links, targets=targets, seed=seed)
    hops, hops_margin = distances.mean(confidence)
    unreachable, unreachable_margin = distances.unreachable(confidence)
    coefficient, coefficient_margin = clustering(links, lazy, confidence=confidence, seed=seed)
    gap, gap_margin = spectral_gap(links, seed=seed)
    links_each = (links.count - int(links.self_loops.sum())) / n
    degree = mean_degree(links, lazy, seed=seed)
    causal = links.is_causal
    return SmallWorld(
        pattern=pattern,
        n=n,
        batch=lazy.batch,
        head=lazy.head,
        causal=causal,
        links=links.count,
        full_links=n * (n + 1) // 2 if causal else n * n,
        degree=links_each,
        hops=hops,
        hops_margin=hops_margin,
        diameter=distances.diameter,
        unreachable=unreachable,
        unreachable_margin=unreachable_margin,
        histogram=tuple(distances.histogram.tolist()),
        clustering=coefficient,
        clustering_margin=coefficient_margin,
        spectral_gap=gap,
        spectral_gap_margin=gap_margin,
        random_hops=baselines.random_hops(n, links_each),
        random_clustering=baselines.random_clustering(n, degree),
        lattice_hops=baselines.lattice_hops(n, links_each),
        lattice_clustering=baselines.lattice_clustering(n, degree),
        sigma=baselines.sigma(hops, coefficient, n, links_each, degree),
        omega=baselines.omega(hops, coefficient, n, links_each, degree),
        exact=distances.exact,
        targets=int(distances.targets.size),
        confidence=confidence,
    )


def check_targets(targets: int | None) -> int | None:
    """`targets` as an int, or None. Raises ArgumentError below 32, the smallest sample with a usable margin."""
    try:
        return None if targets is None else whole("targets", targets, 32)
    except ValueError as error:
        raise ArgumentError(f"{error} With fewer tokens drawn a margin would mean little; None chooses.") from None


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def _with_margin(value: float, margin: float, digits: int = 2) -> str:
    """`value ± margin`, rounded to the first digits of the margin."""
    if not margin:
        return f"{value:,.{digits}f}"
    digits = max(digits, min(6, 1 - math.floor(math.log10(margin))))
    return f"{value:,.{digits}f} ± {margin:.{digits}f}"


def _share(share: float) -> str:
    """A percentage that rounding turns into neither 0 nor 100."""
    return f"{100 * share:.2g}%" if share < 0.0005 else f"{share:.1%}" if share <= 0.9995 else f"{share:.3%}"


def _percent(share: float, margin: float) -> str:
    return f"{share:.1%}" + (f" ± {100 * margin:.1g}%" if margin else "")


def _gap(gap: float, margin: float) -> str:
    if math.isnan(gap):
        return "nan"
    return f"{gap:.4g}" if margin <= 1e-3 * gap or gap < 1e-12 else f"<= {gap:.2g}"


def _histogram_text(histogram: tuple[float, ...]) -> str:
    """`1 hop 3.0%, 2 hops 97.0%`; quartiles for more than six distances."""
    if not histogram:
        return "no token hears of another"
    if len(histogram) <= 6:
        return ", ".join(f"{hop} hop{'s' * (hop > 1)} {_share(share)}" for hop, share in enumerate(histogram, 1))
    texts, reached = [], 0.0
    quartiles = [0.25, 0.5, 0.75]
    for hop, share in enumerate(histogram, 1):
        reached += share
        while quartiles and reached >= quartiles[0] - 1e-12:
            texts.append(f"{quartiles.pop(0):.0%} within {hop:,}")
    return ", ".join(texts) + " hops"
