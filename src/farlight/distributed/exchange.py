"""The exchange of one attention, as a pure function of pattern, layout and sizes: which keys and queries travel between ranks.

Per class of heads and pair of ranks, `cover.minimum_cover` says which keys of the owner travel to the reader, and which queries
of the reader travel to the owner, who returns partial results. A link whose key travels is computed by the reader, every other
remote link by the owner. What more than `BROADCAST_ABOVE` ranks and more than half of them need is broadcast
instead of sent to each.

Every rank derives the whole exchange alone; nothing of it is communicated.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farlight.caching import SizedCache
from farlight.distributed.cover import Cover, all_keys, minimum_cover
from farlight.distributed.layout import Layout
from farlight.distributed.links import HeadClass, RemoteLinks, head_classes, remote_links
from farlight.errors import PatternError
from farlight.patterns.expression import Pattern, Sizes

__all__ = ["BROADCAST_ABOVE", "ClassExchange", "Exchange", "Moves", "Problem", "exchange", "exchange_of"]

Array = NDArray[np.int64]
# Receivers up to which the owner of a key or query sends it to each of them itself.
BROADCAST_ABOVE = 8
_MEMO_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Problem:
    """One attention spread over ranks: everything that decides what travels.

    sizes: those of the whole problem. queries, keys: who owns the query rows (not positions) and the keys. key_bytes: of one
    key with its value, one head; row_bytes: of one query row with its returned output and lse, one head. keys_only: no query
    travels.
    """

    pattern: Pattern
    sizes: Sizes
    kv_heads: int
    queries: Layout
    keys: Layout
    key_bytes: int
    row_bytes: int
    keys_only: bool = False

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.sizes.heads // self.kv_heads

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.keys.world


@dataclass(frozen=True)
class Moves:
    """Intervals `lo … hi - 1` of keys, or of query rows, that travel from rank `source` to rank `target`; sorted by
    (source, target, lo), disjoint for each pair.
    """

    source: Array
    target: Array
    lo: Array
    hi: Array

    @staticmethod
    def of(columns: list[tuple[Array, Array, Array, Array]]) -> Moves:
        """From unsorted (source, target, lo, hi) columns."""
        if not columns:
            return Moves(*(np.zeros(0, dtype=np.int64) for _ in range(4)))
        source, target, lo, hi = (np.concatenate(column) for column in zip(*columns, strict=True))
        order = np.lexsort((lo, target, source))
        return Moves(source[order], target[order], lo[order], hi[order])

    def between(self, source: int | None, target: int | None) -> Moves:
        """The moves from one rank, to one rank, or both (None: any)."""
        kept = np.ones(len(self.lo), dtype=bool)
        if source is not None:
            kept &= self.source == source
        if target is not None:
            kept &= self.target == target
        return Moves(self.source[kept], self.target[kept], self.lo[kept], self.hi[kept])

    def fan_out(self, n: int) -> Array:
        """`(n,)`: to how many ranks each key or row travels."""
        return np.cumsum(np.bincount(self.lo, minlength=n + 1) - np.bincount(self.hi, minlength=n + 1))[:n]


@dataclass(frozen=True)
class ClassExchange:
    """What travels for one class of heads. `everyone_keys`, `everyone_rows`: ascending positions that are broadcast; the moves
    name them too, for those ranks that use them. pairs: computed by each rank, per key head.
    """

    heads: HeadClass
    keys: Moves
    rows: Moves
    everyone_keys: Array
    everyone_rows: Array
    pairs: Array
    weight: int


@dataclass(frozen=True)
class Exchange:
    """All classes of a problem."""

    problem: Problem
    classes: tuple[ClassExchange, ...]

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""
        moves = [m for c in self.classes for m in (c.keys, c.rows)]
        return 1024 + sum(32 * len(m.lo) for m in moves)


_exchanges: SizedCache[Exchange] = SizedCache(_MEMO_BYTES)


def exchange_of(problem: Problem) -> Exchange:
    """`exchange`, kept: layers of one shape share it."""
    key = (problem, BROADCAST_ABOVE)
    return _exchanges.get(key, lambda: exchange(problem))


def exchange(problem: Problem) -> Exchange:
    """What travels, for all ranks. Costs the rows' intervals; with windows and named tokens, seconds for millions of tokens.

    Raises PatternError where the pattern or the layouts do not fit the sizes.
    """
    sizes = problem.sizes
    problem.pattern.check(sizes)
    for what, layout, n in (("queries", problem.queries, sizes.n_q), ("keys", problem.keys, sizes.n_k)):
        if layout.n != n or layout.world != problem.world:
            raise PatternError(
                f"the layout of the {what} is for {layout.n} tokens on {layout.world} ranks, but there are {n} on "
                f"{problem.world}."
            )
    memo: dict[bytes, Cover] = {}
    classes = head_classes(problem.pattern, sizes, problem.kv_heads)
    return Exchange(problem, tuple(_class_exchange(problem, heads, memo) for heads in classes))


def _class_exchange(problem: Problem, heads: HeadClass, memo: dict[bytes, Cover]) -> ClassExchange:
    links = remote_links(problem.pattern, problem.sizes, heads, problem.queries, problem.keys)
    keys: list[tuple[Array, Array, Array, Array]] = []
    rows: list[tuple[Array, Array, Array, Array]] = []
    weight = 0
    changes = np.flatnonzero((np.diff(links.reader) != 0) | (np.diff(links.owner) != 0)) + 1
    bounds = [0, *changes.tolist(), len(links.reader)] if len(links.reader) else []
    for first, last in itertools.pairwise(bounds):
        reader, owner = int(links.reader[first]), int(links.owner[first])
        row_lo, group = np.unique(links.row_lo[first:last], return_inverse=True)
        row_hi = row_lo + _lengths(links, first, last, group, len(row_lo))
        base = int(links.key_lo[first:last].min())
        cover = _memoised(
            memo, problem, group, links.key_lo[first:last] - base, links.key_hi[first:last] - base, row_hi - row_lo
        )
        weight += cover.weight
        keys.append(_column(owner, reader, cover.keys[:, 0] + base, cover.keys[:, 1] + base))
        rows.append(_column(reader, owner, row_lo[cover.groups], row_hi[cover.groups]))
    moved_keys, moved_rows = Moves.of(keys), Moves.of(rows)
    pairs = links.local.copy()
    for variant in heads.variants:
        alone = links
        if len(heads.variants) > 1:
            single = HeadClass(heads.rows, (variant,))
            alone = remote_links(problem.pattern, problem.sizes, single, problem.queries, problem.keys)
        pairs += variant[2] * _remote_pairs(alone, moved_keys, problem.world)
    return ClassExchange(
        heads,
        moved_keys,
        moved_rows,
        _for_everyone(moved_keys, problem.sizes.n_k, problem.world),
        _for_everyone(moved_rows, problem.sizes.n_q, problem.world),
        pairs,
        weight,
    )


def _lengths(links: RemoteLinks, first: int, last: int, group: Array, groups: int) -> Array:
    """Rows of each group."""
    length = np.zeros(groups, dtype=np.int64)
    length[group] = links.row_hi[first:last] - links.row_lo[first:last]
    return length


def _column(source: int, target: int, lo: Array, hi: Array) -> tuple[Array, Array, Array, Array]:
    return np.full(len(lo), source), np.full(len(lo), target), lo, hi


def _memoised(memo: dict[bytes, Cover], problem: Problem, group: Array, lo: Array, hi: Array, rows: Array) -> Cover:
    """The cover of a pair; inner pairs of a window are all alike."""
    key = b"".join(x.astype(np.int64).tobytes() for x in (np.array([len(rows)]), rows, group, lo, hi))
    if key not in memo:
        serve = all_keys if problem.keys_only else minimum_cover
        memo[key] = serve(group, lo, hi, rows, problem.group * problem.row_bytes, problem.key_bytes)
    return memo[key]


def _for_everyone(moves: Moves, n: int, world: int) -> Array:
    """The keys or rows that are broadcast."""
    return np.flatnonzero(moves.fan_out(n) > max(BROADCAST_ABOVE, world // 2))


def _remote_pairs(links: RemoteLinks, moved_keys: Moves, world: int) -> Array:
    """`(world,)`: remote pairs computed by each rank: by the reader where the key travels, else by the owner of the key."""
    pairs = np.zeros(world, dtype=np.int64)
    if not len(links.reader):
        return pairs
    rows = links.row_hi - links.row_lo
    np.add.at(pairs, links.owner, rows * (links.key_hi - links.key_lo))
    if not len(moved_keys.lo):
        return pairs
    # Moved keys below a position, counted along (owner, reader, position) in one running sum.
    n = int(max(links.key_hi.max(), moved_keys.hi.max())) + 1
    start = (moved_keys.source * world + moved_keys.target) * n + moved_keys.lo
    length = moved_keys.hi - moved_keys.lo
    before = np.concatenate(([0], np.cumsum(length)))

    def below(position: Array) -> Array:
        place = (links.owner * world + links.reader) * n + position
        at = np.searchsorted(start, place, side="right") - 1
        inside = np.minimum(place - start[np.maximum(at, 0)], length[np.maximum(at, 0)])
        counted: Array = np.where(at >= 0, before[np.maximum(at, 0)] + inside, 0)
        return counted

    moved = rows * (below(links.key_hi) - below(links.key_lo))
    np.add.at(pairs, links.reader, moved)
    np.subtract.at(pairs, links.owner, moved)
    return pairs
