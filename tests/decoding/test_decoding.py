"""`KVCache` and `decode`: the cache holds exactly the live keys, and outputs equal attention over every key appended."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import farlight as fl
from farlight.decoding import last_use as rules
from farlight.decoding.slot_queries import SlotQueries
from farlight.patterns import Pattern, Sizes
from farlight.patterns.liveness import FOREVER, LastUse
from farlight.routing import TopBlocks, TopKeys
from farlight.testing import CASES, Case, inputs
from farlight.testing.strategies import patterns


def live_keys(pattern: Pattern, n: int, length: int, following: int, batch: int, heads: int, kv_heads: int) -> Tensor:
    """`(B, H_kv, length)` from the dense mask: the keys that a query at a position >= following sees; n: length of the text."""
    seen = pattern.dense(n, batch=batch, heads=heads).expand(batch, heads, n, n)[:, :, following:, :length].any(2)
    return seen.unflatten(1, (kv_heads, heads // kv_heads)).any(2)


def cached_keys(cache: fl.KVCache, batch: int, kv_heads: int, length: int) -> Tensor:
    """`(B, H_kv, length)`: the keys that `cache.positions` lists."""
    positions = cache.positions.expand(batch, kv_heads, -1)
    out = torch.zeros(batch, kv_heads, length + 1, dtype=torch.bool)
    out.scatter_(2, torch.where(positions < 0, length, positions), True)
    return out[..., :length]


def chunks(total: int, sizes: Iterator[int]) -> Iterator[tuple[int, int]]:
    start = 0
    while start < total:
        stop = min(total, start + next(sizes))
        yield start, stop
        start = stop


def reference(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, n: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """(out, lse) of rows start … stop - 1 over all keys before stop in float64; the pattern is that of a text of n tokens."""
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


@settings(max_examples=80)
@given(problems())
def test_any_pattern_keeps_exactly_the_live_keys_and_decodes_as_without_a_cache(problem) -> None:
    pattern, n, batch, heads, kv_heads, sizes = problem
    generator = torch.Generator().manual_seed(n)
    q = torch.randn(batch, heads, n, 4, generator=generator)
    k, v = torch.randn(2, batch, kv_heads, n, 4, generator=generator)
    cache = fl.KVCache(pattern, max_length=n, heads=heads)
    for start, stop in chunks(n, itertools.cycle(sizes)):
        cache.append(k[:, :, start:stop], v[:, :, start:stop])
        assert torch.equal(
            cached_keys(cache, batch, kv_heads, stop), live_keys(pattern, n, stop, start, batch, heads, kv_heads)
        )
        out, lse = fl.decode(q[:, :, start:stop], cache, return_lse=True)
        true_out, true_lse = reference(q, k, v, pattern, n, start, stop)
        torch.testing.assert_close(out.double(), true_out, atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(lse.double(), true_lse, atol=2e-6, rtol=2e-6)
        last = fl.decode(q[:, :, stop - 1 : stop], cache)
        torch.testing.assert_close(last, out[:, :, -1:], atol=2e-6, rtol=2e-6)


def tensors(n: int, heads: int, kv_heads: int, dim: int = 8, batch: int = 1, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(n + heads)
    drawn = [torch.randn(batch, h, n, dim, generator=generator, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)]
    return [x.to(dtype) for x in drawn]


def decode_all(cache: fl.KVCache, q: Tensor, k: Tensor, v: Tensor, prompt: int) -> Tensor:
    """Every row: the prompt as one append, the rest token by token."""
    cache.append(k[:, :, :prompt], v[:, :, :prompt])
    out = [fl.decode(q[:, :, :prompt], cache)]
    for t in range(prompt, q.shape[2]):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        out.append(fl.decode(q[:, :, t : t + 1], cache))
    return torch.cat(out, 2)


def relative_error(actual: Tensor, expected: Tensor, size: Tensor) -> float:
    """The larger of the whole output's relative error and the largest row error relative to `size` = Σ p |v|."""
    error = actual.double() - expected
    return max(float(error.norm() / expected.norm()), float((error.norm(dim=-1) / size.norm(dim=-1).clamp(min=1e-30)).max()))


STEPS = 2000
SINK = fl.seen_by_all([0])  # so that no row is empty
LONG = {
    "streaming": (fl.presets.streaming(4, 128), 132),
    "window and global tokens": (fl.causal() & (fl.window(64) | fl.global_tokens([0, 7])), 67),
    "dilated": (fl.causal() & (fl.window(16, dilation=8) | SINK), 130),
    "strided": (fl.causal() & (fl.window(15, 0) | fl.strided(64)), STEPS),
    "fixed": (fl.presets.sparse_transformer(64, "fixed"), 94),
    "documents": (fl.causal() & fl.documents(lengths=[700, 20, 900, 380]), 900),
    "segments": (fl.causal() & fl.blocked_window(1, 0, block=50), 100),
    "logarithmic": (fl.presets.logsparse() & fl.window(600), 513),
    "per head": (fl.causal() & fl.per_head([fl.window(8), fl.window(300)]), 301),
    "random": (fl.causal() & (fl.window(8) | fl.random_keys(2, seed=3, causal=True)), None),
    "everything": (fl.causal(), STEPS),
}


@pytest.mark.parametrize("name", LONG)
def test_two_thousand_steps_equal_attention_without_a_cache(name: str) -> None:
    pattern, kept = LONG[name]
    length = STEPS if name == "random" else None
    cache = fl.KVCache(pattern, max_length=length)
    q, k, v = tensors(STEPS, 2, 2)
    out = decode_all(cache, q, k, v, prompt=100)
    (true, _), (size, _) = (reference(q, k, x, pattern, STEPS, 0, STEPS) for x in (v, v.abs()))
    assert relative_error(out, true, size) <= 1e-6
    assert cache.length == STEPS
    if kept is not None:
        assert cache.kept <= kept
        # Bytes are bounded by the kept keys, not by the text: 2 tensors of 2 heads in float32, and slack.
        assert cache.nbytes <= 1.3 * (kept + 16) * (2 * 2 * 8 * 4 + 34)


@pytest.mark.slow
def test_a_hundred_thousand_steps_equal_attention_without_a_cache() -> None:
    steps, pattern = 100_000, fl.presets.streaming(4, 1024)
    q, k, v = tensors(steps, 2, 1, dim=16)
    cache = fl.KVCache(pattern)
    out = decode_all(cache, q, k, v, prompt=1)
    true, size = (fl.attention(q.double(), k.double(), x.double(), pattern, backend="torch") for x in (v, v.abs()))
    assert isinstance(true, Tensor)
    assert isinstance(size, Tensor)
    assert relative_error(out, true, size) <= 1e-6
    assert cache.kept == 1028


def test_heads_with_different_windows_keep_their_own_lengths() -> None:
    cache = fl.KVCache(fl.per_head([fl.window(7, 0)] * 3 + [fl.window(499, 0)]))
    q, k, v = tensors(1000, 4, 4)
    decode_all(cache, q, k, v, prompt=900)
    assert (cache.positions >= 0).sum(-1).tolist() == [[8, 8, 8, 500]]
    assert cache.nbytes < 1.3 * (3 * 8 + 500 + 60) * 2 * 8 * 4 + 9000


def test_a_query_that_sees_every_slot_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from farlight.decoding import decode

    def never(*args: object) -> Tensor:
        raise AssertionError("a mask was made")

    cache = fl.KVCache(fl.presets.streaming(4, 64))
    q, k, v = tensors(300, 2, 2)
    cache.append(k[:, :, :200], v[:, :, :200])
    monkeypatch.setattr(SlotQueries, "mask", never)
    for t in range(200, 300):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        decode(q[:, :, t : t + 1], cache)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [fl.presets.streaming(2, 40), fl.causal() & fl.strided(5)], ids=["all seen", "a few seen"])
def test_dtypes_and_grouped_queries(dtype: torch.dtype, pattern: Pattern) -> None:
    q, k, v = tensors(150, 4, 2, dim=16, batch=2, dtype=dtype)
    cache = fl.KVCache(pattern, heads=4)
    cache.append(k[:, :, :100], v[:, :, :100])
    cache.forget()
    kept = cache.kept
    cache.append(k[:, :, 100:149], v[:, :, 100:149])
    assert cache.kept <= kept + 49
    cache.append(k[:, :, 149:], v[:, :, 149:])
    out, lse = fl.decode(q[:, :, 149:], cache, return_lse=True)
    plain = fl.decode(q[:, :, 149:], cache)
    true, true_lse = reference(q, k, v, pattern, 150, 149, 150)
    assert out.dtype == plain.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(out.double(), true, atol=close, rtol=close)
    torch.testing.assert_close(plain.double(), true, atol=close, rtol=close)
    torch.testing.assert_close(lse.double(), true_lse, atol=max(2e-6, close / 10), rtol=1e-6)


def test_scale() -> None:
    q, k, v = tensors(20, 2, 2)
    cache = fl.KVCache(fl.causal())
    cache.append(k, v)
    for scale in (0.0, -1.5):
        expected = fl.attention(q, k, v, fl.causal(), scale=scale)
        torch.testing.assert_close(fl.decode(q, cache, scale=scale), expected, atol=1e-6, rtol=1e-5)


def test_texts_of_different_lengths_each_keep_their_own_positions() -> None:
    """A padded batch equals its items one by one: padding on either side, in prompts and between."""
    pattern = fl.presets.streaming(2, 5)
    q, k, v = tensors(240, 2, 1, batch=3)
    generator = torch.Generator().manual_seed(1)
    together = fl.KVCache(pattern, heads=2)
    alone = [fl.KVCache(pattern, heads=2) for _ in range(3)]
    for start, stop in chunks(240, iter([200, *[9, 1, 1, 3, 1] * 3])):
        real = torch.rand(3, stop - start, generator=generator) < 0.7
        together.append(k[:, :, start:stop], v[:, :, start:stop], real=real)
        out, lse = fl.decode(q[:, :, start:stop], together, return_lse=True)
        for item, cache in enumerate(alone):
            columns = torch.arange(start, stop)[real[item]]
            cache.append(k[item : item + 1, :, columns], v[item : item + 1, :, columns])
            if columns.numel():
                own = fl.decode(q[item : item + 1, :, columns], cache)
                torch.testing.assert_close(out[item : item + 1][:, :, real[item]], own, atol=1e-6, rtol=1e-5)
            assert not bool(out[item][:, ~real[item]].any())
            assert bool((lse[item][:, ~real[item]] == float("-inf")).all())
            count = int((together.positions[item, 0] >= 0).sum())
            assert together.positions[item, 0, :count].tolist() == cache.positions[0, 0].tolist()
    assert together.lengths == [cache.length for cache in alone]


def test_select_repeats_and_reorders_batch_items() -> None:
    pattern = fl.presets.streaming(1, 6)
    q, k, v = tensors(30, 2, 2, batch=3)
    order = [2, 0, 2]
    for real in (None, torch.tensor([[True] * 20, [False] * 5 + [True] * 15, [True] * 10 + [False] * 10])):
        cache = fl.KVCache(pattern)
        cache.append(k[:, :, :20], v[:, :, :20], real=real)
        out = fl.decode(q[:, :, :20], cache)
        cache.select(order)
        torch.testing.assert_close(fl.decode(q[order][:, :, :20], cache), out[order])
        other = fl.KVCache(pattern)
        other.append(k[order][:, :, :20], v[order][:, :, :20], real=None if real is None else real[order])
        for one in (cache, other):
            one.append(k[order][:, :, 20:21], v[order][:, :, 20:21])
        step = q[order][:, :, 20:21]
        torch.testing.assert_close(fl.decode(step, cache), fl.decode(step, other))
        assert cache.batch == other.batch == 3
    dozen = fl.KVCache(fl.random_keys(2, causal=True), max_length=30)
    dozen.append(k[:, :, :20], v[:, :, :20])
    dozen.select([1])
    dozen.append(k[1:2, :, 20:21], v[1:2, :, 20:21])
    assert fl.decode(q[1:2, :, 20:21], dozen).shape == (1, 2, 1, 8)


def test_forget_frees_the_memory_of_a_long_prompt() -> None:
    q, k, v = tensors(5000, 2, 2)
    cache = fl.KVCache(fl.presets.streaming(4, 100))
    cache.append(k, v)
    fl.decode(q, cache)
    whole = cache.nbytes
    cache.forget()
    assert cache.kept == 103  # 4 sinks, and 99 that the next token will see
    assert cache.nbytes < whole / 20
    with pytest.raises(fl.ArgumentError, match="1 queries, but the last append brought 0 tokens"):
        fl.decode(q[:, :, -1:], cache)


def test_appended_tensors_are_copied() -> None:
    q, k, v = tensors(10, 2, 2)
    cache = fl.KVCache(fl.causal())
    cache.append(k, v)
    before = fl.decode(q, cache)
    k.zero_()
    torch.testing.assert_close(fl.decode(q, cache), before)


def test_a_cache_may_be_copied_stored_and_used_in_and_out_of_inference_mode(tmp_path: Path) -> None:
    for pattern in (fl.presets.streaming(2, 8), TopBlocks(2, 4, causal=True)):
        q, k, v = tensors(41, 2, 2)
        cache = fl.KVCache(pattern)
        with torch.inference_mode():
            cache.append(k[:, :, :30].clone(), v[:, :, :30].clone())
            fl.decode(q[:, :, :30], cache)
        torch.save(cache, tmp_path / "cache.pt")
        branches = [cache, copy.deepcopy(cache), torch.load(tmp_path / "cache.pt", weights_only=False)]
        for branch in branches:
            branch.select([0])
            for t in range(30, 40):
                branch.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        with torch.inference_mode():
            cache.append(k[:, :, 40:], v[:, :, 40:])
        for branch in branches[1:]:
            branch.append(k[:, :, 40:], v[:, :, 40:])
        first, *others = (fl.decode(q[:, :, 40:], branch) for branch in branches)
        assert all(torch.equal(first, other) for other in others)


def test_no_token_and_no_query() -> None:
    q, k, v = tensors(5, 2, 2)
    for pattern in (fl.presets.streaming(2, 3), fl.causal() & fl.strided(2)):
        cache = fl.KVCache(pattern)
        cache.append(k[:, :, :0], v[:, :, :0])
        assert (cache.length, cache.kept, cache.positions.shape) == (0, 0, (1, 2, 0))
        assert fl.decode(q[:, :, :0], cache).shape == (1, 2, 0, 8)
        cache.append(k, v)
        out, lse = fl.decode(q[:, :, :0], cache, return_lse=True)
        assert (out.shape, lse.shape) == ((1, 2, 0, 8), (1, 2, 0))
        torch.testing.assert_close(fl.decode(q, cache).double(), reference(q, k, v, pattern, 5, 0, 5)[0], atol=1e-6, rtol=1e-5)


def test_rows_that_see_nothing() -> None:
    q, k, v = tensors(10, 2, 2)
    for pattern in (~fl.full(), fl.offsets([-20]), fl.causal() & fl.documents(lengths=[4])):
        cache = fl.KVCache(pattern)
        cache.append(k[:, :, :9], v[:, :, :9])
        cache.append(k[:, :, 9:], v[:, :, 9:])
        out, lse = fl.decode(q[:, :, 9:], cache, return_lse=True)
        assert not bool(out.any())
        assert bool((lse == float("-inf")).all())


ROUTERS = {
    "mean": TopBlocks(3, 8, causal=True),
    "bounds, by mass": TopBlocks(block=8, mass=0.5, causal=True, score="minmax"),
    "with a window": TopBlocks(2, 16, causal=True) | fl.presets.streaming(2, 5),
    "less a window": TopBlocks(2, 16, causal=True) - fl.window(3) | fl.window(0),
    "keys": TopKeys(5, causal=True),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_choose_as_over_all_keys(name: str) -> None:
    router = ROUTERS[name]
    q, k, v = tensors(160, 4, 2)
    cache = fl.KVCache(router, heads=4)
    for start, stop in chunks(160, iter([70, 3, 1, 1, 65, *[1] * 20])):
        cache.append(k[:, :, start:stop], v[:, :, start:stop])
        rows = q[:, :, start:stop]
        out, lse = fl.decode(rows, cache, return_lse=True)
        pattern = router(rows, k[:, :, :stop])
        true, true_lse = fl.attention(rows, k[:, :, :stop], v[:, :, :stop], pattern, return_lse=True)
        torch.testing.assert_close(out, true, atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(lse, true_lse, atol=2e-6, rtol=2e-6)
    assert cache.kept == cache.length == 160


def test_a_router_reads_summaries_and_not_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    router = TopBlocks(3, 8, causal=True)
    q, k, v = tensors(200, 2, 2)
    cache = fl.KVCache(router)
    cache.append(k[:, :, :199], v[:, :, :199])
    cache.append(k[:, :, 199:], v[:, :, 199:])
    read: list[int] = []
    plain = router.summary
    monkeypatch.setattr(router, "summary", lambda k, real=None: read.append(k.shape[2]) or plain(k, real))
    fl.decode(q[:, :, 199:], cache)
    assert not read
    cache.append(k[:, :, :1], v[:, :, :1])
    assert sum(read) == 0  # the block is not complete: 201 = 25 · 8 + 1
    cache.append(k[:, :, :7], v[:, :, :7])
    assert sum(read) == 8


class Errors:
    """Caches for the calls of BAD."""

    @staticmethod
    def cache(**options: object) -> fl.KVCache:
        cache = fl.KVCache(fl.causal(), **options)  # type: ignore[arg-type]
        cache.append(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8))
        return cache


BAD = {
    "not a pattern": (lambda: fl.KVCache("window(3)"), "KVCache: the pattern is str; pass a pattern such as"),
    "no length": (lambda: fl.KVCache(fl.global_tokens([-1])), "counts from the end of the text, but this text has no known"),
    "max_length": (lambda: fl.KVCache(fl.full(), max_length=0), "max_length = 0: it must be a whole number >= 1"),
    "not causal router": (lambda: fl.KVCache(TopBlocks(2)), "decides for blocks of queries or looks ahead"),
    "k": (
        lambda: Errors.cache().append(torch.zeros(2, 2, 8), torch.zeros(2, 2, 8)),
        r"append: k is \(2, 2, 8\) of torch.float32",
    ),
    "k and v": (lambda: Errors.cache().append(torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 2, 8)), "they must agree"),
    "nothing": (lambda: fl.KVCache(fl.full()).append(torch.zeros(1, 0, 1, 8), torch.zeros(1, 0, 1, 8)), "must be at least 1"),
    "other heads": (
        lambda: Errors.cache().append(torch.zeros(2, 1, 1, 8), torch.zeros(2, 1, 1, 8)),
        r"the cache holds \(2, 2, …, 8\); use a new cache",
    ),
    "other type": (
        lambda: Errors.cache().append(torch.zeros(2, 2, 1, 8).half(), torch.zeros(2, 2, 1, 8).half()),
        "k is torch.float16 on cpu, but the cache holds torch.float32 on cpu",
    ),
    "heads": (lambda: Errors.cache(heads=3), "k has 2 heads, but heads = 3"),
    "too long": (lambda: Errors.cache(max_length=2), "3 tokens after 0 make more than max_length = 2"),
    "real": (
        lambda: Errors.cache().append(torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8), real=[[True]]),
        r"real is \(1, 1\) of torch.bool; bool \(2, 1\), True where there is a token",
    ),
    "router and real": (
        lambda: fl.KVCache(TopKeys(2)).append(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8), real=[[True]]),
        "cannot share a router's cache",
    ),
    "grad": (
        lambda: Errors.cache().append(torch.zeros(2, 2, 1, 8, requires_grad=True), torch.zeros(2, 2, 1, 8)),
        r"append: an input requires grad, but decoding records no gradients.*Use torch.no_grad\(\)",
    ),
    "grad of q": (lambda: fl.decode(torch.zeros(2, 2, 1, 8, requires_grad=True), Errors.cache()), "decode: an input requires"),
    "no cache": (lambda: fl.decode(torch.zeros(2, 2, 1, 8), None), "decode: the cache is NoneType"),
    "empty": (lambda: fl.decode(torch.zeros(2, 2, 1, 8), fl.KVCache(fl.full())), "nothing was appended to the cache yet"),
    "q": (lambda: fl.decode(torch.zeros(2, 8), Errors.cache()), r"decode: q is \(2, 8\); a tensor \(B, H, n, D\) is needed"),
    "q's heads": (lambda: fl.decode(torch.zeros(2, 3, 1, 8), Errors.cache()), "the heads be a multiple"),
    "q's type": (lambda: fl.decode(torch.zeros(2, 2, 1, 8).double(), Errors.cache()), "q is torch.float64 on cpu"),
    "old queries": (lambda: fl.decode(torch.zeros(2, 2, 4, 8), Errors.cache()), "4 queries, but the last append brought 3"),
    "select": (lambda: Errors.cache().select([2]), r"\[2\] for a batch of 2; use 0 … 1"),
    "select none": (lambda: Errors.cache().select([]), "is not a list of batch items"),
    "select nothing": (lambda: fl.KVCache(fl.full()).select([0]), "nothing was appended yet"),
}


@pytest.mark.parametrize("name", BAD)
def test_error(name: str) -> None:
    call, why = BAD[name]
    with pytest.raises((fl.ArgumentError, fl.PatternError), match=why):
        call()


def test_a_pattern_that_differs_by_head_requires_the_number_of_heads() -> None:
    cache = fl.KVCache(fl.random_keys(2, causal=True))
    cache.append(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))
    with pytest.raises(fl.ArgumentError, match=r"q has 4 heads, but the cache was made for 2.*KVCache\(pattern, heads=4\)"):
        fl.decode(torch.zeros(1, 4, 1, 8), cache)


def test_items_with_their_own_tables_cannot_be_reordered() -> None:
    cache = fl.KVCache(fl.causal() & fl.padding([3, 2]))
    cache.append(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8))
    cache.select([0, 1])
    with pytest.raises(fl.ArgumentError, match="the pattern has tables of its own for each batch item"):
        cache.select([1, 0])


# A cache keeps keys and values of one width, and says so (tests/attention/test_input_tensors.py).
SQUARE = [
    case
    for case in CASES
    if case.n_q == case.n_k and case.q_offset in (None, 0) and 0 < case.n_q <= 260 and case.value_dim == case.head_dim
]


@pytest.mark.parametrize("case", SQUARE, ids=str)
def test_the_shared_cases(case: Case) -> None:
    """Most of the text as a prompt, then a chunk, then the last tokens one by one."""
    operands, n = inputs(case), case.n_q
    q, k, v = operands.q * case.scale_value * case.head_dim**0.5, operands.k, operands.v
    cache = fl.KVCache(case.pattern, max_length=n, heads=case.heads)
    for start, stop in chunks(n, iter([max(1, n - 9), 5, 1, 1, 1, 1])):
        cache.append(k[:, :, start:stop], v[:, :, start:stop])
        expected = live_keys(case.pattern, n, stop, start, case.batch, case.heads, case.kv_heads)
        assert torch.equal(cached_keys(cache, case.batch, case.kv_heads, stop), expected)
        out, lse = fl.decode(q[:, :, start:stop], cache, return_lse=True)
        true, true_lse = reference(q, k, v, case.pattern, n, start, stop)
        # The rounding error of a large score is an absolute error of its exponent.
        close = 3e-6 * max(1.0, abs(case.scale_value) * case.head_dim**0.5)
        torch.testing.assert_close(out.double(), true, atol=close, rtol=close)
        torch.testing.assert_close(lse.double(), true_lse, atol=close, rtol=close)


@pytest.mark.parametrize("early", [1, 0])
def test_the_checks_detect_a_key_that_is_evicted_too_early(monkeypatch: pytest.MonkeyPatch, early: int) -> None:
    """The checks above can fail: a last use that is wrong by one token shows in the kept keys and in the outputs."""
    right = rules.last_use

    def wrong(*arguments: Any) -> LastUse:
        use = right(*arguments)
        return LastUse(torch.where(use.last < FOREVER, use.last - early, use.last), use.unbroken)

    monkeypatch.setattr(rules, "last_use", wrong)
    pattern = fl.presets.streaming(2, 20)
    q, k, v = tensors(100, 2, 2)
    cache = fl.KVCache(pattern)
    out = decode_all(cache, q, k, v, prompt=50)
    true, _ = reference(q, k, v, pattern, 100, 0, 100)
    agree = torch.equal(cached_keys(cache, 1, 2, 100), live_keys(pattern, 200, 100, 99, 1, 2, 2))
    assert agree == (early == 0)
    assert (float((out.double() - true).abs().max()) < 1e-5) == (early == 0)
