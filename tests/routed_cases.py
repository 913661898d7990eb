"""What routers answer with, as cases: the shared ones that are planned on the device, and more of that kind."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import farlight as fl
from farlight.plan.routed import routed
from farlight.routing import meets
from farlight.testing import CASES, Case
from farlight.testing.cases import bits, table

__all__ = ["ROUTED"]


def _more() -> Iterator[Case]:
    causal, blocks_of_16 = fl.causal(), torch.arange(150)[:, None] // 16
    yield Case("tall clusters", fl.clusters(table(60, 300, high=2)), 300)
    yield Case("tall clusters, per head", fl.clusters(table(61, 2, 4, 280, low=-1, high=3)), 280, batch=2, heads=4, kv_heads=2)
    yield Case(
        "clusters, causal, keys of their own",
        fl.clusters(table(62, 1, 4, 100, low=-1, high=3), table(63, 1, 4, 270, low=-1, high=3)) & causal,
        100,
        270,
        batch=2,
        heads=4,
        kv_heads=1,
    )
    yield Case(
        "clusters, causal, last queries",
        fl.clusters(table(76, 1, 2, 50, low=-1, high=3), table(77, 1, 2, 130, low=-1, high=3)) & causal,
        50,
        130,
        kv_heads=1,
    )
    yield Case(
        "clusters, causal, padded",
        causal & fl.clusters(table(64, 1, 2, 260, high=3)) & fl.padding(bits(65, 2, 260, share=0.8)),
        260,
        batch=2,
    )
    yield Case("clusters, labels far apart", fl.clusters([2**62, 5, -3, 2**62, 5, 2**63 - 1]), 6)
    yield Case("clusters, rows before the text", fl.clusters(table(66, 40, high=2), table(67, 20, high=2)) & causal, 40, 20)
    yield Case("clusters, none", fl.clusters([-1] * 40), 40)
    yield Case("lists of blocks, row by row", meets(table(68, 1, 2, 150, 3, low=-1, high=10), blocks_of_16), 150)
    yield Case(
        "lists of blocks, row by row, causal, last queries",
        meets(table(69, 2, 1, 40, 2, low=-1, high=6), blocks_of_16[:90]) & causal,
        40,
        90,
        batch=2,
        kv_heads=1,
    )
    yield Case(
        "chosen blocks, causal, of two sizes",
        fl.chosen_blocks(table(70, 2, 1, 5, 4, low=-1, high=10), block=16, query_block=32) & causal,
        150,
        batch=2,
        kv_heads=1,
    )
    yield Case(
        "chosen blocks of odd sizes",
        fl.chosen_blocks(table(71, 2, 1, 8, 4, low=-1, high=12), block=23, query_block=37) & causal,
        260,
        270,
        batch=2,
        heads=4,
        kv_heads=2,
    )
    yield Case(
        "chosen blocks, more than a tile",
        fl.chosen_blocks(table(72, 1, 2, 2, 9, low=-1, high=12), block=24, query_block=200),
        260,
        280,
        q_offset=3,
    )
    yield Case(
        "chosen keys, causal, padded",
        fl.chosen_keys(table(73, 2, 1, 150, 5, low=-1, high=150)) & causal & fl.padding(bits(74, 2, 150)),
        150,
        batch=2,
        kv_heads=1,
    )
    yield Case("chosen keys, many for few", fl.chosen_keys(table(75, 1, 1, 140, 40, high=9)), 140, 9, q_offset=0)


ROUTED = tuple(of for of in CASES if routed(of.pattern, of.sizes) is not None) + tuple(_more())
