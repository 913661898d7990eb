"""Causal routers: later tokens change no earlier row, and token-by-token routing gives the rows of the parallel pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.nn import NativeSparseAttention
from farlight.routing import LSH, KMeans, Router, TopBlocks, TopKeys, gated_attention, gist_attention

N, HEADS, KV, DIM = 41, 4, 2, 6


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, HEADS, N, DIM, generator=g, dtype=dtype)
    k, v = (torch.randn(2, KV, N, DIM, generator=g, dtype=dtype) for _ in "kv")
    return q, k, v


ROUTERS: dict[str, Callable[[], Router]] = {
    "kmeans": lambda: KMeans(HEADS, DIM, 4, causal=True).eval(),
    "kmeans, training": lambda: KMeans(HEADS, DIM, 4, causal=True, decay=0.5).train(),
    "kmeans, bounded": lambda: KMeans(HEADS, DIM, 4, causal=True, per_cluster=3).eval(),
    "kmeans, shared and bounded": lambda: KMeans(HEADS, DIM, 4, causal=True, per_cluster=3, shared=True).eval(),
    "lsh": lambda: LSH(4, 2, causal=True),
    "lsh, shared": lambda: LSH(4, 2, causal=True, shared=True),
    "blocks, count": lambda: TopBlocks(3, 4, causal=True),
    "blocks, share": lambda: TopBlocks(share=0.4, block=4, causal=True),
    "blocks, mass": lambda: TopBlocks(mass=0.5, block=4, causal=True),
    "blocks, bounds": lambda: TopBlocks(3, 4, causal=True, score="minmax"),
    "blocks of queries": lambda: TopBlocks(3, 4, 4, causal=True),
    "blocks of more queries": lambda: TopBlocks(3, 3, 5, causal=True),
    "keys, count": lambda: TopKeys(5, causal=True),
    "keys, share": lambda: TopKeys(share=0.3, causal=True),
    "keys, mass": lambda: TopKeys(mass=0.6, causal=True),
    "joined": lambda: (TopBlocks(2, 4, causal=True) | fl.window(3, 0)) - fl.offsets([-1]),
}


def dense(pattern: fl.Pattern, n_q: int, n_k: int) -> Tensor:
    return pattern.dense(n_q, n_k, batch=2, heads=HEADS).expand(2, HEADS, n_q, n_k)


def changed(x: Tensor, t: int, factor: float) -> Tensor:
    out = x.clone()
    out[:, :, t + 1 :] = factor * torch.randn(
        out[:, :, t + 1 :].shape, generator=torch.Generator().manual_seed(t), dtype=x.dtype
    )
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_later_tokens_change_no_earlier_row(name: str, masked: bool) -> None:
    q, k, v = tensors()
    mask = torch.arange(N) >= torch.tensor([[0], [9]]) if masked else None
    pattern = ROUTERS[name]()(q, k, key_mask=mask)
    before, out = dense(pattern, N, N), fl.attention(q, k, v, pattern)
    assert not bool(before.triu(1).any())
    for t in (0, 3, 4, 13, 19, N - 2):
        for factor in (1.0, 1e4):
            q2, k2, v2 = (changed(x, t, factor) for x in (q, k, v))
            pattern2 = ROUTERS[name]()(q2, k2, key_mask=mask)
            assert torch.equal(dense(pattern2, N, N)[:, :, : t + 1], before[:, :, : t + 1])
        torch.testing.assert_close(fl.attention(q2, k2, v2, pattern2)[:, :, : t + 1], out[:, :, : t + 1])


@pytest.mark.parametrize("name", ROUTERS)
def test_token_by_token_equals_the_parallel_pass(name: str) -> None:
    q, k, v = tensors()
    router = ROUTERS[name]().eval()
    whole = router(q, k)
    seen, out = dense(whole, N, N), fl.attention(q, k, v, whole)
    for t in range(N):
        first = t
        if isinstance(router, TopBlocks):
            first = t // router.query_block * router.query_block  # the query that decides for its block
        step_qkv = (q[:, :, first : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
        step = router(*step_qkv[:2])
        assert torch.equal(dense(step, t + 1 - first, t + 1)[:, :, -1], seen[:, :, t, : t + 1])
        if t % 7 == 0:
            torch.testing.assert_close(fl.attention(*step_qkv, step)[:, :, -1], out[:, :, t])


@pytest.mark.parametrize("levels", [1, 3])
def test_gist_and_gated_attention_are_causal(levels: int) -> None:
    q, k, v = tensors(dtype=torch.float64)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        pattern = TopBlocks(2, 4, causal=True)(q, k) | fl.window(2, 0)
        gist = gist_attention(q, k, v, pattern, block=4, levels=levels, causal=True)
        gate = gated_attention(q, k, v, pattern, q[..., :2], k[..., :2])
        assert isinstance(gist, Tensor)
        assert isinstance(gate, Tensor)
        return gist, gate

    before = run(q, k, v)
    for t in (0, 4, 18, 30):
        after = run(*(changed(x, t, 10.0) for x in (q, k, v)))
        prefix = run(*(x[:, :, : t + 1] for x in (q, k, v)))
        step = run(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
        for whole_out, changed_out, prefix_out, step_out in zip(before, after, prefix, step, strict=True):
            torch.testing.assert_close(changed_out[:, :, : t + 1], whole_out[:, :, : t + 1])
            torch.testing.assert_close(prefix_out, whole_out[:, :, : t + 1])
            torch.testing.assert_close(step_out[:, :, 0], whole_out[:, :, t])


def test_native_sparse_attention_is_causal() -> None:
    torch.manual_seed(1)
    layer = NativeSparseAttention(24, 4, kv_heads=2, compress=6, stride=3, block=6, count=4, window=4).double()
    x = torch.randn(2, N, 24, dtype=torch.float64)
    out = layer(x)
    for t in (0, 5, 17, 30):
        y = x.clone()
        y[:, t + 1 :] = torch.randn_like(y[:, t + 1 :])
        torch.testing.assert_close(layer(y)[:, : t + 1], out[:, : t + 1])
        torch.testing.assert_close(layer(x[:, : t + 1]), out[:, : t + 1])
