"""How many tokens share one relay: the bottleneck that hop counts hide.

One lighthouse brings any two tokens of a million within two hops, and yet all that a token can then learn of the rest of
the text must pass through one vector. For a reader i and a token j that i does not see itself (*far*), the relays are the
tokens h that i sees and that see j: the ways of two hops. Each far token with any relay is dealt out to its relays in equal
shares; what falls to h for reader i is its *load*: for so many tokens i depends on the vector of h. Far tokens with one
relay only depend on it altogether.

For one reader this is a sum of differences (how many relays has each token?) and two prefix sums (what falls to each relay?),
so every token is counted, whatever the length; readers are drawn when they are many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from farlight.analysis.graph.links import Array, Links, Stretches
from farlight.analysis.graph.sampling import draw

__all__ = ["Capacity", "Relay", "capacity"]

_SHOWN = 16
_WORK = 400_000_000


@dataclass(frozen=True)
class Relay:
    """A token as a relay, over the readers looked at.

    load: far tokens that fall to it for a reader, on average; sole: of those, the ones for which it is the reader's only relay;
    hears, heard_by: how many other tokens it sees and is seen by.
    """

    position: int
    load: float
    sole: float
    hears: int
    heard_by: int


@dataclass(frozen=True)
class Capacity:
    """Means over readers.

    near: tokens seen directly, itself included; relayed: far tokens with at least one relay; sole: far tokens with exactly
    one; relays: how many relays take part for a reader; bottleneck: the load of its busiest relay, that is the number of
    tokens that share one vector. `busiest` lists the relays with the highest mean load.
    """

    readers: int
    exact: bool
    near: float
    relayed: float
    sole: float
    relays: float
    bottleneck: float
    busiest: tuple[Relay, ...]

    def to_dict(self) -> dict[str, Any]:
        out = {name: value for name, value in vars(self).items() if name != "busiest"}
        return {**out, "busiest": [vars(relay) for relay in self.busiest]}

    def __str__(self) -> str:
        if not self.relayed:
            return "capacity: no token needs a relay within two hops"
        first = self.busiest[0]
        return (
            f"capacity: a token sees {self.near:,.0f} tokens itself and {self.relayed:,.0f} more by one of {self.relays:,.0f} "
            f"relays; {self.bottleneck:,.0f} of them share its busiest relay, {self.sole:,.0f} have only one\n"
            f"  busiest over all readers: token {first.position:,} carries {first.load:,.0f} tokens for each "
            f"(hears {first.hears:,}, heard by {first.heard_by:,})"
        )


def capacity(links: Links, *, readers: int, seed: int = 0) -> Capacity:
    """Loads of relays for so many readers, fewer where that would take too long; exact when they are all.

    >>> import farlight as fl
    >>> found = capacity(Links.of(fl.window(0) | fl.global_tokens([0]), 100), readers=100)
    >>> found.busiest[0].position, round(found.bottleneck, 2)  # 99 readers hear of 98 others through token 0 alone
    (0, 97.02)
    """
    n = links.n
    rng = np.random.default_rng(seed)
    chosen = draw(n, readers, rng)
    if chosen.size < n:
        rng.shuffle(chosen)  # so that stopping early leaves a fair sample
    load, sole = np.zeros(n), np.zeros(n)
    sums = np.zeros(5)  # near, relayed, sole, relays, bottleneck
    work = done = 0
    for reader in chosen.tolist():
        found = _loads(links, reader)
        load[found.relay] += found.load
        sole[found.relay] += found.sole
        taking_part = np.count_nonzero(found.load)
        sums += np.array([found.near, found.load.sum(), found.sole.sum(), taking_part, found.load.max(initial=0.0)])
        work, done = work + found.work, done + 1
        if work > _WORK:
            break
    near, relayed, alone, relays, bottleneck = (sums / done).tolist()
    order = np.argsort(-load, kind="stable")[:_SHOWN]
    busiest = tuple(
        Relay(int(h), float(load[h]) / done, float(sole[h]) / done, int(links.degree[h]), int(links.listeners[h]))
        for h in order
        if load[h] > 0
    )
    return Capacity(done, done == n, near, relayed, alone, relays, bottleneck, busiest)


@dataclass
class _Loads:
    """For one reader: its relays, their load and what depends on each alone."""

    relay: Array
    load: Array
    sole: Array
    near: int
    work: int


def _loads(links: Links, reader: int) -> _Loads:
    n = links.n
    seen = np.zeros(n, dtype=bool)
    for part in links.stretches(np.array([reader])):
        seen[part.keys()[1]] = True
    seen[reader] = False
    relay = np.flatnonzero(seen)
    parts = links.stretches(relay)
    times = np.zeros(n, dtype=np.int64)
    for part in parts:
        size = n if part.slots is None else part.slots.size
        step = np.bincount(part.lo, minlength=size + 1) - np.bincount(part.hi, minlength=size + 1)
        here = np.cumsum(step)[:size]
        if part.slots is None:
            times += here
        else:
            times[part.slots] += here
    seen[reader] = True
    far = ~seen & (times > 0)
    share = np.where(far, 1 / np.maximum(times, 1), 0.0)
    load, sole = _per_relay(parts, share, relay.size), _per_relay(parts, (far & (times == 1)).astype(np.float64), relay.size)
    work = n * (4 + 6 * len(parts)) + 8 * sum(part.at.size for part in parts)
    return _Loads(relay, load, sole, int(seen.sum()), work)


def _per_relay(parts: list[Stretches], value: Array, relays: int) -> Array:
    """The sum of `value` over the keys that each relay sees."""
    out = np.zeros(relays)
    for part in parts:
        given = value if part.slots is None else value[part.slots]
        total = np.concatenate(([0.0], np.cumsum(given)))
        out += np.bincount(part.at, weights=total[part.hi] - total[part.lo], minlength=relays)
    return np.where(out > 1e-9, out, 0.0)
