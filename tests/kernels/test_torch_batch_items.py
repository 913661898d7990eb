"""Batch items with equal links are planned once, and the torch backend computes many of them together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.kernels import torch_tiled as blocked
from farlight.kernels.torch_tiled.gather import tile_batches
from farlight.kernels.torch_tiled.schedule import schedule_of
from farlight.patterns import Sizes
from farlight.plan import plan_for
from farlight.testing.oracle import attend, dropout_mask

ITEMS, HEADS, KV_HEADS, N, DIM = 40, 4, 2, 24, 8
LENGTHS = [1 + (7 * b) % 5 * 5 for b in range(ITEMS)]  # five lengths
REAL = torch.arange(N) < torch.tensor(LENGTHS)[:, None]
IDS = torch.arange(N) * torch.tensor([1 + b % 3 for b in range(ITEMS)])[:, None] // N
LATER = torch.roll(REAL, 3, 1)

BY_ITEM = {
    "padding by lengths": (fl.padding(LENGTHS), 5),
    "padding by a mask": (fl.padding(REAL), 5),
    "padding on the left": (fl.padding(REAL.flip(1)), 5),
    "documents by ids": (fl.documents(IDS), 3),
    "documents by lengths": (fl.documents(lengths=[[4, 8] if b % 2 else [12] for b in range(ITEMS)]), 2),
    "named tokens": (fl.sees_all(LATER) | fl.seen_by_all(LATER), 5),
}


def variants(pattern: fl.Pattern) -> int:
    plan = plan_for(pattern, Sizes.of(N, batch=ITEMS, heads=HEADS), blocked.SHAPE)
    return max(int(layer.variant.max()) + 1 for piece in plan.pieces for layer in piece.layers)


@pytest.mark.parametrize(("pattern", "different"), BY_ITEM.values(), ids=BY_ITEM.keys())
def test_equal_items_share_a_variant(pattern: fl.Pattern, different: int) -> None:
    assert variants(pattern) == different
    assert variants(pattern & fl.window(3)) == different


def test_the_steps_of_a_call_do_not_grow_with_its_items() -> None:
    def steps(items: int) -> int:
        pattern = fl.window(4) & fl.padding([1 + b % 3 for b in range(items)])
        plan = plan_for(pattern, Sizes.of(N, batch=items, heads=HEADS), blocked.SHAPE)
        return len(list(tile_batches(schedule_of(plan, torch.device("cpu")), HEADS, KV_HEADS, DIM)))

    assert steps(3) == steps(48)


def tensors(dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [torch.randn(ITEMS, h, N, DIM, generator=g, dtype=torch.float64).to(dtype) for h in heads]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "more",
    [fl.full(), fl.window(3), fl.window(2, dilation=3), fl.random_keys(3, seed=1)],
    ids=["full", "near", "dilated", "points"],
)
@pytest.mark.parametrize(("pattern", "different"), BY_ITEM.values(), ids=BY_ITEM.keys())
def test_items_computed_together_are_exact(pattern: fl.Pattern, different: int, more: fl.Pattern, dropout: float) -> None:
    pattern = pattern & more
    q, k, v, grad = tensors(torch.float64)
    given, truth = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    out, lse = fl.attention(*given, pattern, backend="torch", dropout=dropout, seed=5, return_lse=True)
    keep = dropout_mask(Sizes.of(N, batch=ITEMS, heads=HEADS), 5, dropout)
    mask = pattern.dense(N, batch=ITEMS, heads=HEADS)
    expected, expected_lse = attend(*truth, mask, scale=DIM**-0.5, keep=keep, dropout=dropout)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    for x, y in zip(torch.autograd.grad(out, given, grad), torch.autograd.grad(expected, truth, grad), strict=True):
        torch.testing.assert_close(x, y)
