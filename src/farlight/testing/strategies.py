"""Hypothesis strategies: recursive pattern expressions over every primitive, drawn together with sizes that they fit.

Not imported by `farlight.testing`: the only module of farlight that needs hypothesis.
"""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

import farlight.patterns as fl
from farlight.patterns import Pattern, Sizes, presets
from farlight.testing.cases import Case, bits, table

__all__ = ["PRIMITIVES", "atoms", "cases", "patterns", "problems", "sizes"]

Strategy = st.SearchStrategy

PRIMITIVES = (
    *("full", "causal", "window", "strided", "blocked_window", "landmarks", "offsets", "neighborhood"),
    *("global_tokens", "sees_all", "seen_by_all", "documents", "padding"),
    *("random_keys", "random_blocks"),
    *("pairs", "blocks", "clusters", "chosen_blocks", "chosen_keys", "per_head"),
)


@st.composite
def sizes(draw: st.DrawFn, max_length: int = 40) -> Sizes:
    """Sizes with up to `max_length` queries and keys, and any q_offset."""
    n_k = draw(st.integers(0, max_length))
    n_q = draw(st.integers(0, max_length))
    q_offset = draw(st.none() | st.integers(-max_length, 2 * max_length))
    return Sizes.of(n_q, n_k, batch=draw(st.integers(1, 2)), heads=draw(st.integers(1, 3)), q_offset=q_offset)


def _leading(draw: st.DrawFn, at: Sizes, heads: bool = True) -> tuple[int, ...]:
    """Leading dimensions of a table: batch and heads, each full or 1."""
    batch = draw(st.sampled_from([1, at.batch]))
    return (batch, draw(st.sampled_from([1, at.heads]))) if heads else (batch,)


def _rows(draw: st.DrawFn, at: Sizes, unit: int = 1) -> int:
    """Rows of a table over queries: one per key position or one per query, divided by the block size `unit`."""
    return -(-draw(st.sampled_from([at.n_k, at.n_q])) // unit)


def _neighborhood(draw: st.DrawFn, n: int) -> Pattern:
    """A grid of at most n tokens with windows that fit; where there is no token, another pattern."""
    axes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    while axes and math.prod(axes) > n:
        axes.pop()
    if not axes:
        return fl.causal()
    dilation = [draw(st.integers(1, min(2, length))) for length in axes]
    window = [draw(st.integers(1, length // d)) for length, d in zip(axes, dilation, strict=True)]
    return fl.neighborhood(axes, window, dilation, [draw(st.booleans()) for _ in axes])


@st.composite
def atoms(draw: st.DrawFn, at: Sizes) -> Pattern:
    """A primitive that fits these sizes."""
    near, seed = st.integers(0, 12), draw(st.integers(0, 2**20))
    n = at.n_k
    positions = st.lists(st.integers(-n - 3, n + 9), max_size=5)  # some outside the text
    mask = bits(seed, _leading(draw, at, heads=False)[0], n, share=draw(st.sampled_from([0.1, 0.5, 0.9])))
    block = draw(st.integers(1, 9))
    causal = draw(st.booleans())
    match draw(st.sampled_from(PRIMITIVES)):
        case "full":
            return fl.full()
        case "causal":
            return fl.causal()
        case "window":
            return fl.window(draw(near), draw(st.none() | near), dilation=draw(st.sampled_from([1, 1, 2, 3, 7])))
        case "strided":
            return fl.strided(draw(st.integers(1, 9)), phase=draw(st.none() | st.just("head") | st.integers(0, 8)))
        case "blocked_window":
            return fl.blocked_window(draw(st.integers(0, 2)), draw(st.none() | st.integers(0, 2)), block=block)
        case "landmarks":
            return fl.landmarks(block, draw(st.integers(1, block)))
        case "neighborhood":
            return _neighborhood(draw, n)
        case "offsets":
            return fl.offsets(draw(st.lists(st.integers(-20, 20), max_size=5)))
        case "global_tokens" | "sees_all" | "seen_by_all" as name:
            return getattr(fl, name)(mask if draw(st.booleans()) else draw(positions))  # type: ignore[no-any-return]
        case "documents":
            if draw(st.booleans()):
                ids = table(seed, *mask.shape, low=-1, high=4)
                return fl.documents(ids.sort(1).values if draw(st.booleans()) else ids)
            cuts = sorted(draw(st.lists(st.integers(0, n), min_size=1, max_size=4)))
            return fl.documents(lengths=[b - a for a, b in zip([0, *cuts], cuts, strict=False)])
        case "padding":
            return fl.padding(mask if draw(st.booleans()) else table(seed, mask.shape[0], high=n + 1).tolist())
        case "random_keys":
            return fl.random_keys(draw(st.integers(0, 5)), seed=seed, causal=causal)
        case "random_blocks":
            return fl.random_blocks(draw(st.integers(0, 3)), block=block, seed=seed, causal=causal)
        case "pairs":
            return fl.pairs(bits(seed, *_leading(draw, at), _rows(draw, at), n, share=0.3))
        case "blocks":
            return fl.blocks(bits(seed, *_leading(draw, at), _rows(draw, at, block), -(-n // block)), block)
        case "clusters":
            query = table(seed, *_leading(draw, at), _rows(draw, at), low=-1, high=4)
            if query.shape[-1] == n and draw(st.booleans()):
                return fl.clusters(query)
            return fl.clusters(query, table(seed + 1, *_leading(draw, at), n, low=-1, high=4))
        case "chosen_blocks":
            unit = draw(st.integers(1, 9))
            chosen = table(
                seed, *_leading(draw, at), _rows(draw, at, unit), draw(st.integers(0, 3)), low=-1, high=-(-n // block)
            )
            return fl.chosen_blocks(chosen, block=block, query_block=unit)
        case "chosen_keys":
            return fl.chosen_keys(table(seed, *_leading(draw, at), _rows(draw, at), draw(st.integers(0, 4)), low=-1, high=n))
        case "per_head":
            return fl.per_head([draw(atoms(at)) for _ in range(at.heads)])
    raise AssertionError("a primitive without a strategy")


@st.composite
def _preset(draw: st.DrawFn, at: Sizes) -> Pattern:
    small = st.integers(1, 6)
    dilation = draw(small)
    fits = [
        presets.longnet([draw(small), 4 * draw(small)], [1, dilation]),
        presets.sparse_transformer(draw(small), draw(st.sampled_from(["strided", "fixed"]))),
        presets.logsparse(),
    ]
    if at.n_k >= 6:
        fits += [
            presets.longformer(2 * draw(small), [0, -1], dilation, draw(st.booleans())),
            presets.bigbird(draw(small), draw(st.integers(0, 2)), dilation),
            presets.etc(draw(small), draw(small)),
            presets.streaming(draw(small), draw(small)),
            presets.star(),
        ]
    return draw(st.sampled_from(fits))


def patterns(at: Sizes, max_atoms: int = 6) -> Strategy[Pattern]:
    """An expression of up to `max_atoms` primitives and presets that fits the sizes `at`."""

    def combine(inner: Strategy[Pattern]) -> Strategy[Pattern]:
        operands = st.tuples(inner, inner)
        return st.one_of(
            operands.map(lambda ab: ab[0] | ab[1]),
            operands.map(lambda ab: ab[0] & ab[1]),
            operands.map(lambda ab: ab[0] - ab[1]),
            inner.map(lambda a: ~a),
            st.lists(inner, min_size=at.heads, max_size=at.heads).map(fl.per_head),
        )

    return st.recursive(st.one_of(atoms(at), atoms(at), atoms(at), _preset(at)), combine, max_leaves=max_atoms)


@st.composite
def problems(draw: st.DrawFn, max_length: int = 40) -> tuple[Pattern, Sizes]:
    """A random expression and sizes that it fits."""
    at = draw(sizes(max_length))
    return draw(patterns(at)), at


@st.composite
def cases(draw: st.DrawFn, max_length: int = 40) -> Case:
    """A random expression as a `Case`, with random heads, head dimension, strides, dropout and scale."""
    pattern, at = draw(problems(max_length))
    kv_heads = draw(st.sampled_from([h for h in range(1, at.heads + 1) if at.heads % h == 0]))
    return Case(
        "random expression",
        pattern,
        at.n_q,
        at.n_k,
        batch=at.batch,
        heads=at.heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 5, 8, 16, 20])),
        q_offset=at.q_offset,
        dropout=draw(st.sampled_from([0.0, 0.0, 0.3])),
        scale=draw(st.sampled_from([None, 0.0, -0.5, 1.0])),
        seed=draw(st.integers(0, 2**20)),
        layout=draw(st.sampled_from(["contiguous", "tokens first", "every other"])),
    )


def seeds() -> Strategy[int]:
    """Dropout seeds: integers in [0, 2^63)."""
    return st.integers(0, 2**63 - 1) | st.just(0) | st.just(torch.iinfo(torch.int64).max)
