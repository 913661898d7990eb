"""`fl.path`, `fl.reach` and the load of relays against networkx and against pair-by-pair counts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import farlight as fl
from farlight.analysis.graph import Path, path, reach
from farlight.analysis.graph import capacity as capacity_module
from farlight.analysis.graph.capacity import capacity
from farlight.analysis.graph.links import LazyLinks, Links
from farlight.analysis.graph.rules import _REACH, _RESTRICT, rules_of
from farlight.errors import ArgumentError, PatternError
from farlight.patterns import CONSTRUCTORS, Sizes
from farlight.testing.strategies import patterns

SOME = {
    "window": fl.window(2),
    "window and global": fl.window(2) | fl.global_tokens([50]),
    "all three": fl.presets.longformer(8, (0, -1)) | fl.random_keys(1, seed=3),
    "causal": fl.presets.streaming(2, 5),
    "sorted tokens": fl.presets.longformer(4, (7, 60, 61), dilation=3) | fl.strided(20),
    "random alone": fl.random_keys(2, seed=9),
    "one way round": fl.offsets([-1]),
    "documents": fl.documents(lengths=[40, 60]) & fl.window(3),
}


def digraph(
    pattern: fl.Pattern, n: int, at: Sizes | None = None, batch: int = 0, head: int = 0
) -> tuple[nx.DiGraph, np.ndarray]:
    dense = pattern.dense(n) if at is None else pattern.dense(n, batch=at.batch, heads=at.heads)
    allowed = dense[min(batch, dense.shape[0] - 1), min(head, dense.shape[1] - 1)].numpy()
    return nx.from_numpy_array(allowed.T.astype(int), create_using=nx.DiGraph), allowed


def check_path(result: Path, graph: nx.DiGraph, allowed: np.ndarray) -> None:
    if not nx.has_path(graph, result.source, result.target):
        assert not result
        assert result.layers is None
        assert result.positions == result.hops == ()
        assert result.heard == len(nx.ancestors(graph, result.target)) + 1
        return
    assert result
    assert result.layers == len(result.hops) == nx.shortest_path_length(graph, result.source, result.target)
    assert result.positions[0] == result.source
    assert result.positions[-1] == result.target
    for hop, j, i in zip(result.hops, result.positions, result.positions[1:], strict=False):
        assert (hop.speaker, hop.listener) == (j, i)
        assert allowed[i, j]
        assert hop.rules


@pytest.mark.parametrize("name", SOME)
def test_paths_are_shortest_and_allowed(name: str) -> None:
    n = 100
    graph, allowed = digraph(SOME[name], n)
    rng = np.random.default_rng(0)
    for source, target in [(0, 99), (99, 0), (3, 3), *rng.integers(0, n, (30, 2)).tolist()]:
        check_path(path(SOME[name], n, source, target), graph, allowed)


@st.composite
def problems(draw: st.DrawFn) -> tuple[fl.Pattern, Sizes, list[int]]:
    n = draw(st.integers(1, 60))
    at = Sizes.of(n, batch=draw(st.integers(1, 2)), heads=draw(st.integers(1, 3)))
    wanted = [n - 1, n - 1, at.batch - 1, at.heads - 1]
    return draw(patterns(at, 4)), at, [draw(st.integers(0, most)) for most in wanted]


@given(problems())
@settings(max_examples=100)
def test_paths_of_random_expressions(problem: tuple[fl.Pattern, Sizes, list[int]]) -> None:
    pattern, at, (source, target, batch, head) = problem
    graph, allowed = digraph(pattern, at.n_k, at, batch, head)
    check_path(path(pattern, at.n_k, source, target, batch=batch, head=head), graph, allowed)


def test_paths_by_the_rows_that_see_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farlight.analysis.graph.paths._LARGE_FRONTIER", 3)
    for pattern in SOME.values():
        graph, allowed = digraph(pattern, 100)
        for source, target in np.random.default_rng(1).integers(0, 100, (12, 2)).tolist():
            check_path(path(pattern, 100, source, target), graph, allowed)


def test_a_long_search_computes_all_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    row_counts: list[int] = []
    lazy_runs = LazyLinks.runs

    def spy(self: LazyLinks, which: np.ndarray) -> list:  # type: ignore[type-arg]
        row_counts.append(which.size)
        return lazy_runs(self, which)

    monkeypatch.setattr(LazyLinks, "runs", spy)
    result = path(fl.window(1), 300, 0, 299)
    assert result.layers == 299
    assert len(row_counts) < 80
    assert path(fl.window(1) & fl.causal(), 300, 299, 0).layers is None


def test_a_short_path_computes_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a long text a short path computes the runs of rows near the target only."""
    row_counts: list[int] = []
    lazy_runs = LazyLinks.runs

    def spy(self: LazyLinks, which: np.ndarray) -> list:  # type: ignore[type-arg]
        row_counts.append(which.size)
        return lazy_runs(self, which)

    monkeypatch.setattr(LazyLinks, "runs", spy)
    result = path(fl.window(16) | fl.global_tokens([0]), 200_000, 100_000, 199_999)
    assert result.positions == (100_000, 0, 199_999)
    assert sum(row_counts) < 100


# ---- words -------------------------------------------------------------------------------------------------------------


def rules(pattern: fl.Pattern, i: int, j: int, n: int = 64, head: int = 0) -> tuple[str, ...]:
    heads = getattr(pattern, "parts", [0]) if isinstance(pattern, type(fl.per_head([fl.full()]))) else [0]
    assert pattern.dense(n, heads=len(heads))[0, min(head, len(heads) - 1), i, j]
    return path(pattern, n, j, i, head=head).hops[0].rules


@pytest.mark.parametrize(
    "pattern, i, j, words",
    [
        (fl.window(4), 9, 7, ("window",)),
        (fl.window(4) | fl.global_tokens([0]), 3, 0, ("window", "global token 0")),
        (fl.window(4) | fl.global_tokens([5, -1]), 30, 63, ("global token 63",)),
        (fl.global_tokens([5]), 5, 40, ("global token 5",)),
        (fl.sees_all([5]), 5, 40, ("global token 5",)),
        (fl.seen_by_all([5]), 40, 5, ("global token 5",)),
        (fl.global_tokens(torch.arange(64) == 7), 20, 7, ("global token 7",)),
        (fl.causal() & fl.window(4), 9, 7, ("window within the past",)),
        (fl.causal() & (fl.window(4) | fl.landmarks(8)), 30, 7, ("landmark within the past",)),
        (fl.causal() & fl.padding([60]), 9, 7, ("the past and the real tokens",)),
        (fl.full() & fl.window(3), 9, 7, ("window",)),
        (fl.full(), 9, 7, ("everything",)),
        (fl.full() & fl.full(), 9, 7, ("everything",)),
        (fl.window(4) & fl.documents(lengths=[32, 32]), 9, 7, ("window within one document",)),
        (fl.documents(lengths=[32, 32]), 9, 7, ("one document",)),
        (fl.window(8) & fl.strided(2), 9, 7, ("window and stride",)),
        (fl.window(8, dilation=2), 9, 7, ("window",)),
        (fl.window(8) - fl.window(1), 9, 7, ("window",)),
        (fl.window(8) & ~fl.window(1), 9, 7, ("window within ~window(1)",)),
        (~fl.window(3), 9, 30, ("~window(3)",)),
        (~~fl.window(3), 9, 8, ("window",)),
        (fl.blocked_window(1, block=8), 9, 17, ("window of blocks",)),
        (fl.offsets([-3]), 9, 6, ("offset",)),
        (fl.clusters(torch.arange(64).view(1, 1, -1) % 3), 9, 6, ("cluster",)),
        (fl.chosen_keys(torch.full((1, 1, 64, 1), 6)), 9, 6, ("chosen key",)),
        (fl.pairs(torch.ones(64, 64, dtype=torch.bool)), 9, 6, ("listed pair",)),
        (fl.per_head([fl.window(4)]), 9, 7, ("window",)),
    ],
)
def test_the_rule_of_a_hop(pattern: fl.Pattern, i: int, j: int, words: tuple[str, ...]) -> None:
    assert rules(pattern, i, j) == words


def test_random_rules() -> None:
    for pattern, word in ((fl.random_keys(2), "random key"), (fl.random_blocks(1, block=8), "random block")):
        j = int(pattern.dense(64)[0, 0, 9].nonzero().flatten()[-1])
        assert rules(pattern, 9, j if j != 9 else int(pattern.dense(64)[0, 0, 9].nonzero()[0])) == (word,)
    by_head = fl.per_head([fl.window(4), fl.global_tokens([0])])
    assert path(by_head, 64, 0, 3, head=0).hops[0].rules == ("window",)
    assert path(by_head, 64, 0, 3, head=1).hops[0].rules == ("global token 0",)


def test_every_constructor_has_a_word() -> None:
    named = {kind.__name__ for kind in (*_REACH, *_RESTRICT)} | {"global_tokens", "sees_all", "seen_by_all", "per_head"}
    assert named == set(CONSTRUCTORS)
    assert rules_of(fl.window(1), 0, 1, 0, lambda part: True) == ("window",)


def test_a_path_is_a_sentence() -> None:
    pattern = fl.window(2) | fl.global_tokens([0])
    result = path(pattern, 1000, 998, 500)
    assert str(result) == "500 hears of 998 after 2 layers: 0 hears 998 by global token 0, 500 hears 0 by global token 0."
    listed = ["[CLS]", *["x"] * 499, "Harry"]
    assert result.tell(listed).startswith("Harry (500) hears of 998 after 2 layers: [CLS] (0) hears 998 by")
    assert str(result.hops[0]) == "0 hears 998 (global token 0)"
    assert str(path(pattern, 1000, 3, 3)) == "3 is 3 itself: no layer is needed."
    assert str(path(pattern, 1000, 4, 3)) == "3 hears of 4 after 1 layer: 3 hears 4 by window."
    assert str(path(fl.causal(), 1000, -1, 3)) == (
        "3 never hears of 999, through however many layers: it hears of 4 of 1,000 tokens, itself included."
    )
    assert "… 43 more …" in str(path(fl.window(2), 100, 0, 97))
    again = json.loads(json.dumps(result.to_dict()))
    assert again["positions"] == [998, 0, 500]
    assert again["hops"][0] == {"speaker": 998, "listener": 0, "rules": ["global token 0"]}


# ---- reach -------------------------------------------------------------------------------------------------------------


def heard_of(allowed: np.ndarray, layers: int) -> np.ndarray:
    """(layers + 1, n): how many tokens each has heard of, by multiplying reach with the matrix."""
    known = np.eye(allowed.shape[0], dtype=bool)
    out = [known.sum(1)]
    for _ in range(layers):
        known = known | ((allowed.astype(int) @ known.astype(int)) > 0)
        out.append(known.sum(1))
    return np.array(out)


@pytest.mark.parametrize("name", SOME)
def test_reach_agrees_with_matrix_products(name: str) -> None:
    result = reach(SOME[name], 100, 6)
    want = heard_of(digraph(SOME[name], 100)[1], 6) / 100
    assert result.exact
    assert result.positions.tolist() == list(range(100))
    assert result.share == pytest.approx(want, abs=1e-9)
    assert result.mean == pytest.approx(want.mean(1), abs=1e-9)
    assert result.worst == pytest.approx(want.min(1), abs=1e-9)
    assert set(result.margin) == {0.0}


@given(problems())
@settings(max_examples=50)
def test_reach_of_random_expressions(problem: tuple[fl.Pattern, Sizes, list[int]]) -> None:
    pattern, at, (_, layers, batch, head) = problem
    layers = min(layers, 5)
    result = reach(pattern, at.n_k, layers, batch=batch, head=head)
    _, allowed = digraph(pattern, at.n_k, at, batch, head)
    assert result.share == pytest.approx(heard_of(allowed, layers) / at.n_k, abs=1e-9)
    assert result.capacity is not None
    if at.n_k <= 60:
        check_capacity(result.capacity, allowed)


def test_drawn_reach_covers_the_exact_one() -> None:
    pattern = fl.window(4) | fl.random_keys(1, seed=2)
    exact = reach(pattern, 1500, 6, targets=1500, readers=0)
    assert exact.exact
    assert exact.capacity is None
    good = 0
    for seed in range(20):
        result = reach(pattern, 1500, 6, targets=150, readers=0, seed=seed)
        assert not result.exact
        assert result.share.shape == (7, 150)
        assert (np.abs(np.array(result.mean) - exact.mean) <= np.array(result.margin) + 1e-12)[:2].all(), "known from the count"
        good += bool((np.abs(np.array(result.mean) - exact.mean) <= np.array(result.margin) + 1e-12).all())
        # The row of a position is exact even when positions are sampled.
        assert result.share == pytest.approx(exact.share[:, result.positions], abs=1e-12)
    assert good >= 18


def test_reach_prints_and_answers_depth() -> None:
    result = reach(fl.window(5) | fl.global_tokens([0]), 1000, 3)
    assert result.depth() == 2
    assert result.depth(0.005) == 1
    assert reach(fl.window(5), 1000, 3, readers=0).depth() is None
    assert str(result).splitlines()[:6] == [
        "window(5) | global_tokens([0]) over 1,000 tokens (every token)",
        "layer   mean heard of   worst",
        "    0            0.1%   0.1%",
        "    1           1.30%   0.7%",
        "    2         100.00%   100.00%",
        "    3         100.00%   100.00%",
    ]
    assert "capacity: a token sees" in str(result)
    assert "± " in str(reach(fl.window(5) | fl.random_keys(1), 2000, 3, targets=64))
    assert [
        line.split()[0] for line in str(reach(fl.window(1), 60, 30, readers=0)).splitlines()[2:]
    ] == "0 1 2 4 8 16 30".split()  # noqa: SIM905
    again = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert again["mean"] == list(result.mean)
    assert again["capacity"]["busiest"][0]["position"] == 0


# ---- capacity ----------------------------------------------------------------------------------------------------------


def brute_force_loads(allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(reader, relay) loads and sole counts, and the number of tokens each reader sees itself, one pair at a time."""
    n = allowed.shape[0]
    load, sole = np.zeros((n, n)), np.zeros((n, n))
    near = np.array([len({i, *np.flatnonzero(allowed[i])}) for i in range(n)])
    for i in range(n):
        for j in range(n):
            if j == i or allowed[i, j]:
                continue
            relays = [h for h in range(n) if h != i and allowed[i, h] and allowed[h, j]]
            for h in relays:
                load[i, h] += 1 / len(relays)
            if len(relays) == 1:
                sole[i, relays[0]] += 1
    return load, sole, near


def check_capacity(result: capacity_module.Capacity, allowed: np.ndarray) -> None:
    load, sole, near = brute_force_loads(allowed)
    assert result.exact
    assert result.near == pytest.approx(near.mean(), abs=1e-9)
    assert result.relayed == pytest.approx(load.sum(1).mean(), abs=1e-9)
    assert result.sole == pytest.approx(sole.sum(1).mean(), abs=1e-9)
    assert result.relays == pytest.approx((load > 0).sum(1).mean(), abs=1e-9)
    assert result.bottleneck == pytest.approx(load.max(1).mean(), abs=1e-9)
    assert len(result.busiest) == min(16, (load.sum(0) > 0).sum())
    strict = allowed & ~np.eye(allowed.shape[0], dtype=bool)
    for relay in result.busiest:
        assert relay.load == pytest.approx(load[:, relay.position].mean(), abs=1e-9)
        assert relay.sole == pytest.approx(sole[:, relay.position].mean(), abs=1e-9)
        assert relay.hears == strict[relay.position].sum()
        assert relay.heard_by == strict[:, relay.position].sum()
    assert [relay.load for relay in result.busiest] == sorted((relay.load for relay in result.busiest), reverse=True)


@pytest.mark.parametrize("name", SOME)
def test_loads_of_relays_by_brute_force(name: str) -> None:
    check_capacity(capacity(Links.of(SOME[name], 100), readers=100), digraph(SOME[name], 100)[1])


def test_four_global_tokens_share_the_load_of_one() -> None:
    """Distances are the same with one global token and with four; the bottleneck is a quarter."""
    one = reach(fl.window(8) | fl.global_tokens([0]), 2000, 2)
    four = reach(fl.window(8) | fl.global_tokens(range(4)), 2000, 2)
    assert one.mean[2] == four.mean[2] == 1.0
    assert one.capacity is not None
    assert four.capacity is not None
    assert one.capacity.bottleneck > 0.97 * 2000
    assert four.capacity.bottleneck == pytest.approx(one.capacity.bottleneck / 4, rel=0.02)
    assert one.capacity.sole > 0.9 * 2000
    assert four.capacity.sole < 20
    assert [relay.position for relay in four.capacity.busiest[:4]] == [0, 1, 2, 3]


def test_fewer_readers_beyond_the_work_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    links = Links.of(fl.window(2) | fl.global_tokens([0]), 400)
    assert capacity(links, readers=50).readers == 50
    monkeypatch.setattr(capacity_module, "_WORK", 10_000)
    few = capacity(links, readers=50)
    assert 1 <= few.readers < 10
    assert not few.exact
    assert str(capacity(Links.of(fl.full(), 20), readers=5)) == "capacity: no token needs a relay within two hops"


# ---- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, kind, text",
    [
        (
            lambda: path(fl.full(), 10, 10, 0),
            ArgumentError,
            "source = 10 is not a position in a text of n = 10 tokens; use 0 … 9, or -10 … -1 from",
        ),
        (lambda: path(fl.full(), 10, 0, -11), ArgumentError, "target = -11 is not a position in a text of n = 10 tokens"),
        (lambda: path(fl.full(), 10, 0, 1.5), ArgumentError, "target = 1.5: a whole number is needed, not float"),
        (
            lambda: path(fl.window(2) | fl.documents(lengths=[12]), 10, 0, 1),
            PatternError,
            "the lengths add up to 12, more than the 10 tokens",
        ),
        (lambda: path("full()", 10, 0, 1), ArgumentError, "str is not a pattern"),
        (lambda: reach(fl.full(), 10, -1), ArgumentError, "layers = -1: it must be a whole number >= 0"),
        (lambda: reach(fl.full(), 10, 2, readers=-1), ArgumentError, "readers = -1: it must be a whole number >= 0"),
        (lambda: reach(fl.full(), 10, 2, targets=8), ArgumentError, "targets = 8: it must be a whole number >= 32"),
        (
            lambda: reach(fl.full(), 10, 2, confidence=0),
            ArgumentError,
            "confidence = 0: it must be a probability between 0 and 1",
        ),
        (lambda: reach(fl.full(), 0, 2), ArgumentError, "n = 0: it must be a whole number >= 1"),
    ],
)
def test_errors(call: Callable[[], object], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()


@pytest.mark.slow
def test_a_path_through_a_million_tokens_takes_a_second() -> None:
    torch.set_num_threads(1)
    pattern, n = fl.presets.longformer(512) | fl.random_keys(3), 2**20
    path(pattern, 1000, 0, 999)
    for source, target in ((300, n - 5), (n - 1, 1), (n // 2, n // 3)):
        start = time.process_time()
        result = path(pattern, n, source, target)
        assert time.process_time() - start < 1
        assert result.layers == 2
