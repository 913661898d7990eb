"""`rooms`, `meets`, `between` and `unseen`: the scalar truth against plain loops, the intervals and plans against the truth,
and all ways of writing them down.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.patterns import Pattern, Sizes, parse
from farlight.patterns.membership import rooms
from farlight.patterns.multi_label import meets
from farlight.patterns.uncovered import unseen
from farlight.plan import TileShape, plan_for
from farlight.plan.layout import TermLayout
from farlight.plan.normal_form import terms_of
from farlight.routing import LSH, Router, TopBlocks, between

G = torch.Generator().manual_seed(2)
MEMBERS = torch.rand(2, 2, 23, 5, generator=G) < 0.3
OF_QUERIES, OF_KEYS = torch.rand(1, 2, 17, 70, generator=G) < 0.05, torch.rand(2, 1, 23, 70, generator=G) < 0.05
STARTS, STOPS = torch.randint(-3, 25, (2, 1, 17), generator=G), torch.randint(-3, 30, (1, 2, 17), generator=G)
LABELS = torch.randint(-1, 5, (2, 2, 23, 3), generator=G)
Q_LABELS, K_LABELS = torch.randint(-1, 9, (1, 2, 17, 2), generator=G), torch.randint(-2, 9, (2, 1, 23, 2), generator=G)
LISTS, ONE_LABEL = torch.randint(-1, 6, (2, 2, 17, 4), generator=G), torch.randint(-1, 6, (1, 2, 23, 1), generator=G)
SEEN = fl.window(2, 0) | fl.chosen_blocks(torch.randint(-1, 6, (2, 2, 6, 2), generator=G), block=4)

Rule = Callable[[int, int, int, int], bool]  # (b, h, i, j)


def pick(table: Tensor, b: int, h: int) -> Tensor:
    return table[b % table.shape[0], h % table.shape[1]]


def shares_a_label(query: Tensor, key: Tensor, offset: int) -> Rule:
    def rule(b: int, h: int, i: int, j: int) -> bool:
        mine, theirs = pick(query, b, h)[i - offset].tolist(), pick(key, b, h)[j].tolist()
        return any(a == c >= 0 for a, c in zip(mine, theirs if len(theirs) > 1 else theirs * len(mine), strict=True))

    return rule


def is_free(keys: int, block: int, causal: bool, b: int, h: int, i: int, cell: int, level: int) -> bool:
    size, mask = block * 2**level, SEEN.dense(17, keys, batch=2, heads=2)
    inside = range(cell * size, min(keys, (cell + 1) * size))
    if any(bool(mask[b, h, i - (keys - 17), j]) for j in inside):
        return False
    if causal and (cell + 1) * size > i + 1:
        return False
    return level == 0 or abs(i // size - cell) > 1


def is_summarised(block: int, level: int, levels: int, causal: bool) -> Rule:
    def rule(b: int, h: int, i: int, j: int) -> bool:
        if not is_free(23, block, causal, b, h, i, j, level):
            return False
        return level + 1 == levels or not is_free(23, block, causal, b, h, i, j // 2, level + 1)

    return rule


CASES: dict[str, tuple[Pattern, Sizes, Rule]] = {
    "rooms": (
        rooms(MEMBERS),
        Sizes(23, 23, 0, 2, 2),
        lambda b, h, i, j: bool((pick(MEMBERS, b, h)[i] & pick(MEMBERS, b, h)[j]).any()),
    ),
    "rooms of some queries": (
        rooms(OF_QUERIES, OF_KEYS),
        Sizes(17, 23, 6, 2, 2),
        lambda b, h, i, j: bool((pick(OF_QUERIES, b, h)[i - 6] & pick(OF_KEYS, b, h)[j]).any()),
    ),
    "meets": (meets(LABELS), Sizes(23, 23, 0, 2, 2), shares_a_label(LABELS, LABELS, 0)),
    "meets of some queries": (
        meets(Q_LABELS, K_LABELS),
        Sizes(17, 23, 6, 2, 2),
        shares_a_label(Q_LABELS, K_LABELS.clamp(min=-1), 6),
    ),
    "meets, lists": (meets(LISTS, ONE_LABEL), Sizes(17, 23, 6, 2, 2), shares_a_label(LISTS, ONE_LABEL, 6)),
    "meets, one round": (
        meets(Q_LABELS[..., :1], K_LABELS[..., :1]),
        Sizes(17, 23, 6, 2, 2),
        shares_a_label(Q_LABELS[..., :1], K_LABELS[..., :1], 6),
    ),
    "between": (
        between(STARTS, STOPS),
        Sizes(17, 23, 6, 2, 2),
        lambda b, h, i, j: int(pick(STARTS, b, h)[i - 6]) <= j < int(pick(STOPS, b, h)[i - 6]),
    ),
    "between, to the end": (
        between(STARTS),
        Sizes(17, 23, 6, 2, 2),
        lambda b, h, i, j: int(pick(STARTS, b, h)[i - 6]) <= j,
    ),
    **{
        f"unseen {level} of {levels}, {block}{', causal' if causal else ''}": (
            unseen(SEEN, block, 23, level, levels, causal),
            Sizes(17, -(-23 // (block << level)), 6, 2, 2),
            is_summarised(block, level, levels, causal),
        )
        for block in (2, 3)
        for levels in (1, 3)
        for level in range(levels)
        for causal in (False, True)
    },
}


@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition(name: str) -> None:
    pattern, s, rule = CASES[name]
    wanted = torch.zeros(s.batch, s.heads, s.n_q, s.n_k, dtype=torch.bool)
    for b in range(s.batch):
        for h in range(s.heads):
            for r in range(s.n_q):
                for j in range(s.n_k):
                    wanted[b, h, r, j] = rule(b, h, r + s.q_offset, j)
    shape = {"batch": s.batch, "heads": s.heads, "q_offset": s.q_offset}
    assert torch.equal(pattern.dense(s.n_q, s.n_k, **shape).expand(wanted.shape), wanted)
    planned = fl.plan(pattern, s.n_q, s.n_k, **shape)
    planned.check()
    assert torch.equal(planned.dense(), wanted)
    assert planned.pairs == int(wanted.sum())
    if not name.startswith("unseen"):
        others = [fl.clusters(torch.arange(s.n_k) % 3), fl.window(2), fl.random_keys(2)]
        for other in others:
            for joined in (pattern | other, pattern & other, other - pattern, pattern - other, ~pattern & other):
                assert torch.equal(
                    fl.plan(joined, s.n_q, s.n_k, **shape).dense(), joined.dense(s.n_q, s.n_k, **shape).expand(wanted.shape)
                )


@pytest.mark.parametrize("name", CASES)
def test_round_trips(name: str) -> None:
    pattern, s, _ = CASES[name]
    shape = {"batch": s.batch, "heads": s.heads, "q_offset": s.q_offset}
    before = pattern.dense(s.n_q, s.n_k, **shape)
    joined = fl.clusters([0, 1]) | pattern
    for again in (
        parse(repr(pattern)),
        Pattern.from_json(pattern.to_json()),
        pickle.loads(pickle.dumps(pattern)),
        copy.deepcopy(pattern),
        parse(joined.text, joined.tables).parts[1],  # type: ignore[attr-defined]
    ):
        assert again == pattern
        assert torch.equal(again.dense(s.n_q, s.n_k, **shape), before)


def test_each_uncovered_block_is_summarised_once() -> None:
    """Over the levels, every block of which a query sees nothing is covered by exactly one cell."""
    n, block, levels = 96, 2, 5
    pattern = fl.window(3) | fl.random_blocks(2, block=block)
    shape = {"q_offset": 0, "heads": 2}
    count = torch.zeros(1, 2, n, n // block, dtype=torch.int64)
    for level in range(levels):
        cells = -(-n // (block << level))
        one = unseen(pattern, block, n, level, levels).dense(n, cells, **shape)
        count += one.repeat_interleave(2**level, 3)[..., : n // block].long()
    nothing = ~pattern.dense(n, heads=2).unflatten(3, (-1, block)).any(-1)
    assert torch.equal(count, nothing.long())


def test_cost_of_many_levels_is_n_log_n() -> None:
    counts = []
    for n in (1 << 10, 1 << 12, 1 << 14):
        levels, total = max(1, (n // 16).bit_length() - 2), 0
        for level in range(levels):
            heard_cells = unseen(fl.blocked_window(1, block=16), 16, n, level, levels)
            total += fl.plan(heard_cells, n, n // (16 << level), q_offset=0).pairs
        counts.append(total / n)
    assert counts[1] - counts[0] < 8
    assert counts[2] - counts[1] < 8  # a few cells more for each query when the text grows fourfold
    flat = fl.plan(unseen(fl.blocked_window(1, block=16), 16, 1 << 14), 1 << 14, 1 << 10, q_offset=0).pairs
    assert flat / (1 << 14) > 30 * counts[2]


@pytest.mark.parametrize(
    "router", [LSH(8, 3), LSH(16, 2, causal=True), TopBlocks(5, 8, 1), TopBlocks(5, 8, causal=True)], ids=repr
)
def test_planning_evaluates_no_single_pair(router: Router) -> None:
    """Duplicates between terms are excluded by construction, without evaluating pairs; and the tiles are dense."""
    x = torch.randn(1, 2, 500, 8, generator=torch.Generator().manual_seed(0))
    pattern, sizes = router(x, x), Sizes(500, 500, 0, 1, 2)
    assert not any(TermLayout(term, sizes, 32).pairwise for term in terms_of(pattern, sizes))
    # A list of blocks for each query: 32 rows visit the blocks of all of them, or gather keys that few see.
    assert plan_for(pattern, sizes, TileShape()).waste < (2 if isinstance(router, LSH) else 5)


def test_a_long_text_of_clusters_is_planned_by_its_pairs() -> None:
    """2^15 tokens in 2^11 clusters of 32: one pair in a thousand, and no n² anywhere."""
    members = torch.zeros(1, 1, 1 << 15, 1 << 11, dtype=torch.bool)
    order = torch.randperm(1 << 15, generator=torch.Generator().manual_seed(0))
    members[0, 0, order, torch.arange(1 << 15) % (1 << 11)] = True
    assert rooms(members).count(1 << 15) == (1 << 11) * 16**2
