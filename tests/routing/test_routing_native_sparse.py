"""`NativeSparseAttention` against the formulas of its docstring, one query at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from farlight.nn import NativeSparseAttention


def softmax(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return (keys @ q * q.numel() ** -0.5).softmax(0) @ values if len(keys) else torch.zeros_like(q)


def reference(layer: NativeSparseAttention, x: Tensor) -> Tensor:
    batch, n, width = x.shape
    heads, kv, dim = layer.heads, layer.kv_heads, layer.head_dim
    group, width_c, d, block = heads // kv, layer.compress, layer.stride, layer.block
    out = torch.zeros(batch, n, width, dtype=x.dtype)
    q_all = layer.q_proj(x).view(batch, n, heads, dim)
    kv_all = layer.kv_proj(x).view(batch, n, 3, 2, kv, dim)
    gates = layer.gate_proj(x).sigmoid().view(batch, n, 3, heads)
    for b in range(batch):
        for g in range(kv):
            keys, values = kv_all[b, :, :, 0, g], kv_all[b, :, :, 1, g]
            starts = range(0, n - width_c + 1, d)
            short_k = [layer.pool_k((keys[s : s + width_c, 0] + layer.place[0]).reshape(-1)) for s in starts]
            short_v = [layer.pool_v((values[s : s + width_c, 0] + layer.place[1]).reshape(-1)) for s in starts]
            for i in range(n):
                past = [c for c, s in enumerate(starts) if s + width_c - 1 <= i]
                wide_k = torch.stack([short_k[c] for c in past]) if past else x.new_zeros(0, dim)
                wide_v = torch.stack([short_v[c] for c in past]) if past else x.new_zeros(0, dim)
                importance = dict.fromkeys(range(i // block + 1), 0.0)
                for h in range(g * group, (g + 1) * group):
                    p = (wide_k @ q_all[b, i, h] * dim**-0.5).softmax(0)
                    for c, share in zip(past, p.tolist(), strict=True):
                        for token in range(starts[c], starts[c] + width_c):
                            if token // block in importance:
                                importance[token // block] += share / d
                forced = {u for u in (0, i // block - 1, i // block) if u >= 0}
                rest = sorted(set(importance) - forced, key=lambda u: -importance[u])
                blocks = forced | set(rest[: max(0, layer.count - len(forced))])
                near = [j for j in range(i + 1) if j // block in blocks]
                win = list(range(max(0, i - layer.window), i + 1))
                for h in range(g * group, (g + 1) * group):
                    q = q_all[b, i, h]
                    parts = [
                        softmax(q, wide_k, wide_v),
                        softmax(q, keys[near, 1], values[near, 1]),
                        softmax(q, keys[win, 2], values[win, 2]),
                    ]
                    mixed = sum(gates[b, i, part, h] * value for part, value in enumerate(parts))
                    out[b, i, h * dim : (h + 1) * dim] = mixed
    return layer.out_proj(out)


@pytest.mark.parametrize(
    "n, compress, stride, block, count", [(37, 4, 2, 4, 4), (40, 6, 3, 6, 3), (5, 8, 4, 4, 1), (21, 4, 4, 4, 4)]
)
def test_matches_the_formula(n: int, compress: int, stride: int, block: int, count: int) -> None:
    torch.manual_seed(3)
    layer = NativeSparseAttention(
        24, 4, kv_heads=2, compress=compress, stride=stride, block=block, count=count, window=3
    ).double()
    x = torch.randn(2, n, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference(layer, x))


def test_every_parameter_gets_a_gradient_and_the_state_round_trips() -> None:
    layer = NativeSparseAttention(16, 4, kv_heads=1, compress=4, stride=2, block=4, count=4, window=4)
    x = torch.randn(1, 30, 16)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in layer.parameters())
    other = NativeSparseAttention(16, 4, kv_heads=1, compress=4, stride=2, block=4, count=4, window=4)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_rotate_is_applied_to_queries_and_near_keys() -> None:
    shapes = []

    def rotate(x: Tensor, at: Tensor) -> Tensor:
        shapes.append((tuple(x.shape), at.tolist() == list(range(30))))
        return x

    torch.manual_seed(0)
    layer = NativeSparseAttention(16, 4, kv_heads=2, compress=4, stride=2, block=4, rotate=rotate)
    layer(torch.randn(1, 30, 16))
    assert shapes == [((1, 4, 30, 4), True), ((1, 2, 30, 4), True), ((1, 2, 30, 4), True)]
