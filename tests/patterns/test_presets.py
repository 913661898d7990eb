"""Presets against independent definitions from their papers, and the waste of their plans at the papers' sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from definitions import drawn
from torch import Tensor

import farlight as fl
from farlight.patterns import Pattern, Sizes
from farlight.plan import TileShape
from farlight.plan.build import build

Rule = Callable[[int, int, int], bool]  # (h, i, j)


def by_hand(rule: Rule, n: int, heads: int = 1) -> Tensor:
    return torch.tensor([[[[rule(h, i, j) for j in range(n)] for i in range(n)] for h in range(heads)]])


def bigbird_rule(n: int, block: int, count: int, seed: int) -> Rule:
    blocks = -(-n // block)

    def rule(h: int, i: int, j: int) -> bool:
        u, w = i // block, j // block
        ends = i < block or j < block or i >= n - block or j >= n - block
        return abs(u - w) <= 1 or ends or w in drawn(seed, h, u, min(count, blocks), blocks)

    return rule


# (name, pattern, n, heads, rule)
DEFINED: list[tuple[str, Pattern, int, int, Rule]] = [
    ("Longformer", fl.presets.longformer(8, (0, 20)), 40, 1, lambda h, i, j: abs(i - j) <= 4 or {i, j} & {0, 20} != set()),
    ("Longformer, no globals", fl.presets.longformer(8, ()), 40, 1, lambda h, i, j: abs(i - j) <= 4),
    ("Longformer, dilated", fl.presets.longformer(6, (), 3), 40, 1, lambda h, i, j: abs(i - j) <= 9 and (i - j) % 3 == 0),
    (
        "Longformer, autoregressive",
        fl.presets.longformer(8, (0,), autoregressive=True),
        40,
        1,
        lambda h, i, j: j <= i and (i - j <= 4 or 0 in (i, j)),
    ),
    ("BigBird", fl.presets.bigbird(4, 2, seed=3), 50, 3, bigbird_rule(50, 4, 2, 3)),
    ("BigBird, whole blocks", fl.presets.bigbird(8, 1), 64, 2, bigbird_rule(64, 8, 1, 0)),
    ("ETC", fl.presets.etc(3, 5), 40, 1, lambda h, i, j: abs(i - j) <= 3 or i < 5 or j < 5),
    ("ETC without globals", fl.presets.etc(3, 0), 40, 1, lambda h, i, j: abs(i - j) <= 3),
    (
        "Sparse Transformer, strided",
        fl.presets.sparse_transformer(5),
        40,
        1,
        lambda h, i, j: j <= i and (i - j < 5 or (i - j) % 5 == 0),
    ),
    (
        "Sparse Transformer, fixed",
        fl.presets.sparse_transformer(6, "fixed", 2),
        40,
        1,
        lambda h, i, j: j <= i and (i // 6 == j // 6 or j % 6 >= 4),
    ),
    (
        "LongNet",
        fl.presets.longnet([4, 12, 24], [1, 2, 4]),
        50,
        5,
        lambda h, i, j: any(i // w == j // w and i % r == j % r == h % r for w, r in ((4, 1), (12, 2), (24, 4))),
    ),
    ("StreamingLLM", fl.presets.streaming(3, 6), 40, 1, lambda h, i, j: j <= i and (i - j < 6 or j < 3)),
    ("StreamingLLM without sinks", fl.presets.streaming(0, 6), 40, 1, lambda h, i, j: j <= i and i - j < 6),
    ("star", fl.presets.star(), 30, 1, lambda h, i, j: abs(i - j) <= 1 or 0 in (i, j)),
    ("LogSparse", fl.presets.logsparse(), 50, 1, lambda h, i, j: i - j in (0, 1, 2, 4, 8, 16, 32)),
]


@pytest.mark.parametrize(("name", "pattern", "n", "heads", "rule"), DEFINED, ids=[row[0] for row in DEFINED])
def test_a_preset_is_its_paper(name: str, pattern: Pattern, n: int, heads: int, rule: Rule) -> None:
    assert torch.equal(pattern.dense(n, heads=heads).expand(1, heads, -1, -1), by_hand(rule, n, heads))


def test_every_preset_is_tested_and_cites_its_paper() -> None:
    text = " ".join(name for name, *_ in DEFINED).lower().replace(" ", "")
    short = {"streaming": "streamingllm", "sparse_transformer": "sparsetransformer"}
    for name in fl.presets.__all__:
        assert short.get(name, name) in text
        doc = getattr(fl.presets, name).__doc__
        assert "arXiv:" in doc
        assert ">>>" in doc


def test_the_defaults_of_the_interface() -> None:
    assert fl.presets.longformer() == fl.window(256) | fl.global_tokens([0])
    assert fl.presets.bigbird() == fl.presets.bigbird(64, 3, 0)
    assert fl.presets.streaming() == fl.presets.streaming(4, 1024)
    assert fl.presets.sparse_transformer(8) == fl.presets.sparse_transformer(8, "strided")
    assert fl.presets.longformer(window=4, global_positions=(1,), dilation=2, autoregressive=True) == fl.causal() & (
        fl.window(2, dilation=2) | fl.global_tokens([1])
    )
    assert fl.presets.longnet(segments=[4], dilations=[1]) == fl.blocked_window(0, block=4)


def test_heads_of_longnet_cover_all_positions() -> None:
    seen = fl.presets.longnet([32], [4]).dense(64, heads=4).any(3)[0]
    assert bool(seen.any(0).all())
    assert seen.sum(0).unique().tolist() == [1]


# ---- what a plan visits for each pair wanted, at 16 384 tokens ---------------------------------------------------------
N = 16_384
COSTS: list[tuple[str, Callable[[], Pattern], int]] = [
    ("Longformer(512)", lambda: fl.presets.longformer(512), 1),
    ("BigBird(64, 3)", lambda: fl.presets.bigbird(64, 3), 2),
    ("Longformer, dilation 4", lambda: fl.presets.longformer(512, dilation=4), 1),
    ("LongNet", lambda: fl.presets.longnet([2048, 4096, 8192, 16384], [1, 2, 4, 8]), 8),
    ("Sparse Transformer, strided", lambda: fl.presets.sparse_transformer(128), 1),
    ("Sparse Transformer, fixed", lambda: fl.presets.sparse_transformer(128, "fixed", 8), 1),
    ("StreamingLLM", lambda: fl.presets.streaming(), 1),
    ("32 balanced clusters", lambda: fl.clusters(torch.arange(N) % 32), 1),
]


@pytest.mark.parametrize(("name", "make", "heads"), COSTS, ids=[row[0] for row in COSTS])
def test_waste_is_small_at_the_size_of_the_paper(name: str, make: Callable[[], Pattern], heads: int) -> None:
    plan = build(make(), Sizes.of(N, heads=heads), TileShape())
    assert plan.waste <= 1.3, f"{name}: {plan.waste:.3f}"
    assert plan.pairs == make().count(N, heads=heads)
