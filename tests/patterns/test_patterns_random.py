"""Random primitives: draws that depend on (seed, head, position) alone, are uniform, and differ by seed and head."""

from __future__ import annotations

import pytest
import torch
from definitions import hashed, mix
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import farlight as fl
from farlight.patterns import Pattern, Sizes
from farlight.patterns.hashing import draw_below, dropout_keep, dropout_threshold, hash_words, mix32

MILLION = 1_000_000
RANDOM = [
    fl.random_keys(3),
    fl.random_keys(3, seed=2**63 + 11),
    fl.random_keys(5, causal=True),
    fl.random_blocks(2, block=64),
    fl.random_blocks(3, block=50, seed=1, causal=True),
]


def keys_of_row(pattern: Pattern, sizes: Sizes, rows: Tensor, wanted: int, head: int) -> list[int]:
    """The keys that row `rows[wanted]` sees when these rows are computed together, without a dense mask."""
    spans = pattern._spans(sizes, torch.zeros_like(rows), torch.full_like(rows, head), rows + sizes.q_offset)
    row, key = spans.expand()
    return [int(j) for j in key[row == wanted]]


@pytest.mark.parametrize("pattern", RANDOM, ids=repr)
def test_row_900000_of_a_million_is_computed_alone(pattern: Pattern) -> None:
    at = 900_000
    whole = Sizes.of(MILLION, heads=2)
    for head in (0, 1):
        many = keys_of_row(pattern, whole, torch.arange(at - 2000, at + 2000), 2000, head)
        assert many == keys_of_row(pattern, whole, torch.tensor([at]), 0, head)
        # As the only query, by its offset; and as row 7 of ten.
        assert many == keys_of_row(pattern, Sizes.of(1, MILLION, heads=2, q_offset=at), torch.tensor([0]), 0, head)
        assert many == keys_of_row(pattern, Sizes.of(10, MILLION, heads=2, q_offset=at - 7), torch.arange(10), 7, head)
        row = pattern.dense_rows(at, at + 1, whole)[0, head, 0]
        assert row.nonzero().squeeze(1).tolist() == many
        assert pattern.allows(at, many[0], MILLION, head=head)


def test_all_rows_of_a_million_at_once_hold_the_same_row() -> None:
    pattern, sizes = fl.random_keys(3, seed=4), Sizes.of(MILLION)
    every, zero = torch.arange(MILLION), torch.zeros(MILLION, dtype=torch.int64)
    drawn = pattern._points(sizes, zero, zero, every)
    for at in (0, 1, 900_000, MILLION - 1):
        alone = pattern._points(sizes, zero[:1], zero[:1], torch.tensor([at]))
        assert torch.equal(alone[0], drawn[at])
    assert pattern.count(MILLION) == 3 * MILLION


@pytest.mark.parametrize("pattern", RANDOM, ids=repr)
def test_the_draw_does_not_depend_on_batch_chunk_or_global_state(pattern: Pattern) -> None:
    first = pattern.dense(300, heads=2)
    torch.manual_seed(123)
    torch.rand(10)
    assert torch.equal(pattern.dense(300, batch=3, heads=2), first)
    assert torch.equal(pattern.dense(300, heads=1)[:, 0], first[:, 0])
    assert torch.equal(pattern.dense(40, 300, heads=2), first[:, :, -40:])
    sizes = Sizes.of(300, heads=2)
    pieces = [pattern.dense_rows(r, min(r + 77, 300), sizes) for r in range(0, 300, 77)]
    assert torch.equal(torch.cat(pieces, 2), first)


def test_seeds_and_heads_draw_differently() -> None:
    base = fl.random_keys(4).dense(400, heads=2)
    other = fl.random_keys(4, seed=1).dense(400, heads=2)
    high = fl.random_keys(4, seed=2**32).dense(400, heads=2)  # both halves of a seed count
    for a, b in ((base, other), (base, high), (other, high), (base[:, :1], base[:, 1:])):
        # Two independent draws of 4 of 400 share a hundredth of their links.
        shared = int((a & b).sum()) / int(a.sum())
        assert shared < 0.03
    assert fl.random_keys(4, seed=2**64) == fl.random_keys(4), "seeds are 64 bits wide"


def test_keys_are_drawn_evenly() -> None:
    n, rows = 50, 6000
    seen = fl.random_keys(3).dense(rows, n, q_offset=0)[0, 0].sum(0).double()
    expected = 3 * rows / n
    assert int(seen.sum()) == 3 * rows
    # The sum of squares over 49 degrees of freedom exceeds 108 once in a million.
    assert float(((seen - expected) ** 2 / expected).sum()) < 108


def test_every_subset_is_drawn_equally_often() -> None:
    rows = 10_000
    mask = fl.random_keys(2, seed=3).dense(rows, 5, q_offset=0)[0, 0]
    code = (mask.long() * (2 ** torch.arange(5))).sum(1)
    counts = torch.bincount(code)
    counts = counts[counts > 0].double()
    assert counts.numel() == 10  # pairs out of five
    assert float(((counts - rows / 10) ** 2 / (rows / 10)).sum()) < 45  # 9 degrees of freedom, once in a million


def test_causal_draws_are_from_the_past_and_complete_while_it_is_short() -> None:
    mask = fl.random_keys(4, causal=True).dense(200)[0, 0]
    assert not (mask & ~fl.causal().dense(200)[0, 0]).any()
    assert mask.sum(1).tolist() == [min(i + 1, 4) for i in range(200)]
    late = mask[100:].double()
    mean = float((late * torch.arange(200)).sum() / late.sum())
    assert 60 < mean < 90, "keys are drawn from the whole past: on average its middle"
    blocks = fl.random_blocks(2, block=10, causal=True).dense(100)[0, 0]
    assert not (blocks & ~fl.causal().dense(100)[0, 0]).any()
    assert bool(blocks.diagonal()[:10].all()), "the first block has only itself to draw"


def test_a_count_beyond_the_keys_draws_all_keys() -> None:
    assert bool(fl.random_keys(50).dense(20).all())
    assert bool(fl.random_blocks(50, block=3).dense(20).all())
    assert torch.equal(fl.random_keys(50, causal=True).dense(20), fl.causal().dense(20))
    assert not fl.random_keys(0).dense(20).any()


def test_queries_of_one_block_share_a_draw() -> None:
    mask = fl.random_blocks(2, block=8).dense(64, heads=2)
    tiles = mask.unflatten(3, (8, 8)).unflatten(2, (8, 8))
    assert torch.equal(tiles.any(5).any(3), tiles.all(5).all(3))
    assert set(tiles.any(5).any(3).sum(3).flatten().tolist()) == {2}


# ---- the hash itself, which every kernel repeats ----------------------------------------------------------------------
WORDS = st.integers(-(2**40), 2**63 - 1)


@given(st.lists(WORDS, min_size=1, max_size=6))
def test_the_hash_of_tensors_is_the_hash_of_integers(words: list[int]) -> None:
    assert int(hash_words(*words)) == hashed(*words)
    assert int(hash_words(*(torch.tensor(w) for w in words))) == hashed(*words)
    assert int(mix32(torch.tensor(words[0] & (2**32 - 1)))) == mix(words[0] & (2**32 - 1))


def test_the_random_numbers_never_change() -> None:
    """A stored seed must give the same links in every version: these numbers are part of the format."""
    assert int(hash_words(0)) == 0xC44756AA
    assert fl.random_keys(3).dense(1, 1000, q_offset=5)[0, 0, 0].nonzero().view(-1).tolist() == [143, 332, 645]
    assert fl.random_blocks(2, block=10).dense(1, 1000, q_offset=5)[0, 0, 0, ::10].nonzero().view(-1).tolist() == [5, 63]


@given(st.integers(0, 2**32 - 1), st.integers(1, 2**31))
def test_a_number_below_a_bound(h: int, bound: int) -> None:
    assert int(draw_below(torch.tensor(h), bound)) == h * bound >> 32
    assert 0 <= int(draw_below(torch.tensor(h), bound)) < bound


def test_dropout_keeps_pairs_with_probability_1_minus_p() -> None:
    b, h, i, j = (torch.arange(n).view(shape) for n, shape in ((2, (2, 1, 1, 1)), (3, (3, 1, 1)), (64, (64, 1)), (80, (80,))))
    keep = dropout_keep(5, 0.25, b, h, i, j)
    assert keep.shape == (2, 3, 64, 80)
    # 30 720 links: the share kept is within 5 standard deviations of 0.75.
    assert abs(float(keep.double().mean()) - 0.75) < 5 * (0.25 * 0.75 / keep.numel()) ** 0.5
    for other in (dropout_keep(6, 0.25, b, h, i, j), dropout_keep(5 + 2**32, 0.25, b, h, i, j), keep.flip(0), keep.roll(1, 1)):
        assert 0.5 < float((keep == other).double().mean()) < 0.75, "independent choices agree in 0.625 of the links"
    # A link's fate is its own: computed alone it is the same, also at positions before the text.
    alone = [dropout_keep(torch.tensor(5), 0.25, *(torch.tensor(x) for x in (1, 2, at, 7))) for at in (-3, 0, 63)]
    assert alone[1] == keep[1, 2, 0, 7]
    assert alone[2] == keep[1, 2, 63, 7]


def test_a_larger_p_drops_a_superset() -> None:
    at = [torch.arange(n).view(s) for n, s in ((1, (1, 1, 1, 1)), (1, (1, 1, 1)), (50, (50, 1)), (50, (50,)))]
    less, more = dropout_keep(9, 0.1, *at), dropout_keep(9, 0.6, *at)
    assert not (more & ~less).any()
    assert bool(dropout_keep(9, 0.0, *at).all())
    assert dropout_threshold(0.5) == 2**31
