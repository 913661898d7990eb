"""Routers over ranks against the choice of one process; run by `ranks.in_ranks`."""

from __future__ import annotations

import torch
from torch import Tensor

import farlight as fl
from farlight.distributed import Layout, attention
from farlight.distributed.collectives import Channel
from farlight.distributed.routers import choose_over_ranks
from farlight.patterns import Pattern
from farlight.routing import LSH, KMeans, PerHeadRouter, Router, TopBlocks

__all__ = ["N", "answers_over_ranks", "links_over_ranks", "operands", "refusal_over_ranks", "routers"]

N, BLOCK = 90, 8


def operands(n: int = N) -> list[Tensor]:
    """q, k, v of a text with 4 query heads on 2 key heads."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, heads, n, 8, generator=generator) for heads in (4, 2, 2)]


def routers() -> dict[str, Router]:
    """Every kind of router that chooses over ranks."""
    return {
        "clusters": KMeans(4, 8, 5),
        "causal clusters, shared": KMeans(4, 8, 3, causal=True, shared=True, per_cluster=6),
        "balanced clusters": KMeans(4, 8, 6, per_cluster=11),
        "buckets": LSH(6, rounds=2, causal=True),
        "blocks": TopBlocks(3, BLOCK),
        "causal blocks of each query": TopBlocks(2, BLOCK, causal=True),
        "blocks by mass, a group together": TopBlocks(mass=0.4, block=BLOCK, query_block=2 * BLOCK, per="group"),
        "bounds": TopBlocks(share=0.3, block=BLOCK, score="minmax", causal=True),
        "softmax": TopBlocks(2, BLOCK, score="softmax"),
        "joined": (TopBlocks(1, BLOCK) | fl.window(3)) - fl.sees_all([4]),
        "by head": PerHeadRouter([LSH(4), fl.window(2), TopBlocks(1, BLOCK), KMeans(1, 8, 4)]),
    }


def _layout(rank: int, world: int, kind: str) -> Layout:
    if kind == "even":
        return Layout.even(N, world, multiple=2 * BLOCK)
    cuts = [0, *(2 * BLOCK * c for c in (1, 1, 3, 4)[: 2 * world - 1]), N]
    return Layout(cuts, [p % world for p in range(len(cuts) - 1)], world)


def links_over_ranks(rank: int, world: int, kind: str) -> dict[str, list[Pattern]]:
    """The choices of every router in two training calls, and the centroids after them."""
    layout, channel = _layout(rank, world, kind), Channel()
    q, k, _ = (layout.shard(x, 2, rank) for x in operands())
    return {
        name: [choose_over_ranks(router, q, k, layout, layout, channel) for _ in range(2)] for name, router in routers().items()
    }


def answers_over_ranks(rank: int, world: int, name: str) -> list[Tensor]:
    """Output and gradients of q, k and v of an attention under a router, gathered."""
    layout = _layout(rank, world, "even")
    q, k, v = (layout.shard(x, 2, rank).detach().requires_grad_() for x in operands())
    out = attention(q, k, v, routers()[name], layout=layout)
    assert isinstance(out, Tensor)
    out.square().sum().backward()
    return [layout.unshard(x.detach(), 2) for x in (out, q.grad, k.grad, v.grad) if x is not None]


def refusal_over_ranks(rank: int, world: int) -> str:
    """What each rank raises for a router that needs every key, where the last rank has no token."""
    layout = Layout([0, N, N])
    q, k, _ = (layout.shard(x, 2, rank) for x in operands())
    try:
        choose_over_ranks(TopBlocks(lost=0.1, block=BLOCK), q, k, layout, layout, Channel())
    except fl.errors.ArgumentError as error:
        return str(error)
    return ""
