"""Block patterns are planned by tile where the tile's rows agree, with the same links as row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import farlight as fl
from farlight.patterns import Pattern, Sizes
from farlight.patterns.spans import Spans
from farlight.plan import TileShape
from farlight.plan.build import build, count_pairs
from farlight.plan.layout import Chunk, TermLayout
from farlight.plan.normal_form import terms_of
from farlight.testing.cases import bits, table
from farlight.testing.strategies import problems

TILES = TileShape(8, 4, 64)
LAYOUT = fl.blocks(bits(1, 3, 7, 7), 16)
CHOSEN = fl.chosen_blocks(table(2, 2, 3, 14, 3, low=-1, high=7), block=16, query_block=8)
DRAWN = fl.random_blocks(2, block=16)
BLOCK_PATTERNS: list[Pattern] = [
    LAYOUT,
    CHOSEN,
    DRAWN,
    LAYOUT | fl.window(5),
    CHOSEN & fl.causal(),
    (CHOSEN & fl.causal()) | fl.window(3, 0),
    CHOSEN | fl.global_tokens([0, -1]),
    CHOSEN | fl.global_tokens([3, 50, 90]) | fl.window(9),
    LAYOUT - fl.window(20),
    ~LAYOUT & fl.window(30),
    ~CHOSEN,
    DRAWN | LAYOUT | fl.blocked_window(1, block=16),
    CHOSEN & fl.padding([100, 37]),
    CHOSEN - fl.seen_by_all(range(20, 31)),
    CHOSEN & fl.documents(lengths=[40, 13, 51]),
    fl.per_head([LAYOUT | fl.window(2), fl.window(4), DRAWN - fl.causal()]),
    LAYOUT | fl.window(6, dilation=3) | fl.random_keys(2),
]
SIZES = Sizes.of(107, batch=2, heads=3)


@pytest.mark.parametrize("pattern", BLOCK_PATTERNS, ids=repr)
@pytest.mark.parametrize("shape", [TILES, TileShape(16, 2, 30), TileShape(4, 1000, 1000)], ids=lambda shape: str(shape.tile))
def test_the_links_are_those_of_the_pattern(pattern: Pattern, shape: TileShape) -> None:
    plan = build(pattern, SIZES, shape)
    plan.check()
    wanted = pattern.dense(107, batch=2, heads=3).expand(2, 3, -1, -1)
    assert torch.equal(plan.dense(), wanted)
    assert plan.pairs == count_pairs(pattern, SIZES) == int(wanted.sum())


@pytest.mark.parametrize("pattern", BLOCK_PATTERNS, ids=repr)
def test_block_patterns_are_planned_by_tile(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    tile_spans = TermLayout.tile_spans

    def counting(self: TermLayout, chunk: Chunk) -> object:
        nonlocal calls
        spans = tile_spans(self, chunk)
        calls += spans is not None
        return spans

    monkeypatch.setattr(TermLayout, "tile_spans", counting)
    by_tile = build(pattern, SIZES, TILES)
    assert calls > 0
    monkeypatch.setattr(TermLayout, "tile_spans", lambda *_: None)
    by_row = build(pattern, SIZES, TILES)
    assert (by_tile.pairs, by_tile.overlapping) == (by_row.pairs, by_row.overlapping)
    assert torch.equal(by_tile.dense(), by_row.dense())


def test_blocks_smaller_than_a_tile_are_planned_by_row() -> None:
    term = terms_of(fl.random_blocks(2, block=6), SIZES)[0]
    layout = TermLayout(term, SIZES, 8)
    assert all(layout.tile_spans(chunk) is None for chunk in layout.chunks())


@given(problems(), st.integers(0, 10**6))
def test_rows_that_are_said_to_agree_see_the_same(problem: tuple[Pattern, Sizes], seed: int) -> None:
    pattern, sizes = problem
    if not sizes.n_q:
        return
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(sizes.n_q, (40,), generator=generator)
    last = (first + torch.randint(9, (40,), generator=generator)).clamp(max=sizes.n_q - 1)
    for atom in pattern.atoms():
        mask = atom.dense(sizes.n_q, sizes.n_k, batch=sizes.batch, heads=sizes.heads, q_offset=sizes.q_offset)
        agree = atom._rows_equal(sizes, first + sizes.q_offset, last + sizes.q_offset)
        for a, b in zip(first[agree].tolist(), last[agree].tolist(), strict=True):
            assert bool((mask[:, :, a : b + 1] == mask[:, :, a : a + 1]).all()), repr(atom)


def test_repeated_rows() -> None:
    mask = bits(5, 4, 9)
    source = torch.tensor([0, 0, 1, 3, 3, 3])
    assert torch.equal(Spans.from_mask(mask).repeated(source).mask(), mask[source])
    thin = Spans.thin(9, torch.tensor([1, 5, 0, 7]), torch.tensor([4, 5, 9, 9]))
    assert thin.repeated(source).is_thin
    assert torch.equal(thin.repeated(source).mask(), thin.mask()[source])
    assert torch.equal(Spans.from_mask(mask).scaled(3, 25).mask(), mask.repeat_interleave(3, 1)[:, :25])
