"""`fl.fit`: allocation against brute force, profiles against dense sums, recovery of planted structure."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.analysis.fit import profile as profile_module
from farlight.analysis.fit.candidates import fixed_options, parse_candidates
from farlight.analysis.fit.frontier import Option, allocate, concave
from farlight.analysis.fit.greedy import LinkUnits, grow, row_shares
from farlight.analysis.fit.profile import HeadProfile, LayerProfile, skew_diagonals
from farlight.analysis.loss.retention import retention


def option(links: float, value: float, kept: float | None = None) -> Option:
    return Option(links, value if kept is None else kept, value, object)


def random_heads(seed: int, heads: int = 3, points: int = 5) -> list[list[Option]]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(heads):
        links = torch.randint(0, 30, (points,), generator=g).tolist()
        values = torch.rand(points, generator=g).tolist()
        out.append([option(0, 0.0)] + [option(x, v) for x, v in zip(links, values, strict=True)])
    return out


# ---- budgets ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(20))
def test_the_hull_holds_every_option_from_below(seed: int) -> None:
    options = random_heads(seed, 1, 12)[0]
    hull = concave(options)
    slopes = [(b.value - a.value) / (b.links - a.links) for a, b in itertools.pairwise(hull)]
    assert slopes == sorted(slopes, reverse=True)
    assert all(slope > 0 for slope in slopes)
    for price in (0.0, 0.01, 0.03, 0.1, 1.0):
        best = max(o.value - price * o.links for o in options)
        assert max(o.value - price * o.links for o in hull) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("weights", [None, [3.0, 1.0, 0.2]])
def test_a_budget_is_spent_within_one_step_of_the_best(seed: int, weights: list[float] | None) -> None:
    heads, links = random_heads(seed), 35.0
    w = weights or [1.0] * 3
    chosen = allocate(heads, links=links, weights=weights)
    assert sum(o.links for o in chosen) <= links + 1e-6
    value = sum(a * o.value for a, o in zip(w, chosen, strict=True))
    best = max(
        sum(a * o.value for a, o in zip(w, pick, strict=True))
        for pick in itertools.product(*heads)
        if sum(o.links for o in pick) <= links
    )
    steps = [a * (y.value - x.value) for a, head in zip(w, heads, strict=True) for x, y in itertools.pairwise(concave(head))]
    assert best - max(steps) - 1e-9 <= value <= best + 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_a_budget_is_spent_best_where_steps_are_alike(seed: int) -> None:
    """Unit steps with falling gains: greedy is exactly optimal."""
    g = torch.Generator().manual_seed(seed)
    heads = []
    for _ in range(4):
        gains = torch.rand(6, generator=g).sort(descending=True).values.cumsum(0).tolist()
        heads.append([option(0, 0.0)] + [option(n + 1, v) for n, v in enumerate(gains)])
    for links in (0, 1, 5, 11, 24):
        chosen = allocate(heads, links=float(links))
        best = max(sum(o.value for o in pick) for pick in itertools.product(*heads) if sum(o.links for o in pick) <= links)
        assert sum(o.value for o in chosen) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(30))
def test_a_share_is_kept_within_one_step_of_the_cheapest(seed: int) -> None:
    heads = random_heads(seed)
    most = sum(max(o.kept for o in head) for head in heads) / 3
    keep = 0.7 * most
    chosen = allocate(heads, keep=keep)
    assert sum(o.kept for o in chosen) / 3 >= keep - 1e-6
    cheapest = min(
        sum(o.links for o in pick) for pick in itertools.product(*heads) if sum(o.kept for o in pick) / 3 >= keep - 1e-9
    )
    steps = [y.links - x.links for head in heads for x, y in itertools.pairwise(concave(head))]
    assert cheapest <= sum(o.links for o in chosen) <= cheapest + max(steps)


def test_flat_heads_get_more_and_local_heads_less() -> None:
    local = [option(0, 0.0), option(10, 0.9), option(100, 0.95)]
    flat = [option(0, 0.0), option(50, 0.4), option(100, 0.8)]
    chosen = allocate([local, flat], links=110)
    assert [o.links for o in chosen] == [10, 100]


def test_targets_that_cannot_be_met() -> None:
    with pytest.raises(fl.ArgumentError, match=r"3 links are allowed, but the cheapest candidates take 8; allow more"):
        allocate([[option(4, 0.1)], [option(4, 0.1)]], links=3)
    with pytest.raises(fl.ArgumentError, match=r"keep = 0.9: the candidates keep at most 0.5000; ask for less"):
        allocate([[option(4, 0.5)]], keep=0.9)


# ---- profiles --------------------------------------------------------------------------------------------------------
def tensors(
    batch: int = 2, heads: int = 4, kv_heads: int = 2, n_q: int = 40, n_k: int = 40, seed: int = 0
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n_q, 8, generator=g, dtype=torch.float64) * 1.5
    return q, torch.randn(batch, kv_heads, n_k, 8, generator=g, dtype=torch.float64)


def dense(q: Tensor, k: Tensor, base: fl.Pattern | None) -> tuple[Tensor, Tensor]:
    """(mean probability, allowed), `(H, n_q, n_k)`, by the dense formula."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    allowed = (fl.full() if base is None else base).dense(q.shape[2], k.shape[2])
    full = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return full.mean(0), allowed[0].double().expand(q.shape[1], -1, -1)


@pytest.mark.parametrize("most", [1024, 16])
@pytest.mark.parametrize("base", [None, fl.causal()])
@pytest.mark.parametrize("tile", [1 << 21, 100])
def test_a_profile_is_the_dense_sums(most: int, base: fl.Pattern | None, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "MAX_DENSE_TOKENS", most)
    monkeypatch.setattr(profile_module, "NUM_COLUMNS", 5)
    monkeypatch.setattr("farlight.analysis.loss.probabilities._TILE_SCORES", tile)
    q, k = tensors()
    profile = LayerProfile()
    profile.add(q[:1], k[:1], base=base)
    profile.add(q[1:], k[1:], base=base)
    assert profile.block == (1 if most == 1024 else 4)
    mean, allowed = dense(q, k, base)
    place = torch.arange(40)[None] - torch.arange(40)[:, None] + 39
    for head in range(4):
        head_profile = profile.head(head)
        for got, expected in ((head_profile.distance, mean[head]), (head_profile.distance_links, allowed[head])):
            torch.testing.assert_close(
                got,
                torch.zeros(79, dtype=torch.float64).scatter_add(0, place.flatten(), expected.flatten()),
                rtol=1e-5,
                atol=1e-5,
            )
        torch.testing.assert_close(head_profile.column, mean[head][:, head_profile.columns], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(head_profile.column_links, allowed[head][:, head_profile.columns])
        cells = mean[head].unflatten(1, (-1, profile.block)).sum(2).unflatten(0, (-1, profile.block)).sum(1)
        torch.testing.assert_close(head_profile.cells, cells, rtol=1e-5, atol=1e-6)
        if most == 1024:
            assert set(head_profile.columns.tolist()) == set(mean[head].sum(0).topk(5).indices.tolist())


def test_skew_diagonals_makes_diagonals_columns() -> None:
    x = torch.arange(1, 13).view(1, 3, 4)
    assert skew_diagonals(x)[0].tolist() == [[0, 0, 1, 2, 3, 4], [0, 5, 6, 7, 8, 0], [9, 10, 11, 12, 0, 0]]


def test_a_profile_refuses_texts_of_another_size() -> None:
    profile = LayerProfile()
    profile.add(*tensors())
    with pytest.raises(fl.ArgumentError, match=r"\(4, 40, 40, 0\) was given \(4, 30, 40, 10\); give texts of one length"):
        profile.add(*tensors(n_q=30))
    with pytest.raises(fl.ArgumentError, match="the profile is empty"):
        LayerProfile().head(0)


# ---- growth ----------------------------------------------------------------------------------------------------------
QUEUES = {
    "sides": lambda units: [list(range(39, -1, -1)), list(range(40, 79))],
    "singles": lambda units: [[unit] for unit in range(units.edges.size - 1)],
    "steps": lambda units: [[units.index_of(d) for d in range(0, -40, -3)], [units.index_of(d) for d in range(3, 40, 3)]],
}


@pytest.mark.parametrize("name", QUEUES)
@pytest.mark.parametrize("base", [None, fl.causal()])
def test_growth_counts_each_link_once(name: str, base: fl.Pattern | None) -> None:
    """At every state links and shares are those of the union, distances and keys overlapping, within the base."""
    q, k = tensors(1, 1, 1, seed=3)
    profile = LayerProfile()
    profile.add(q, k, base=base)
    mean, allowed = dense(q, k, base)
    units = LinkUnits(profile.head(0))
    states = list(grow(units, QUEUES[name](units)))
    assert len(states) > 10
    distance = torch.arange(40)[None] - torch.arange(40)[:, None]
    for state in states:
        mask = torch.isin(torch.arange(40), torch.tensor(state.keys, dtype=torch.int64)).expand(40, 40).clone()
        for start, stop in state.runs:
            mask |= (distance >= start) & (distance < stop)
        assert state.links == pytest.approx(float((mask * allowed[0]).sum()), abs=1e-6)
        assert state.kept == pytest.approx(float((mask * mean[0]).sum()) / 40, abs=1e-5)
        torch.testing.assert_close(row_shares(profile.head(0), state), (mask * mean[0]).sum(1), rtol=1e-5, atol=1e-6)
    if name != "steps":
        assert states[-1].kept == pytest.approx(1.0, abs=1e-4)


def test_far_distances_come_in_runs_that_cover_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farlight.analysis.fit.greedy._SINGLE_DISTANCES", 8)
    profile = LayerProfile()
    profile.add(*tensors(1, 1, 1, 30, 200))
    units = LinkUnits(profile.head(0))
    assert (units.edges[0], units.edges[-1]) == (-199, 30)
    assert units.edges.size < 150
    assert (units.edges[1:] > units.edges[:-1]).all()
    assert units.cost.sum() == 30 * 200
    assert units.edges[units.index_of(0)] == 0


# ---- options ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("base", [None, fl.causal()])
@pytest.mark.parametrize("family", ["window", "dilated", "strided", "offsets", "blocks", "pairs"])
def test_an_option_is_what_its_pattern_is(family: str, base: fl.Pattern | None) -> None:
    check_options(family, base, None)


@pytest.mark.parametrize("q_offset", [-90, 95])
@pytest.mark.parametrize("family", ["window", "dilated", "strided", "offsets"])
def test_options_of_queries_that_all_lie_on_one_side_of_the_keys(family: str, q_offset: int) -> None:
    """Distance 0 does not occur in the text."""
    check_options(family, None, q_offset)


def check_options(family: str, base: fl.Pattern | None, q_offset: int | None) -> None:
    """Links and kept share of a family's options against `retention` of their patterns."""
    q, k = tensors(2, 1, 1, seed=1)
    profile = LayerProfile()
    profile.add(q, k, base=base, q_offset=q_offset)
    options = fixed_options(profile.head(0), [family], False)
    assert len(options) > 5
    for option in options[:: max(1, len(options) // 12)]:
        pattern = option.make()
        assert isinstance(pattern, fl.Pattern)
        result = retention(q, k, pattern, base=base, q_offset=q_offset)
        assert option.links == pytest.approx(result.links.double().mean().item(), abs=1e-4), pattern
        assert option.kept == pytest.approx(result.mass.mean().item(), abs=1e-5), pattern


def test_pairs_are_the_best_pairs() -> None:
    q, k = tensors(1, 1, 1)
    mean, _ = dense(q, k, None)
    result = fl.fit(q, k, density=0.1, candidates="pairs")
    links = int(result.links[0])
    assert 0.09 * 1600 < links <= 160
    best = mean.flatten().sort(descending=True).values[:links].sum() / 40
    assert result.mass == pytest.approx(best.item(), abs=1e-6)


def test_even_lifts_the_rows_that_keep_little() -> None:
    q, k = tensors(1, 1, 1, seed=5)
    plain, even = (fl.fit(q, k, density=0.15, candidates="pairs", even=even) for even in (False, True))
    lost = [(1 - retention(q, k, result.on(q, k)).kept).square().mean() for result in (plain, even)]
    assert lost[1] < lost[0]
    assert even.mass < plain.mass


# ---- planted structure -----------------------------------------------------------------------------------------------
def planted(n: int = 64) -> tuple[Tensor, Tensor]:
    """Three heads: to the token three before (of the first three, to the last three), to token 5, to everything alike."""
    q, k = torch.zeros(1, 3, n, n + 1), torch.zeros(1, 3, n, n + 1)
    q[0, 0, :, :n] = torch.eye(n) * 80
    k[0, 0, :, :n] = torch.eye(n).roll(3, 1)
    q[0, 1, :, n] = 80
    k[0, 1, 5, n] = 1
    return q, k


@pytest.mark.parametrize("most", [1024, 32])
def test_planted_heads_are_recovered(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each planted head gets its own 64 links and not one more; the flat head gets all that is left."""
    monkeypatch.setattr(profile_module, "MAX_DENSE_TOKENS", most)
    q, k = planted()
    result = fl.fit(q, k, density=0.3)
    assert result.heads[:2] == (fl.offsets([-3, 61]), fl.seen_by_all([5]))
    assert result.links[:2].tolist() == [64.0, 64.0]
    torch.testing.assert_close(result.kept[:2], torch.full((2,), 0.997, dtype=torch.float64), rtol=0, atol=1e-3)
    budget = 0.3 * 3 * 64 * 64 - 128
    # What a flat head keeps is its links; a budget that pays for no further lighthouse leaves less than one over.
    assert budget - 64 < result.links[2] <= budget
    assert result.kept[2] == pytest.approx(float(result.links[2]) / 64**2)
    # 61 of 64 rows suffice for 95 %: the corner is not bought.
    assert fl.fit(q[:, :1], k[:, :1], keep=0.95).heads == (fl.offsets([-3]),)


@pytest.mark.parametrize("base", [None, fl.causal()])
def test_a_fit_reports_what_retention_measures(base: fl.Pattern | None) -> None:
    q, k = tensors()
    result = fl.fit(q, k, keep=0.6, base=base)
    measured = retention(q, k, result.on(q, k), base=base)
    torch.testing.assert_close(measured.mass.mean(0), result.kept, rtol=0, atol=1e-5)
    torch.testing.assert_close(measured.links.double().mean(0), result.links, rtol=0, atol=1e-3)
    assert result.mass >= 0.6 - 1e-9
    torch.testing.assert_close(result.lost, 1 - result.kept)
    assert "of full attention" in str(result)


def test_more_is_kept_for_more_links() -> None:
    q, k = tensors()
    fits = [fl.fit(q, k, density=density) for density in (0.02, 0.1, 0.3, 1.0)]
    assert [f.mass for f in fits] == sorted(f.mass for f in fits)
    assert all(f.density <= d + 1e-9 for f, d in zip(fits, (0.02, 0.1, 0.3, 1.0), strict=True))
    assert fits[-1].mass == pytest.approx(1.0, abs=1e-6)
    for frontier in fits[0].frontiers:
        assert (frontier.diff(dim=0) > 0).all()


def test_content_is_a_candidate() -> None:
    q, k = tensors(2, 4, 2, seed=2)
    expressions = [f"topkeys({count})" for count in (1, 2, 4, 8)]
    result = fl.fit(q, k, density=0.1, candidates=[*expressions, fl.window(1)])
    assert all(isinstance(head, str) and head.startswith("topkeys") for head in result.heads)
    assert isinstance(result.pattern, fl.routing.Router)
    assert retention(q, k, result.on(q, k)).mass.mean().item() == pytest.approx(result.mass, abs=1e-6)
    mixed = fl.fit(q, k, density=0.04, candidates=["topkeys(1)", "topkeys(2)", fl.window(0) - fl.full()])
    assert len(set(mixed.heads)) > 1
    assert mixed.on(q, k).dense(40, batch=2, heads=4).shape == (2, 4, 40, 40)
    assert fl.routing.read_router(mixed.expression)(q, k) == mixed.on(q, k)


def test_causal_bases_get_causal_routers() -> None:
    assert all("causal=True" in text for text in parse_candidates(["topblocks"], True)[1] if "topblocks" in text)
    q, k = tensors()
    result = fl.fit(q, k, keep=0.5, candidates=["topblocks", "window"], base=fl.causal() & fl.window(30))
    assert result.mass >= 0.5


# ---- errors ----------------------------------------------------------------------------------------------------------
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"keep": 0.9, "density": 0.1}, r"keep = 0.9 and density = 0.1: give one of them"),
    ({"keep": 1.2}, r"keep = 1.2: it must be a share, 0 < keep <= 1"),
    ({"density": 0.0}, r"density = 0.0: it must be a share"),
    ({"keep": 0.9, "even": True}, r"even=True with keep = 0.9: keep counts plain shares; give density"),
    ({"candidates": ["windows"]}, r"there is no family 'windows'; known are window, dilated, .*topblocks"),
    ({"candidates": [3]}, r"candidates: int is not a candidate; give a family \(window, "),
    ({"candidates": []}, r"candidates is empty; give at least one, or None for window"),
    ({"candidates": [fl.window(1)], "keep": 0.9}, r"keep = 0.9: the candidates keep at most 0\.\d+; ask for less"),
    ({"candidates": [fl.full()], "density": 0.5}, r"links are allowed, but the cheapest candidates take"),
]


@pytest.mark.parametrize("options, text", ERRORS)
def test_bad_fits_say_what_is_wrong(options: dict[str, Any], text: str) -> None:
    q, k = tensors()
    with pytest.raises(fl.ArgumentError, match=text):
        fl.fit(q, k, **options)


def test_a_wrong_expression_is_refused_by_its_reader() -> None:
    with pytest.raises(fl.PatternError, match="topblocks"):
        fl.fit(*tensors(), candidates=["topblocks(share=7)"])


def test_head_profile_is_a_value() -> None:
    profile = LayerProfile()
    profile.add(*tensors())
    assert isinstance(profile.head(0), HeadProfile)
    with pytest.raises(AttributeError):
        profile.head(0).block = 3  # type: ignore[misc]
