"""By which relays does one token hear of another? A shortest chain of links, and the rule behind each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from farlight.analysis.graph.links import Array, LazyLinks, Links, ranges
from farlight.analysis.graph.rules import rules_of
from farlight.analysis.graph.sizes import position_in
from farlight.patterns.expression import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Hop", "Path", "path"]

# From here on a walk is so long that working out all rows at once is cheaper than asking for some at every step.
_LONG = 64
# When so many rows are to be asked, it is worth knowing first who hears the source directly.
_MANY = 4096


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
    """A shortest way for news of `source` to reach `target`; `positions` starts with the one and ends with the other.

    Each hop takes one layer. Where there is no way, `found` is False (and so is the path as a condition), `positions` and
    `hops` are empty and `heard` tells how many tokens, itself included, `target` can hear of at all.
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
        return bool(self.positions)

    @property
    def layers(self) -> int | None:
        """How many layers it takes; None when there is no way."""
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
        """The path as a sentence; `words` (by position) are put in place of the numbers.

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

        who, whom = name(self.target), name(self.source)
        if not self.found:
            heard = f": it hears of {self.heard:,} of {self.n:,} tokens, itself included" if self.heard is not None else ""
            return f"{who} never hears of {whom}, through however many layers{heard}."
        if not self.hops:
            return f"{who} is {whom} itself: no layer is needed."
        shown: list[str] = [f"{name(hop.listener)} hears {name(hop.speaker)} by {' or '.join(hop.rules)}" for hop in self.hops]
        if len(shown) > 8:
            shown = [*shown[:3], f"… {len(shown) - 6:,} more …", *shown[-3:]]
        return f"{who} hears of {whom} after {len(self.hops):,} layer{'s' * (len(self.hops) > 1)}: {', '.join(shown)}."

    def __str__(self) -> str:
        return self.tell()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the relays as arcs over the text."""
        from farlight.analysis.plot import plot_path

        return plot_path(self, ax=ax)


def path(pattern: Pattern, n: int, source: int, target: int, *, batch: int = 0, head: int = 0) -> Path:
    """A shortest chain of positions by which the token at `target` hears of the one at `source`, and the rule of each hop.

    Negative positions count from the end. Walks back from the target, whose keys are few, asking each row for its stretches
    once; before a step that asks many rows, the source's own listeners are found in one pass, so that the walk ends as soon
    as it meets one of them. Of several shortest chains it gives one whose relays lie closest to the target.

    Raises PatternError or ArgumentError when the pattern or a position does not fit n tokens; a target that never hears of the
    source is an answer, not an error: see `Path.found`.

    >>> import farlight as fl
    >>> path(fl.window(2), 10, 0, 5).positions
    (0, 2, 4, 5)
    >>> print(path(fl.causal(), 10, 7, 5))
    5 never hears of 7, through however many layers: it hears of 6 of 10 tokens, itself included.
    """
    asked = LazyLinks(pattern, n, batch, head)
    source, target = position_in("source", source, asked.n), position_in("target", target, asked.n)
    layers, heard = _walk_back(asked, source, target)
    if layers is None:
        return Path(pattern, asked.n, source, target, (), (), heard)
    positions = _chain(asked, source, target, layers)
    hops = tuple(_hop(asked, j, i) for j, i in pairwise(positions))
    return Path(pattern, asked.n, source, target, tuple(positions), hops)


def _walk_back(asked: LazyLinks, source: int, target: int) -> tuple[list[Array] | None, int]:
    """The tokens that target hears of after exactly 0, 1, … layers, up to one layer before the source; None without a way.
    And how many tokens it was known to hear of when the walk ended.
    """
    links: LazyLinks | Links = asked
    known = np.zeros(asked.n, dtype=bool)
    known[target] = True
    newest = np.array([target])
    layers: list[Array] = []
    listeners: Array | None = None
    while newest.size:
        if newest[np.searchsorted(newest, source) % newest.size] == source:
            return layers, int(known.sum())
        if listeners is None and newest.size > _MANY:
            listeners = _sees(asked, np.arange(asked.n), source)
        layers.append(newest)
        if listeners is not None and bool(listeners[newest].any()):
            return layers, int(known.sum())
        if len(layers) == _LONG:
            links = asked.all()
        newest = _one_layer_back(links, newest, known)
    return None, int(known.sum())


def _one_layer_back(links: LazyLinks | Links, rows: Array, known: Array) -> Array:
    """The tokens that these rows see and that were not known; they are now."""
    found = []
    for part in links.stretches(rows):
        order = np.argsort(part.lo, kind="stable")
        lo, reach = part.lo[order], np.maximum.accumulate(part.hi[order])
        first = np.flatnonzero(np.append(True, lo[1:] > reach[:-1]))
        slots = ranges(lo[first], reach[np.append(first[1:], lo.size) - 1])
        keys = slots if part.slots is None else part.slots[slots].astype(np.int64)
        keys = keys[~known[keys]]
        known[keys] = True
        found.append(keys)
    return np.sort(np.concatenate(found)) if found else rows[:0]


def _sees(asked: LazyLinks, rows: Array, key: int) -> Array:
    """Elementwise: does the query at each of these positions see the key?"""
    item, head, i = torch.tensor(asked.batch, device="cpu"), torch.tensor(asked.head, device="cpu"), torch.from_numpy(rows)
    seen: Array = asked.pattern._allows(asked.sizes, item, head, i, torch.tensor(key, device="cpu")).expand(i.shape).numpy()
    return seen


def _chain(asked: LazyLinks, source: int, target: int, layers: list[Array]) -> list[int]:
    """From the source through one token of each layer, last to first, each of which sees the one before."""
    chain = [source]
    for rows in reversed(layers):
        who = rows[_sees(asked, rows, chain[-1])]
        chain.append(int(who[np.abs(who - target).argmin()]))
    return chain


def _hop(asked: LazyLinks, speaker: int, listener: int) -> Hop:
    item, head, i, j = (torch.tensor(x, device="cpu") for x in (asked.batch, asked.head, listener, speaker))
    rules = rules_of(
        asked.pattern, listener, speaker, asked.head, lambda part: bool(part._allows(asked.sizes, item, head, i, j))
    )
    return Hop(speaker, listener, rules)
