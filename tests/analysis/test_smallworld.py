"""`fl.smallworld` against networkx on small graphs, its estimates against the exact values, and its parts alone."""

from __future__ import annotations

import json
import math
import time
from collections import Counter

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import farlight as fl
from farlight.analysis.graph import SmallWorld, baselines, smallworld
from farlight.analysis.graph import clustering as clustering_module
from farlight.analysis.graph.bfs import BitsetBFS
from farlight.analysis.graph.bits import column_counts, nonzero_rows, one_hot_bits, or_rows
from farlight.analysis.graph.distances import survey
from farlight.analysis.graph.links import LazyLinks, Links
from farlight.analysis.graph.sampling import margin_of_mean, max_missed_share, stratified_sample, t_quantile
from farlight.analysis.graph.scatter import RunScatter
from farlight.analysis.graph.spectrum import spectral_gap
from farlight.analysis.memory import peak_memory
from farlight.errors import ArgumentError, PatternError
from farlight.patterns import Sizes
from farlight.testing import CASES
from farlight.testing.strategies import patterns

PRESETS = {
    "longformer": fl.presets.longformer(16, (0, -1)),
    "longformer dilated": fl.presets.longformer(8, (3,), dilation=4),
    "longformer autoregressive": fl.presets.longformer(16, (0, 100), autoregressive=True),
    "bigbird": fl.presets.bigbird(8, 2),
    "etc": fl.presets.etc(5, 4),
    "sparse transformer strided": fl.presets.sparse_transformer(12),
    "sparse transformer fixed": fl.presets.sparse_transformer(12, "fixed", 2),
    "longnet": fl.presets.longnet([16, 64, 256], [1, 4, 16]),
    "streaming": fl.presets.streaming(4, 32),
    "star": fl.presets.star(),
    "logsparse": fl.presets.logsparse(),
}
OTHERS = {
    "full": fl.full(),
    "causal": fl.causal(),
    "window alone": fl.window(3),
    "documents": fl.documents(lengths=[100, 1, 60, 40]),
    "nothing": fl.window(0) - fl.full(),
    "only itself": fl.window(0),
    "one way round": fl.offsets([-1]),
    "few random keys": fl.random_keys(2),
    "per head": fl.per_head([fl.window(2), fl.window(1) | fl.random_keys(1, seed=4)]),
    "holes": fl.window(30) - fl.strided(3),
    "complement": ~fl.window(40),
}


def graphs(
    pattern: fl.Pattern, n: int, batch: int = 0, head: int = 0, batches: int = 1, heads: int = 1
) -> tuple[nx.DiGraph, np.ndarray]:
    """The directed graph with an edge key -> query for each link, and its matrix by query and key, without loops."""
    dense = pattern.dense(n, batch=batches, heads=heads)
    dense = dense[min(batch, dense.shape[0] - 1), min(head, dense.shape[1] - 1)].numpy().copy()
    np.fill_diagonal(dense, False)
    return nx.from_numpy_array(dense.T.astype(int), create_using=nx.DiGraph), dense


def networkx_metrics(graph: nx.DiGraph) -> tuple[Counter[int], float]:
    """Ordered pairs by hops, and the undirected clustering coefficient."""
    hops: Counter[int] = Counter()
    for _, lengths in nx.all_pairs_shortest_path_length(graph):
        hops.update(length for length in lengths.values() if length)
    undirected = nx.Graph(graph.to_undirected())
    return hops, nx.average_clustering(undirected) if len(undirected) else 0.0


def numpy_spectral_gap(dense: np.ndarray) -> float:
    """1 - λ₂ of the normalised weighted adjacency matrix, all eigenvalues computed."""
    weight = (dense.astype(float) + dense.T) / 2
    degree = weight.sum(1)
    kept = degree > 0
    if kept.sum() < 2:
        return math.nan
    root = np.sqrt(degree[kept])
    return float(1 - np.linalg.eigvalsh(weight[kept][:, kept] / np.outer(root, root))[-2])


def compare(world: SmallWorld, graph: nx.DiGraph, dense: np.ndarray) -> None:
    n = dense.shape[0]
    hops, clustering = networkx_metrics(graph)
    pairs = sum(hops.values())
    assert world.exact
    assert world.hops_margin == world.unreachable_margin == world.clustering_margin == 0
    if pairs:
        assert world.hops == pytest.approx(sum(h * c for h, c in hops.items()) / pairs, abs=1e-9)
        assert world.histogram == pytest.approx([hops[h] / pairs for h in range(1, max(hops) + 1)], abs=1e-9)
    else:
        assert math.isnan(world.hops)
        assert world.histogram == ()
    assert world.diameter == max(hops, default=0)
    assert world.unreachable == pytest.approx(1 - pairs / (n * (n - 1)) if n > 1 else 0.0, abs=1e-9)
    assert world.clustering == pytest.approx(clustering, abs=1e-9)
    assert world.spectral_gap == pytest.approx(numpy_spectral_gap(dense), abs=1e-9, nan_ok=True)
    assert world.causal == (not np.triu(dense, 1).any())


@pytest.mark.parametrize("n", [97, 256, 400])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_agree_with_networkx(name: str, n: int) -> None:
    pattern = PRESETS[name]
    if name == "longformer autoregressive" and n < 101:
        n = 101
    graph, dense = graphs(pattern, n)
    world = smallworld(pattern, n)
    compare(world, graph, dense)
    assert world.links == pattern.count(n)
    if (dense == dense.T).all():
        # Undirected: networkx's own average over the undirected graph.
        undirected = graph.to_undirected()
        if nx.is_connected(undirected):
            assert world.hops == pytest.approx(nx.average_shortest_path_length(undirected), abs=1e-9)
            assert world.diameter == nx.diameter(undirected)


@pytest.mark.parametrize("name", OTHERS)
def test_other_patterns_agree_with_networkx(name: str) -> None:
    heads = 2 if name == "per head" else 1
    for head in range(heads):
        graph, dense = graphs(OTHERS[name], 201, head=head, heads=heads)
        compare(smallworld(OTHERS[name], 201, head=head), graph, dense)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_shortest_texts(n: int) -> None:
    for pattern in (fl.full(), fl.window(0), fl.causal(), fl.random_keys(1)):
        compare(smallworld(pattern, n), *graphs(pattern, n))


@st.composite
def small_problems(draw: st.DrawFn) -> tuple[fl.Pattern, Sizes, int, int]:
    n = draw(st.integers(1, 60))
    at = Sizes.of(n, batch=draw(st.integers(1, 2)), heads=draw(st.integers(1, 3)))
    return draw(patterns(at, 4)), at, draw(st.integers(0, at.batch - 1)), draw(st.integers(0, at.heads - 1))


@given(small_problems())
@settings(max_examples=60)
def test_random_expressions_agree_with_networkx(problem: tuple[fl.Pattern, Sizes, int, int]) -> None:
    pattern, at, batch, head = problem
    graph, dense = graphs(pattern, at.n_k, batch, head, at.batch, at.heads)
    compare(smallworld(pattern, at.n_k, batch=batch, head=head), graph, dense)


@given(small_problems())
@settings(max_examples=80)
def test_links_equal_the_dense_pattern(problem: tuple[fl.Pattern, Sizes, int, int]) -> None:
    pattern, at, batch, head = problem
    whole = pattern.dense(at.n_k, batch=at.batch, heads=at.heads)
    dense = whole[min(batch, whole.shape[0] - 1), min(head, whole.shape[1] - 1)].numpy()
    n = at.n_k
    lazy = LazyLinks(pattern, n, batch, head)
    links = lazy.all()
    rows = np.flatnonzero(np.random.default_rng(n).random(n) < 0.5)
    for source, chosen in ((links, np.arange(n)), (links, rows), (lazy, rows)):
        seen = np.zeros((chosen.size, n), dtype=int)
        for part in source.runs(chosen):
            np.add.at(seen, part.pairs(), 1)
        assert (seen == dense[chosen]).all()
    loops = dense.diagonal()
    assert (links.self_loops == loops).all()
    assert (links.in_degree == dense.sum(1) - loops).all()
    assert (links.out_degree == dense.sum(0) - loops).all()
    assert links.count == dense.sum()
    values = np.random.default_rng(0).standard_normal(n)
    strict = dense & ~np.eye(n, dtype=bool)
    assert links.sum_over_keys(values) == pytest.approx(strict @ values, abs=1e-12)
    assert links.sum_over_queries(values) == pytest.approx(strict.T @ values, abs=1e-12)


def test_links_equal_the_shared_cases() -> None:
    """Includes terms with a permutation of the keys and single keys at once, such as a stride of random keys."""
    for case in CASES:
        if case.n_q != case.n_k or case.q_offset not in (None, 0) or not 0 < case.n_k <= 260:
            continue
        truth = case.pattern.dense(case.n_k, batch=case.batch, heads=case.heads)
        head = truth.shape[1] - 1
        seen = np.zeros((case.n_k, case.n_k), dtype=int)
        for part in Links.of(case.pattern, case.n_k, 0, head).runs(np.arange(case.n_k)):
            np.add.at(seen, part.pairs(), 1)
        assert np.array_equal(seen, truth[0, head].int().numpy()), case.name


# ---- the parts ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(0, 300), st.integers(1, 3))
@settings(max_examples=40)
def test_column_counts(seed: int, rows: int, words: int) -> None:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**64, (rows, words), dtype=np.uint64) & rng.integers(0, 2**64, (rows, words), dtype=np.uint64)
    want = [sum(int(word) >> bit & 1 for word in bits[:, w]) for w in range(words) for bit in range(64)]
    assert column_counts(bits).tolist() == want
    assert nonzero_rows(bits).tolist() == bits.any(1).nonzero()[0].tolist()


@given(st.integers(0, 2**32 - 1), st.integers(1, 3000), st.integers(0, 200))
@settings(max_examples=60)
def test_scatter_gives_every_slot_its_bits(seed: int, size: int, runs: int) -> None:
    rng = np.random.default_rng(seed)
    lo = rng.integers(0, size, runs)
    hi = np.minimum(size, lo + rng.choice([1, 2, 3, 100, 256, 257, 700, size], runs))
    row = rng.integers(0, 50, runs)
    bits = rng.integers(0, 2**64, (50, 2), dtype=np.uint64)
    want = np.zeros((size, 2), dtype=np.uint64)
    for r, a, b in zip(row, lo, hi, strict=True):
        want[a:b] |= bits[r]
    scatter = RunScatter(row, lo, hi, size)
    assert (scatter.scatter(bits) == want).all()
    assert (scatter.scatter(bits) == want).all(), "a second use must give the same"


def test_scatter_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farlight.analysis.graph.scatter._MAX_WRITES", 7)
    rng = np.random.default_rng(0)
    lo = np.sort(rng.integers(0, 40, 300))
    bits = rng.integers(0, 2**64, (300, 1), dtype=np.uint64)
    want = np.zeros((41, 1), dtype=np.uint64)
    for r, a in enumerate(lo):
        want[a] |= bits[r]
    assert (RunScatter(np.arange(300), lo, lo + 1, 41).scatter(bits) == want).all()


def test_or_rows_writes_only_there() -> None:
    table = np.full((4, 2), 8, dtype=np.uint64)
    or_rows(table, np.array([2, 0]), np.array([[1, 2], [3, 4]], dtype=np.uint64))
    assert table.tolist() == [[11, 12], [8, 8], [9, 10], [8, 8]]
    assert one_hot_bits(65)[64].tolist() == [0, 1]


@pytest.mark.parametrize("dense", [True, False])
def test_sparse_and_dense_steps_agree(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for pattern in (*PRESETS.values(), fl.window(2)):
        links = Links.of(pattern, 150)
        targets = np.array([0, 149, 70, 70, 3])
        want = [c.tolist() for c in BitsetBFS(links).frontier_sizes(targets)]
        name = "_dense_step" if dense else "_sparse_step"
        with monkeypatch.context() as patch:
            for other in ("_dense_step", "_sparse_step"):
                patch.setattr(BitsetBFS, other, getattr(BitsetBFS, name))
            assert [c.tolist() for c in BitsetBFS(links).frontier_sizes(targets)] == want


def test_searches_stop_at_max_depth() -> None:
    bfs = BitsetBFS(Links.of(fl.window(1), 50))
    assert [c.tolist() for c in bfs.frontier_sizes(np.array([20]), max_depth=2)] == [[2], [2]]
    assert bfs.work > 0


def test_too_many_runs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farlight.analysis.graph.links._MAX_RUNS", 500)
    with pytest.raises(ArgumentError, match=r"n = 300: random_keys\(4\) has about 1,1\d\d runs of consecutive keys, more"):
        smallworld(fl.random_keys(4), 300)


# ---- baselines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, degree", [(101, 4), (100, 8), (61, 40), (61, 58), (7, 4), (50, 2)])
def test_lattice_agrees_with_networkx(n: int, degree: int) -> None:
    ring = nx.watts_strogatz_graph(n, degree, 0)
    assert baselines.lattice_hops(n, degree) == pytest.approx(nx.average_shortest_path_length(ring), abs=1e-9)
    assert baselines.lattice_clustering(n, degree) == pytest.approx(nx.average_clustering(ring), abs=1e-9)


@pytest.mark.parametrize("n, degree, within", [(300, 4, 0.03), (300, 12, 0.02), (150, 40, 0.01), (100, 75, 0.01)])
def test_random_graph_agrees_with_drawn_ones(n: int, degree: int, within: float) -> None:
    drawn, clustered = [], []
    for seed in range(3):
        graph = nx.gnp_random_graph(n, degree / (n - 1), seed=seed, directed=True)
        hops, _ = networkx_metrics(graph)
        drawn.append(sum(h * c for h, c in hops.items()) / sum(hops.values()))
        clustered.append(nx.average_clustering(nx.gnp_random_graph(n, degree / (n - 1), seed=seed)))
    assert baselines.random_hops(n, degree) == pytest.approx(np.mean(drawn), rel=within)
    assert baselines.random_clustering(n, degree) == pytest.approx(np.mean(clustered), rel=0.25)


def test_a_rewired_lattice_is_the_small_world_of_the_paper() -> None:
    """Watts and Strogatz: a lattice with a few random links is as short as a random graph and as clustered as a lattice."""
    lattice = smallworld(fl.window(5), 1000)
    mixed = smallworld(fl.window(5) | fl.random_keys(1, seed=1), 1000)
    random = smallworld(fl.random_keys(10, seed=1), 1000)
    assert lattice.omega < -0.9 < mixed.omega < random.omega
    assert abs(mixed.omega) < 0.35 < random.omega
    assert mixed.sigma > 10 > lattice.sigma > 1
    assert random.sigma < 2
    assert lattice.hops > 10 * mixed.hops


# ---- estimates ---------------------------------------------------------------------------------------------------------


def covered(pattern: fl.Pattern, n: int, targets: int, seeds: range) -> tuple[int, int]:
    """For how many seeds the margins of average hops and of the unreachable share hold the exact value."""
    links = Links.of(pattern, n)
    exact = survey(links, targets=n)
    assert exact.exact
    hops, unreachable = exact.mean(0.95)[0], exact.unreachable(0.95)[0]
    covered_seeds = [0, 0]
    for seed in seeds:
        sampled = survey(links, targets=targets, seed=seed)
        assert not sampled.exact
        for place, (truth, (value, margin)) in enumerate(
            ((hops, sampled.mean(0.95)), (unreachable, sampled.unreachable(0.95)))
        ):
            assert 0 < margin < 5
            covered_seeds[place] += abs(value - truth) <= margin
    return covered_seeds[0], covered_seeds[1]


ESTIMATED = {
    "longformer and random": fl.presets.longformer(32) | fl.random_keys(2),
    "window and random": fl.window(8) | fl.random_keys(2),
    "one hub": fl.window(0) | fl.global_tokens([5]),
    "causal random": fl.causal() & (fl.window(8, 0) | fl.random_keys(2)),
    "documents": fl.documents(lengths=[300, 40, 200]) & fl.window(30),
    "hardly connected": fl.random_keys(1),
}


@pytest.mark.parametrize("name", ESTIMATED)
def test_estimates_cover_the_exact_values(name: str) -> None:
    assert min(covered(ESTIMATED[name], 700, 100, range(25))) >= 23


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATED)
def test_estimates_cover_the_exact_values_at_length(name: str) -> None:
    assert min(covered(ESTIMATED[name], 4096, 256, range(100))) >= 95


def test_drawn_clustering_covers_the_counted_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for pattern in (fl.window(8) | fl.random_keys(2), fl.presets.star(), fl.presets.logsparse(), fl.presets.bigbird(16, 2)):
        lazy = LazyLinks(pattern, 900)
        links = lazy.all()
        truth, none = clustering_module.clustering(links, lazy, confidence=0.95, seed=0)
        degree = clustering_module.mean_degree(links, lazy, seed=0)
        assert none == 0
        with monkeypatch.context() as patch:
            patch.setattr(clustering_module, "_EXACT_TOKENS", 0)
            patch.setattr(clustering_module, "_SAMPLED_TOKENS", 200)
            drawn = [clustering_module.clustering(links, lazy, confidence=0.95, seed=seed) for seed in range(12)]
            assert sum(abs(value - truth) <= margin for value, margin in drawn) >= 11
            assert all(0 < margin < 0.06 for _, margin in drawn)
            assert clustering_module.mean_degree(links, lazy, seed=0) == pytest.approx(degree, rel=0.03)


def test_few_neighbours_are_counted_even_when_tokens_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering_module, "_EXACT_TOKENS", 0)
    monkeypatch.setattr(clustering_module, "_SAMPLED_TOKENS", 200)
    graph, _ = graphs(fl.window(3), 200)
    world = smallworld(fl.window(3), 200)
    assert world.clustering == pytest.approx(nx.average_clustering(graph.to_undirected()), abs=1e-9)


def test_stratified_sample_and_margins() -> None:
    rng = np.random.default_rng(0)
    times = sum(np.bincount(stratified_sample(10, 4, rng), minlength=10) for _ in range(2000))
    assert np.abs(times / 2000 - 0.4).max() < 0.04, "every token is as likely"
    assert stratified_sample(5, 9, rng).tolist() == [0, 1, 2, 3, 4]
    assert t_quantile(0.95, 10**9) == pytest.approx(1.959964, abs=1e-6)
    assert t_quantile(0.95, 30) == pytest.approx(2.042272, abs=1e-4)
    assert t_quantile(0.95, 10) == pytest.approx(2.228139, abs=5e-3)
    assert max_missed_share(0.95, 300) == pytest.approx(0.01, rel=0.01)
    assert margin_of_mean(np.ones(50), 50, 0.95, 1.0) == 0
    assert margin_of_mean(np.ones(50), 10**9, 0.95, 1.0) == pytest.approx(0.06, abs=1e-3)


def test_the_gap_of_an_early_stop_is_within_the_margin() -> None:
    """After few Lanczos steps the gap is too large, by no more than the margin."""
    links = Links.of(fl.window(4), 700)
    exact = spectral_gap(links)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("farlight.analysis.graph.spectrum._MAX_STEPS", 30)
        patch.setattr("farlight.analysis.graph.spectrum._BASIS_BYTES", 0)
        gap, margin = spectral_gap(links)
    assert exact <= gap <= exact + margin


# ---- the answer --------------------------------------------------------------------------------------------------------


def test_small_world_as_table_and_json() -> None:
    world = smallworld(fl.window(4) | fl.global_tokens([0]), 1000)
    lines = str(world).splitlines()
    assert lines[0] == "window(4) | global_tokens([0]) over 1,000 tokens (every token)"
    assert " ".join(lines[1].split()) == "links 10,970 full attention 1,000,000: 91 times fewer; 10.0 keys for each token"
    names = " ".join(line.split()[0] for line in lines[1:])
    assert names == "links average diameter unreachable clustering spectral sigma omega"
    assert "1 hop 1.0%, 2 hops 99.0%" in lines[3]
    again = json.loads(json.dumps(world.to_dict(), allow_nan=False))
    assert again["pattern"] == "window(4) | global_tokens([0])"
    assert again["hops"] == world.hops
    assert sum(again["histogram"]) == pytest.approx(1)
    nothing = smallworld(fl.window(0) - fl.full(), 5)
    assert nothing.to_dict()["hops"] is None
    assert "no token hears of another" in str(nothing)


def test_small_world_names_its_sample() -> None:
    world = smallworld(fl.window(50), 3000, targets=64, confidence=0.9)
    assert not world.exact
    assert world.targets == 64
    assert "(64 tokens drawn, margins at 90% confidence)" in str(world)
    assert ">= 60" in str(world), "the ends of the text are fixed targets, so the diameter is exact"
    assert "% within" in str(world)
    assert smallworld(fl.window(50), 3000, targets=64, seed=1).hops != world.hops
    assert smallworld(fl.window(50), 3000, targets=64, confidence=0.9) == world


def test_causal_patterns_compare_with_causal_attention() -> None:
    world = smallworld(fl.presets.streaming(4, 16), 500)
    assert world.causal
    assert world.full_links == 500 * 501 // 2
    assert world.unreachable == pytest.approx(0.5)
    assert "causal attention 125,250" in str(world)


@pytest.mark.parametrize(
    "call, kind, text",
    [
        (
            lambda: smallworld("window(3)", 10),
            ArgumentError,
            r"pattern = 'window\(3\)': str is not a pattern; pass e.g. fl.window\(256\)",
        ),
        (lambda: smallworld(fl.full(), 0), ArgumentError, r"n = 0: it must be a whole number >= 1"),
        (lambda: smallworld(fl.full(), 2.5), ArgumentError, r"n = 2.5: a whole number is needed, not float"),
        (lambda: smallworld(fl.full(), 5, batch=-1), ArgumentError, r"batch = -1: it must be a whole number >= 0"),
        (
            lambda: smallworld(fl.per_head([fl.full()] * 2 + [fl.causal()]), 5, head=3),
            ArgumentError,
            r"head = 3: this pattern has 3 heads; use 0 … 2",
        ),
        (
            lambda: smallworld(fl.documents(lengths=[[2, 3], [5]]), 5, batch=2),
            ArgumentError,
            r"batch = 2: this pattern has 2 batch items; use 0 … 1",
        ),
        (lambda: smallworld(fl.documents(lengths=[9]), 5), PatternError, r"the lengths add up to 9, more than the 5 tokens"),
        (
            lambda: smallworld(fl.full(), 5, confidence=1.0),
            ArgumentError,
            r"confidence = 1.0: it must be a probability between 0 and 1",
        ),
        (
            lambda: smallworld(fl.full(), 5, targets=3),
            ArgumentError,
            r"targets = 3: it must be a whole number >= 32. With fewer tokens",
        ),
    ],
)
def test_errors(call: object, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()  # type: ignore[operator]


@pytest.mark.slow
def test_a_million_tokens_in_a_minute_and_two_gigabytes() -> None:
    """Process time of one thread: independent of the machine's other load."""
    torch.set_num_threads(1)
    pattern = fl.presets.longformer(512) | fl.random_keys(3)
    start = time.process_time()
    with peak_memory() as peak:
        world = smallworld(pattern, 2**20)
    assert time.process_time() - start < 60
    assert peak.bytes < 2 * 2**30
    assert world.diameter == 2
    assert world.hops == pytest.approx(2, abs=0.01)
    assert world.saving > 1900
