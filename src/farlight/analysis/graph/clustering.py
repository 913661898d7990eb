"""How often two neighbours of a token are linked themselves: the clustering coefficient.

Defined on the undirected graph: i and j are neighbours when either sees the other, a token is not its own neighbour. The
local coefficient of a token with k neighbours is the share of its k (k - 1) / 2 pairs of neighbours that are neighbours of
each other (0 for k < 2); the graph's is the mean over tokens, as in `networkx.average_clustering` of the undirected graph.
Short texts are counted; in long ones tokens are drawn, and pairs of neighbours of each: the estimate has no bias.
"""

from __future__ import annotations

import numpy as np
import torch

from farlight.analysis.graph.links import Array, LazyLinks, Links
from farlight.analysis.graph.sampling import draw, margin_of_mean

__all__ = ["clustering", "mean_degree", "neighbours"]

_COUNTED = 1024
_TOKENS = 1024
_PAIRS = 128
_NEIGHBOURS_AT_ONCE = 1 << 22
_LINKS = 4096


def clustering(links: Links, asked: LazyLinks, *, confidence: float, seed: int) -> tuple[float, float]:
    """The clustering coefficient and the margin (0 where it was counted)."""
    n = links.n
    if n <= _COUNTED:
        return float(_counted(links).mean()), 0.0
    rng = np.random.default_rng(seed)
    degree = 2 * (links.count - int(links.selfs.sum())) / n
    tokens = draw(n, int(min(_TOKENS, max(16, _NEIGHBOURS_AT_ONCE // max(1.0, degree)))), rng)
    local = _drawn(links, asked, tokens, rng)
    return float(local.mean()), margin_of_mean(local, n, confidence, 1.0)


def mean_degree(links: Links, asked: LazyLinks, *, seed: int) -> float:
    """Mean number of neighbours in the undirected graph, where a link that goes both ways is one.

    With d links for each token, a share f of which goes both ways, it is d (2 - f); f is counted in short texts and
    otherwise taken from links drawn at random.
    """
    n, each = links.n, (links.count - int(links.selfs.sum())) / links.n
    if n <= _COUNTED:
        return float(_undirected(links).sum(dtype=np.float64)) / n
    i, j = _links_at_random(links, np.random.default_rng(seed))
    return each * (2 - float(_linked(asked, j, i).mean())) if i.size else 0.0


def _links_at_random(links: Links, rng: np.random.Generator) -> tuple[Array, Array]:
    """(query, key) of links drawn with equal probability, those of a token to itself left out."""
    lengths = [np.cumsum(order.hi.astype(np.int64) - order.lo) for order in links.orders]
    ends = np.cumsum([int(length[-1]) for length in lengths])
    drawn = rng.integers(0, max(1, int(ends[-1]) if ends.size else 0), _LINKS)
    rows, keys = [], []
    for order, length, end in zip(links.orders, lengths, ends, strict=True):
        number = drawn[(drawn < end) & (drawn >= end - length[-1])] - (end - length[-1])
        at = np.searchsorted(length, number, side="right")
        slot = order.hi[at] - (length[at] - number)
        rows.append(order.row[at].astype(np.int64))
        keys.append(slot.astype(np.int64) if order.slots is None else order.slots[slot].astype(np.int64))
    i, j = (np.concatenate(part) if part else np.zeros(0, dtype=np.int64) for part in (rows, keys))
    return i[i != j], j[i != j]


def _linked(asked: LazyLinks, i: Array, j: Array) -> Array:
    """Whether the query at i sees the key at j, elementwise."""
    item, head, at = torch.tensor(asked.batch, device="cpu"), torch.tensor(asked.head, device="cpu"), torch.from_numpy(i)
    seen: Array = asked.pattern._allows(asked.sizes, item, head, at, torch.from_numpy(j)).expand(at.shape).numpy()
    return seen


def _undirected(links: Links) -> Array:
    """(n, n) float32: 1 where either sees the other."""
    linked = np.zeros((links.n, links.n), dtype=np.float32)
    for part in links.stretches(np.arange(links.n)):
        linked[part.keys()] = 1
    linked = np.maximum(linked, linked.T)
    np.fill_diagonal(linked, 0)
    return linked


def _counted(links: Links) -> Array:
    """(n,) local coefficients, from the square of the adjacency matrix."""
    linked = _undirected(links)
    degree = linked.sum(1, dtype=np.float64)
    closed = ((linked @ linked) * linked).sum(1, dtype=np.float64)
    local: Array = closed / np.maximum(1, degree * (degree - 1))
    return local


def neighbours(links: Links, tokens: Array) -> tuple[Array, Array]:
    """(number of the token, neighbour) for sorted tokens, distinct and sorted: whom each sees and who sees it."""
    n = links.n
    numbers, others = [], []
    for part in links.stretches(tokens):
        at, key = part.keys()
        numbers.append(at)
        others.append(key.astype(np.int64))
    for order in links.orders:
        # Which of the tokens lie in each stretch: their slots in order, and how many lie before each slot.
        slot = order.slot_of(n)[tokens]
        has = np.flatnonzero(slot >= 0)
        has = has[np.argsort(slot[has], kind="stable")]
        before = np.zeros(order.size + 1, dtype=np.int64)
        before[1:] = np.bincount(slot[has], minlength=order.size).cumsum()
        first, last = before[order.lo], before[order.hi]
        some = np.flatnonzero(last > first)
        times = (last - first)[some]
        within = np.arange(int(times.sum())) - np.repeat(times.cumsum() - times, times)
        numbers.append(has[np.repeat(first[some], times) + within])
        others.append(np.repeat(order.row[some].astype(np.int64), times))
    code = np.unique(np.concatenate(numbers) * n + np.concatenate(others))
    number, other = code // n, code % n
    strange = other != tokens[number]
    return number[strange], other[strange]


def _drawn(links: Links, asked: LazyLinks, tokens: Array, rng: np.random.Generator) -> Array:
    """Local coefficients of some tokens, each from at most `_PAIRS` pairs of neighbours."""
    tokens = np.unique(tokens)
    number, other = neighbours(links, tokens)
    degree = np.bincount(number, minlength=tokens.size)
    first = degree.cumsum() - degree
    pairs = np.minimum(degree * (degree - 1) // 2, _PAIRS)
    of = np.repeat(np.arange(tokens.size), pairs)
    # Every pair of few neighbours; of many, pairs of two different ones at random.
    a = rng.integers(0, degree[of])
    b = rng.integers(0, degree[of] - 1)
    b += b >= a
    for k in np.unique(degree[degree * (degree - 1) // 2 <= _PAIRS]):
        if k >= 2:
            rows, columns = np.triu_indices(k, 1)
            here = np.flatnonzero(degree[of] == k)
            a[here] = np.tile(rows, here.size // rows.size)
            b[here] = np.tile(columns, here.size // rows.size)
    i, j = other[first[of] + a], other[first[of] + b]
    linked = _linked(asked, i, j) | _linked(asked, j, i)
    closed = np.bincount(of, weights=linked, minlength=tokens.size)
    local: Array = closed / np.maximum(1, pairs)
    return local
