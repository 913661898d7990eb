"""Random routers for the native choice and its bounds, the comparison of two choices, and the true loss of their links."""

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
    return shares.masked_fill(seen, 0.0).sum(-1).clamp(max=1.0)  # a float64 sum of all shares may round to more


def assert_same_choice(
    actual: Tensor,
    expected: Tensor,
    router: TopBlocks,
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> None:
    """Equal links; but of blocks ordered by summed softmax shares two may be swapped whose float64 shares agree to 1e-6, since
    the order of a float32 sum decides between them.
    """
    for item, head, row in (actual != expected).any(-1).nonzero().tolist():
        problem = f"{router}, q {tuple(q.shape)}, k {tuple(k.shape)}: item {item}, head {head}, row {row}"
        assert router.score == "softmax" or router.budget.lost is not None, problem
        found, wanted = (_blocks(x[item, head, row], router.block) for x in (actual, expected))
        masks = [None if mask is None else mask[min(item, mask.shape[0] - 1)] for mask in (key_mask, query_mask)]
        shares = _summed_shares(router, q[item].double(), k[item].double(), *masks, head, row)
        swapped = [sorted(float(shares[c]) for c in found - wanted), sorted(float(shares[c]) for c in wanted - found)]
        assert len(swapped[0]) == len(swapped[1]), problem
        torch.testing.assert_close(*(torch.tensor(x, dtype=torch.float64) for x in swapped), rtol=1e-6, atol=0.0)
        assert max(swapped[0] + swapped[1]) <= min(swapped[0] + swapped[1]) * (1 + 1e-6), problem


def _blocks(row: Tensor, block: int) -> set[int]:
    return set((row.nonzero().flatten() // block).tolist())


def _summed_shares(
    router: TopBlocks, q: Tensor, k: Tensor, key_mask: Tensor | None, query_mask: Tensor | None, head: int, row: int
) -> Tensor:
    """By the definition in `TopBlocks`: Σ softmax_c(scale · score + log n_c) over the queries that choose with this one, for
    each key block; 0 for a block that is not scored. q `(H, n_q, D)`, k `(G, n_k, D)`.
    """
    (heads, n_q, dim), (kv_heads, n_k, _) = q.shape, k.shape
    offset, size, group = n_k - n_q, router.query_block, heads // kv_heads
    first = offset // size * size if offset >= 0 else offset
    start = first + (row + offset - first) // size * size
    rows = [r for r in range(n_q) if start <= r + offset < start + size and (query_mask is None or bool(query_mask[r]))]
    together = range(head // group * group, (head // group + 1) * group) if router.per == "group" else [head]
    real = torch.ones(n_k, dtype=torch.bool) if key_mask is None else key_mask
    keys = [k[head // group, lo : lo + router.block][real[lo : lo + router.block]] for lo in range(0, n_k, router.block)]
    scored = [c for c, x in enumerate(keys) if x.shape[0] and (not router.causal or min((c + 1) * router.block, n_k) <= start)]
    queries = torch.cat([q[h, rows] for h in together]) * (dim**-0.5 if router.scale is None else router.scale)
    shares = torch.zeros(len(keys), dtype=torch.float64)
    if scored:
        exponents = torch.stack([_score(router, queries, keys[c]) + torch.tensor(keys[c].shape[0]).log() for c in scored], 1)
        shares[scored] = exponents.softmax(1).sum(0)
    return shares


def _score(router: TopBlocks, queries: Tensor, keys: Tensor) -> Tensor:
    if router.score == "softmax":
        return queries @ keys.mean(0)
    return torch.maximum(queries * keys.amax(0), queries * keys.amin(0)).sum(1)
