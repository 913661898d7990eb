"""What routers answer with, as cases: the shared ones that are planned on the device, and more of that kind."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import farlight as fl
from farlight.patterns.multi_label import meets
from farlight.plan.routed_union import split_routed
from farlight.routing import from_indices
from farlight.testing import CASES, Case
from farlight.testing.cases import bits, table

__all__ = ["ROUTED", "UNIONS"]


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
        "lists of blocks, row by row, first queries", from_indices(table(97, 1, 40, 2, high=3), block=16), 40, q_offset=-3
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


def _unions() -> Iterator[Case]:
    """Unions with a fixed pattern whose links the choice has too, so that a link which is not left out of it counts twice."""
    causal, few = fl.causal(), fl.clusters(table(81, 1, 2, 150, low=-1, high=3))
    yield Case("window or clusters", fl.window(9) | few, 150)
    yield Case("window or clusters, causal", causal & (fl.window(9) | few), 150)
    yield Case("window or clusters of the past", fl.window(9, 20) | (few & causal), 150)
    yield Case("window of the past or clusters", (fl.window(9) & causal) | few, 150)
    yield Case("windows of two sizes or clusters", fl.window(3, 40) | few | fl.window(20, 2), 150)
    yield Case("window, lighthouses or clusters", fl.window(5) | fl.global_tokens([0, 70, -1]) | few, 150)
    yield Case("lighthouses or clusters", fl.global_tokens([3]) | few, 150)
    yield Case("rows that see all, keys that all see, or clusters", fl.sees_all([4]) | few | fl.seen_by_all([7, 140]), 150)
    yield Case(
        "window, lighthouses or clusters, causal, one key head",
        causal & (fl.global_tokens([0, 100]) | fl.clusters(table(82, 2, 4, 140, low=-1, high=2)) | fl.window(30)),
        140,
        batch=2,
        heads=4,
        kv_heads=1,
    )
    yield Case(
        "window or clusters, per head, grouped heads",
        fl.clusters(table(83, 1, 4, 90, high=2), table(84, 2, 1, 90, low=-1, high=2)) | fl.window(12, 4),
        90,
        batch=2,
        heads=4,
        kv_heads=2,
    )
    yield Case("window or clusters, dropout", fl.window(6) | few, 150, dropout=0.3)
    yield Case(
        "window or clusters, last queries",
        fl.window(25, 3) | fl.clusters(table(85, 1, 2, 40, high=2), table(86, 1, 2, 130, high=2)),
        40,
        130,
        kv_heads=1,
    )
    yield Case("window or clusters, first queries", fl.window(4) | fl.clusters(table(87, 60, high=2)), 60, 60, q_offset=-20)
    yield Case("window around all clusters", fl.window(16) | fl.clusters(torch.arange(130) // 9), 130)
    yield Case("window around the text or clusters", fl.window(500) | few, 150)
    yield Case("window to the left around the text or clusters", fl.window(500, 2) | few, 150)
    yield Case("window or no clusters", fl.window(2) | fl.clusters([-1] * 40), 40)
    yield Case("window or clusters, padded", fl.window(4) | (few & fl.padding(bits(88, 2, 150))), 150, batch=2)
    yield Case("tall clusters or a window", fl.clusters(table(89, 1, 2, 300, high=2)) | fl.window(70, 40), 300)
    yield Case(
        "window or lists of blocks, row by row",
        fl.window(12) | meets(table(90, 1, 2, 100, 2, low=-1, high=6), torch.arange(100)[:, None] // 16),
        100,
    )
    yield Case(
        "lighthouse, window or lists of blocks, row by row, causal",
        causal & (fl.global_tokens([0]) | fl.window(12) | from_indices(table(91, 1, 100, 2, low=-1, high=6), block=16)),
        100,
    )
    yield Case(
        "window or chosen blocks",
        fl.window(20) | fl.chosen_blocks(table(92, 2, 1, 5, 4, low=-1, high=10), block=16, query_block=32),
        150,
        batch=2,
        kv_heads=1,
    )
    yield Case(
        "window or chosen blocks of odd sizes, causal",
        causal & (fl.chosen_blocks(table(93, 1, 2, 4, 4, low=-1, high=7), block=23, query_block=37) | fl.window(20)),
        140,
        150,
    )
    yield Case(
        "window or chosen blocks, more than a tile, last queries",
        fl.window(40, 7) | fl.chosen_blocks(table(94, 1, 4, 1, 9, low=-1, high=12), block=24, query_block=200),
        170,
        280,
        heads=4,
        kv_heads=2,
    )
    yield Case(
        "window, lighthouse or chosen keys",
        fl.window(15) | fl.global_tokens([0, 77]) | fl.chosen_keys(table(95, 2, 1, 90, 8, low=-1, high=90)),
        90,
        batch=2,
        kv_heads=1,
    )
    yield Case(
        "window or chosen keys, causal, last queries",
        causal & (fl.chosen_keys(table(96, 1, 2, 60, 9, low=-1, high=90)) | fl.window(15)),
        60,
        90,
    )


UNIONS = tuple(_unions())
ROUTED = tuple(of for of in CASES if split_routed(of.pattern, of.sizes) is not None) + tuple(_more()) + UNIONS
