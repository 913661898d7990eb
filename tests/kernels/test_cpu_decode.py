"""The native decode kernels on every ISA: element types, head dimensions, groups, masks, splits of the keys, threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.decoding.pages import quantize
from farlight.kernels.cpu import native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
ISAS = native.available() if native.unavailable() is None else []
STORED = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float16, torch.int8: "int8"}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.use(request.param)
    yield request.param
    native.use(before)


def as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in float64 after rounding to what the cache stores."""
    if dtype == torch.int8:
        codes, scale = quantize(x)
        return codes.double() * scale.double()[..., None]
    return x.to(dtype).double()


def drawn(n: int, heads: int, kv_heads: int, dim: int, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n + 7 * dim)
    return [torch.randn(batch, h, n, dim, generator=generator) for h in (heads, kv_heads, kv_heads)]


def expected(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64 of q `(B, H, n, D)` under `mask` `(n, N)`."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q.double() @ k.transpose(2, 3)) * q.shape[3] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("dim", [1, 7, 16, 40, 64, 80, 256])
def test_element_types_and_head_dimensions(isa: str, stored: torch.dtype, dim: int) -> None:
    """float32 queries over keys of each type: exact products of the stored numbers, whatever the group and the queries."""
    for kv_heads, group, n_q, n in ((2, 1, 1, 130), (1, 3, 2, 77), (2, 5, 1, 64)):
        q, k, v = drawn(n, kv_heads * group, kv_heads, dim)
        cache = fl.KVCache(fl.causal(), dtype=STORED[stored], heads=kv_heads * group)
        cache.append(k[:, :, :-n_q], v[:, :, :-n_q])
        cache.append(k[:, :, -n_q:], v[:, :, -n_q:])
        out, lse = fl.decode(q[:, :, -n_q:], cache, return_lse=True)
        mask = torch.ones(n_q, n, dtype=torch.bool).tril(n - n_q)
        true, true_lse = expected(q[:, :, -n_q:], as_stored(k, stored), as_stored(v, stored), mask)
        torch.testing.assert_close(out.double(), true, atol=3e-6, rtol=3e-6)
        torch.testing.assert_close(lse.double(), true_lse, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("dim", [1, 7, 40, 64, 80, 256])
def test_bfloat16_queries_over_bfloat16_keys(isa: str, dim: int) -> None:
    """Products of pairs where the ISA has them: the lse is exact to float32, groups of every size, rows by address too."""
    for kv_heads, group, n, pattern in (
        (2, 1, 130, fl.causal()),
        (1, 3, 77, fl.causal()),
        (1, 5, 150, fl.window(40, dilation=3)),
    ):
        q, k, v = (x.bfloat16() for x in drawn(n, kv_heads * group, kv_heads, dim))
        cache = fl.KVCache(pattern, heads=kv_heads * group)
        cache.append(k, v)
        out, lse = fl.decode(q[:, :, -1:], cache, scale=0.3, return_lse=True)
        mask = pattern.dense(n)[0, 0, -1:]
        true, true_lse = expected(q[:, :, -1:].double() * 0.3 * dim**0.5, k.double(), v.double(), mask)
        torch.testing.assert_close(out.double(), true, atol=4e-3, rtol=4e-3)
        torch.testing.assert_close(lse.double(), true_lse, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_lists_are_split_and_any_number_of_threads_gives_the_same_bits(isa: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in drawn(2600, 4, 2, 64))
    for pattern in (fl.causal(), fl.causal() & (fl.strided(3) | fl.window(40))):
        cache = fl.KVCache(pattern, heads=4)
        cache.append(k, v)
        outs = []
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            outs.append(fl.decode(q[:, :, -3:], cache, return_lse=True))
            torch.set_num_threads(before)
        for out, lse in outs[1:]:
            assert torch.equal(out, outs[0][0])
            assert torch.equal(lse, outs[0][1])
        mask = pattern.dense(2600)[0, 0, -3:]
        true, true_lse = expected(q[:, :, -3:], k.double(), v.double(), mask)
        close = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
        torch.testing.assert_close(outs[0][0].double(), true, atol=close, rtol=close)
        torch.testing.assert_close(outs[0][1].double(), true_lse, atol=3e-6, rtol=3e-6)


def test_scores_that_are_large_or_not_finite(isa: str) -> None:
    """Scores of 1e7 keep their weights; a NaN or an infinity reaches the rows that see it, and only those."""
    q, k, v = drawn(100, 2, 2, 16)
    cache = fl.KVCache(fl.causal())
    cache.append(k * 1e4, v)
    out = fl.decode(q[:, :, -1:] * 1e3, cache)
    true, _ = expected(q[:, :, -1:] * 1e3, (k * 1e4).double(), v.double(), torch.ones(1, 100, dtype=torch.bool))
    torch.testing.assert_close(out.double(), true, atol=1e-5, rtol=1e-5)
    for bad in (float("nan"), float("inf")):
        k_bad = k.clone()
        k_bad[0, 0, 50] = bad
        cache = fl.KVCache(fl.causal())
        cache.append(k_bad, v)
        out = fl.decode(q[:, :, -1:], cache)
        assert bool(out[0, 0].isnan().all())
        assert bool(out[0, 1].isfinite().all())
    only_nan = fl.KVCache(fl.causal())
    only_nan.append(torch.full_like(k[:, :, :1], float("nan")), v[:, :, :1])
    assert bool(fl.decode(q[:, :, :1], only_nan).isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_tokens_are_rounded_as_torch_rounds_them(isa: str, dtype: torch.dtype) -> None:
    """A step rounds in C++, a prompt in torch: the same numbers, at ties, in the subnormal range and beyond the largest."""
    values = torch.cat([torch.linspace(-2, 2, 257), torch.logspace(-9, 5.5, 255)])[None, None, None]
    values = values.repeat(1, 2, 1, 1)[..., : 256 * 2].view(1, 2, 2, 256)
    together, apart = (fl.KVCache(fl.causal(), dtype=STORED[dtype]) for _ in range(2))
    together.append(values, values)
    apart.append(values[:, :, :1], values[:, :, :1])
    fl.decode(values[:, :, :1], apart)
    fl.step(values[:, :, 1:], values[:, :, 1:], values[:, :, 1:], apart)
    for a, b in zip(together._stores[0].read(), apart._stores[0].read(), strict=True):
        assert torch.equal(a, b)


def test_visibility_programs_equal_the_definition(isa: str) -> None:
    """Each instruction on positions around zero, runs, blocks and beyond 2^31."""
    from farlight.decoding.visibility import compile_program
    from farlight.patterns.liveness import liveness_sizes

    rules = [
        fl.causal() & fl.window(7, dilation=3),
        fl.strided(5) | fl.strided(7, phase=3),
        fl.landmarks(6, 2) - fl.window(4),
        ~fl.offsets([-9, -8, -3, 0, 2]),
        fl.blocked_window(1, 0, block=9),
        fl.global_tokens([0, 3, 4, 90]),
        fl.full() & ~fl.causal(),
        fl.sees_all([95]) | fl.seen_by_all(range(0, 60, 7)),
    ]
    for pattern in rules:
        sizes = liveness_sizes(pattern, None)
        program = compile_program(pattern, sizes)
        assert program is not None
        for first in (0, 2**31 - 40, 2**40):
            j = torch.arange(first, first + 100)
            for i in (first, first + 50, first + 95, first + 99):
                zero = torch.zeros(1, dtype=torch.int64)
                true = pattern._allows(sizes, zero, zero, torch.full_like(j, i), j).expand(100)
                seen = native.module().visible(list(program.code), program.depth, j.data_ptr(), 100, i)
                assert list(seen) == true.int().tolist(), (pattern, first, i)
    assert compile_program(fl.documents(lengths=[3, 4]), liveness_sizes(fl.documents(lengths=[3, 4]), 7)) is None
