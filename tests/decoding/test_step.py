"""`fl.step`, stored dtypes, `crop`, `fork` and `keep_back`: what they promise, and their errors."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.kernels.cpu import unavailable
from farlight.patterns import Pattern
from farlight.routing import TopBlocks

needs_native = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


def tensors(
    n: int, heads: int, kv_heads: int, dim: int = 8, batch: int = 1, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n + heads)
    return [torch.randn(batch, h, n, dim, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads)]


PATTERNS = {
    "streaming": fl.presets.streaming(4, 60),
    "dilated": fl.causal() & fl.window(8, dilation=8),
    "strided": fl.causal() & (fl.window(15, 0) | fl.strided(16)),
    "phases": fl.causal() & (fl.window(9) | fl.strided(7, phase=2)),
    "heads": fl.causal() & fl.per_head([fl.window(8), fl.window(40)] * 2),
    "groups": fl.causal() & fl.per_head([fl.window(8), fl.window(8), fl.window(40), fl.window(3, dilation=5)]),
    "documents": fl.causal() & fl.documents(lengths=[70, 20, 90, 120]),
    "random": fl.causal() & (fl.window(8) | fl.random_keys(2, seed=3, causal=True)),
    "everything": fl.causal(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_step_is_an_append_and_a_decode(name: str, dtype: torch.dtype) -> None:
    pattern = PATTERNS[name]
    q, k, v = tensors(300, 4, 4 if name == "heads" else 2, dtype=dtype, batch=2)
    caches = [fl.KVCache(pattern, max_length=300, heads=4) for _ in range(2)]
    for cache in caches:
        cache.append(k[:, :, :50], v[:, :, :50])
        fl.decode(q[:, :, 49:50], cache)
    true, true_lse = fl.attention(q, k, v, pattern, return_lse=True, backend="reference")
    for t in range(50, 300):
        token = [x[:, :, t : t + 1] for x in (q, k, v)]
        out, lse = fl.step(*token, caches[0], return_lse=True)
        caches[1].append(*token[1:])
        other = fl.decode(token[0], caches[1])
        close = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(out, true[:, :, t : t + 1], atol=close, rtol=close)
        torch.testing.assert_close(lse, true_lse[:, :, t : t + 1].to(lse.dtype), atol=max(close, 2e-6) * 2, rtol=close)
        torch.testing.assert_close(out, other, atol=close, rtol=close)
        assert torch.equal(caches[0].positions, caches[1].positions)


@needs_native
def test_steps_of_a_full_window_are_one_native_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from farlight.decoding import native, store

    q, k, v = tensors(400, 2, 2)
    cache = fl.KVCache(fl.presets.streaming(4, 64) | fl.window(3, 0, dilation=9))
    for t in range(200):
        fl.step(*(x[:, :, t : t + 1] for x in (q, k, v)), cache)

    def never(*args: Any) -> None:
        raise AssertionError("the general path was taken")

    monkeypatch.setattr(store.KeyStore, "append", never)
    monkeypatch.setattr(native.NativeStores, "attend", never)
    for t in range(200, 400):
        fl.step(*(x[:, :, t : t + 1] for x in (q, k, v)), cache)
    assert cache.length == 400


RINGS = {
    "prompt": (fl.window(20, 0, dilation=3), 100, 0, None),
    "sinks": (fl.presets.streaming(4, 1) | fl.window(20, 0, dilation=8), 300, 0, None),
    "no prompt": (fl.window(20, 0, dilation=4), 0, 0, None),
    "short prompt": (fl.window(70, 0, dilation=2), 40, 0, "int8"),
    "keep_back": (fl.window(20, 0, dilation=3), 100, 7, None),
}


@needs_native
@pytest.mark.parametrize("name", RINGS)
def test_the_keys_of_one_residue_are_neighbours_in_a_full_ring(name: str) -> None:
    """What a dilated window sees is one run of slots, at most cut by the ring's ends; crops and forks lose no key."""
    pattern, prompt, keep_back, stored = RINGS[name]
    n = 1100
    q, k, v = tensors(n, 2, 2, dim=4)
    cache = fl.KVCache(pattern, keep_back=keep_back, dtype=stored)
    if prompt:
        cache.append(k[:, :, :prompt], v[:, :, :prompt])
    assert cache._native_stores() is not None or not prompt
    true = fl.attention(q, k, v, pattern)
    close = 2e-6 if stored is None else 0.1
    for t in range(prompt, n):
        out = fl.step(*(x[:, :, t : t + 1] for x in (q, k, v)), cache)
        torch.testing.assert_close(out, true[:, :, t : t + 1], atol=close, rtol=close)
        if keep_back and t == 600:
            cache = cache.fork()
            cache.crop(595)
            for again in range(595, 601):
                out = fl.step(*(x[:, :, again : again + 1] for x in (q, k, v)), cache)
                torch.testing.assert_close(out, true[:, :, again : again + 1], atol=close, rtol=close)
    for t in range(n, n + 3):
        fl.step(*(x[:, :, -1:] for x in (q, k, v)), cache)
        slots = cache._stores[0].slots
        position, last_use = slots.position[0, : slots.count[0]], slots.last_use[0, : slots.count[0]]
        dilated = max((atom for atom in pattern.atoms() if isinstance(atom, fl.window)), key=lambda atom: atom.dilation)
        distance = t - position
        seen = (distance % dilated.dilation == 0) & (distance <= dilated.left * dilated.dilation)
        ring = seen[last_use < 2**62]
        assert int((ring != np.roll(ring, 1)).sum()) == 2, (t, ring)


def strided_rows(x: Tensor) -> Tensor:
    wide = x.new_zeros(*x.shape[:3], 2 * x.shape[3])
    wide[..., ::2] = x
    return wide[..., ::2]


# Tensors whose memory is not their values in contiguous rows, or whose class may compute otherwise.
UNUSUAL = {
    "plain": lambda x: x,
    "heads and tokens transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "rows not contiguous": strided_rows,
    "negative bit": lambda x: (-x)._neg_view(),
    "one head, expanded": lambda x: x[:, :1].expand_as(x),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape),
}


@needs_native
@pytest.mark.parametrize("has_reader", [True, False])
@pytest.mark.parametrize("name", UNUSUAL)
def test_a_step_reads_the_values_of_every_tensor(name: str, has_reader: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's table of functions for other libraries and without: the step equals that of plain copies."""
    from farlight.decoding import native

    if not has_reader:
        monkeypatch.setattr(native, "_reader", lambda: None)
    q, k, v = tensors(30, 4, 2)
    caches = [fl.KVCache(fl.window(9), heads=4) for _ in range(2)]
    for t in range(30):
        token = [x[:, :, t : t + 1].contiguous() for x in (q, k, v)]
        unusual = [UNUSUAL[name](x) for x in token]
        plain = [x.clone() + 0.0 for x in unusual]
        out = fl.step(unusual[0], unusual[1], unusual[2], caches[0])
        caches[1].append(plain[1].detach(), plain[2].detach())
        torch.testing.assert_close(out, fl.decode(plain[0].detach(), caches[1]), atol=2e-6, rtol=2e-6)


@needs_native
@pytest.mark.parametrize("has_reader", [True, False])
def test_a_step_refuses_what_does_not_fit_the_steps_before(has_reader: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from farlight.decoding import native

    if not has_reader:
        monkeypatch.setattr(native, "_reader", lambda: None)
    q, k, v = tensors(1, 4, 2)
    cache = fl.KVCache(fl.window(9))
    for _ in range(20):
        fl.step(q, k, v, cache)
    wrong = {
        "dtype": (q.double(), k.double(), v.double()),
        "head_dim": tuple(x[..., :-1] for x in (q, k, v)),
        "batch": tuple(x.expand(2, -1, -1, -1) for x in (q, k, v)),
        "heads of k are those of q": (q, q, q),
        "heads of q": (q[:, :3], k, v),
        "v": (q, k, v[..., :-1]),
        "gradient": (q, k, v.clone().requires_grad_()),
        "dims": (q[0], k[0], v[0]),
    }
    for tokens in wrong.values():
        with pytest.raises(fl.ArgumentError):
            fl.step(*tokens, cache)
        assert cache.length == 20
    more = q.repeat_interleave(2, 1)  # twice as many query heads are allowed: the pattern is that of every head
    out = fl.step(more, k, v, cache)
    assert cache.length == 21
    torch.testing.assert_close(out[:, ::2], fl.decode(q, cache), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("pattern", [fl.presets.streaming(2, 40), TopBlocks(2, 8, causal=True)], ids=["streaming", "router"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "int8"], ids=str)
@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_stored_dtypes_bound_the_error(pattern: Any, dtype: Any, tokens: torch.dtype) -> None:
    """An element differs by at most half a unit of its type, so an output by at most that of V plus the weights' change."""
    q, k, v = tensors(200, 4, 2, dim=64, batch=2, dtype=tokens)
    cache, exact = fl.KVCache(pattern, dtype=dtype, heads=4), fl.KVCache(pattern, heads=4)
    cache.append(k[:, :, :150], v[:, :, :150])
    exact.append(k[:, :, :150], v[:, :, :150])
    for t in range(150, 200):
        out = fl.step(*(x[:, :, t : t + 1] for x in (q, k, v)), cache)
        true = fl.step(*(x[:, :, t : t + 1] for x in (q, k, v)), exact)
        assert out.dtype == tokens
        if isinstance(pattern, Pattern):  # a router may choose another block where two scores are close
            half_unit = 1 / 254 if dtype == "int8" else torch.finfo(dtype).eps / 2
            k_error, v_error = ((x.float().abs().amax(-1) * half_unit).amax() for x in (k, v))
            score_error = float(q[:, :, t].float().norm(dim=-1).max()) * float(k_error) * 64**0.5 * 64**-0.5
            bound = (
                float(v_error)
                + (torch.tensor(2 * score_error).exp().item() - 1) * float(v.float().abs().max())
                + 2e-2 * (tokens == torch.bfloat16)
            )
            assert float((out - true).abs().max()) <= bound
        cosine = torch.nn.functional.cosine_similarity(out.double(), true.double(), dim=-1)
        if isinstance(pattern, Pattern):
            assert float(cosine.min()) >= 0.999


def test_nbytes_tells_the_size_of_the_stored_type() -> None:
    _, k, v = tensors(4096, 2, 2, dim=64)
    sizes = {}
    for dtype in (None, torch.bfloat16, "int8"):
        cache = fl.KVCache(fl.causal(), dtype=dtype)
        cache.append(k, v)
        tables = cache._stores[0].slots.nbytes
        sizes[dtype] = cache.nbytes - tables
    rows = 2 * 2 * 4096
    assert sizes == {None: rows * 64 * 4, torch.bfloat16: rows * 64 * 2, "int8": rows * (64 + 4)}


def test_crop_takes_back_the_last_append_and_keep_back_tokens_more() -> None:
    q, k, v = tensors(100, 2, 2)
    pattern = fl.presets.streaming(2, 16)
    cache = fl.KVCache(pattern, keep_back=4)
    for t in range(90):
        fl.step(*(x[:, :, t : t + 1] for x in (q, k, v)), cache)
    cache.crop(90)
    with pytest.raises(fl.ArgumentError, match=r"position 80 on see are evicted; it can go back to 85. Make"):
        cache.crop(80)
    cache.crop(85)
    assert cache.length == 85
    with pytest.raises(fl.ArgumentError, match="1 queries, but the last append brought 0 tokens"):
        fl.decode(q[:, :, :1], cache)
    for t in range(85, 100):
        out = fl.step(*(x[:, :, t : t + 1] for x in (q, k, v)), cache)
        true = fl.attention(q[:, :, : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], pattern)[:, :, -1:]
        torch.testing.assert_close(out, true, atol=2e-6, rtol=2e-6)
    everything = fl.KVCache(fl.causal())
    everything.append(k, v)
    everything.crop(0)
    assert (everything.length, everything.kept) == (0, 0)


@needs_native
def test_a_fork_copies_the_pages_that_are_written_only() -> None:
    q, k, v = tensors(2000, 2, 2, dim=64)
    cache = fl.KVCache(fl.causal())
    cache.append(k, v)
    branches = [cache.fork() for _ in range(3)]
    for number, branch in enumerate(branches):
        fl.step(*(x[:, :, number : number + 1] for x in (q, k, v)), branch)
    first = {id(page) for page in cache._stores[0].pages.pages}
    for branch in branches:
        pages = branch._stores[0].pages.pages
        assert sum(id(page) not in first for page in pages) == 1
    assert cache.length == 2000
    assert [branch.length for branch in branches] == [2001] * 3
    del branches, branch
    gc.collect()
    assert not any(page.is_shared for page in cache._stores[0].pages.pages)


BAD = {
    "dtype": (lambda: fl.KVCache(fl.causal(), dtype="int4"), "KVCache: dtype = 'int4': use 'int8', torch.float16"),
    "keep_back": (lambda: fl.KVCache(fl.causal(), keep_back=-1), "keep_back = -1: it must be a whole number >= 0"),
    "crop": (lambda: cache_of(3).crop(4), "crop: length = 4, but only 3 tokens were appended"),
    "crop type": (lambda: cache_of(3).crop(1.5), "crop: length = 1.5"),
    "no cache": (lambda: fl.step(*tensors(1, 2, 2), None), "step: the cache is NoneType; pass a fl.KVCache"),
    "no tensor": (lambda: fl.step(None, *tensors(1, 2, 2)[1:], cache_of(3)), "step: q and k must be tensors"),
    "q": (
        lambda: fl.step(torch.zeros(1, 3, 1, 8), *tensors(1, 2, 2)[1:], cache_of(3)),
        r"step: q is \(1, 3, 1, 8\) of torch.float32",
    ),
    "grad": (lambda: fl.step(tensors(1, 2, 2)[0].requires_grad_(), *tensors(1, 2, 2)[1:], cache_of(3)), "requires grad"),
}


def cache_of(n: int) -> fl.KVCache:
    q, k, v = tensors(n, 2, 2)
    cache = fl.KVCache(fl.causal())
    cache.append(k, v)
    fl.decode(q, cache)
    return cache


@pytest.mark.parametrize("name", BAD)
def test_error(name: str) -> None:
    call, why = BAD[name]
    with pytest.raises((fl.ArgumentError, fl.PatternError), match=why):
        call()


ROUTERS = {
    "count": TopBlocks(3, 8, causal=True),
    "share": TopBlocks(share=0.3, block=8, causal=True),
    "mass": TopBlocks(mass=0.6, block=8, causal=True, scale=0.4),
    "bounds": TopBlocks(2, 16, causal=True, score="minmax"),
    "union": TopBlocks(2, 16, causal=True) | fl.presets.streaming(2, 5),
    "difference": TopBlocks(4, 8, causal=True) - fl.window(3) | fl.window(0),
    "intersection": TopBlocks(6, 8, causal=True) & (fl.strided(3) | fl.window(9)),
    "two": TopBlocks(2, 8, causal=True) | TopBlocks(1, 32, causal=True, score="minmax"),
}


@needs_native
@pytest.mark.parametrize("stored", [None, torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("name", ROUTERS)
def test_blocks_are_chosen_natively_as_the_router_chooses(name: str, stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and chunks of a few queries: the links of `router(q, k)` over the stored keys, chosen in one native call."""
    from farlight.decoding import routed

    router = ROUTERS[name]
    q, k, v = tensors(200, 4, 2, dim=32, batch=2)
    cache = fl.KVCache(router, heads=4, dtype=stored)
    cache.append(k[:, :, :60], v[:, :, :60])

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("the keys were read in torch")

    monkeypatch.setattr(routed, "attend_kept", never)
    stops = [*range(61, 150), 153, 160, 161, 190, *range(191, 201)]
    for start, stop in zip([60, *stops], stops, strict=False):
        token = [x[:, :, start:stop] for x in (q, k, v)]
        out, lse = fl.step(*token, cache, return_lse=True)
        held = [x[:, :, :stop] for x in cache._stores[0].read(torch.float32)]
        pattern = router(token[0], held[0])
        true, true_lse = fl.attention(token[0], *held, pattern, return_lse=True, backend="reference")
        torch.testing.assert_close(out, true, atol=3e-6, rtol=3e-6)
        torch.testing.assert_close(lse, true_lse, atol=3e-6, rtol=3e-6)
    cache.crop(101)
    branch = cache.fork()
    for cache_ in (branch, cache):
        out = fl.step(*(x[:, :, 101:102] for x in (q, k, v)), cache_)
        held = [x[:, :, :102] for x in cache_._stores[0].read(torch.float32)]
        true = fl.attention(q[:, :, 101:102], *held, router(q[:, :, 101:102], held[0]))
        torch.testing.assert_close(out, true, atol=3e-6, rtol=3e-6)


MEANS = {
    "random": lambda k: k,
    "nearly equal": lambda k: 1.0 + k * 1e-7,
    "in one direction": lambda k: k + 40.0,
    "equal": lambda k: torch.ones_like(k),
    "one large element": lambda k: k * torch.tensor([1e4] + [1.0] * 23),
    "of all sizes": lambda k: k * 10 ** torch.linspace(-6, 6, k.shape[2])[:, None],
    "subnormal": lambda k: k * 1e-39,
    "overflowing": lambda k: k * 1e37,
}


@needs_native
@pytest.mark.parametrize("name", MEANS)
def test_int8_means_rule_out_no_block_that_is_among_the_best(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The selection is that of the float32 means, to the bit of the output: codes only bound the scores."""
    from farlight.decoding import summaries

    q, k, v = tensors(400, 8, 2, dim=24, batch=2)
    k = MEANS[name](k)
    q = q * 100.0 if name == "overflowing" else q
    outs = []
    for has_codes in (True, False):
        if not has_codes:
            monkeypatch.setattr(summaries, "is_native", lambda *arguments: False)
        cache = fl.KVCache(TopBlocks(6, 4, causal=True) | TopBlocks(share=0.02, block=2, causal=True), heads=8)
        cache.append(k[:, :, :330], v[:, :, :330])
        chunks = [*range(330, 370), *range(370, 401, 3)]
        outs.append([fl.step(*(x[:, :, a:b] for x in (q, k, v)), cache) for a, b in itertools.pairwise(chunks)])
        held = cache._router_state
        assert held is not None
        assert all(bool(summary.codes) == has_codes for summary in held._summaries.values())
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*outs, strict=True))


@needs_native
def test_scores_that_are_not_finite_are_left_to_the_router() -> None:
    q, k, v = tensors(64, 2, 2)
    k[0, 1, 5] = float("nan")
    router = TopBlocks(2, 8, causal=True)
    cache = fl.KVCache(router)
    cache.append(k[:, :, :63], v[:, :, :63])
    out = fl.step(*(x[:, :, 63:] for x in (q, k, v)), cache)
    true = fl.attention(q[:, :, 63:], k, v, router(q[:, :, 63:], k))
    torch.testing.assert_close(out[:, :1], true[:, :1], atol=3e-6, rtol=3e-6)
