"""Score terms and sinks while decoding, against the dense formula in float64 over the whole text."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from score_formula import TERMS, Dense, Terms, make_terms
from torch import Tensor

import farlight as fl
from farlight.decoding.pages import quantize
from farlight.kernels.cpu import unavailable
from farlight.patterns import Pattern
from farlight.routing import TopBlocks
from farlight.testing import Case

N, PROMPT = 110, 70
# What the native kernels run as a program, by a mask, in several stores, and as a router.
PATTERNS: dict[str, Any] = {
    "ring": fl.presets.streaming(3, 20),
    "drawn": fl.causal() & (fl.window(4) | fl.random_keys(3, causal=True)),
    "heads": fl.causal() & fl.per_head([fl.window(9), fl.window(9), fl.window(30), fl.window(3, dilation=5)]),
    "router": TopBlocks(3, 8, causal=True),
}
ALONE = [(name, (term,)) for name, term in zip(itertools.cycle(PATTERNS), TERMS, strict=False)]
TOGETHER = [(name, TERMS) for name in PATTERNS]


def text(pattern: Pattern, dtype: torch.dtype, heads: int = 4, batch: int = 2) -> tuple[Case, list[Tensor]]:
    case = Case("decoded", pattern, N, heads=heads, kv_heads=heads // 2, batch=batch, head_dim=8)
    generator = torch.Generator().manual_seed(5)
    return case, [torch.randn(batch, h, N, 8, generator=generator).to(dtype) for h in (heads, heads // 2, heads // 2)]


def dense(case: Case, terms: Terms, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    formula = Dense(case, terms.to(torch.float64), *(x.double() for x in (q, k, v)))
    return formula.out.detach(), formula.lse.detach()


@dataclass
class Check:
    """Compares rows of the text with its true rows."""

    out: Tensor
    lse: Tensor

    def __call__(self, start: int, stop: int, out: Tensor, lse: Tensor) -> None:
        close = 1e-12 if out.dtype == torch.float64 else 4e-6
        torch.testing.assert_close(out.double(), self.out[:, :, start:stop], atol=close, rtol=close)
        torch.testing.assert_close(lse.double(), self.lse[:, :, start:stop], atol=close, rtol=close)


def stored(x: Tensor, dtype: Any) -> Tensor:
    codes, scale = quantize(x.float())
    return codes.to(x.dtype) * scale.to(x.dtype)[..., None] if dtype == "int8" else x


@pytest.mark.parametrize(("name", "names"), ALONE + TOGETHER, ids=str)
def test_a_program_equals_the_dense_formula(name: str, names: tuple[str, ...]) -> None:
    """A prompt, steps, a crop, a chunk and a fork, under terms that the cache was made with or that the call names."""
    for dtype, kept_as in ((torch.float32, None), (torch.float64, None), (torch.float32, "int8")):
        pattern = PATTERNS[name]
        case, (q, k, v) = text(fl.causal() if name == "router" else pattern, dtype)
        terms = make_terms(names, replace(case, heads=4))
        options: dict[str, Any] = {"score": terms.score(), "sinks": terms.sinks}
        length = None if name == "router" else N
        cache = fl.KVCache(pattern, heads=4, max_length=length, dtype=kept_as, keep_back=4, **options)
        keys, values = stored(k, kept_as), stored(v, kept_as)
        if name == "router":
            case = replace(case, pattern=links(pattern, q, keys))
        check = Check(*dense(case, terms, q, keys, values))

        cache.append(k[:, :, :PROMPT], v[:, :, :PROMPT])
        check(PROMPT - 66, PROMPT, *fl.decode(q[:, :, PROMPT - 66 : PROMPT], cache, return_lse=True))
        for t in range(PROMPT, PROMPT + 6):
            check(t, t + 1, *fl.step(*(x[:, :, t : t + 1] for x in (q, k, v)), cache, return_lse=True))
        cache.crop(PROMPT + 2)
        branch = cache.fork()
        branch.score = branch.sinks = None
        for holder, call in ((branch, options), (cache, {})):
            for start, stop in ((PROMPT + 2, PROMPT + 9), (PROMPT + 9, PROMPT + 10)):
                check(start, stop, *fl.step(*(x[:, :, start:stop] for x in (q, k, v)), holder, return_lse=True, **call))


def links(router: TopBlocks, q: Tensor, k: Tensor) -> Pattern:
    """The router's links of the whole text, row by row as a growing text gives them."""
    rows = torch.zeros(2, 4, N, N, dtype=torch.bool)
    for i in range(N):
        rows[:, :, i : i + 1, : i + 1] = router(q[:, :, i : i + 1], k[:, :, : i + 1]).dense(1, i + 1, batch=2, heads=4)
    return fl.pairs(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_texts_of_different_lengths_have_positions_of_their_own(dtype: torch.dtype) -> None:
    case, (q, k, v) = text(fl.presets.streaming(2, 9), dtype)
    terms = replace(make_terms(TERMS, case), key_bias=torch.randn(2, 4, N + 7))
    cache = fl.KVCache(case.pattern, heads=4)
    padding, lengths = 5, (80, 75)
    real = torch.ones(2, 80, dtype=torch.bool)
    real[1, :padding] = False
    shifted = [torch.cat((x[1:, :, :padding], x[1:, :, : 80 - padding]), 2) for x in (q, k, v)]
    prompt = [torch.cat((x[:1, :, :80], y)) for x, y in zip((q, k, v), shifted, strict=True)]
    cache.append(*prompt[1:], real=real)
    out, lse = fl.decode(prompt[0], cache, score=terms.score(), sinks=terms.sinks, return_lse=True)
    assert terms.key_bias is not None
    true, true_lse = dense(case, replace(terms, key_bias=terms.key_bias[..., :N]), q, k, v)
    close = 1e-12 if dtype == torch.float64 else 4e-6
    for t in range(3):
        for item, length in enumerate(lengths):
            rows = slice(length + t - 1, length + t) if t else slice(0, length)
            columns = slice(None) if t or not item else slice(padding, None)
            torch.testing.assert_close(out[item, :, columns].double(), true[item, :, rows], atol=close, rtol=close)
            torch.testing.assert_close(lse[item, :, columns].double(), true_lse[item, :, rows], atol=close, rtol=close)
        step = [torch.stack([x[b, :, n + t : n + t + 1] for b, n in enumerate(lengths)]) for x in (q, k, v)]
        out, lse = fl.step(*step, cache, score=terms.score(), sinks=terms.sinks, return_lse=True)


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_steps_under_terms_are_one_native_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from farlight.decoding import kept_attention, store

    case, (q, k, v) = text(fl.presets.streaming(3, 20), torch.float32)
    terms = make_terms(TERMS, case)
    cache = fl.KVCache(case.pattern, heads=4, score=terms.score(), sinks=terms.sinks)
    for t in range(60):
        fl.step(*(x[:, :, t : t + 1] for x in (q, k, v)), cache)

    def never(*args: Any) -> None:
        raise AssertionError("the general path was taken")

    monkeypatch.setattr(store.KeyStore, "append", never)
    monkeypatch.setattr(kept_attention, "_matmul_softmax", never)
    for t in range(60, N):
        fl.step(*(x[:, :, t : t + 1] for x in (q, k, v)), cache)
    assert cache.length == N


def test_a_row_without_keys_gives_the_sink() -> None:
    for dtype in (torch.float32, torch.float64):
        cache = fl.KVCache(fl.causal() & fl.strided(2, phase=1), heads=2)
        out, lse = fl.step(*torch.randn(3, 1, 2, 1, 4, dtype=dtype), cache, sinks=torch.tensor([2.0, -3.0]), return_lse=True)
        assert not out.any()
        assert lse.flatten().tolist() == [2.0, -3.0]


def cache_of(**options: Any) -> fl.KVCache:
    cache = fl.KVCache(fl.causal(), **options)
    cache.append(*torch.randn(2, 2, 2, 5, 4))
    return cache


def decoded(cache: fl.KVCache, **options: Any) -> Any:
    return fl.decode(torch.randn(2, 2, 1, 4), cache, **options)


ERRORS = {
    "type": (lambda: fl.KVCache(fl.causal(), score=3), "KVCache: score is int; pass a value of fl.score"),
    "sinks": (lambda: decoded(cache_of(), sinks=[0.0]), r"decode: sinks is \[0.0\]; pass a floating-point tensor \(H,\)"),
    "slopes": (lambda: decoded(cache_of(), score=fl.score.alibi([1.0])), r"alibi: slopes has shape \(1,\)"),
    "short": (
        lambda: decoded(cache_of(), score=fl.score.key_bias(torch.zeros(1, 1, 4))),
        "decode: key_bias names 4 keys, but the text has 5 tokens; pass one bias for each position so far",
    ),
    "grad": (
        lambda: decoded(cache_of(), sinks=torch.zeros(2, requires_grad=True)),
        "decode: an input requires grad, but decoding records no gradients",
    ),
    "select": (
        lambda: cache_of(score=fl.score.key_bias(torch.zeros(2, 1, 9))).select([1, 0]),
        "the score has tables of its own for each batch item, which cannot follow; pass it to each fl.decode",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name: str) -> None:
    call, why = ERRORS[name]
    with pytest.raises(fl.ArgumentError, match=why):
        call()


def test_terms_that_do_not_fit_raise_before_a_step_appends() -> None:
    cache = cache_of()
    for _ in range(2):
        with pytest.raises(fl.ArgumentError, match="alibi: slopes"):
            fl.step(*torch.randn(3, 2, 2, 1, 4), cache, score=fl.score.alibi([1.0]))
        assert cache.length == 5
        fl.decode(torch.randn(2, 2, 1, 4), cache)
