"""Last use of keys: every primitive, and random expressions of them, against the columns of the dense mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import farlight as fl
from farlight.patterns import Pattern, Sizes
from farlight.patterns.liveness import FOREVER, LastUse, for_head, last_use, liveness_sizes, upper_bound
from farlight.testing.strategies import PRIMITIVES, patterns

# Long enough that the patterns below show in it everything that they do in a sequence without end.
FAR = 400


def last_use_of(pattern: Pattern, sizes: Sizes, item: int, head: int, keys: int) -> LastUse:
    j = torch.arange(keys)
    return last_use(for_head(pattern, head), sizes, torch.full_like(j, item), torch.full_like(j, head), j)


def dense_last_use(seen: Tensor) -> tuple[Tensor, Tensor]:
    """(last, unbroken) from a dense mask `(queries, keys)`."""
    i = torch.arange(seen.shape[0])[:, None]
    last = torch.where(seen, i, -1).amax(0) if seen.numel() else torch.zeros(seen.shape[1], dtype=torch.int64)
    j = torch.arange(seen.shape[1])
    return last, (seen | (i < j) | (i > last)).all(0) & (last >= j)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[Pattern, int, int, int]:
    n, batch, heads = draw(st.integers(0, 40)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    return draw(patterns(Sizes.of(n, batch=batch, heads=heads))), n, batch, heads


@given(sequences())
def test_last_use_in_a_sequence_of_known_length(problem) -> None:
    pattern, n, batch, heads = problem
    sizes = liveness_sizes(pattern, n, batch=batch, heads=heads)
    dense = pattern.dense(n, batch=batch, heads=heads).expand(batch, heads, n, n)
    for item in range(batch):
        for head in range(heads):
            use = last_use_of(pattern, sizes, item, head, n)
            last, unbroken = dense_last_use(dense[item, head])
            assert use.last.tolist() == last.tolist()
            assert not bool((use.unbroken & ~unbroken).any())


endless_atoms = st.one_of(
    st.just(fl.full()),
    st.just(fl.causal()),
    st.builds(lambda a, b, d: fl.window(a, b, dilation=d), st.integers(0, 9), st.integers(0, 9), st.integers(1, 3)),
    st.builds(lambda s, p: fl.strided(s, phase=p), st.integers(1, 4), st.none() | st.just("head") | st.integers(0, 3)),
    st.builds(lambda a, b, n: fl.blocked_window(a, b, block=n), st.integers(0, 2), st.integers(0, 2), st.integers(1, 9)),
    st.builds(fl.landmarks, st.sampled_from([3, 5])),
    st.builds(fl.offsets, st.lists(st.integers(-20, 20), max_size=4)),
    st.builds(fl.global_tokens, st.lists(st.integers(0, 30), max_size=3)),
    st.builds(fl.sees_all, st.lists(st.integers(0, 30), max_size=3)),
    st.builds(fl.seen_by_all, st.lists(st.integers(0, 30), max_size=3)),
    st.builds(lambda n: fl.documents(lengths=n), st.lists(st.integers(0, 9), max_size=4)),
    st.builds(fl.padding, st.integers(0, 30)),
)
endless = st.recursive(
    endless_atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda ab: ab[0] | ab[1]),
        st.tuples(inner, inner).map(lambda ab: ab[0] & ab[1]),
        st.tuples(inner, inner).map(lambda ab: ab[0] - ab[1]),
        inner.map(lambda a: ~a),
        st.tuples(inner, inner).map(lambda ab: fl.per_head(list(ab))),
    ),
    max_leaves=6,
)


@settings(max_examples=250)
@given(endless)
def test_last_use_in_a_sequence_without_end(pattern: Pattern) -> None:
    sizes = liveness_sizes(pattern, None, heads=2)
    dense = pattern.dense(FAR, heads=2).expand(1, 2, FAR, FAR)
    for head in range(2):
        use = last_use_of(pattern, sizes, 0, head, 40)
        last, unbroken = dense_last_use(dense[0, head, :, :40])
        # All changes lie before 100 and no period exceeds 36: what is seen later than 200 is seen for ever.
        last = torch.where(last > 200, FOREVER, last)
        assert use.last.tolist() == last.tolist()
        assert torch.equal(use.unbroken, unbroken & (last >= torch.arange(40)))


def test_every_primitive_has_an_example() -> None:
    """The strategies behind the two tests above draw every primitive; a new one must say where its columns change."""
    assert set(PRIMITIVES) >= {name for name in fl.patterns.CONSTRUCTORS if name != "per_head"}


@pytest.mark.parametrize(
    ("pattern", "position", "last"),
    [
        (fl.presets.streaming(4, 1024), 3, FOREVER),
        (fl.presets.streaming(4, 1024), 4, 4 + 1023),
        (fl.causal() & fl.window(10, dilation=7), 5, 75),
        (fl.causal() & fl.strided(64), 5, FOREVER),
        (fl.presets.sparse_transformer(128, "fixed"), 127, FOREVER),
        (fl.presets.sparse_transformer(128, "fixed"), 126, 127),
        (fl.causal() & fl.documents(lengths=[50, 50]), 70, 99),
        (fl.causal() & fl.global_tokens([9]), 4, 9),
        (fl.causal() & (fl.sees_all([3000]) | fl.window(2)), 17, 3000),
        (fl.causal() & (fl.sees_all([3000]) | fl.window(2)), 3001, 3003),
        (fl.presets.logsparse(), 12, 12 + 2**39),
        (fl.window(0, 5), 12, 12),
        (~fl.causal(), 12, 11),
        (~fl.full(), 12, -1),
    ],
    ids=str,
)
def test_last_use_of_known_patterns(pattern: Pattern, position: int, last: int) -> None:
    zero, j = torch.zeros(1, dtype=torch.int64), torch.tensor([position])
    assert int(last_use(pattern, liveness_sizes(pattern, None), zero, zero, j).last) == last


def test_columns_of_streaming_are_unbroken() -> None:
    """What lets one token be decoded without a mask: every kept key is seen by it."""
    pattern = fl.presets.streaming(4, 64)
    assert bool(last_use_of(pattern, liveness_sizes(pattern, None), 0, 0, 300).unbroken.all())
    strided = fl.causal() & fl.strided(3)
    assert not bool(last_use_of(strided, liveness_sizes(strided, None), 0, 0, 300).unbroken.any())


@pytest.mark.parametrize("causal", [False, True])
def test_random_keys_of_a_known_length_are_exact(causal: bool) -> None:
    pattern = fl.random_keys(2, seed=5, causal=causal)
    use = last_use_of(pattern, liveness_sizes(pattern, 3000), 0, 0, 3000)
    last, _ = dense_last_use(pattern.dense(3000)[0, 0])
    assert torch.equal(use.last, last)
    assert 0.1 < float((last < 2000).double().mean()) < 0.9  # many keys can be dropped long before the end


def test_random_keys_without_end_are_live_forever() -> None:
    pattern = fl.causal() & (fl.random_keys(1, causal=True) | fl.window(3))
    assert set(last_use_of(pattern, liveness_sizes(pattern, None), 0, 0, 50).last.tolist()) == {FOREVER}
    # Inside a window a draw is scanned exactly: the window bounds the last use.
    near = fl.window(40, 0) & fl.random_keys(1, causal=True)
    last, _ = dense_last_use(near.dense(200)[0, 0, :, :100])
    assert torch.equal(last_use_of(near, liveness_sizes(near, None), 0, 0, 100).last, last)


def test_strides_with_a_long_common_period_are_bounded_from_above() -> None:
    pattern = fl.causal() & fl.strided(1009) & fl.strided(1013) - fl.strided(1019)
    use = last_use_of(pattern, liveness_sizes(pattern, None), 0, 0, 5)
    assert use.last.tolist() == [FOREVER] * 5
    cut = pattern & fl.window(3000)
    last, _ = dense_last_use(cut.dense(4000)[0, 0, :, :5])
    assert torch.equal(last_use_of(cut, liveness_sizes(cut, None), 0, 0, 5).last, last)


def test_upper_bound_is_a_superset() -> None:
    some = fl.random_keys(2, seed=1, causal=True)
    for pattern in (some, ~some, fl.window(5) - some, ~(fl.window(5) - some), fl.per_head([some, ~some]), ~(some | ~some)):
        bound = upper_bound(pattern, {some})
        assert some not in set(bound.atoms())
        assert not bool((pattern.dense(30, heads=2) & ~bound.dense(30, heads=2)).any())


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (fl.global_tokens([0, -1]), r"global_tokens\(\[0, -1\]\) counts from the end of the text"),
        (fl.seen_by_all(torch.tensor([True, False])), "seen_by_all is given as a mask"),
        (fl.padding(torch.tensor([True, False])), "padding is given as a mask"),
        (fl.documents([0, 0, 1]), "documents is given as ids"),
        (fl.random_keys(3), "random_keys draws from the keys of the whole text, unless causal=True"),
        (fl.random_blocks(3), "random_blocks draws from the keys of the whole text, unless causal=True"),
        (fl.pairs(torch.ones(3, 3, dtype=torch.bool)), "pairs is made for a text of one length"),
        (fl.clusters([0, 1]), "clusters is made for a text of one length"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_pattern_of_known_length_is_refused_without_end(pattern: Pattern, why: str) -> None:
    with pytest.raises(fl.PatternError, match=f"{why}, but this text has no known length.*Give max_length="):
        liveness_sizes(fl.causal() & pattern, None)


def test_the_default_column_changes_are_correct() -> None:
    class evens(fl.patterns.expression.Atom):
        def __init__(self) -> None:
            self._set(text="evens()", tables=())

        def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i * i + j) % 6 == 0

    pattern = evens() | fl.window(2)
    last, _ = dense_last_use(pattern.dense(50)[0, 0])
    assert torch.equal(last_use_of(pattern, liveness_sizes(pattern, 50), 0, 0, 50).last, last)
    with pytest.raises(fl.PatternError, match="evens is made for a text of one length"):
        liveness_sizes(pattern, None)
