"""Clustering coefficient: how often two neighbours of a token are linked themselves.

Defined on the undirected graph: i and j are neighbours when either sees the other; self-loops do not count. The local
coefficient of a token with k neighbours is the share of its k (k - 1) / 2 pairs of neighbours that are neighbours of each
other (0 for k < 2); the graph's is the mean over tokens, as in `networkx.average_clustering` of the undirected graph. Up to
`_EXACT_TOKENS` tokens it is exact, from the square of the adjacency matrix; beyond, tokens are sampled, and pairs of
neighbours of each: an unbiased estimate.
"""

from __future__ import annotations

import numpy as np
import torch

from farlight.analysis.graph.links import Array, LazyLinks, Links, expand_ranges
from farlight.analysis.graph.sampling import margin_of_mean, stratified_sample

__all__ = ["clustering", "mean_degree", "neighbours"]

_EXACT_TOKENS = 1024
_SAMPLED_TOKENS = 1024
_PAIRS_PER_TOKEN = 128
# Neighbours of all sampled tokens together: bounds memory.
_MAX_NEIGHBOURS = 1 << 22
_SAMPLED_LINKS = 4096


def clustering(links: Links, lazy: LazyLinks, *, confidence: float, seed: int) -> tuple[float, float]:
    """(clustering coefficient, margin at `confidence`); the margin of an exact value is 0. `lazy` answers single pairs."""
    n = links.n
    if n <= _EXACT_TOKENS:
        return float(_exact_coefficients(links).mean()), 0.0
    rng = np.random.default_rng(seed)
    degree = 2 * (links.count - int(links.self_loops.sum())) / n
    tokens = stratified_sample(n, int(min(_SAMPLED_TOKENS, max(16, _MAX_NEIGHBOURS // max(1.0, degree)))), rng)
    local = _sampled_coefficients(links, lazy, tokens, rng)
    return float(local.mean()), margin_of_mean(local, n, confidence, 1.0)


def mean_degree(links: Links, lazy: LazyLinks, *, seed: int) -> float:
    """Mean number of neighbours in the undirected graph, where a link in both directions counts once.

    With d links per token, a share f of which goes both ways, it is d (2 - f); f is exact for short texts
    and otherwise estimated from sampled links.
    """
    n, links_each = links.n, (links.count - int(links.self_loops.sum())) / links.n
    if n <= _EXACT_TOKENS:
        return float(_undirected_adjacency(links).sum(dtype=np.float64)) / n
    i, j = _sample_links(links, np.random.default_rng(seed))
    return links_each * (2 - float(_has_link(lazy, j, i).mean())) if i.size else 0.0


def _sample_links(links: Links, rng: np.random.Generator) -> tuple[Array, Array]:
    """(query, key) of links drawn uniformly with replacement; self-loops are dropped."""
    cumulative = [np.cumsum(order.hi.astype(np.int64) - order.lo) for order in links.orders]
    ends = np.cumsum([int(run_ends[-1]) for run_ends in cumulative])
    drawn = rng.integers(0, max(1, int(ends[-1]) if ends.size else 0), _SAMPLED_LINKS)
    rows, keys = [], []
    for order, run_ends, end in zip(links.orders, cumulative, ends, strict=True):
        link = drawn[(drawn < end) & (drawn >= end - run_ends[-1])] - (end - run_ends[-1])
        run = np.searchsorted(run_ends, link, side="right")
        slot = order.hi[run] - (run_ends[run] - link)
        rows.append(order.row[run].astype(np.int64))
        keys.append(slot.astype(np.int64) if order.slots is None else order.slots[slot].astype(np.int64))
    i, j = (np.concatenate(part) if part else np.zeros(0, dtype=np.int64) for part in (rows, keys))
    return i[i != j], j[i != j]


def _has_link(lazy: LazyLinks, i: Array, j: Array) -> Array:
    """Elementwise: whether the query at i sees the key at j."""
    item, head, row = torch.tensor(lazy.batch, device="cpu"), torch.tensor(lazy.head, device="cpu"), torch.from_numpy(i)
    allowed: Array = lazy.pattern._allows(lazy.sizes, item, head, row, torch.from_numpy(j)).expand(row.shape).numpy()
    return allowed


def _undirected_adjacency(links: Links) -> Array:
    """(n, n) float32: 1 where either token sees the other, 0 on the diagonal."""
    adjacency = np.zeros((links.n, links.n), dtype=np.float32)
    for part in links.runs(np.arange(links.n)):
        adjacency[part.pairs()] = 1
    adjacency = np.maximum(adjacency, adjacency.T)
    np.fill_diagonal(adjacency, 0)
    return adjacency


def _exact_coefficients(links: Links) -> Array:
    """(n,) local coefficients: (A² ∘ A) 1 counts the closed pairs of each token."""
    adjacency = _undirected_adjacency(links)
    degree = adjacency.sum(1, dtype=np.float64)
    closed = ((adjacency @ adjacency) * adjacency).sum(1, dtype=np.float64)
    local: Array = closed / np.maximum(1, degree * (degree - 1))
    return local


def neighbours(links: Links, tokens: Array) -> tuple[Array, Array]:
    """(index into `tokens`, neighbour) of every neighbour of these sorted tokens, in either direction; distinct and sorted."""
    n = links.n
    index, others = [], []
    for part in links.runs(tokens):
        row_index, key = part.pairs()
        index.append(row_index)
        others.append(key.astype(np.int64))
    for order in links.orders:
        # Rows whose runs contain a token: runs are cut out of the sorted slots of `tokens` by their count before each slot.
        slot = order.slot_of(n)[tokens]
        with_slot = np.flatnonzero(slot >= 0)
        with_slot = with_slot[np.argsort(slot[with_slot], kind="stable")]
        before = np.zeros(order.size + 1, dtype=np.int64)
        before[1:] = np.bincount(slot[with_slot], minlength=order.size).cumsum()
        run, place = expand_ranges(before[order.lo], before[order.hi])
        index.append(with_slot[place])
        others.append(order.row[run].astype(np.int64))
    code = np.unique(np.concatenate(index) * n + np.concatenate(others))
    token_index, other = code // n, code % n
    not_self = other != tokens[token_index]
    return token_index[not_self], other[not_self]


def _sampled_coefficients(links: Links, lazy: LazyLinks, tokens: Array, rng: np.random.Generator) -> Array:
    """(tokens,) local coefficients, each from at most `_PAIRS_PER_TOKEN` pairs of neighbours."""
    tokens = np.unique(tokens)
    token_index, other = neighbours(links, tokens)
    degree = np.bincount(token_index, minlength=tokens.size)
    first = degree.cumsum() - degree
    pairs = np.minimum(degree * (degree - 1) // 2, _PAIRS_PER_TOKEN)
    owner = np.repeat(np.arange(tokens.size), pairs)
    # Of many neighbours, random pairs of two different ones; of few, all pairs.
    a = rng.integers(0, degree[owner])
    b = rng.integers(0, degree[owner] - 1)
    b += b >= a
    for k in np.unique(degree[degree * (degree - 1) // 2 <= _PAIRS_PER_TOKEN]):
        if k >= 2:
            rows, columns = np.triu_indices(k, 1)
            entries = np.flatnonzero(degree[owner] == k)
            a[entries] = np.tile(rows, entries.size // rows.size)
            b[entries] = np.tile(columns, entries.size // rows.size)
    i, j = other[first[owner] + a], other[first[owner] + b]
    linked = _has_link(lazy, i, j) | _has_link(lazy, j, i)
    closed = np.bincount(owner, weights=linked, minlength=tokens.size)
    local: Array = closed / np.maximum(1, pairs)
    return local
