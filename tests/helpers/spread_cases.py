"""What the ranks of a test do: shared cases spread over layouts, and the properties that every exchange is held to.

Functions here run inside the processes of `ranks.in_ranks`. A layout is even, or has two shuffled pieces of any length a rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

import farlight.distributed.exchange
import farlight.distributed.routes
from farlight.distributed import Layout, attention
from farlight.testing import Answer, Case, assert_answer, inputs, solve

__all__ = ["broadcasting", "compare_cases", "layouts", "spread_answer"]

SEED = 0x1234_5678_9ABC


def layouts(case: Case, world: int, seed: int | None) -> tuple[Layout, Layout]:
    """(layout of the queries, of the keys): even for seed None, else random with empty and several pieces."""
    if seed is None:
        return Layout.even(case.n_q, world), Layout.even(case.n_k, world)
    generator = torch.Generator().manual_seed(seed)

    def drawn(n: int) -> Layout:
        cuts = torch.randint(0, n + 1, (2 * world - 1,), generator=generator).sort().values.tolist()
        return Layout([0, *cuts, n], [p % world for p in torch.randperm(2 * world, generator=generator).tolist()])

    return drawn(case.n_q), drawn(case.n_k)


@contextmanager
def broadcasting(above: int) -> Iterator[None]:
    """Tokens that more than `above` ranks need, and more than half of them, are broadcast."""
    modules = farlight.distributed.exchange, farlight.distributed.routes
    with mock.patch.object(modules[0], "BROADCAST_ABOVE", above), mock.patch.object(modules[1], "BROADCAST_ABOVE", above):
        yield


def spread_answer(case: Case, dtype: torch.dtype, rank: int, queries: Layout, keys: Layout) -> Answer:
    """Outputs and gradients of the whole case, gathered from the ranks. Collective."""
    whole = inputs(case, dtype)
    parts = ((queries, whole.q), (keys, whole.k), (keys, whole.v))
    q, k, v = (layout.shard(x, 2, rank).detach().requires_grad_() for layout, x in parts)
    out, lse = attention(
        q,
        k,
        v,
        case.pattern,
        layout=keys,
        q_layout=queries,
        scale=case.scale,
        q_offset=case.q_offset,
        dropout=case.dropout,
        seed=SEED,
        return_lse=True,
    )
    torch.autograd.backward((out, lse), (queries.shard(whole.grad_out, 2, rank), queries.shard(whole.grad_lse, 2, rank)))
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is not None
    results: list[tuple[Layout, Tensor]] = [(queries, out), (queries, lse), (queries, q.grad), (keys, k.grad), (keys, v.grad)]
    return Answer(*(layout.unshard(x.detach(), 2) for layout, x in results))


def compare_cases(rank: int, world: int, cases: list[Case], dtypes: list[torch.dtype], broadcast_above: list[int]) -> int:
    """Every case on an even and on a random layout against float64 truth, by rank 0. Returns the number of comparisons."""
    compared = 0
    for number, case in enumerate(cases):
        for dtype in dtypes:
            for seed, above in zip((None, number), broadcast_above, strict=True):
                queries, keys = layouts(case, world, seed)
                with broadcasting(above):
                    answer = spread_answer(case, dtype, rank, queries, keys)
                if rank == 0:
                    solution = solve(case, inputs(case, dtype), dropout_seed=SEED, with_grad_lse=True)
                    compared += assert_answer(answer, solution, f"{case.name}, {dtype}, {queries}, {keys}")
    return compared
