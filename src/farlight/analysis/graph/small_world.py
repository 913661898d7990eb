"""Is it a small world? Hops, clustering and mixing of a pattern's links, beside a random graph and a lattice."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from farlight.analysis.graph import baselines as yardsticks
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
    """What `fl.smallworld` found for one head of a pattern over n tokens.

    Hops: token i hears of token j ≠ i after h layers when the shortest chain of links from j to i has h of them. `hops` is the
    mean over the ordered pairs that can be reached at all, `unreachable` the share of the n (n - 1) pairs that cannot;
    `histogram[h - 1]` is the share of reachable pairs at h hops and `diameter` the largest h that was met (the largest there
    is when `exact`, at least that when targets were drawn).

    `clustering` and `spectral_gap` are of the undirected graph (see `graph/clustering.py` and `graph/spectrum.py`).
    `sigma` and `omega` compare with a random graph and a ring lattice of the same degree (`graph/yardsticks.py`), whose own
    numbers are given beside them.

    A `…_margin` is half the width of the confidence interval at `confidence`, 0 where every token was looked at;
    `spectral_gap_margin` says how far the iteration was from an eigenvalue when it ended (the gap is then at most what is
    given). `links` counts the links of tokens to themselves, as `Pattern.count` does; `full_links` is n², or n (n + 1) / 2
    when no token sees a later one.
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
        """How many times fewer links than full attention (in the same direction) has."""
        return self.full_links / self.links if self.links else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: None where a number is not defined, the pattern as its expression."""
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

    def __str__(self) -> str:
        rows = [
            (
                "links",
                f"{self.links:,}",
                f"{self._full()}: {_times(self.saving)} fewer; {self.degree:,.1f} keys for each token",
            ),
            (
                "average hops",
                _with(self.hops, self.hops_margin),
                f"random graph {self.random_hops:.2f}, lattice {self.lattice_hops:,.2f}",
            ),
            ("diameter", f"{'' if self.exact else '>= '}{self.diameter:,}", _spoken_histogram(self.histogram)),
            ("unreachable", _percent(self.unreachable, self.unreachable_margin), self._direction()),
            (
                "clustering",
                _with(self.clustering, self.clustering_margin, 3),
                f"random graph {self.random_clustering:.2g}, lattice {self.lattice_clustering:.3f}",
            ),
            ("spectral gap", _gap(self.spectral_gap, self.spectral_gap_margin), "0 = falls apart, 1 = mixes in one step"),
            ("sigma", f"{self.sigma:,.4g}", "far above 1 in a small world"),
            ("omega", f"{self.omega:.2f}", "near 0 in a small world, 1 random, -1 lattice"),
        ]
        how = "every token" if self.exact else f"{self.targets:,} tokens drawn, margins at {self.confidence:.0%} confidence"
        wide = max(len(row[1]) for row in rows)
        lines = [f"{name:<13} {value:>{wide}}   {note}" for name, value, note in rows]
        return "\n".join([f"{self.pattern!r} over {self.n:,} tokens ({how})", *lines])

    def _full(self) -> str:
        name = "causal attention" if self.causal else "full attention"
        return f"{name} {self.full_links:,}"

    def _direction(self) -> str:
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
    """How far news travels along a pattern's links: hops, clustering, mixing, and whether that makes a small world.

    Args: `n` tokens, as queries and as keys; `batch` and `head`, for patterns that differ between them; `targets`, how many
    tokens to walk from (None: all where that is affordable, else as many as about 15 seconds allow; n: all); `confidence` of
    the margins when tokens are drawn, by `seed`.

    No n² is formed and rows that see much are never listed: a walk gives each row's set of walks to whole stretches of keys.
    Raises PatternError when the pattern does not fit n tokens, ArgumentError for anything else that cannot be.

    >>> import farlight as fl
    >>> world = smallworld(fl.window(4) | fl.global_tokens([0]), 1000)
    >>> round(world.hops, 3), world.diameter, world.exact
    (1.99, 2, True)
    >>> smallworld(fl.window(4), 1000).diameter
    250
    """
    confidence, targets = check_confidence(confidence), check_targets(targets)
    asked = LazyLinks(pattern, n, batch, head)
    n, links = asked.n, asked.all()
    hops = survey(links, targets=targets, seed=seed)
    mean, mean_margin = hops.mean(confidence)
    unreachable, unreachable_margin = hops.unreachable(confidence)
    cluster, cluster_margin = clustering(links, asked, confidence=confidence, seed=seed)
    gap, gap_margin = spectral_gap(links, seed=seed)
    each = (links.count - int(links.selfs.sum())) / n
    degree = mean_degree(links, asked, seed=seed)
    causal = not links.looks_ahead
    return SmallWorld(
        pattern=pattern,
        n=n,
        batch=asked.batch,
        head=asked.head,
        causal=causal,
        links=links.count,
        full_links=n * (n + 1) // 2 if causal else n * n,
        degree=each,
        hops=mean,
        hops_margin=mean_margin,
        diameter=hops.farthest,
        unreachable=unreachable,
        unreachable_margin=unreachable_margin,
        histogram=tuple(hops.share.tolist()),
        clustering=cluster,
        clustering_margin=cluster_margin,
        spectral_gap=gap,
        spectral_gap_margin=gap_margin,
        random_hops=yardsticks.random_hops(n, each),
        random_clustering=yardsticks.random_clustering(n, degree),
        lattice_hops=yardsticks.lattice_hops(n, each),
        lattice_clustering=yardsticks.lattice_clustering(n, degree),
        sigma=yardsticks.sigma(mean, cluster, n, each, degree),
        omega=yardsticks.omega(mean, cluster, n, each, degree),
        exact=hops.exact,
        targets=int(hops.targets.size),
        confidence=confidence,
    )


def check_targets(targets: int | None) -> int | None:
    """None, or a number of tokens to walk from."""
    try:
        return None if targets is None else whole("targets", targets, 32)
    except ValueError as error:
        raise ArgumentError(f"{error} With fewer tokens drawn a margin would mean little; None chooses.") from None


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def _with(value: float, margin: float, digits: int = 2) -> str:
    """A number and its margin, to the digits that the margin leaves meaning."""
    if not margin:
        return f"{value:,.{digits}f}"
    digits = max(digits, min(6, 1 - math.floor(math.log10(margin))))
    return f"{value:,.{digits}f} ± {margin:.{digits}f}"


def _share(share: float) -> str:
    """A percentage that is neither 0 nor 100 because of rounding."""
    return f"{100 * share:.2g}%" if share < 0.0005 else f"{share:.1%}" if share <= 0.9995 else f"{share:.3%}"


def _percent(share: float, margin: float) -> str:
    return f"{share:.1%}" + (f" ± {100 * margin:.1g}%" if margin else "")


def _gap(gap: float, margin: float) -> str:
    if math.isnan(gap):
        return "nan"
    return f"{gap:.4g}" if margin <= 1e-3 * gap or gap < 1e-12 else f"<= {gap:.2g}"


def _spoken_histogram(histogram: tuple[float, ...]) -> str:
    """`1 hop 3.0%, 2 hops 97.0%`, or quantiles where there are many."""
    if not histogram:
        return "no token hears of another"
    if len(histogram) <= 6:
        return ", ".join(f"{hop} hop{'s' * (hop > 1)} {_share(share)}" for hop, share in enumerate(histogram, 1))
    within, reached = [], 0.0
    wanted = [0.25, 0.5, 0.75]
    for hop, share in enumerate(histogram, 1):
        reached += share
        while wanted and reached >= wanted[0] - 1e-12:
            within.append(f"{wanted.pop(0):.0%} within {hop:,}")
    return ", ".join(within) + " hops"
