"""Timed patterns, each with the equivalent mask function for FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import farlight as fl
from farlight.patterns import Sizes

__all__ = ["Problem", "problems"]

Rule = Callable[[Any, Any, Any, Any], Any]


@dataclass(frozen=True)
class Problem:
    """A pattern and its FlexAttention mask function `rule(b, h, i, j)`.

    by_head: the rule depends on h; radius: of a plain window, which FlashAttention has too.
    """

    name: str
    pattern: fl.Pattern
    rule: Rule
    by_head: bool
    radius: int | None = None


def window(n: int, heads: int, device: str) -> Problem:
    return Problem("window(256)", fl.window(256), lambda b, h, i, j: (i - j).abs() <= 256, False, 256)


def longformer(n: int, heads: int, device: str) -> Problem:
    pattern = fl.window(256) | fl.global_tokens(range(min(64, n)))
    return Problem(
        "Longformer(512) + 64 global", pattern, lambda b, h, i, j: ((i - j).abs() <= 256) | (i < 64) | (j < 64), False
    )


def bigbird(n: int, heads: int, device: str) -> Problem:
    block = min(64, max(1, n // 8))
    pattern = fl.presets.bigbird(block, 3)
    # The pattern is made of blocks: one evaluation for each pair of blocks.
    first = torch.arange(0, n, block)
    h = torch.arange(heads).view(1, -1, 1, 1)
    layout = pattern._allows(
        Sizes.of(n, heads=heads), torch.zeros(1, 1, 1, 1, dtype=torch.int64), h, first[:, None], first[None, :]
    )
    layout = layout.expand(1, heads, -1, -1)[0].to(device)
    return Problem(f"BigBird({block}, 3)", pattern, lambda b, h, i, j: layout[h, i // block, j // block], True)


def dilated(n: int, heads: int, device: str) -> Problem:
    return Problem(
        "dilated window, 128 by 4",
        fl.window(128, dilation=4),
        lambda b, h, i, j: ((i - j).abs() <= 512) & ((i - j) % 4 == 0),
        False,
    )


def random_keys(n: int, heads: int, device: str) -> Problem:
    random_pattern = fl.random_keys(3)
    sizes = Sizes.of(n, heads=heads)
    rows = torch.arange(n)
    keys = [random_pattern._points(sizes, torch.zeros_like(rows), torch.full_like(rows, h), rows) for h in range(heads)]
    table = torch.stack(keys).to(device)

    def rule(b: Any, h: Any, i: Any, j: Any) -> Any:
        near = (i - j).abs() <= 256
        return near | (table[h, i, 0] == j) | (table[h, i, 1] == j) | (table[h, i, 2] == j)

    return Problem("window(256) + 3 random keys", fl.window(256) | random_pattern, rule, True)


def clusters(n: int, heads: int, device: str) -> Problem:
    labels = torch.randint(0, 32, (1, heads, n), generator=torch.Generator().manual_seed(5))
    on_device = labels[0].to(device)
    return Problem("32 clusters", fl.clusters(labels), lambda b, h, i, j: on_device[h, i] == on_device[h, j], True)


problems: tuple[Callable[[int, int, str], Problem], ...] = (longformer, bigbird, dilated, random_keys, clusters, window)
