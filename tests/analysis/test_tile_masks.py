"""The mask of a pattern in a tile against the same part of `pattern.dense`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import farlight as fl
from farlight.analysis.loss.tile_masks import TileFrame, tile_mask
from farlight.patterns import Pattern, Sizes
from farlight.testing.strategies import problems

B, H, N = 2, 3, 29
CPU = torch.device("cpu")


def lists(*shape: int, limit: int, seed: int = 0) -> torch.Tensor:
    """Random indices -1 … limit - 1, some of them twice in a list."""
    return torch.randint(-1, limit, shape, generator=torch.Generator().manual_seed(seed))


BLOCKS = fl.chosen_blocks(lists(B, H, 6, 3, limit=8), block=4, query_block=5)
PATTERNS = {
    "blocks": BLOCKS,
    "blocks, none": fl.chosen_blocks(torch.full((1, 1, 8, 2), -1), block=4),
    "blocks, empty lists": fl.chosen_blocks(torch.zeros(1, 1, 8, 0, dtype=torch.int64), block=4),
    "blocks of one query": fl.chosen_blocks.owning(lists(1, H, N, 3, limit=8).to(torch.int16), 4, 1),
    "keys": fl.chosen_keys(lists(B, 1, N, 4, limit=N)),
    "routed": (BLOCKS & fl.causal()) | fl.window(3, 0) | fl.seen_by_all([0, 1]),
    "difference": fl.causal() - BLOCKS,
    "complement": ~(BLOCKS | fl.chosen_keys(lists(1, H, N, 2, limit=N, seed=1))),
    "per head": fl.per_head([fl.window(2), BLOCKS, fl.window(2)]) & fl.padding([20, N]),
    "per head of one pattern": fl.per_head([BLOCKS] * H),
    "per head of fixed patterns": fl.per_head([fl.full(), fl.causal(), fl.full()]),
    "phases": fl.strided(3, phase="head") | fl.window(1),
    "clusters": fl.clusters(lists(B, H, N, limit=4)) & fl.causal(),
    "everything": fl.full(),
}


def check(pattern: Pattern, sizes: Sizes, frame: TileFrame) -> None:
    dense = pattern.dense(sizes.n_q, sizes.n_k, batch=sizes.batch, heads=sizes.heads, q_offset=sizes.q_offset)
    wanted = dense.expand(sizes.batch, sizes.heads, -1, -1)[frame.items, frame.heads, frame.rows, : frame.keys]
    found = tile_mask(pattern, frame)
    assert found.dtype == torch.bool
    assert found.shape[0] == (wanted.shape[0] if pattern.varies_over_batch else 1)
    assert found.shape[1] == (wanted.shape[1] if pattern.varies_over_heads else 1)
    assert torch.equal(found.expand(wanted.shape), wanted)


@pytest.mark.parametrize("offset", [0, 7, -2])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_tile_is_a_part_of_the_dense_mask(name: str, offset: int) -> None:
    sizes = Sizes.of(N - max(offset, 0), N, batch=B, heads=H, q_offset=offset)
    for rows, items, heads, keys in (
        (slice(0, sizes.n_q), slice(0, B), slice(0, H), N),
        (slice(3, 17), slice(1, 2), slice(1, 3), 19),
        (slice(11, 12), slice(0, 1), slice(2, 3), 1),
        (slice(4, 9), slice(0, 2), slice(0, 3), 0),
    ):
        check(PATTERNS[name], sizes, TileFrame(rows, items, heads, keys, sizes, CPU))


def part(draw: st.DrawFn, size: int) -> slice:
    start = draw(st.integers(0, size - 1))
    return slice(start, draw(st.integers(start + 1, size)))


@st.composite
def tiles(draw: st.DrawFn) -> tuple[Pattern, Sizes, TileFrame]:
    pattern, sizes = draw(problems().filter(lambda problem: problem[1].n_q > 0))
    rows, items, heads = (part(draw, size) for size in (sizes.n_q, sizes.batch, sizes.heads))
    return pattern, sizes, TileFrame(rows, items, heads, draw(st.integers(0, sizes.n_k)), sizes, CPU)


@given(tiles())
def test_random_patterns_and_tiles(tile: tuple[Pattern, Sizes, TileFrame]) -> None:
    check(*tile)


def test_a_pattern_that_does_not_fit_is_refused() -> None:
    sizes = Sizes.of(N, N - 8, batch=B, heads=H)
    with pytest.raises(fl.PatternError, match="chosen_keys"):
        tile_mask(PATTERNS["keys"], TileFrame(slice(0, N), slice(0, B), slice(0, H), N, sizes, CPU))


def test_a_pattern_of_all_heads_is_evaluated_once_for_the_tiles_of_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of long texts hold one batch item and key head."""
    evaluated = list[int]()
    allows = fl.window._allows

    def counted(
        self: fl.window, sizes: Sizes, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor
    ) -> torch.Tensor:
        evaluated.append(int(i.min()))
        return allows(self, sizes, b, h, i, j)

    monkeypatch.setattr(fl.window, "_allows", counted)
    monkeypatch.setattr("farlight.analysis.loss.probabilities._TILE_SCORES", 300)
    q = torch.randn(B, H, N, 4)
    fixed = (fl.window(3) | fl.seen_by_all([0])) & fl.causal()
    measured = [fl.retention(q, q, pattern, base=fl.causal()) for pattern in (fixed, fixed | BLOCKS)]
    rows = sorted(set(evaluated))
    assert len(rows) > 1
    assert sorted(evaluated) == sorted(rows * 2)
    for result, pattern in zip(measured, (fixed, fixed | BLOCKS), strict=True):
        links = (pattern & fl.causal()).dense(N, batch=B, heads=H).expand(B, H, N, N).sum((2, 3))
        assert torch.equal(result.links, links)
