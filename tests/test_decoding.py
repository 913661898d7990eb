"""Decoding with a cache: what is kept is exactly what is needed, and the answers are those of attention over everything."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import farlight as fl
from farlight.patterns import Pattern, Sizes
from farlight.testing.strategies import patterns


def needed(pattern: Pattern, n: int, length: int, following: int, batch: int, heads: int, kv_heads: int) -> Tensor:
    """`(B, H_kv, length)`: by the book, which keys some query at a position >= following sees, in a text of n tokens."""
    seen = pattern.dense(n, batch=batch, heads=heads).expand(batch, heads, n, n)[:, :, following:, :length].any(2)
    return seen.unflatten(1, (kv_heads, heads // kv_heads)).any(2)


def held(cache: fl.KVCache, batch: int, kv_heads: int, length: int) -> Tensor:
    """`(B, H_kv, length)`: what the cache says it holds."""
    positions = cache.positions.expand(batch, kv_heads, -1)
    out = torch.zeros(batch, kv_heads, length + 1, dtype=torch.bool)
    out.scatter_(2, torch.where(positions < 0, length, positions), True)
    return out[..., :length]


def pieces(total: int, sizes: Iterator[int]) -> Iterator[tuple[int, int]]:
    start = 0
    while start < total:
        stop = min(total, start + next(sizes))
        yield start, stop
        start = stop


def uncached(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, n: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The rows start … stop - 1 over all keys before stop, the pattern being that of a text of n tokens, in float64."""
    batch, heads = q.shape[:2]
    mask = pattern.dense(n, batch=batch, heads=heads)[:, :, start:stop, :stop]
    group = heads // k.shape[1]
    k, v = (x[:, :, :stop].double().repeat_interleave(group, 1) for x in (k, v))
    scores = (q[:, :, start:stop].double() @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None].nan_to_num(neginf=0.0)).exp() @ v, lse


@st.composite
def problems(draw: st.DrawFn) -> tuple[Pattern, int, int, int, int, list[int]]:
    n, batch = draw(st.integers(1, 36)), draw(st.integers(1, 2))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]))
    pattern = draw(patterns(Sizes.of(n, batch=batch, heads=kv_heads * group)))
    return pattern, n, batch, kv_heads * group, kv_heads, draw(st.lists(st.sampled_from([1, 1, 2, 7]), min_size=1, max_size=6))


@settings(max_examples=120)
@given(problems())
def test_any_pattern_keeps_exactly_what_is_needed_and_answers_as_without_a_cache(problem) -> None:
    pattern, n, batch, heads, kv_heads, sizes = problem
    generator = torch.Generator().manual_seed(n)
    q = torch.randn(batch, heads, n, 4, generator=generator)
    k, v = torch.randn(2, batch, kv_heads, n, 4, generator=generator)
    cache = fl.KVCache(pattern, max_length=n, heads=heads)
    for start, stop in pieces(n, itertools.cycle(sizes)):
        cache.append(k[:, :, start:stop], v[:, :, start:stop])
        assert torch.equal(held(cache, batch, kv_heads, stop), needed(pattern, n, stop, start, batch, heads, kv_heads))
        out, lse = fl.decode(q[:, :, start:stop], cache, return_lse=True)
        true_out, true_lse = uncached(q, k, v, pattern, n, start, stop)
        torch.testing.assert_close(out.double(), true_out, atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(lse.double(), true_lse, atol=2e-6, rtol=2e-6)
        last = fl.decode(q[:, :, stop - 1 : stop], cache)
        torch.testing.assert_close(last, out[:, :, -1:], atol=2e-6, rtol=2e-6)
