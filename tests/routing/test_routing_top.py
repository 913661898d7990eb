"""`TopBlocks`, `TopKeys`, `from_indices` and `gated_attention` against their definitions in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight import routing
from farlight.routing import TopBlocks, TopKeys, from_indices, gated_attention

Q, K = 23, 29
MASK = torch.arange(K) < torch.tensor([[K], [18]])
HOLES = torch.rand(2, K, generator=torch.Generator().manual_seed(8)) < 0.6


def tensors(n_q: int = Q, n_k: int = K, batch: int = 2, heads: int = 4, kv: int = 2, dim: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(6)
    return (
        torch.randn(batch, heads, n_q, dim, generator=g, dtype=torch.float64),
        torch.randn(batch, kv, n_k, dim, generator=g, dtype=torch.float64),
    )


def reference_selection(
    scores: dict[int, float], forced: set[int], num_forced: int, budget: dict[str, float], weight: dict[int, float]
) -> set[int]:
    """The forced entries and the best scored ones within the budget."""
    best = sorted(scores, key=lambda c: -scores[c])
    if "mass" in budget:
        order, total, out = sorted(weight, key=lambda c: -weight[c]), sum(weight.values()), set(forced)
        part = 0.0
        for c in order:
            if part >= budget["mass"] * total:
                break
            out.add(c)
            part += weight[c]
        return out
    number = budget.get("count", math.ceil(round(budget.get("share", 0) * (len(scores) + num_forced), 9)))
    return forced | set(best[: max(0, int(number) - num_forced)])


def reference_blocks(router: TopBlocks, budget: dict[str, float], q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    batch, heads, n_q, dim = q.shape
    n_k, group, size, block = k.shape[2], heads // k.shape[1], router.query_block, router.block
    offset = n_k - n_q
    out = torch.zeros(batch, heads, n_q, n_k, dtype=torch.bool)
    for b in range(batch):
        real = [True] * n_k if mask is None else mask[b].tolist()
        for h in range(heads):
            groups: dict[int, list[int]] = {}
            for i in range(n_q):
                groups.setdefault((i + offset) // size if offset >= 0 else i // size, []).append(i)
            for u, rows in groups.items():
                start = u * size if offset >= 0 else offset + u * size
                alive = [i for i in rows if mask is None or real[i + offset]]
                if not alive:
                    continue
                chief = q[b, h, alive[0]] if router.causal else torch.stack([q[b, h, i] for i in alive]).mean(0)
                scores, weight, forced = {}, {}, set()
                num_forced = len({max(0, p) // block for p in range(start, start + size)}) if router.causal else 0
                for c in range(-(-n_k // block)):
                    keys = [k[b, h // group, j] for j in range(c * block, min(n_k, (c + 1) * block)) if real[j]]
                    if not keys:
                        continue
                    if router.causal and not (c + 1) * block <= start:
                        if c * block < start + size:
                            forced.add(c)
                        continue
                    table = torch.stack(keys)
                    if router.score == "mean":
                        scores[c] = float(chief @ table.mean(0))
                    else:
                        scores[c] = float(torch.maximum(chief * table.amin(0), chief * table.amax(0)).sum())
                    weight[c] = len(keys) * math.exp(scores[c] * dim**-0.5)
                for i in rows:
                    for c in reference_selection(scores, forced, num_forced, budget, weight):
                        for j in range(c * block, min(n_k, (c + 1) * block)):
                            if real[j] and (not router.causal or j <= i + offset):
                                out[b, h, i, j] = True
    return out


def assert_allows(pattern: fl.Pattern, expected: Tensor) -> None:
    batch, heads, n_q, n_k = expected.shape
    assert torch.equal(pattern.dense(n_q, n_k, batch=batch, heads=heads).expand(expected.shape), expected)
    assert torch.equal(fl.plan(pattern, n_q, n_k, batch=batch, heads=heads).dense(), expected)


BUDGETS = [{"count": 3}, {"count": 99}, {"share": 0.3}, {"mass": 0.7}]


@pytest.mark.parametrize("mask", [None, MASK, HOLES], ids=["real", "padded", "holes"])
@pytest.mark.parametrize("score", ["mean", "minmax"])
@pytest.mark.parametrize(
    "block, query_block, causal",
    [(4, 1, True), (4, None, True), (3, 6, True), (4, 3, True), (4, 4, False), (3, 5, False), (64, 1, False), (1, 1, True)],
)
def test_top_blocks_matches_the_definition(
    block: int, query_block: int | None, causal: bool, score: str, mask: Tensor | None
) -> None:
    q, k = tensors(n_q=K if causal and query_block else Q)
    for budget in BUDGETS:
        router = TopBlocks(**budget, block=block, query_block=query_block, causal=causal, score=score)
        assert_allows(router(q, k, key_mask=mask), reference_blocks(router, budget, q, k, mask))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("query_block", [1, 3])
def test_more_queries_than_keys(query_block: int, causal: bool) -> None:
    q, k = tensors(n_q=31, n_k=13)
    router = TopBlocks(2, 4, query_block, causal)
    assert_allows(router(q, k), reference_blocks(router, {"count": 2}, q, k, None))


def test_minmax_scores_bound_every_key() -> None:
    """A key outside the selected blocks scores no higher than the lowest bound among them."""
    q, k = tensors()
    router = TopBlocks(3, 4, 1, score="minmax")
    seen = router(q, k).dense(Q, K, batch=2, heads=4)
    scores = q @ k.repeat_interleave(2, 1).mT
    blocks = torch.nn.functional.pad(k.repeat_interleave(2, 1), (0, 0, 0, 3), value=float("nan")).unflatten(2, (-1, 4))
    least, most = blocks.nan_to_num(torch.inf).amin(3), blocks.nan_to_num(-torch.inf).amax(3)
    bound = torch.maximum(q[:, :, :, None] * least[:, :, None], q[:, :, :, None] * most[:, :, None]).sum(-1)
    chosen = seen[..., ::4]
    lowest = bound.masked_fill(~chosen, torch.inf).amin(-1)
    assert bool((scores.masked_fill(seen, -torch.inf).amax(-1) <= lowest + 1e-12).all())


def test_mass_selects_fewer_blocks_for_concentrated_rows() -> None:
    """By mass, a row with one dominant block selects one, a row without one selects many."""
    k = torch.eye(8, dtype=torch.float64).view(1, 1, 8, 8)
    q = torch.stack((50 * k[0, 0, 3], torch.zeros(8))).view(1, 1, 2, 8)
    assert TopBlocks(mass=0.9, block=1, query_block=1)(q, k).dense(2, 8).sum(-1).flatten().tolist() == [1, 8]
    assert TopKeys(mass=0.5)(q, k).dense(2, 8).sum(-1).flatten().tolist() == [1, 4]


@pytest.mark.parametrize("mask", [None, MASK, HOLES], ids=["real", "padded", "holes"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n_q, n_k", [(Q, K), (31, 13)])
def test_top_keys_matches_the_definition(n_q: int, n_k: int, causal: bool, mask: Tensor | None) -> None:
    q, k = tensors(n_q, n_k)
    real = None if mask is None else mask[:, :n_k]
    rows = None if mask is None else torch.rand(2, n_q, generator=torch.Generator().manual_seed(1)) < 0.8
    for budget in BUDGETS:
        expected = torch.zeros(2, 4, n_q, n_k, dtype=torch.bool)
        for b in range(2):
            for h in range(4):
                for i in range(n_q):
                    seen = [j for j in range(n_k) if (real is None or real[b, j]) and (not causal or j <= i + n_k - n_q)]
                    if rows is not None and not rows[b, i]:
                        continue
                    scores = {j: float(q[b, h, i] @ k[b, h // 2, j]) for j in seen}
                    weight = {j: math.exp(s * 5**-0.5) for j, s in scores.items()}
                    for j in reference_selection(scores, set(), 0, budget, weight):
                        expected[b, h, i, j] = True
        assert_allows(TopKeys(**budget, causal=causal)(q, k, key_mask=real, query_mask=rows), expected)


def test_row_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = tensors()
    routers = [
        TopKeys(mass=0.6),
        TopBlocks(mass=0.7, block=4, query_block=1),
        routing.KMeans(4, 5, 3).eval(),
        routing.LSH(4, 2),
    ]
    at_once = [router(q, k) for router in routers]
    monkeypatch.setattr("farlight.routing.base._MAX_SCORES", 300)
    for router, expected in zip(routers, at_once, strict=True):
        assert torch.equal(router(q, k).dense(Q, K, batch=2, heads=4), expected.dense(Q, K, batch=2, heads=4))


def test_from_indices() -> None:
    g = torch.Generator().manual_seed(0)
    keys = torch.randint(-9, K, (2, Q, 5), generator=g)
    for causal in (False, True):
        expected = torch.zeros(2, 4, Q, K, dtype=torch.bool)
        for b in range(2):
            for i in range(Q):
                for j in keys[b, i].tolist():
                    if j >= 0 and (not causal or j <= i + K - Q):
                        expected[b, :, i, j] = True
        assert_allows(from_indices(keys, causal=causal), expected)
    blocks = torch.randint(-3, 8, (2, 4, 8, 3), generator=g)
    assert from_indices(blocks, block=4, query_block=4) == fl.chosen_blocks(blocks.clamp(min=-1), block=4)


def test_combined_routers() -> None:
    q, k = tensors()
    joined = (TopKeys(2) | fl.window(1)) & TopBlocks(3, 4) - fl.strided(2)
    pattern = (TopKeys(2)(q, k) | fl.window(1)) & (TopBlocks(3, 4)(q, k) - fl.strided(2))
    assert joined(q, k) == pattern
    assert len(list((routing.KMeans(4, 5, 3) | fl.window(1)).buffers())) == 2


# ---- the gate --------------------------------------------------------------------------------------------------------
def test_gated_attention_matches_the_formula_and_trains_the_scorer() -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(1, h, n, 4, generator=g, dtype=torch.float64, requires_grad=True) for h, n in ((4, 9), (2, 11), (2, 11))
    )
    q_score, k_score = (
        torch.randn(1, h, n, 3, generator=g, dtype=torch.float64, requires_grad=True) for h, n in ((4, 9), (2, 11))
    )
    pattern = TopBlocks(2, 3, causal=True)(q_score, k_score) | fl.window(1, 0)
    mask = pattern.dense(9, 11, heads=4)

    def expected(q: Tensor, k: Tensor, v: Tensor, q_score: Tensor, k_score: Tensor) -> Tensor:
        k, v, k_score = (x.repeat_interleave(2, 1) for x in (k, v, k_score))
        logits = 0.3 * q @ k.mT + q_score @ k_score.mT
        return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v

    every = (q, k, v, q_score, k_score)
    out, lse = gated_attention(q, k, v, pattern, q_score, k_score, scale=0.3, return_lse=True)
    torch.testing.assert_close(out, expected(*every))
    weights = torch.randn(out.shape, generator=g, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((out * weights).sum(), every),
        torch.autograd.grad((expected(*every) * weights).sum(), every),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
    assert lse.shape == (1, 4, 9)


def test_a_gated_scorer_learns_which_block_holds_the_answer() -> None:
    """The answer is in one of 8 blocks; an untrained scorer learns to select that block."""
    g = torch.Generator().manual_seed(0)
    n, block, width = 32, 4, 8
    marks = torch.nn.functional.normalize(torch.randn(8, width, generator=g), dim=-1)
    to_query, to_key = (torch.randn(width, width, generator=g).mul(0.1).requires_grad_() for _ in "qk")
    optimizer = torch.optim.Adam([to_query, to_key], 0.05)
    hits = []
    for _ in range(60):
        answer = torch.randint(8, (16,), generator=g)
        keys = marks.repeat_interleave(block, 0).expand(16, 1, n, width)
        values = torch.zeros(16, 1, n, width).scatter_(
            3, torch.arange(8).repeat_interleave(block).view(1, 1, n, 1).expand(16, 1, n, 1), 1.0
        )
        q_score, k_score = marks[answer].view(16, 1, 1, width) @ to_query, keys @ to_key
        pattern = TopBlocks(3, block, 1)(q_score, k_score) | fl.random_keys(4)
        out = gated_attention(torch.zeros_like(q_score), torch.zeros_like(keys), values, pattern, q_score, k_score)
        loss = torch.nn.functional.nll_loss((out.view(16, width) + 1e-3).log(), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        best = TopBlocks(1, block, 1)(q_score, k_score).dense(1, n, batch=16)
        hits.append(float(best[torch.arange(16), 0, 0, answer * block].float().mean()))
    assert hits[0] < 0.5
    assert sum(hits[-10:]) / 10 > 0.95
