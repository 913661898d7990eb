"""Load of relays: how many tokens share one vector on the two-hop paths to a reader.

With one global token any two tokens are two hops apart, yet everything a token learns of the far text then passes through
one vector. For a reader i and a token j that i does not see itself (*far*), the relays are the tokens h ≠ i that i sees and
that see j: the two-hop paths. Each far token with r relays adds 1 / r to the *load* of each; a far token with r = 1 is *sole*
to its relay.

Per reader: r for every token by a difference array over the runs of the relays' rows, then the load of each relay by a prefix
sum of 1 / r over its runs. Every token is counted, whatever the length; readers are sampled when there are many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from farlight.analysis.graph.links import Array, KeyRuns, Links
from farlight.analysis.graph.sampling import stratified_sample

__all__ = ["Capacity", "Relay", "capacity"]

_MAX_LISTED = 16
# Words touched over all readers: about a second.
_WORK = 400_000_000


@dataclass(frozen=True)
class Relay:
    """A token as a relay, means over the readers.

    load: far tokens assigned to it; sole: far tokens for which it is the only relay; hears, heard_by: how many other tokens
    it sees and is seen by.
    """

    position: int
    load: float
    sole: float
    hears: int
    heard_by: int


@dataclass(frozen=True)
class Capacity:
    """Loads of relays, means over the readers.

    near: tokens seen directly, itself included; relayed: far tokens with at least one relay; sole: far tokens with exactly
    one; relays: relays with a load; bottleneck: the load of the busiest relay, that is the number of tokens that share one
    vector. `busiest` lists the relays with the highest mean load. `exact`: all tokens were readers.
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
        """Plain values for JSON."""
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
    """Loads of relays over `readers` sampled readers, fewer where the work exceeds `_WORK`; exact when they are all tokens.

    >>> import farlight as fl
    >>> hub = capacity(Links.of(fl.window(0) | fl.global_tokens([0]), 100), readers=100)
    >>> hub.busiest[0].position, round(hub.bottleneck, 2)  # 99 readers reach 98 others through token 0 alone
    (0, 97.02)
    """
    n = links.n
    rng = np.random.default_rng(seed)
    sample = stratified_sample(n, readers, rng)
    if sample.size < n:
        rng.shuffle(sample)  # so that stopping early leaves an unbiased sample
    load, sole = np.zeros(n), np.zeros(n)
    sums = np.zeros(5)  # near, relayed, sole, relays, bottleneck
    work = done = 0
    for reader in sample.tolist():
        loads = _reader_loads(links, reader)
        load[loads.relay] += loads.load
        sole[loads.relay] += loads.sole
        max_load = loads.load.max(initial=0.0)
        sums += np.array([loads.near, loads.load.sum(), loads.sole.sum(), np.count_nonzero(loads.load), max_load])
        work, done = work + loads.work, done + 1
        if work > _WORK:
            break
    near, relayed, sole_mean, relays, bottleneck = (sums / done).tolist()
    by_load = np.argsort(-load, kind="stable")[:_MAX_LISTED]
    busiest = tuple(
        Relay(int(h), float(load[h]) / done, float(sole[h]) / done, int(links.in_degree[h]), int(links.out_degree[h]))
        for h in by_load
        if load[h] > 0
    )
    return Capacity(done, done == n, near, relayed, sole_mean, relays, bottleneck, busiest)


@dataclass
class _ReaderLoads:
    """One reader: its relays (positions), their loads and sole counts, the number of near tokens, and the words touched."""

    relay: Array
    load: Array
    sole: Array
    near: int
    work: int


def _reader_loads(links: Links, reader: int) -> _ReaderLoads:
    n = links.n
    near = np.zeros(n, dtype=bool)
    for part in links.runs(np.array([reader])):
        near[part.pairs()[1]] = True
    near[reader] = False
    relay = np.flatnonzero(near)
    parts = links.runs(relay)
    num_relays = np.zeros(n, dtype=np.int64)
    for part in parts:
        size = n if part.slots is None else part.slots.size
        step = np.bincount(part.lo, minlength=size + 1) - np.bincount(part.hi, minlength=size + 1)
        slot_relays = np.cumsum(step)[:size]
        if part.slots is None:
            num_relays += slot_relays
        else:
            num_relays[part.slots] += slot_relays
    near[reader] = True
    far = ~near & (num_relays > 0)
    share = np.where(far, 1 / np.maximum(num_relays, 1), 0.0)
    load = _sum_per_relay(parts, share, relay.size)
    sole = _sum_per_relay(parts, (far & (num_relays == 1)).astype(np.float64), relay.size)
    work = n * (4 + 6 * len(parts)) + 8 * sum(part.row_index.size for part in parts)
    return _ReaderLoads(relay, load, sole, int(near.sum()), work)


def _sum_per_relay(parts: list[KeyRuns], values: Array, relays: int) -> Array:
    """(relays,) the sum of `values` over the keys of each relay's row."""
    out = np.zeros(relays)
    for part in parts:
        slot_values = values if part.slots is None else values[part.slots]
        prefix = np.concatenate(([0.0], np.cumsum(slot_values)))
        out += np.bincount(part.row_index, weights=prefix[part.hi] - prefix[part.lo], minlength=relays)
    return np.where(out > 1e-9, out, 0.0)
