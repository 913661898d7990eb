"""Baselines of the small-world metrics: a random graph and a ring lattice of the same degree.

Watts and Strogatz 1998 ("Collective dynamics of 'small-world' networks") call a graph a small world when its clustering is
about that of a lattice and its path length about that of a random graph. Both baselines are closed forms or recurrences; no
graph is sampled. `n` is the number of tokens, `degree` the mean number of neighbours; nan where a quantity is undefined.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["lattice_clustering", "lattice_hops", "omega", "random_clustering", "random_hops", "sigma"]


def random_hops(n: int, degree: float) -> float:
    """Average path length over reachable pairs of a random directed graph with link probability p = degree / (n - 1).

    Mean-field recurrence: u unreached tokens become u (1 - p)^f after a frontier of f tokens. The first two layers are exact
    expectations but for the variance of f; the result is within some per cent of sampled graphs for degree >= 3.

    >>> round(random_hops(1_000_000, 516), 2), random_hops(10, 9)
    (2.77, 1.0)
    """
    if n < 2 or degree <= 0:
        return math.nan
    stay = 1 - min(1.0, degree / (n - 1))
    unreached, frontier, total_hops, pairs, hop = n - 1.0, 1.0, 0.0, 0.0, 0
    while unreached > 0 and frontier > 1e-9 and hop < 100_000:
        hop += 1
        still_unreached = unreached * stay**frontier
        frontier, unreached = unreached - still_unreached, still_unreached
        total_hops += hop * frontier
        pairs += frontier
    return total_hops / pairs


def random_clustering(n: int, degree: float) -> float:
    """Clustering coefficient of a random graph: any two neighbours are linked with probability degree / (n - 1).

    >>> random_clustering(101, 10)
    0.1
    """
    return math.nan if n < 2 else min(1.0, degree / (n - 1))


def lattice_hops(n: int, degree: float) -> float:
    """Average path length of a ring lattice with degree / 2 neighbours on each side: the mean of ⌈m / (degree / 2)⌉ over the
    distances m around the ring.

    >>> lattice_hops(5, 4), lattice_hops(9, 2)
    (1.0, 2.5)
    """
    if n < 2 or degree <= 0:
        return math.nan
    side = max(1.0, degree / 2)
    distance = np.arange(1, n // 2 + 1)
    multiplicity = np.where(2 * distance == n, 1, 2)
    return float((np.ceil(distance / side) * multiplicity).sum() / (n - 1))


def lattice_clustering(n: int, degree: float) -> float:
    """Clustering coefficient of that ring lattice: the share of pairs of neighbours at most degree / 2 apart around the ring.

    For degree < 2n/3 that is 3 (degree - 2) / (4 (degree - 1)).

    >>> lattice_clustering(100, 4), lattice_clustering(5, 4)
    (0.5, 1.0)
    """
    if n < 3:
        return math.nan
    if degree >= n - 1:
        return 1.0
    if degree <= 2:
        return 0.0
    if degree < 2 * n / 3:
        return 3 * (degree - 2) / (4 * (degree - 1))
    # Neighbours on the two sides are also linked across the back of the ring: count the pairs at each offset.
    side = int(degree // 2)
    offset = np.arange(1, 2 * side + 1)
    # Pairs (x, x + offset) inside -side … side, neither of them 0.
    pairs = 2 * side + 1 - offset - 2 * (offset <= side)
    linked = np.minimum(offset, n - offset) <= side
    return float(pairs[linked].sum() / pairs.sum())


def sigma(hops: float, clustering: float, n: int, links_each: float, degree: float) -> float:
    """(C / C_random) / (L / L_random), Humphries and Gurney 2008: far above 1 in a small world.

    L follows the direction of links, so its baseline has as many keys per token (`links_each`); C is of the undirected
    graph, so its baseline has as many neighbours (`degree`).
    """
    random = random_clustering(n, degree)
    if not random or math.isnan(random):
        return math.nan
    return (clustering / random) / (hops / random_hops(n, links_each))


def omega(hops: float, clustering: float, n: int, links_each: float, degree: float) -> float:
    """L_random / L - C / C_lattice, Telesford et al. 2011: near 0 in a small world, towards 1 random, towards -1 lattice."""
    lattice = lattice_clustering(n, degree)
    if not lattice or math.isnan(lattice):
        return math.nan
    return random_hops(n, links_each) / hops - clustering / lattice
