"""Shortest paths between two tokens, and the pattern rule that allows each hop.

A backward breadth-first search runs from the target to its keys until a frontier contains the source or a token that sees it;
the path is then read off the stored frontiers. The links come from `LazyLinks`, so that a short path in a long text computes
few rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from farlight.analysis.graph.bfs import merge_runs
from farlight.analysis.graph.links import Array, LazyLinks, Links, expand_ranges
from farlight.analysis.graph.rules import rules_of
from farlight.analysis.graph.sizes import position_in
from farlight.patterns.expression import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Hop", "Path", "path"]

# From this depth on, computing the runs of all rows at once is cheaper than those of the frontier at every step.
_MAX_LAZY_DEPTH = 64
# For a frontier this large, one pass over all rows for those that see the source is cheaper than another step.
_LARGE_FRONTIER = 4096


@dataclass(frozen=True)
class Hop:
    """One link: the query at `listener` sees the key at `speaker`, by each of these rules."""

    speaker: int
    listener: int
    rules: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.listener} hears {self.speaker} ({', '.join(self.rules)})"


@dataclass(frozen=True)
class Path:
    """A shortest path of links by which information of `source` reaches `target`.

    positions: from source to target, `layers + 1` of them; hops: one per layer. Without a path, `found` and `bool(path)` are
    False, both are empty, and `heard` is the number of tokens, itself included, with a path to `target`.
    """

    pattern: Pattern
    n: int
    source: int
    target: int
    positions: tuple[int, ...]
    hops: tuple[Hop, ...]
    heard: int | None = None

    @property
    def found(self) -> bool:
        """Whether there is a path."""
        return bool(self.positions)

    @property
    def layers(self) -> int | None:
        """Number of hops, one per layer; None without a path."""
        return len(self.hops) if self.found else None

    def __bool__(self) -> bool:
        return self.found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the pattern as its expression."""
        return {
            "pattern": repr(self.pattern),
            "n": self.n,
            "source": self.source,
            "target": self.target,
            "layers": self.layers,
            "positions": list(self.positions),
            "hops": [{"speaker": h.speaker, "listener": h.listener, "rules": list(h.rules)} for h in self.hops],
            "heard": self.heard,
        }

    def tell(self, words: Mapping[int, str] | Sequence[str] | None = None) -> str:
        """The path as a sentence; `words` by position (a mapping or a sequence) replace the numbers.

        >>> import farlight as fl
        >>> p = path(fl.window(2) | fl.global_tokens([0]), 1000, 998, 500)
        >>> print(p.tell({998: "Voldemort", 500: "Harry", 0: "[CLS]"}))
        Harry (500) hears of Voldemort (998) after 2 layers: [CLS] (0) hears Voldemort (998) by global token 0, Harry (500) \
hears [CLS] (0) by global token 0.
        """

        def name(position: int) -> str:
            if isinstance(words, Mapping):
                word = words.get(position)
            else:
                word = words[position] if words is not None and position < len(words) else None
            return str(position) if word is None else f"{word} ({position})"

        target, source = name(self.target), name(self.source)
        if not self.found:
            heard = f": it hears of {self.heard:,} of {self.n:,} tokens, itself included" if self.heard is not None else ""
            return f"{target} never hears of {source}, through however many layers{heard}."
        if not self.hops:
            return f"{target} is {source} itself: no layer is needed."
        sentences = [f"{name(hop.listener)} hears {name(hop.speaker)} by {' or '.join(hop.rules)}" for hop in self.hops]
        if len(sentences) > 8:
            sentences = [*sentences[:3], f"… {len(sentences) - 6:,} more …", *sentences[-3:]]
        return f"{target} hears of {source} after {len(self.hops):,} layer{'s' * (len(self.hops) > 1)}: {', '.join(sentences)}."

    def __str__(self) -> str:
        return self.tell()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the relays as arcs over the text."""
        from farlight.analysis.plot import plot_path

        return plot_path(self, ax=ax)


def path(pattern: Pattern, n: int, source: int, target: int, *, batch: int = 0, head: int = 0) -> Path:
    """A shortest path from `source` to `target` in a text of n tokens, with the rule that allows each hop.

    Negative positions count from the end. Of several shortest paths it is one whose relays lie closest to the target. A
    target that the source does not reach is an answer, not an error: see `Path.found`.

    Raises PatternError or ArgumentError when the pattern or a position does not fit n tokens.

    >>> import farlight as fl
    >>> path(fl.window(2), 10, 0, 5).positions
    (0, 2, 4, 5)
    >>> print(path(fl.causal(), 10, 7, 5))
    5 never hears of 7, through however many layers: it hears of 6 of 10 tokens, itself included.
    """
    lazy = LazyLinks(pattern, n, batch, head)
    source, target = position_in("source", source, lazy.n), position_in("target", target, lazy.n)
    frontiers, reached = _backward_frontiers(lazy, source, target)
    if frontiers is None:
        return Path(pattern, lazy.n, source, target, (), (), reached)
    positions = _read_off(lazy, source, target, frontiers)
    hops = tuple(_hop(lazy, j, i) for j, i in pairwise(positions))
    return Path(pattern, lazy.n, source, target, tuple(positions), hops)


def _backward_frontiers(lazy: LazyLinks, source: int, target: int) -> tuple[list[Array] | None, int]:
    """(frontiers, tokens reached): the tokens at distance 0, 1, … from the target, up to the layer before the source; None
    without a path.
    """
    links: LazyLinks | Links = lazy
    reached = np.zeros(lazy.n, dtype=bool)
    reached[target] = True
    frontier = np.array([target])
    frontiers: list[Array] = []
    sees_source: Array | None = None
    while frontier.size:
        if frontier[np.searchsorted(frontier, source) % frontier.size] == source:
            return frontiers, int(reached.sum())
        if sees_source is None and frontier.size > _LARGE_FRONTIER:
            sees_source = _sees(lazy, np.arange(lazy.n), source)
        frontiers.append(frontier)
        if sees_source is not None and bool(sees_source[frontier].any()):
            return frontiers, int(reached.sum())
        if len(frontiers) == _MAX_LAZY_DEPTH:
            links = lazy.all()
        frontier = _next_frontier(links, frontier, reached)
    return None, int(reached.sum())


def _next_frontier(links: LazyLinks | Links, rows: Array, reached: Array) -> Array:
    """The sorted keys of these rows that are not in the (n,) bool `reached`, which is updated."""
    parts = []
    for part in links.runs(rows):
        start, stop, _, _ = merge_runs(part.lo, part.hi)
        slots = expand_ranges(start, stop)[1]
        keys = slots if part.slots is None else part.slots[slots].astype(np.int64)
        keys = keys[~reached[keys]]
        reached[keys] = True
        parts.append(keys)
    return np.sort(np.concatenate(parts)) if parts else rows[:0]


def _sees(lazy: LazyLinks, rows: Array, key: int) -> Array:
    """Elementwise: whether the query at each of these positions sees the key."""
    item, head, i = torch.tensor(lazy.batch, device="cpu"), torch.tensor(lazy.head, device="cpu"), torch.from_numpy(rows)
    allowed: Array = lazy.pattern._allows(lazy.sizes, item, head, i, torch.tensor(key, device="cpu")).expand(i.shape).numpy()
    return allowed


def _read_off(lazy: LazyLinks, source: int, target: int, frontiers: list[Array]) -> list[int]:
    """Positions of the path: the source, then from the last frontier to the first a token that sees the one before."""
    positions = [source]
    for rows in reversed(frontiers):
        candidates = rows[_sees(lazy, rows, positions[-1])]
        positions.append(int(candidates[np.abs(candidates - target).argmin()]))
    return positions


def _hop(lazy: LazyLinks, speaker: int, listener: int) -> Hop:
    """The hop with the rules that allow it."""
    item, head, i, j = (torch.tensor(x, device="cpu") for x in (lazy.batch, lazy.head, listener, speaker))
    rules = rules_of(lazy.pattern, listener, speaker, lazy.head, lambda part: bool(part._allows(lazy.sizes, item, head, i, j)))
    return Hop(speaker, listener, rules)
