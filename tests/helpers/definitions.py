"""An independent definition of every primitive in plain Python: whether the query at position i may attend to the key at j.

Written from the documentation, not from the code: no tensor arithmetic and no farlight function. `n` is the number of keys.
Random draws are computed with Python integers, which also pins the random numbers for the C++ and Triton kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

import farlight as fl

Rule = Callable[[int, int, int, int, int], bool]  # (b, h, i, j, n)

WORD = 2**32 - 1


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x85EBCA6B & WORD
    x ^= x >> 13
    x = x * 0xC2B2AE35 & WORD
    return x ^ x >> 16


def hashed(*words: int) -> int:
    h = 0x9E3779B9
    for word in words:
        h = mix(h ^ word & WORD) * 5 + 0xE6546B64 & WORD
    return h


@functools.cache
def drawn(seed: int, head: int, index: int, count: int, population: int) -> set[int]:
    """Floyd's sample of `count` distinct numbers below `population`, or all of them where count is larger."""
    out: set[int] = set()
    row = hashed(seed, seed >> 32, head, index)
    for t in range(count):
        bound = population - count + t + 1
        if bound > 0:
            pick = hashed(row, t) * bound >> 32
            out.add(bound - 1 if pick in out else pick)
    return out


def is_named(positions: list[int], p: int, n: int) -> bool:
    return 0 <= p < n and any(p == (named if named >= 0 else n + named) for named in positions)


def document_of(lengths: list[int], p: int) -> int | None:
    if p < 0:
        return None
    end = 0
    for number, length in enumerate(lengths):
        end += length
        if p < end:
            return number
    return None


def per_item(table: torch.Tensor, b: int) -> torch.Tensor:
    return table[b if table.shape[0] > 1 else 0]


def per_item_and_head(table: torch.Tensor, b: int, h: int) -> torch.Tensor:
    part = per_item(table, b)
    return part[h if part.shape[0] > 1 else 0]


@dataclass(frozen=True)
class Defined:
    """A pattern, its independent rule (b, h, i, j, n) -> bool, and the sizes at which the two are compared."""

    name: str
    pattern: fl.Pattern
    rule: Rule
    n: int = 23
    batch: int = 1
    heads: int = 2

    def __str__(self) -> str:
        return self.name


def ints(seed: int, *shape: int, low: int = 0, high: int = 4) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def bools(seed: int, *shape: int) -> torch.Tensor:
    return ints(seed, *shape, high=3) == 0


def window_rule(left: int, right: int, dilation: int) -> Rule:
    return lambda b, h, i, j, n: -left * dilation <= j - i <= right * dilation and (j - i) % dilation == 0


def neighborhood_rule(shape: list[int], window: list[int], dilation: list[int], causal: list[bool]) -> Rule:
    """Axis by axis, from the list of all keys of the query's residue: the w of them around it, moved into the list."""

    def place(token: int) -> list[int]:
        out = []
        for length in reversed(shape):
            out.append(token % length)
            token //= length
        return out[::-1]

    def on_axis(x: int, y: int, length: int, w: int, d: int, causal: bool) -> bool:
        own = list(range(x % d, length, d))
        at = own.index(x)
        if causal:
            return y in own[max(0, at - w + 1) : at + 1]
        begin = at - w // 2
        while begin < 0:
            begin += 1
        while begin + w > len(own):
            begin -= 1
        return y in own[begin : begin + w]

    def rule(b: int, h: int, i: int, j: int, n: int) -> bool:
        tokens = functools.reduce(lambda a, c: a * c, shape, 1)
        axes = zip(place(i), place(j), shape, window, dilation, causal, strict=True)
        return 0 <= i < tokens and j < tokens and all(on_axis(*axis) for axis in axes)

    return rule


def positional() -> list[Defined]:
    return [
        Defined("full", fl.full(), lambda b, h, i, j, n: True),
        Defined("causal", fl.causal(), lambda b, h, i, j, n: j <= i),
        Defined("window(4)", fl.window(4), window_rule(4, 4, 1)),
        Defined("window(0)", fl.window(0), window_rule(0, 0, 1)),
        Defined("window(3, 1)", fl.window(3, 1), window_rule(3, 1, 1)),
        Defined("window(0, 5)", fl.window(0, 5), window_rule(0, 5, 1)),
        Defined("window(100)", fl.window(100), window_rule(100, 100, 1)),
        Defined("window(2, dilation=3)", fl.window(2, dilation=3), window_rule(2, 2, 3)),
        Defined("window(1, 3, dilation=4)", fl.window(1, 3, dilation=4), window_rule(1, 3, 4)),
        Defined("strided(5)", fl.strided(5), lambda b, h, i, j, n: (j - i) % 5 == 0),
        Defined("strided(1)", fl.strided(1), lambda b, h, i, j, n: True),
        Defined("strided, phase", fl.strided(4, phase=6), lambda b, h, i, j, n: i % 4 == 2 and j % 4 == 2),
        Defined("strided, heads", fl.strided(3, phase="head"), lambda b, h, i, j, n: i % 3 == j % 3 == h % 3, heads=5),
        Defined("blocked_window", fl.blocked_window(1, 2, block=4), lambda b, h, i, j, n: -1 <= j // 4 - i // 4 <= 2),
        Defined("segments", fl.blocked_window(0, block=7), lambda b, h, i, j, n: j // 7 == i // 7),
        Defined("landmarks", fl.landmarks(6, 2), lambda b, h, i, j, n: j % 6 in (4, 5)),
        Defined("neighborhood 1-D", fl.neighborhood([23], 5), neighborhood_rule([23], [5], [1], [False])),
        Defined("neighborhood 2-D", fl.neighborhood((4, 5), 3), neighborhood_rule([4, 5], [3, 3], [1, 1], [False, False])),
        Defined(
            "neighborhood, even", fl.neighborhood((3, 7), (2, 4)), neighborhood_rule([3, 7], [2, 4], [1, 1], [False, False])
        ),
        Defined("neighborhood, dilated", fl.neighborhood([22], 3, 4), neighborhood_rule([22], [3], [4], [False])),
        Defined(
            "neighborhood, causal axis",
            fl.neighborhood((4, 5), (3, 2), (1, 2), (True, False)),
            neighborhood_rule([4, 5], [3, 2], [1, 2], [True, False]),
        ),
        Defined(
            "neighborhood 3-D",
            fl.neighborhood((2, 3, 3), (2, 3, 1), causal=(False, True, True)),
            neighborhood_rule([2, 3, 3], [2, 3, 1], [1, 1, 1], [False, True, True]),
        ),
        Defined("offsets", fl.offsets([0, -3, 7]), lambda b, h, i, j, n: j - i in (0, -3, 7)),
    ]


def named() -> list[Defined]:
    positions = [0, 9, -1]
    mask, masks = bools(1, 23), bools(2, 3, 23)
    ids, ids_per_item = ints(3, 23, low=-1), ints(4, 2, 23, low=-1)
    real = bools(5, 2, 23)

    def of_mask(table: torch.Tensor, b: int, p: int, n: int) -> bool:
        return 0 <= p < n and bool(per_item(table, b)[p])

    def one_document(table: torch.Tensor, b: int, i: int, j: int, n: int) -> bool:
        return 0 <= i < n and int(per_item(table, b)[i]) == int(per_item(table, b)[j]) >= 0

    def same_length(lengths: list[int], i: int, j: int) -> bool:
        return document_of(lengths, i) is not None and document_of(lengths, i) == document_of(lengths, j)

    lengths_per_item = [[5, 0, 9], [23]]
    return [
        Defined(
            "global_tokens",
            fl.global_tokens(positions),
            lambda b, h, i, j, n: is_named(positions, i, n) or is_named(positions, j, n),
        ),
        Defined("sees_all", fl.sees_all(positions), lambda b, h, i, j, n: is_named(positions, i, n)),
        Defined("seen_by_all", fl.seen_by_all(positions), lambda b, h, i, j, n: is_named(positions, j, n)),
        Defined("seen_by_all, a run", fl.seen_by_all(range(3, 9)), lambda b, h, i, j, n: 3 <= j < 9),
        Defined(
            "global_tokens, mask", fl.global_tokens(mask), lambda b, h, i, j, n: of_mask(mask[None], b, i, n) or bool(mask[j])
        ),
        Defined(
            "global_tokens, masks",
            fl.global_tokens(masks),
            lambda b, h, i, j, n: of_mask(masks, b, i, n) or bool(masks[b, j]),
            batch=3,
        ),
        Defined("sees_all, masks", fl.sees_all(masks), lambda b, h, i, j, n: of_mask(masks, b, i, n), batch=3),
        Defined("seen_by_all, masks", fl.seen_by_all(masks), lambda b, h, i, j, n: bool(masks[b, j]), batch=3),
        Defined("documents, ids", fl.documents(ids), lambda b, h, i, j, n: one_document(ids[None], b, i, j, n)),
        Defined(
            "documents, ids per item",
            fl.documents(ids_per_item),
            lambda b, h, i, j, n: one_document(ids_per_item, b, i, j, n),
            batch=2,
        ),
        Defined("documents, lengths", fl.documents(lengths=[5, 0, 9]), lambda b, h, i, j, n: same_length([5, 0, 9], i, j)),
        Defined(
            "documents, lengths per item",
            fl.documents(lengths=lengths_per_item),
            lambda b, h, i, j, n: same_length(lengths_per_item[b], i, j),
            batch=2,
        ),
        Defined("padding", fl.padding([9, 23]), lambda b, h, i, j, n: j < (9, 23)[b], batch=2),
        Defined("padding, mask", fl.padding(real), lambda b, h, i, j, n: bool(real[b, j]), batch=2),
    ]


def random() -> list[Defined]:
    big = 2**40 + 5

    def key(count: int, seed: int, causal: bool) -> Rule:
        return lambda b, h, i, j, n: (
            j in drawn(seed, h, i, count if causal else min(count, n), min(max(i + 1, 0), n) if causal else n)
        )

    def block(count: int, size: int, seed: int, causal: bool) -> Rule:
        def rule(b: int, h: int, i: int, j: int, n: int) -> bool:
            num_blocks, query_block = -(-n // size), i // size
            population = min(max(query_block + 1, 0), num_blocks) if causal else num_blocks
            key_blocks = drawn(seed, h, query_block, count if causal else min(count, num_blocks), population)
            return j // size in key_blocks and (j <= i or not causal)

        return rule

    return [
        Defined("random_keys", fl.random_keys(3), key(3, 0, False)),
        Defined("random_keys, seed", fl.random_keys(5, seed=big), key(5, big, False)),
        Defined("random_keys, causal", fl.random_keys(4, seed=1, causal=True), key(4, 1, True)),
        Defined("random_keys, all", fl.random_keys(99), key(99, 0, False)),
        Defined("random_blocks", fl.random_blocks(2, block=4, seed=3), block(2, 4, 3, False)),
        Defined("random_blocks, causal", fl.random_blocks(2, block=5, causal=True), block(2, 5, 0, True)),
    ]


def content() -> list[Defined]:
    """Tables with one row per position: 23 tokens, 6 blocks of 4."""
    mask, layout = bools(10, 23, 23), bools(11, 2, 2, 6, 6)
    labels, query_labels, key_labels = ints(12, 2, 2, 23, low=-1), ints(13, 2, 23, low=-1), ints(14, 1, 23, low=-1)
    lists, keys = ints(15, 2, 1, 8, 2, low=-1, high=6), ints(16, 1, 2, 23, 3, low=-1, high=23)

    def inside(table: torch.Tensor, row: int) -> bool:
        return 0 <= row < table.shape[-2 if table.dim() > 3 else -1]

    def by_labels(query: torch.Tensor, key: torch.Tensor) -> Rule:
        def rule(b: int, h: int, i: int, j: int, n: int) -> bool:
            rows, columns = per_item_and_head(query, b, h), per_item_and_head(key, b, h)
            return 0 <= i < rows.shape[0] and int(rows[i]) == int(columns[j]) >= 0

        return rule

    def in_list(table: torch.Tensor, unit: int, block: int) -> Rule:
        return lambda b, h, i, j, n: (
            inside(table, i // unit) and j // block in per_item_and_head(table, b, h)[i // unit].tolist()
        )

    halves = [fl.window(2), fl.strided(3)]
    heads: Rule = lambda b, h, i, j, n: abs(j - i) <= 2 if h == 0 else (j - i) % 3 == 0  # noqa: E731
    return [
        Defined("pairs", fl.pairs(mask), lambda b, h, i, j, n: 0 <= i < 23 and bool(mask[i, j])),
        Defined(
            "blocks",
            fl.blocks(layout, 4),
            lambda b, h, i, j, n: inside(layout, i // 4) and bool(layout[b, h, i // 4, j // 4]),
            batch=2,
        ),
        Defined("clusters", fl.clusters(labels), by_labels(labels, labels), batch=2),
        Defined("clusters, own keys", fl.clusters(query_labels, key_labels), by_labels(query_labels[None], key_labels[None])),
        Defined("chosen_blocks", fl.chosen_blocks(lists, block=4, query_block=3), in_list(lists, 3, 4), batch=2),
        Defined("chosen_keys", fl.chosen_keys(keys), in_list(keys, 1, 1)),
        Defined("per_head", fl.per_head(halves), heads),
    ]


DEFINED = (*positional(), *named(), *random(), *content())
