"""Random routers for the native choice and its bounds, and the true loss of their links."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from farlight.routing import Router, TopBlocks


def random_router(rng: random.Random) -> TopBlocks:
    amount: dict[str, Any] = rng.choice(
        [{"count": rng.choice([1, 2, 5, 12])}, {"share": rng.choice([0.1, 0.3, 1.0])}, {"mass": 0.8}]
    )
    return TopBlocks(
        **amount,
        block=rng.choice([1, 3, 4, 8, 16, 64]),
        query_block=rng.choice([1, 1, 2, 5, 8, 16, 32, 64]),
        causal=rng.random() < 0.6,
        score=rng.choice(["mean", "minmax", "softmax"]),
        per=rng.choice(["head", "group"]),
    )


def random_masks(rng: random.Random, batch: int, n_q: int, n_k: int) -> dict[str, Tensor | None]:
    """Masks of real tokens in a third of the draws."""
    if rng.random() >= 0.3:
        return {}
    return {"key_mask": torch.rand(batch, n_k) > 0.3, "query_mask": torch.rand(batch, n_q) > 0.3}


def links(router: Router, q: Tensor, k: Tensor, **masks: Tensor | None) -> Tensor:
    return router(q, k, **masks).dense(q.shape[2], k.shape[2], batch=q.shape[0], heads=q.shape[1])


def true_loss(q: Tensor, k: Tensor, seen: Tensor, full: Tensor, scale: float) -> Tensor:
    """The share of full attention that each row has missed, in float64."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).double()
    scores = (q.double() @ k.transpose(-1, -2)) * scale
    shares = scores.masked_fill(~full, -torch.inf).softmax(-1).nan_to_num(0.0)
    return shares.masked_fill(seen, 0.0).sum(-1)
