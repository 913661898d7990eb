"""How fast news mixes: the spectral gap of a random walk along the links, direction forgotten.

With `A = (M + Mᵀ) / 2`, where M is the 0/1 matrix of links without those of a token to itself (so a link that goes both
ways weighs 1, one that goes one way ½), and D its row sums, the walk moves from a token to a neighbour with probability
`A / D`. Its eigenvalues are those of `D^-½ A D^-½`; the largest is 1, the second largest λ₂ says how much of any imbalance
a step leaves. The gap is 1 - λ₂: 0 where the text falls into parts, near 1 where one step mixes everything.

Lanczos' method finds λ₂ from matrix-vector products, and those are prefix sums over stretches: no matrix is formed. The
known first eigenvector is taken out of every vector. In short texts all vectors are kept and made orthogonal to one another,
and the result is exact to rounding; in long ones only three are held, which finds the same largest eigenvalue in more steps,
and the steps are limited: the margin says how far they came.
"""

from __future__ import annotations

import math

import numpy as np

from farlight.analysis.graph.links import Array, Links

__all__ = ["spectral_gap"]

_KEPT_BYTES = 64 * 2**20
_MOST_STEPS = 400
_WORK = 160_000_000


def spectral_gap(links: Links, *, seed: int = 0, tolerance: float = 1e-11) -> tuple[float, float]:
    """1 - λ₂ and the margin: an eigenvalue lies within so much of λ₂'s estimate, which is never too large.

    Tokens without any link are left out; nan when none has one.

    >>> import farlight as fl
    >>> gap, margin = spectral_gap(Links.of(fl.full(), 20))  # λ₂ of the complete graph is -1 / (n - 1)
    >>> round(gap, 12) == round(1 + 1 / 19, 12), margin < 1e-9
    (True, True)
    """
    degree = (links.degree + links.listeners) / 2
    inside = degree > 0
    size = int(inside.sum())
    if size < 2:
        return math.nan, 0.0
    root = np.sqrt(np.where(inside, degree, 1.0))
    first = np.where(inside, root, 0.0)
    first /= np.linalg.norm(first)

    def product(x: Array) -> Array:
        x = x / root
        y: Array = np.where(inside, 0.5 * (links.hear(x) + links.tell(x)) / root, 0.0)
        return y

    stretches = sum(order.lo.size for order in links.orders)
    steps = min(size - 1, _MOST_STEPS, max(24, _WORK // (links.n + stretches)))
    keeps_all = 8 * steps * links.n <= _KEPT_BYTES
    basis = np.zeros((steps if keeps_all else 0, links.n))
    diagonal, beside = np.zeros(steps), np.zeros(steps)
    previous = np.zeros(links.n)
    x = np.where(inside, np.random.default_rng(seed).standard_normal(links.n), 0.0)
    x -= first * (first @ x)
    x /= np.linalg.norm(x)
    value, error, look = -1.0, 1.0, 0
    for step in range(steps):
        y = product(x)
        diagonal[step] = x @ y
        y -= diagonal[step] * x + (beside[step - 1] * previous if step else 0.0)
        y -= first * (first @ y)
        if keeps_all:
            basis[step] = x
            for _ in range(2):  # once leaves rounding behind, twice is enough
                y -= (basis[: step + 1] @ y) @ basis[: step + 1]
        beside[step] = np.linalg.norm(y)
        spent = beside[step] < 1e-13 or step == size - 2
        if step >= look or spent or step == steps - 1:
            look = step + 1 + step // 4
            value, error = _largest(diagonal[: step + 1], beside[: step + 1])
            if spent or error < tolerance:
                break
        previous, x = x, y / beside[step]
    return max(0.0, 1 - value), error


def _largest(diagonal: Array, beside: Array) -> tuple[float, float]:
    """The largest eigenvalue of the tridiagonal matrix, and how far from an eigenvalue of the whole it can be."""
    matrix = np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1)
    values, vectors = np.linalg.eigh(matrix)
    return float(values[-1]), float(beside[-1] * abs(vectors[-1, -1]))
