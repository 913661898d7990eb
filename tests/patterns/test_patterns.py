"""Every primitive against its definition in plain Python, `_spans`, `_points` and `_labels` against `_allows`, laws of sets."""

from __future__ import annotations

import itertools

import pytest
import torch
from definitions import DEFINED, Defined
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import farlight as fl
from farlight.patterns import Pattern, Sizes
from farlight.patterns.expression import Atom
from farlight.testing.strategies import patterns, problems

# (n_q, q_offset): all rows, the last ones, the first ones, rows before, behind and on both sides of the text.
PLACES = [(23, None), (9, None), (10, 0), (40, None), (12, 19), (7, -30), (6, 100), (90, -33)]


def by_hand(defined: Defined, sizes: Sizes) -> Tensor:
    out = torch.zeros(sizes.batch, sizes.heads, sizes.n_q, sizes.n_k, dtype=torch.bool)
    for b, h, r, j in itertools.product(*(range(n) for n in out.shape)):
        out[b, h, r, j] = defined.rule(b, h, sizes.q_offset + r, j, sizes.n_k)
    return out


def dense(pattern: Pattern, sizes: Sizes) -> Tensor:
    out = pattern.dense(sizes.n_q, sizes.n_k, batch=sizes.batch, heads=sizes.heads, q_offset=sizes.q_offset)
    return out.expand(sizes.batch, sizes.heads, -1, -1)


def every_row(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """(b, h, i) of all rows of all heads of all items, one after another."""
    b, h, i = torch.meshgrid(torch.arange(sizes.batch), torch.arange(sizes.heads), torch.arange(sizes.n_q), indexing="ij")
    return b.reshape(-1), h.reshape(-1), i.reshape(-1) + sizes.q_offset


def sizes_of(defined: Defined, n_q: int, q_offset: int | None) -> Sizes:
    return Sizes.of(n_q, defined.n, batch=defined.batch, heads=defined.heads, q_offset=q_offset)


@pytest.mark.parametrize("defined", DEFINED, ids=str)
def test_dense_is_the_definition(defined: Defined) -> None:
    for n_q, q_offset in PLACES:
        sizes = sizes_of(defined, n_q, q_offset)
        assert torch.equal(dense(defined.pattern, sizes), by_hand(defined, sizes)), (n_q, q_offset)


@pytest.mark.parametrize("defined", DEFINED, ids=str)
def test_allows_is_the_definition(defined: Defined) -> None:
    n = defined.n
    for b, h in itertools.product(range(defined.batch), range(defined.heads)):
        for i, j in itertools.product(range(0, n, 3), range(n)):
            assert defined.pattern.allows(i, j, n, batch=b, head=h) == defined.rule(b, h, i, j, n), (b, h, i, j)


@pytest.mark.parametrize("defined", DEFINED, ids=str)
def test_spans_are_the_dense_rows(defined: Defined) -> None:
    for n_q, q_offset in PLACES:
        sizes = sizes_of(defined, n_q, q_offset)
        spans = defined.pattern._spans(sizes, *every_row(sizes))
        wanted = dense(defined.pattern, sizes).reshape(-1, sizes.n_k)
        assert torch.equal(spans.mask(), wanted), (n_q, q_offset)
        assert spans.count() == int(wanted.sum())
        row, lo, hi = spans.listed()
        assert bool((lo < hi).all())
        same_row = row[1:] == row[:-1]
        assert bool((row[1:] >= row[:-1]).all())
        assert bool((lo[1:] > hi[:-1])[same_row].all()), "intervals of a row must be disjoint and must not touch"


def atoms_of_form(form: str) -> list[Defined]:
    atoms = [defined for defined in DEFINED if isinstance(defined.pattern, Atom)]
    return [one for one in atoms if one.pattern._form(sizes_of(one, one.n, None)) == form]


@pytest.mark.parametrize("defined", atoms_of_form("points"), ids=str)
def test_points_are_distinct_and_are_the_dense_rows(defined: Defined) -> None:
    assert isinstance(defined.pattern, Atom)
    for n_q, q_offset in PLACES:
        sizes = sizes_of(defined, n_q, q_offset)
        keys = defined.pattern._points(sizes, *every_row(sizes))
        times = torch.zeros(keys.shape[0], sizes.n_k + 1, dtype=torch.int64)
        times.scatter_add_(1, torch.where(keys < 0, sizes.n_k, keys), torch.ones_like(keys))
        assert int(times[:, : sizes.n_k].max()) <= 1
        assert torch.equal(times[:, : sizes.n_k] > 0, dense(defined.pattern, sizes).reshape(-1, sizes.n_k))


@pytest.mark.parametrize("defined", atoms_of_form("labels"), ids=str)
def test_labels_agree_where_the_pair_is_allowed(defined: Defined) -> None:
    assert isinstance(defined.pattern, Atom)
    for n_q, q_offset in PLACES:
        sizes = sizes_of(defined, n_q, q_offset)
        b, h = (x.reshape(-1) for x in torch.meshgrid(torch.arange(sizes.batch), torch.arange(sizes.heads), indexing="ij"))
        labels = defined.pattern._labels(sizes, b, h)
        agree = (labels.query[:, :, None] == labels.key[:, None, :]) & (labels.query[:, :, None] >= 0)
        assert torch.equal(agree, dense(defined.pattern, sizes).reshape(agree.shape))


@pytest.mark.parametrize("defined", DEFINED, ids=str)
def test_rows_computed_alone_are_the_rows_of_the_whole(defined: Defined) -> None:
    sizes = sizes_of(defined, 40, None)
    whole = defined.pattern.dense_rows(0, 40, sizes)
    for start, stop in ((0, 1), (17, 18), (39, 40), (20, 33), (5, 5)):
        assert torch.equal(defined.pattern.dense_rows(start, stop, sizes), whole[:, :, start:stop])


@pytest.mark.parametrize("defined", DEFINED, ids=str)
def test_what_does_not_vary_has_a_leading_dimension_of_one(defined: Defined) -> None:
    pattern, sizes = defined.pattern, sizes_of(defined, defined.n, None)
    found = pattern.dense(sizes.n_q, batch=sizes.batch, heads=sizes.heads)
    assert found.shape[0] == (sizes.batch if pattern.varies_over_batch else 1)
    assert found.shape[1] == (sizes.heads if pattern.varies_over_heads else 1)
    assert found.dtype == torch.bool
    assert torch.equal(found.expand(sizes.batch, sizes.heads, -1, -1), by_hand(defined, sizes))


@pytest.mark.parametrize("defined", DEFINED, ids=str)
def test_count_and_density_are_exact(defined: Defined) -> None:
    n, shape = defined.n, {"batch": defined.batch, "heads": defined.heads}
    wanted = int(dense(defined.pattern, sizes_of(defined, n, None)).sum())
    assert defined.pattern.count(n, **shape) == wanted
    assert defined.pattern.density(n, **shape) == wanted / (n * n * defined.batch * defined.heads)


# ---- edges -----------------------------------------------------------------------------------------------------------
def test_a_window_holds_nine_keys_inside_and_is_clipped_never_shifted_at_the_ends() -> None:
    seen = fl.window(4).dense(12).sum(3)[0, 0].tolist()
    assert seen == [5, 6, 7, 8, 9, 9, 9, 9, 8, 7, 6, 5]


def test_queries_are_the_last_positions_by_default() -> None:
    assert torch.equal(fl.causal().dense(3, 8)[0, 0].sum(1), torch.tensor([6, 7, 8]))
    assert torch.equal(fl.causal().dense(3, 8, q_offset=0)[0, 0].sum(1), torch.tensor([1, 2, 3]))
    assert torch.equal(fl.causal().dense(5, 3)[0, 0].sum(1), torch.tensor([0, 0, 1, 2, 3]))


AT_ANY_LENGTH = [
    *(fl.full(), fl.causal(), ~fl.full(), fl.window(3), fl.window(2, dilation=2), fl.strided(3), fl.landmarks(2)),
    *(fl.blocked_window(1, block=4), fl.offsets([0, 1]), fl.random_keys(3), fl.random_blocks(2), fl.global_tokens([])),
    *(fl.documents(lengths=[]), fl.padding([0]), fl.presets.longnet([4], [1]), fl.presets.logsparse()),
]


@pytest.mark.parametrize("pattern", AT_ANY_LENGTH, ids=repr)
def test_empty_texts_and_single_tokens(pattern: Pattern) -> None:
    assert pattern.dense(0).shape == (1, 1, 0, 0)
    assert pattern.dense(0, 5).shape == (1, 1, 0, 5)
    assert pattern.dense(4, 0).shape == (1, 1, 4, 0)
    assert pattern.count(0) == 0
    assert pattern.density(0) == 0.0
    assert pattern.count(1) == int(pattern.dense(1).sum())


def test_a_table_of_queries_may_have_a_row_for_each_query_or_for_each_position() -> None:
    n_q, n_k = 5, 12
    whole = torch.randint(2, (n_k, n_k)) > 0
    by_position, by_query = fl.pairs(whole).dense(n_q, n_k), fl.pairs(whole[-n_q:]).dense(n_q, n_k)
    assert torch.equal(by_position, by_query)
    labels = torch.randint(3, (n_k,))
    assert torch.equal(fl.clusters(labels).dense(n_q, n_k), fl.clusters(labels[-n_q:], labels).dense(n_q, n_k))
    lists = torch.randint(-1, n_k, (n_k, 3))
    assert torch.equal(fl.chosen_keys(lists).dense(n_q, n_k), fl.chosen_keys(lists[-n_q:]).dense(n_q, n_k))
    # Rows of blocks: queries 6 … 11 of 12 are the second half of four blocks of three.
    layout = torch.randint(2, (4, 4)) > 0
    assert torch.equal(fl.blocks(layout, 3).dense(6, 12), fl.blocks(layout[2:], 3).dense(6, 12))
    blocks = torch.randint(-1, 4, (1, 1, 4, 2))
    both = [fl.chosen_blocks(x, block=3).dense(6, 12) for x in (blocks, blocks[:, :, 2:])]
    assert torch.equal(*both)


def test_a_table_by_position_follows_the_offset_and_one_by_query_does_not() -> None:
    mask = torch.eye(8, dtype=torch.bool)
    assert torch.equal(fl.pairs(mask).dense(3, 8, q_offset=2)[0, 0], mask[2:5])
    assert torch.equal(fl.pairs(mask[:3]).dense(3, 8, q_offset=2)[0, 0], mask[:3])
    # Where queries and positions are equally many, a table is read by position.
    assert torch.equal(fl.pairs(mask).dense(8, 8, q_offset=5)[0, 0, :3], mask[5:])
    assert not fl.pairs(mask).dense(8, 8, q_offset=5)[0, 0, 3:].any()


def test_dense_is_computed_on_the_requested_device() -> None:
    for defined in DEFINED:
        sizes = sizes_of(defined, 10, None)
        assert defined.pattern.dense_rows(0, 10, sizes, device="meta").device.type == "meta"


def test_naming_a_pair_twice_changes_nothing() -> None:
    p = fl.chosen_keys([[1, 1, 1], [0, 2, 0], [-1, -1, 2]])
    assert p.dense(3).int()[0, 0].tolist() == [[0, 1, 0], [1, 0, 1], [0, 0, 1]]
    assert p.count(3) == 4
    assert (fl.window(2) | fl.window(2)).count(9) == fl.window(2).count(9)
    assert fl.global_tokens([0, -9, 0]).count(9) == fl.global_tokens([0]).count(9)


# ---- the algebra -----------------------------------------------------------------------------------------------------
@settings(max_examples=40)
@given(st.data())
def test_the_laws_of_sets(data: st.DataObject) -> None:
    first, sizes = data.draw(problems(24))
    a, b, c = first, data.draw(patterns(sizes, 3)), data.draw(patterns(sizes, 3))

    def same(x: Pattern, y: Pattern) -> None:
        assert torch.equal(dense(x, sizes), dense(y, sizes)), (x, y)
        if sizes.n_k:  # the planner asks for no row of an empty text
            assert torch.equal(x._spans(sizes, *every_row(sizes)).mask(), y._spans(sizes, *every_row(sizes)).mask())

    same(a | b, b | a)
    same(a & b, b & a)
    same((a | b) | c, a | (b | c))
    same((a & b) & c, a & (b & c))
    same(a & (b | c), (a & b) | (a & c))
    same(a | (b & c), (a | b) & (a | c))
    same(~(a | b), ~a & ~b)
    same(~(a & b), ~a | ~b)
    same(a - b, a & ~b)
    same(a - (b | c), (a - b) - c)
    same(~~a, a)
    same(a | a, a)
    same(a & a, a)
    same(a | (a & b), a)
    same(a - a, ~fl.full())
    same(a | ~a, fl.full())
    same(a & fl.full(), a)
    assert torch.equal(dense(a | b, sizes), dense(a, sizes) | dense(b, sizes))
    assert torch.equal(dense(a & b, sizes), dense(a, sizes) & dense(b, sizes))
    assert torch.equal(dense(~a, sizes), ~dense(a, sizes))


def test_only_patterns_combine() -> None:
    for sign, act in (("|", lambda p: p | 3), ("&", lambda p: p & None), ("-", lambda p: p - "causal()")):
        with pytest.raises(TypeError, match=rf"`pattern \{sign} .*` *: \w+ is not a pattern; combine patterns with patterns\."):
            act(fl.window(3))
    with pytest.raises(TypeError, match="unsupported operand"):
        3 | fl.window(3)  # type: ignore[operator]


def test_per_head_gives_each_head_its_pattern() -> None:
    parts = [fl.window(1), fl.strided(2), fl.window(1)]
    found = fl.per_head(parts).dense(7, heads=3)
    for head, part in enumerate(parts):
        assert torch.equal(found[0, head], part.dense(7)[0, 0])
    # Inside a larger expression too, and with one pattern for all heads it is that pattern.
    both = (fl.per_head(parts) & fl.causal()).dense(7, heads=3)
    assert torch.equal(both, found & fl.causal().dense(7))
    assert not fl.per_head([fl.window(1)] * 3).varies_over_heads
