"""Spectral gap of the random walk on the undirected link graph: how fast information mixes.

With `A = (M + Mᵀ) / 2`, where M is the 0/1 link matrix without self-loops (a link in both directions weighs 1, one in a
single direction ½), and D its row sums, the walk moves along `D⁻¹ A`. Its eigenvalues are those of `D^-½ A D^-½`; the
largest is 1, the second λ₂ is the factor by which a step damps the slowest imbalance. The gap is 1 - λ₂: 0 for a disconnected
graph, near 1 where one step mixes everything.

λ₂ comes from the Lanczos method, deflated by the known first eigenvector D^½ 1. A matrix-vector product is two sums over
runs (`Links.sum_over_keys`, `sum_over_queries`); no matrix is formed. Short texts keep the whole basis and reorthogonalise
fully, which is exact to rounding. Long ones use the three-term recurrence alone: the same largest eigenvalue after more
steps, whose number is limited; the margin is then the residual norm of the Ritz pair.
"""

from __future__ import annotations

import math

import numpy as np

from farlight.analysis.graph.links import Array, Links

__all__ = ["spectral_gap"]

_BASIS_BYTES = 64 * 2**20
_MAX_STEPS = 400
# Product cost (tokens + runs) times steps.
_WORK = 160_000_000


def spectral_gap(links: Links, *, seed: int = 0, tolerance: float = 1e-11) -> tuple[float, float]:
    """(1 - λ₂, margin): some eigenvalue lies within `margin` of the estimate of λ₂, which is never above λ₂.

    Tokens without links are left out; (nan, 0) when fewer than two remain. `seed` of the start vector.

    >>> import farlight as fl
    >>> gap, margin = spectral_gap(Links.of(fl.full(), 20))  # λ₂ of the complete graph is -1 / (n - 1)
    >>> round(gap, 12) == round(1 + 1 / 19, 12), margin < 1e-9
    (True, True)
    """
    degree = (links.in_degree + links.out_degree) / 2
    linked = degree > 0
    size = int(linked.sum())
    if size < 2:
        return math.nan, 0.0
    root = np.sqrt(np.where(linked, degree, 1.0))
    first_vector = np.where(linked, root, 0.0)
    first_vector /= np.linalg.norm(first_vector)

    def product(x: Array) -> Array:
        x = x / root
        y: Array = np.where(linked, 0.5 * (links.sum_over_keys(x) + links.sum_over_queries(x)) / root, 0.0)
        return y

    steps = min(size - 1, _MAX_STEPS, max(24, _WORK // (links.n + links.num_runs)))
    keeps_basis = 8 * steps * links.n <= _BASIS_BYTES
    basis = np.zeros((steps if keeps_basis else 0, links.n))
    diagonal, off_diagonal = np.zeros(steps), np.zeros(steps)
    previous = np.zeros(links.n)
    x = np.where(linked, np.random.default_rng(seed).standard_normal(links.n), 0.0)
    x -= first_vector * (first_vector @ x)
    x /= np.linalg.norm(x)
    value, error, next_check = -1.0, 1.0, 0
    for step in range(steps):
        y = product(x)
        diagonal[step] = x @ y
        y -= diagonal[step] * x + (off_diagonal[step - 1] * previous if step else 0.0)
        y -= first_vector * (first_vector @ y)
        if keeps_basis:
            basis[step] = x
            for _ in range(2):  # one Gram-Schmidt pass leaves rounding error, two are enough
                y -= (basis[: step + 1] @ y) @ basis[: step + 1]
        off_diagonal[step] = np.linalg.norm(y)
        exhausted = off_diagonal[step] < 1e-13 or step == size - 2
        if step >= next_check or exhausted or step == steps - 1:
            next_check = step + 1 + step // 4
            value, error = _largest_ritz_value(diagonal[: step + 1], off_diagonal[: step + 1])
            if exhausted or error < tolerance:
                break
        previous, x = x, y / off_diagonal[step]
    return max(0.0, 1 - value), error


def _largest_ritz_value(diagonal: Array, off_diagonal: Array) -> tuple[float, float]:
    """(largest eigenvalue of the tridiagonal matrix, residual norm of its Ritz pair)."""
    matrix = np.diag(diagonal) + np.diag(off_diagonal[:-1], 1) + np.diag(off_diagonal[:-1], -1)
    values, vectors = np.linalg.eigh(matrix)
    return float(values[-1]), float(off_diagonal[-1] * abs(vectors[-1, -1]))
