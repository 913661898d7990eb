"""Patterns, inputs and callers of attention for the tests of derivatives and of `torch.vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.patterns import Pattern
from farlight.routing import gated_attention, gist_attention
from farlight.testing import oracle
from parity import BACKENDS

PLANNED = ("cpu", "torch")
FUSED = ("auto", "cpu", "torch", "dense")
every_backend = pytest.mark.parametrize("backend", ["auto", *BACKENDS])

N = 6
NEAR = fl.window(1) | fl.random_keys(1)
PER_ITEM = fl.clusters(torch.tensor([[[0, 1, 0, 1, 1, 0]], [[0, 0, -1, 1, 1, 1]]]))
# The number of batch items of one call, and the pattern.
PATTERNS = {
    "fixed and random": (1, NEAR),
    "rows that see nothing": (2, fl.causal() - fl.window(0)),
    "a table": (2, fl.clusters(torch.tensor([0, 1, 0, 1, 1, 0])) | fl.window(1, 0)),
    "a table for each item": (2, PER_ITEM),
    "items in the text": (2, fl.padding([2, 5]) & fl.causal()),
    "a table and items in the text": (2, PER_ITEM | fl.documents(lengths=[[2, 4], [6]])),
    "per head": (1, fl.per_head([fl.window(0), fl.causal()])),
}


def normal(*shape: int, seed: int = 0, **options: Any) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def keys(*lead: int, kv_heads: int = 1, seed: int = 1, **options: Any) -> tuple[Tensor, Tensor]:
    k, v = normal(2, *lead, kv_heads, N, 4, seed=seed, **options).unbind(0)
    return k, v


def formula(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """The answer by the book, by operations of torch alone."""
    mask = pattern.dense(q.shape[2], k.shape[2], batch=q.shape[0], heads=q.shape[1])
    return oracle.attend(q, k, v, mask, scale=q.shape[-1] ** -0.5)[0]


def attend(pattern: Pattern, backend: str, **options: Any) -> Callable[..., Any]:
    return lambda q, k, v: fl.attention(q, k, v, pattern, backend=backend, **options)


def agree(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


MEMBERS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "attention": lambda x, backend: attend(NEAR, backend)(x, x, x),
    "keys alone": lambda x, backend: attend(NEAR, backend)(torch.ones(1, 2, N, 4, dtype=x.dtype), x, x),
    "gated": lambda x, backend: gated_attention(x, x, x, NEAR, x, x, backend=backend),  # type: ignore[return-value]
    "gist": lambda x, backend: gist_attention(x, x, x, fl.window(1), block=2, backend=backend),  # type: ignore[return-value]
    "merge": lambda x, backend: fl.merge(
        [fl.attention(x, x[:, :, s], x[:, :, s], fl.full(), return_lse=True, backend=backend) for s in (slice(3), slice(3, N))]  # type: ignore[misc]
    )[0],
}
