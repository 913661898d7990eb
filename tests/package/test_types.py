"""The types that a user's program sees: `mypy --strict` over tests/ checks each `assert_type`; the calls run here."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor

import farlight as fl


def test_public_calls() -> None:
    q = torch.randn(1, 2, 32, 8)
    flag = bool(torch.rand(()) < 2)
    assert_type(fl.attention(q, q, q, fl.window(4)), Tensor)
    assert_type(fl.attention(q, q, q, fl.window(4), return_lse=False), Tensor)
    assert_type(fl.attention(q, q, q, fl.window(4), return_lse=True), tuple[Tensor, Tensor])
    plan = fl.plan(fl.causal(), 32, heads=2)
    assert_type(fl.attention(q, q, q, plan, return_lse=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(fl.merge([(q, q[..., 0])]), tuple[Tensor, Tensor])
    assert_type(fl.explain(q, q, q, fl.causal()), fl.Explanation)
    assert_type(fl.explain(q, q, q, fl.causal()).speedup, float)
    assert_type(fl.from_dense(q[0, 0] > 0) | fl.from_edges([0], [1], 32), fl.Pattern)
    assert_type(fl.routing.gist_attention(q, q, q, fl.window(4)), Tensor)
    assert_type(fl.routing.gist_attention(q, q, q, fl.window(4), return_lse=True), tuple[Tensor, Tensor])


def test_decoding_and_layers() -> None:
    q, cache = torch.randn(1, 2, 1, 8), fl.KVCache(fl.causal())
    cache.append(q, q)
    assert_type(fl.decode(q, cache), Tensor)
    assert_type(fl.decode(q, cache, return_lse=True), tuple[Tensor, Tensor])
    x = torch.randn(1, 20, 16)
    assert_type(fl.nn.SparseAttention(16, 2, fl.window(4))(x, x, x), tuple[Tensor, Tensor | None])
    assert_type(fl.nn.SparseEncoder(1, 16, 2, fl.window(4))(x), Tensor)
    assert_type(fl.nn.SparseEncoderLayer(16, 2, fl.window(4))(x), Tensor)
