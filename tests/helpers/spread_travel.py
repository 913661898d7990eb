"""What travels between ranks: enough, nothing that changes no result, and as many bytes as predicted.

Functions here run inside the processes of `ranks.in_ranks`; each asserts on every rank and returns how much it has checked.
Layouts are even for every other case, else two shuffled pieces of any length a rank.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from spread_cases import broadcasting, layouts, spread_answer
from torch import Tensor

from farlight.distributed import Layout, attention
from farlight.distributed.collectives import Channel
from farlight.distributed.communication import problem_of
from farlight.distributed.exchange import Exchange, exchange_of
from farlight.distributed.traffic import Traffic, TravelWidths, backward_traffic, forward_traffic
from farlight.testing import Case, inputs

__all__ = ["sent_keys_matter", "split_sizes_are_those_predicted", "unsent_keys_do_not_matter"]


def exchange_of_case(case: Case, queries: Layout, keys: Layout) -> tuple[Exchange, TravelWidths]:
    """What travels in float32."""
    widths = TravelWidths(case.head_dim, case.value_dim, 4, 4)
    return exchange_of(problem_of(case.pattern, case.sizes, case.kv_heads, queries, keys, widths, "cheapest")), widths


def _numbered(cases: list[Case], world: int) -> Iterator[tuple[Case, Layout, Layout]]:
    for number, case in enumerate(cases):
        yield dataclasses.replace(case, dropout=0.0, scale=None), *layouts(case, world, number if number % 2 else None)


def _outputs(case: Case, rank: int, queries: Layout, keys: Layout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = ((queries, q), (keys, k), (keys, v))
    local = (layout.shard(x, 2, rank) for layout, x in parts)
    out = attention(*local, case.pattern, layout=keys, q_layout=queries, q_offset=case.q_offset)
    assert isinstance(out, Tensor)
    return out


def _mask(case: Case) -> Tensor:
    """`(B, H_kv, G, n_q, n_k)`."""
    dense = case.pattern.dense(case.n_q, case.n_k, batch=case.batch, heads=case.heads, q_offset=case.q_offset)
    return dense.expand(case.batch, case.heads, -1, -1).unflatten(1, (case.kv_heads, -1))


def unsent_keys_do_not_matter(rank: int, world: int, cases: list[Case]) -> int:
    """NaN in every remote key and value that the reader's rows do not see, and so did not get, changes no bit of its results.

    Where another rank computes rows for the reader, its unseen keys are other numbers, not NaN: a masked key of a tile has
    weight 0, and k and v must be finite (docs/conventions.md).
    """
    checked = 0
    for case, queries, keys in _numbered(cases, world):
        exchange, _ = exchange_of_case(case, queries, keys)
        whole, mask = inputs(case, torch.float32), _mask(case)
        q, k, v = whole.q.detach(), whole.k.detach(), whole.v.detach()
        before = _outputs(case, rank, queries, keys, q, k, v)
        owner = torch.from_numpy(keys.owner_of(np.arange(case.n_k)))
        for reader in range(world):
            unread = ~mask[:, :, :, queries.position_ids(reader)].any((2, 3)) & (owner != reader)  # (B, H_kv, n_k)
            hosts = torch.zeros(world, dtype=torch.bool)
            for moved in exchange.classes:
                hosts[moved.rows.between(reader, None).target] = True
            filled = torch.where(hosts[owner], 100.0, math.nan).view(1, 1, -1, 1)
            changed = (torch.where(unread[..., None], filled, x) for x in (k, v))
            after = _outputs(case, rank, queries, keys, q, *changed)
            assert rank != reader or torch.equal(before, after), f"{case.name}, {queries}, {keys}: an unsent key was read"
            checked += int((unread & ~hosts[owner]).sum())
    return checked


def sent_keys_matter(rank: int, world: int, cases: list[Case]) -> int:
    """Another value in a key that was sent changes some result of every rank that it was sent to, for each key."""
    checked = 0
    for case, queries, keys in _numbered(cases, world):
        exchange, _ = exchange_of_case(case, queries, keys)
        whole = inputs(case, torch.float32)
        q, k, v = 0.1 * whole.q.detach(), whole.k.detach(), whole.v.detach()  # no weight so small that it is rounded away
        before = _outputs(case, rank, queries, keys, q, k, v)
        for moved in exchange.classes:
            heads = torch.tensor(moved.heads.rows)
            for key in np.flatnonzero(moved.keys.fan_out(case.n_k)).tolist():
                other = v.clone()
                other[heads // case.kv_heads, heads % case.kv_heads, key] += 100.0
                after = _outputs(case, rank, queries, keys, q, k, other)
                to_here = moved.keys.between(None, rank)
                got = bool(((to_here.lo <= key) & (key < to_here.hi)).any())
                why = f"{case.name}, {queries}, {keys}: key {key} was sent and changed no result"
                assert not got or not torch.equal(before, after), why
                checked += got
    return checked


def split_sizes_are_those_predicted(rank: int, world: int, cases: list[Case]) -> int:
    """What is handed to the all-to-alls is what `forward_traffic` and `backward_traffic` say; the sum over ranks of direct
    bytes is the weight of the minimum covers. Returns the number of collectives.
    """
    count = 0
    for (case, queries, keys), above in itertools.product(_numbered(cases, world), (8, 0)):
        with broadcasting(above), _recorded() as handed:
            spread_answer(case, torch.float32, rank, queries, keys)
            exchange, widths = exchange_of_case(case, queries, keys)
            forward, backward = forward_traffic(exchange, widths), backward_traffic(exchange, widths)
        expected = [(m[rank].tolist(), m[:, rank].tolist()) for traffic in (forward, backward) for m in _matrices(traffic)]
        assert sorted(handed) == sorted(expected), f"{case.name}, {queries}, {keys}: {handed} != {expected}"
        if above >= world:
            minimum = sum(len(moved.heads.rows) * moved.weight for moved in exchange.classes)
            assert int((forward.direct + forward.results).sum()) == minimum
        count += len(handed)
    return count


@contextmanager
def _recorded() -> Iterator[list[tuple[list[int], list[int]]]]:
    """(bytes to each rank, bytes from each rank) of the exchanges of this block."""
    handed: list[tuple[list[int], list[int]]] = []
    Channel.observers.append(lambda name, sent, received: handed.append((sent, received)))
    try:
        yield handed
    finally:
        Channel.observers.clear()


def _matrices(traffic: Traffic) -> list[np.ndarray]:
    """The all-to-alls that take place."""
    names = [name for name in ("direct", "results") if getattr(traffic, name).any()]
    names += ["scatter"] * bool(traffic.chunk) + ["reduce", "collect"] * bool(traffic.reduce.any())
    return [getattr(traffic, name) for name in names]
