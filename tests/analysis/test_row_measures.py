"""The native measures of probability tiles against the torch operations that replace them, and both in `retentions`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.analysis.loss import probabilities
from farlight.analysis.loss.histogram import HistogramBuilder
from farlight.analysis.loss.retention import Retention, retentions
from farlight.analysis.loss.row_measures import measure_rows
from farlight.kernels.cpu import native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="needs the native module")

B, H, R = 2, 3, 5


@contextmanager
def torch_only() -> Iterator[None]:
    """The measures without the native module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("farlight.analysis.loss.row_measures.native_measures.can_measure", lambda probability: False)
        patch.setattr("farlight.analysis.loss.histogram.can_measure", lambda probability: False)
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_tile(keys: int, shape: tuple[int, int, int] = (B, H, R)) -> Tensor:
    """Probabilities from 1 + rounding down to 0, over many octaves."""
    generator = torch.Generator().manual_seed(keys)
    tile = torch.rand(*shape, keys, generator=generator) ** 12
    tile[tile < 1e-9] = 0.0
    tile[..., :1] *= 1.0 + 1e-6
    return tile


def masks(keys: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(keys + 1)
    whole = torch.rand(B, H, R, keys, generator=generator) < 0.3
    return {
        "by item and head": whole,
        "by item": whole[:, :1],
        "by head": whole[:1],
        "fixed": whole[:1, :1],
        "every other key": torch.rand(B, H, R, 2 * keys, generator=generator)[..., ::2] < 0.5,
        "equal rows": whole[:1, :1, :1].expand(1, 1, R, keys),
        "equal keys": whole[:1, :1, :, :1].expand(1, 1, R, keys) if keys else whole[:1, :1],
        "everything": torch.ones((), dtype=torch.bool).expand(1, 1, R, keys),
        "nothing": torch.zeros(1, 1, R, keys, dtype=torch.bool),
    }


@pytest.mark.parametrize("first_keys", [None, 0, 1, 4, 1000])
@pytest.mark.parametrize("keys", [0, 1, 3, 16, 37, 16 * 256 + 21])
def test_rows_are_measured_as_by_torch(keys: int, first_keys: int | None) -> None:
    tile, allowed = random_tile(keys), list(masks(keys).values())
    found = measure_rows(tile, allowed, first_keys, with_lost=True)
    with torch_only():
        wanted = measure_rows(tile.double(), allowed, first_keys, with_lost=True)
    for each, true in zip(found, wanted, strict=True):
        assert each.kept.dtype == torch.float64
        assert each.lost is not None
        assert true.lost is not None
        torch.testing.assert_close(each.kept, true.kept, rtol=1e-12, atol=1e-12)
        assert torch.equal(each.links, true.links)
        assert torch.equal(each.lost.double(), true.lost)
        assert (each.beyond is None) == (first_keys is None)
        if each.beyond is not None:
            torch.testing.assert_close(each.beyond, true.beyond, rtol=1e-12, atol=1e-12)


def test_other_dtypes_and_no_masks() -> None:
    tile = random_tile(20).double()
    (found,) = measure_rows(tile, [masks(20)["fixed"]], None, with_lost=False)
    assert found.kept.dtype == torch.float64
    assert found.lost is None
    assert found.beyond is None
    assert measure_rows(tile, [], 1, with_lost=True) == []


@pytest.mark.parametrize("rows, keys", [(5, 37), (3, 1), (40, 2048), (90, 700), (2, 40_000), (4, 0)])
def test_the_histogram_is_that_of_torch_for_any_number_of_threads(rows: int, keys: int) -> None:
    tile = random_tile(keys, (B, H, rows))

    def built() -> HistogramBuilder:
        builder = HistogramBuilder(B, H + 2, torch.device("cpu"))
        for _ in range(2):
            builder.add(tile, slice(0, B), slice(1, H + 1))
        return builder

    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(built())
    with torch_only():
        wanted = built()
    for found in results:
        assert torch.equal(found._count, wanted._count)
        assert torch.equal(found._mass, results[0]._mass)
        torch.testing.assert_close(found._mass, wanted._mass, rtol=1e-12, atol=1e-300)
    assert int(wanted._count.sum()) == 2 * tile.numel()
    assert not wanted._count[:, [0, -1]].any()


N = 150
LISTS = torch.randint(-1, 38, (2, 4, 38, 5), generator=torch.Generator().manual_seed(2))
PATTERNS = [
    fl.window(4),
    fl.window(3) - fl.full(),
    fl.full(),
    fl.window(2) & fl.sees_all([0, 3, -1]),
    fl.chosen_blocks(LISTS, block=4) | fl.window(5, 0),
    fl.per_head([fl.window(1), fl.full(), fl.causal(), fl.random_keys(3)]) & fl.padding([90, N]),
]


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    q, k = torch.randn(2, 4, N, 8, generator=generator) * 2, torch.randn(2, 2, N, 8, generator=generator)
    return q, k, torch.randn(4, generator=generator)


def check_equal(found: Retention, wanted: Retention) -> None:
    """Equal up to rounding of float32."""
    for name in ("links", "base_links"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))
    for name in ("kept", "best", "best_slack", "mass_without_sink", "error", "lost_output"):
        each, true = getattr(found, name), getattr(wanted, name)
        assert (each is None) == (true is None)
        if each is not None:
            assert each.dtype == true.dtype
            torch.testing.assert_close(each, true, rtol=0, atol=1e-6 if name == "kept" else 3e-6)
    assert (found.lost is None) == (wanted.lost is None)
    if found.lost is not None and wanted.lost is not None:
        torch.testing.assert_close(found.lost.probability, wanted.lost.probability, rtol=0, atol=0)
        for name in ("text", "head", "query", "key"):
            assert torch.equal(getattr(found.lost, name), getattr(wanted.lost, name))


@pytest.mark.parametrize("tile", [1 << 20, 3000], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("options", [{}, {"lost": 7}, {"lost": 5, "by_head": True}, {"with_v": True, "lost": 3}], ids=str)
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("base", [None, fl.causal(), fl.causal() & fl.padding([100, N])], ids=["full", "causal", "padded"])
def test_retention_is_that_of_torch(
    base: fl.Pattern | None, with_sinks: bool, options: dict[str, Any], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probabilities, "_TILE_SCORES", tile)
    monkeypatch.setattr(probabilities, "_GATHER_RATIO", 10**9)  # every pattern under its mask
    q, k, sinks = problem()
    v = torch.randn(2, 2, N, 6, generator=torch.Generator().manual_seed(9)) if options.get("with_v") else None
    given = {name: value for name, value in options.items() if name != "with_v"}
    given |= {"base": base} | ({"sinks": sinks} if with_sinks else {})
    found = retentions(q, k, PATTERNS, v, **given)
    with torch_only():
        wanted = retentions(q, k, PATTERNS, v, **given)
    for each, true in zip(found, wanted, strict=True):
        check_equal(each, true)


def test_the_share_without_the_sink_can_be_left_out() -> None:
    q, k, _ = problem()
    found = retentions(q, k, PATTERNS, base=fl.causal(), without_sink=False)
    wanted = retentions(q, k, PATTERNS, base=fl.causal())
    for each, true in zip(found, wanted, strict=True):
        assert each.mass_without_sink is None
        assert true.mass_without_sink is not None
        assert torch.equal(each.kept, true.kept)
        assert torch.equal(each.best, true.best)
