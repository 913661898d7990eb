"""The exchange as a pure function: every link served once, nothing superfluous sent, the cheapest cover, predicted bytes."""

from __future__ import annotations

import itertools
import sys

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from spread_cases import layouts

import farlight as fl
from farlight.distributed import Layout
from farlight.distributed.collectives import pack, unpack
from farlight.distributed.communication import problem_of
from farlight.distributed.cover import minimum_cover
from farlight.distributed.exchange import ClassExchange, Exchange, exchange
from farlight.distributed.links import row_spans
from farlight.distributed.traffic import TravelWidths, forward_traffic
from farlight.patterns import Pattern, Sizes
from farlight.testing import CASES, Case
from farlight.testing.strategies import problems

WIDTHS = TravelWidths(8, 8, 4, 4)


def exchanged(pattern: Pattern, sizes: Sizes, world: int, seed: int, kv_heads: int = 0, move: str = "cheapest") -> Exchange:
    case = Case("", pattern, sizes.n_q, sizes.n_k)
    queries, keys = layouts(case, world, seed)
    return exchange(problem_of(pattern, sizes, kv_heads or sizes.heads, queries, keys, WIDTHS, move))


def check_links(found: Exchange) -> None:
    """Every remote link has its key or its query moved, every moved token serves a link, pairs are those of the pattern."""
    problem, sizes = found.problem, found.problem.sizes
    mask = problem.pattern.dense(sizes.n_q, sizes.n_k, batch=sizes.batch, heads=sizes.heads, q_offset=sizes.q_offset)
    mask = mask.expand(sizes.batch, sizes.heads, -1, -1)
    reader, owner = problem.queries.owner_of(np.arange(sizes.n_q)), problem.keys.owner_of(np.arange(sizes.n_k))
    pairs = np.zeros(problem.world, dtype=np.int64)
    for moved in found.classes:
        for row in moved.heads.rows:
            b, kv_head = divmod(row, problem.kv_heads)
            links = mask[b, kv_head * problem.group : (kv_head + 1) * problem.group].numpy()
            check_class(moved, links.any(0), reader, owner)
            by_key = travels(moved, True, sizes.n_k, problem.world).T[reader]  # (n_q, n_k): the key comes to the query
            computed_by = np.where((reader[:, None] == owner) | by_key, reader[:, None], owner)
            pairs += np.bincount(computed_by[None].repeat(len(links), 0)[links], minlength=problem.world)
    predicted = sum(len(moved.heads.rows) * moved.pairs for moved in found.classes)
    assert pairs.tolist() == np.broadcast_to(predicted, problem.world).tolist()


def travels(moved: ClassExchange, keys: bool, n: int, world: int) -> np.ndarray:
    """`(n, world)` bool: which keys or rows travel to which rank."""
    table = np.zeros((n, world), dtype=bool)
    moves = moved.keys if keys else moved.rows
    for target, lo, hi in zip(moves.target, moves.lo, moves.hi, strict=True):
        assert not table[lo:hi, target].any(), "sent twice"
        table[lo:hi, target] = True
    return table


def check_class(moved: ClassExchange, links: np.ndarray, reader: np.ndarray, owner: np.ndarray) -> None:
    world = int(max(reader.max(initial=0), owner.max(initial=0), moved.keys.target.max(initial=0))) + 1
    world = max(world, int(moved.rows.target.max(initial=0)) + 1)
    key_moves, row_moves = travels(moved, True, links.shape[1], world), travels(moved, False, links.shape[0], world)
    remote = links & (reader[:, None] != owner)
    served = key_moves.T[reader] | row_moves[:, owner]
    assert not (remote & ~served).any(), "a link that nobody can compute"
    for rank in range(world):
        assert not (key_moves[:, rank] & ~remote[reader == rank].any(0)).any(), "a key that its target does not need"
        assert not (row_moves[:, rank] & ~remote[:, owner == rank].any(1)).any(), "a query that its target does not need"


@pytest.mark.parametrize("world", [2, 5])
def test_every_link_of_the_shared_cases_is_served_once(world: int) -> None:
    for number, case in enumerate(CASES):
        if case.n_q * case.n_k < 200_000:
            check_links(exchanged(case.pattern, case.sizes, world, number, case.kv_heads, "cheapest" if number % 4 else "keys"))


@hypothesis.given(problems(), st.integers(1, 4), st.integers(0, 2**20))
@hypothesis.settings(max_examples=60)
def test_every_link_of_random_expressions_is_served_once(problem: tuple[Pattern, Sizes], world: int, seed: int) -> None:
    check_links(exchanged(*problem, world, seed))


@hypothesis.given(problems())
@hypothesis.settings(max_examples=60)
def test_rows_are_read_as_the_specification_says(problem: tuple[Pattern, Sizes]) -> None:
    pattern, sizes = problem
    mask = pattern.dense(sizes.n_q, sizes.n_k, batch=sizes.batch, heads=sizes.heads, q_offset=sizes.q_offset)
    mask = mask.expand(sizes.batch, sizes.heads, -1, -1)
    i = torch.arange(sizes.n_q) + sizes.q_offset
    for b, h in itertools.product(range(sizes.batch), range(sizes.heads)):
        if i.numel():
            spans = row_spans(pattern, sizes, torch.full_like(i, b), torch.full_like(i, h), i)
            assert torch.equal(spans.mask(), mask[b, h])


def brute_force(links: np.ndarray, rows: list[int], row_weight: int, key_weight: int) -> int:
    """The least weight of a set of groups and keys that touches every link."""
    groups = len(links)
    best = row_weight * sum(rows)
    for kept in itertools.product([False, True], repeat=groups):
        needed = links[~np.array(kept)].any(0).sum()
        best = min(best, row_weight * sum(n for n, k in zip(rows, kept, strict=True) if k) + key_weight * int(needed))
    return best


@hypothesis.given(
    st.lists(st.lists(st.booleans(), min_size=6, max_size=6).filter(any), min_size=1, max_size=6),
    st.lists(st.integers(1, 5), min_size=6, max_size=6),
    st.integers(1, 7),
    st.integers(1, 7),
)
def test_the_cover_is_the_cheapest(links: list[list[bool]], rows: list[int], row_weight: int, key_weight: int) -> None:
    mask, rows = np.array(links), rows[: len(links)]
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    group, lo = np.nonzero(edges == 1)
    hi = np.nonzero(edges == -1)[1]
    cover = minimum_cover(group, lo, hi, np.array(rows), row_weight, key_weight)
    moved = np.zeros(6, dtype=bool)
    for first, last in cover.keys:
        moved[first:last] = True
    assert not (mask & ~moved & ~cover.groups[:, None]).any()
    weight = key_weight * int(moved.sum()) + row_weight * int(np.array(rows)[cover.groups].sum())
    assert weight == cover.weight == brute_force(mask, rows, row_weight, key_weight)


@pytest.mark.slow
@hypothesis.given(problems(max_length=10), st.integers(1, 3), st.integers(0, 2**20))
@hypothesis.settings(max_examples=300)
def test_what_travels_is_the_cheapest_that_serves_all_links(problem: tuple[Pattern, Sizes], world: int, seed: int) -> None:
    """Bytes handed over = weight of the covers = brute force over all sets of moved queries, for each pair of ranks."""
    pattern, sizes = problem
    found = exchanged(pattern, sizes, world, seed)
    asked = found.problem
    mask = pattern.dense(sizes.n_q, sizes.n_k, batch=sizes.batch, heads=sizes.heads, q_offset=sizes.q_offset)
    mask = mask.expand(sizes.batch, sizes.heads, -1, -1)
    reader, owner = asked.queries.owner_of(np.arange(sizes.n_q)), asked.keys.owner_of(np.arange(sizes.n_k))
    least = sent = 0
    for moved in found.classes:
        sent += len(moved.heads.rows) * moved.weight
        # The heads of a class see the same, or share a key head: their links travel together.
        for row in moved.heads.rows:
            b, kv_head = divmod(row, asked.kv_heads)
            links = mask[b, kv_head * asked.group : (kv_head + 1) * asked.group].any(0).numpy()
            for here, there in itertools.permutations(range(world), 2):
                block = links[np.ix_(reader == here, owner == there)]
                if block.any():
                    least += brute_force(block, [1] * len(block), asked.group * asked.row_bytes, asked.key_bytes)
    traffic = forward_traffic(found, WIDTHS)
    assert least == sent == int((traffic.direct + traffic.results).sum())


def test_a_window_moves_keys_and_lighthouses_move_queries() -> None:
    found = exchanged_even(fl.window(4) | fl.global_tokens([0]), 100, 4)
    (moved,) = found.classes
    assert moved.rows.source.tolist() == [0, 0, 0]
    assert moved.rows.lo.tolist() == [0, 0, 0]
    windows = [(s, t, lo, hi) for s, t, lo, hi in zip(*vars(moved.keys).values(), strict=True) if lo]
    assert windows == [(0, 1, 21, 25), (1, 0, 25, 29), (1, 2, 46, 50), (2, 1, 50, 54), (2, 3, 71, 75), (3, 2, 75, 79)]


def exchanged_even(pattern: Pattern, n: int, world: int) -> Exchange:
    layout = Layout.even(n, world)
    return exchange(problem_of(pattern, Sizes.of(n), 1, layout, layout, WIDTHS, "cheapest"))


def test_bytes_without_broadcasts_are_the_weight_of_the_covers() -> None:
    for pattern in (fl.window(9) | fl.random_keys(2) | fl.global_tokens([0, 70]), fl.presets.bigbird(8, 2), fl.causal()):
        plan = Layout.even(200, 5).communication(pattern, heads=3, head_dim=16)
        assert plan.sent.sum() == plan.received.sum() == plan.minimum
        assert plan.sent_backward.sum() == plan.received_backward.sum()
        assert plan.pairs.sum() == pattern.count(200, heads=3)


def test_a_million_tokens_on_a_thousand_ranks() -> None:
    """Longformer(512) with 64 global tokens: at most 2.5 MB a rank in a forward pass, whoever owns the global tokens."""
    pattern = fl.presets.longformer(512, range(64))
    plan = Layout.even(2**20, 1024).communication(pattern, heads=12, head_dim=64)
    assert plan.sent.max() < 2.5e6
    assert plan.received.max() < 2.5e6
    assert plan.pairs.sum() == 12 * pattern.count(2**20)
    assert "1023 " in str(plan)


def test_labels_are_grouped_without_the_square_of_the_text() -> None:
    labels = torch.arange(30_000) // 50 % 64
    plan = Layout.even(30_000, 4).communication(fl.clusters(labels) & fl.window(400), heads=1, head_dim=8)
    assert plan.pairs.sum() == (fl.clusters(labels) & fl.window(400)).count(30_000)


def test_without_scipy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(fl.UnsupportedError, match=r"max-flow from scipy .*'farlight\[distributed\]', or pass move='keys'"):
        exchanged_even(fl.window(4), 100, 2)
    layout = Layout.even(100, 2)
    layout.communication(fl.window(4), heads=1, head_dim=8, move="keys")
    exchanged_even(fl.seen_by_all([0, 1]) | fl.sees_all([3]) & fl.window(0), 100, 2)  # one side is lighter: no flow is needed


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(fl.PatternError, match="it has 5 rows"):
        Layout.even(10, 2).communication(fl.pairs(torch.ones(5, 5, dtype=torch.bool)), heads=1, head_dim=8)
    with pytest.raises(fl.ArgumentError, match="3 heads are not a multiple of 2 key heads"):
        Layout.even(10, 2).communication(fl.full(), heads=3, kv_heads=2, head_dim=8)


def test_tensors_of_any_strides_are_packed() -> None:
    """A view of one element is contiguous with any stride."""
    x = torch.arange(6, dtype=torch.float64)
    message = [x[1::2][:1], x.bfloat16()[::3], x[:0], x.view(2, 3).t(), x[None, 4::2].expand(3, -1)[:1]]
    data = pack([message, message], torch.device("cpu"))
    shapes = [(tuple(part.shape), part.dtype) for part in message]
    for unpacked in unpack(data, [shapes, shapes]):
        for part, expected in zip(unpacked, message, strict=True):
            assert torch.equal(part, expected)
