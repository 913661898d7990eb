"""What a random graph and a ring lattice of the same degree would measure: the yardsticks of small worlds.

Watts and Strogatz 1998 ("Collective dynamics of 'small-world' networks") call a network a small world when it is about as
clustered as a lattice and about as short as a random graph. Both references are computed, not drawn.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["lattice_clustering", "lattice_hops", "omega", "random_clustering", "random_hops", "sigma"]


def random_hops(n: int, degree: float) -> float:
    """Average hops over reachable pairs of a random directed graph: n tokens, each pair linked with probability
    p = degree / (n - 1).

    Mean field: of u tokens not yet reached, u (1 - p)^f stay so after f tokens were newly reached; the first two layers
    are exact expectations but for the spread of f. Within some per cent of drawn graphs for degree >= 3.

    >>> round(random_hops(1_000_000, 516), 2), random_hops(10, 9)
    (2.77, 1.0)
    """
    if n < 2 or degree <= 0:
        return math.nan
    stay = 1 - min(1.0, degree / (n - 1))
    unreached, newest, total, pairs, hop = n - 1.0, 1.0, 0.0, 0.0, 0
    while unreached > 0 and newest > 1e-9 and hop < 100_000:
        hop += 1
        left = unreached * stay**newest
        newest, unreached = unreached - left, left
        total += hop * newest
        pairs += newest
    return total / pairs


def random_clustering(n: int, degree: float) -> float:
    """Two neighbours of a token are linked like any two: degree / (n - 1).

    >>> random_clustering(101, 10)
    0.1
    """
    return math.nan if n < 2 else min(1.0, degree / (n - 1))


def lattice_hops(n: int, degree: float) -> float:
    """Average hops of a ring in which each token is linked to degree / 2 neighbours on each side:
    the mean of ⌈m / (degree / 2)⌉ over the distances m around the ring.

    >>> lattice_hops(5, 4), lattice_hops(9, 2)
    (1.0, 2.5)
    """
    if n < 2 or degree <= 0:
        return math.nan
    side = max(1.0, degree / 2)
    distance = np.arange(1, n // 2 + 1)
    times = np.where(2 * distance == n, 1, 2)
    return float((np.ceil(distance / side) * times).sum() / (n - 1))


def lattice_clustering(n: int, degree: float) -> float:
    """Clustering of that ring: of the pairs of a token's neighbours, the share at most degree / 2 apart around the ring.

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
    # So wide that neighbours on both sides meet at the back of the ring as well: pairs a apart, 1 <= a <= 2 side.
    side = int(degree // 2)
    apart = np.arange(1, 2 * side + 1)
    # Pairs (x, x + a) inside -side … side, neither of them 0.
    pairs = 2 * side + 1 - apart - 2 * (apart <= side)
    linked = np.minimum(apart, n - apart) <= side
    return float(pairs[linked].sum() / pairs.sum())


def sigma(hops: float, clustering: float, n: int, links_each: float, degree: float) -> float:
    """(C / C_random) / (L / L_random), Humphries and Gurney 2008: far above 1 in a small world.

    L is along the direction of links, so its yardstick has as many keys for each token (`links_each`); C is of the
    undirected graph, so its yardstick has as many neighbours (`degree`).
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
