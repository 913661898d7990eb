"""What to move between two ranks: the minimum-weight vertex cover of their links.

A link is served when its key travels to the query's rank or its query to the key's. The links between the query rows of one
rank and the keys of another form a bipartite graph; a choice of rows and keys that serves every link is a vertex cover, and the
cheapest one is a minimum cut (König's theorem, weighted). Where all rows see the same keys, the lighter side is the answer;
else max-flow decides, on a network that spells each interval of keys by nodes of a segment tree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from farlight.errors import PlanError, UnsupportedError

__all__ = ["Cover", "all_keys", "minimum_cover"]

Array = NDArray[np.int64]
_INFINITE = 2**31 - 1


@dataclass(frozen=True)
class Cover:
    """Moved keys as disjoint ascending intervals `(m, 2)`, moved groups of rows `(groups,)` bool, and their total weight."""

    keys: Array
    groups: NDArray[np.bool_]
    weight: int


def minimum_cover(group: Array, key_lo: Array, key_hi: Array, rows: Array, row_weight: int, key_weight: int) -> Cover:
    """The cheapest set of rows and keys that touches every link.

    Entry e links all rows of group `group[e]` with the keys `key_lo[e] … key_hi[e] - 1`; intervals of a group are disjoint and
    ascending, entries sorted by group. `rows[g]` rows are in group g. A row costs `row_weight`, a key `key_weight`.

    Raises UnsupportedError where max-flow is needed and scipy is missing.
    """
    counts = np.bincount(group, minlength=len(rows))
    width = int(counts[0])
    if bool((counts == width).all()):
        lo, hi = key_lo.reshape(-1, width), key_hi.reshape(-1, width)
        if bool((lo == lo[0]).all() and (hi == hi[0]).all()):
            by_rows, by_keys = row_weight * int(rows.sum()), key_weight * int((hi[0] - lo[0]).sum())
            if by_keys <= by_rows:
                return Cover(_joined(lo[0], hi[0]), np.zeros(len(rows), dtype=bool), by_keys)
            return Cover(np.zeros((0, 2), dtype=np.int64), np.ones(len(rows), dtype=bool), by_rows)
    return _by_flow(group, key_lo, key_hi, rows, row_weight, key_weight)


def all_keys(group: Array, key_lo: Array, key_hi: Array, rows: Array, row_weight: int, key_weight: int) -> Cover:
    """The cover of all keys that any row sees; arguments as for `minimum_cover`."""
    order = np.argsort(key_lo, kind="stable")
    lo, hi = key_lo[order], np.maximum.accumulate(key_hi[order])
    first = np.ones(len(lo), dtype=bool)
    first[1:] = lo[1:] > hi[:-1]
    keys = np.stack((lo[first], hi[np.append(first[1:], True)]), 1)
    return Cover(keys, np.zeros(len(rows), dtype=bool), key_weight * int((keys[:, 1] - keys[:, 0]).sum()))


def _joined(lo: Array, hi: Array) -> Array:
    """Ascending disjoint intervals, those that touch joined."""
    first = np.ones(len(lo), dtype=bool)
    first[1:] = lo[1:] != hi[:-1]
    last = np.append(first[1:], True)
    return np.stack((lo[first], hi[last]), 1) if len(lo) else np.zeros((0, 2), dtype=np.int64)


def _by_flow(group: Array, key_lo: Array, key_hi: Array, rows: Array, row_weight: int, key_weight: int) -> Cover:
    """The cover from a maximum flow: source → groups → tree nodes → segments of keys → sink."""
    csgraph = _scipy_csgraph()
    points = np.unique(np.concatenate((key_lo, key_hi)))
    segments, groups = len(points) - 1, len(rows)
    leaves = 1 << max(0, (segments - 1).bit_length())
    divisor = math.gcd(row_weight, key_weight)
    row_capacity, key_capacity = rows * (row_weight // divisor), np.diff(points) * (key_weight // divisor)
    if min(int(row_capacity.sum()), int(key_capacity.sum())) >= _INFINITE:
        raise PlanError(
            f"the links of {int(rows.sum())} query rows and {int(np.diff(points).sum())} keys weigh more than max-flow in "
            "32 bits can add up; use more ranks."
        )
    source, first_group, first_node = 0, 1, groups  # node t of the tree (root 1) is first_node + t
    sink = first_node + 2 * leaves
    node = np.arange(2, 2 * leaves)
    entry, tree_node = _tree_nodes(np.searchsorted(points, key_lo), np.searchsorted(points, key_hi), leaves)
    tails = [np.zeros(groups, dtype=np.int64), first_group + group[entry], first_node + node // 2]
    heads = [first_group + np.arange(groups), first_node + tree_node, first_node + node]
    capacities = [row_capacity, np.full(len(entry), _INFINITE), np.full(len(node), _INFINITE)]
    leaf = first_node + leaves + np.arange(segments)
    tails.append(leaf)
    heads.append(np.full(segments, sink))
    capacities.append(key_capacity)
    flow, reached = csgraph(np.concatenate(tails), np.concatenate(heads), np.concatenate(capacities), source, sink)
    moved_rows = ~reached[first_group : first_group + groups]
    moved_keys = reached[leaf]
    keys = _joined(points[:-1][moved_keys], points[1:][moved_keys])
    return Cover(keys, moved_rows, flow * divisor)


def _tree_nodes(first: Array, last: Array, leaves: int) -> tuple[Array, Array]:
    """(entry, node): the nodes of a segment tree whose leaves are together `first[e] … last[e] - 1`."""
    left, right = first + leaves, last + leaves
    entries: list[Array] = []
    nodes: list[Array] = []
    index = np.arange(len(first))
    while True:
        active = left < right
        if not active.any():
            return np.concatenate(entries), np.concatenate(nodes)
        take = active & (left % 2 == 1)
        entries.append(index[take])
        nodes.append(left[take])
        left = left + take
        take = active & (right % 2 == 1)
        right = right - take
        entries.append(index[take])
        nodes.append(right[take])
        left, right = left // 2, right // 2


def _scipy_csgraph() -> Any:
    """A function (tails, heads, capacities, source, sink) → (value of the maximum flow, nodes on the source's side)."""
    try:
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import breadth_first_order, maximum_flow
    except ImportError as error:
        raise UnsupportedError(
            f"deciding whether keys or queries travel between ranks needs max-flow from scipy ({error}); "
            "pip install 'farlight[distributed]', or pass move='keys'."
        ) from error

    def solve(tails: Array, heads: Array, capacities: Array, source: int, sink: int) -> tuple[int, NDArray[np.bool_]]:
        shape = (sink + 1, sink + 1)
        graph = csr_array(
            (np.minimum(capacities, _INFINITE).astype(np.int32), (tails.astype(np.int32), heads.astype(np.int32))), shape=shape
        )
        result = maximum_flow(graph, source, sink)
        residual = graph.astype(np.int64) - result.flow.astype(np.int64)
        residual.data[residual.data < 0] = 0
        residual.eliminate_zeros()
        reached = np.zeros(sink + 1, dtype=bool)
        reached[breadth_first_order(residual, source, return_predecessors=False)] = True
        return int(result.flow_value), reached

    return solve
