"""`KMeans` against its definition in plain loops; centroid updates; state; two ranks against one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.routing import KMeans


def tensors(
    n_q: int = 23, n_k: int = 29, batch: int = 2, heads: int = 4, kv: int = 2, dim: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, n_q, dim, generator=g), torch.randn(batch, kv, n_k, dim, generator=g)


def cosine(mu: Tensor, x: Tensor) -> float:
    return float(mu.double() @ x.double() / x.double().norm())


def nearest_label(router: KMeans, h: int, x: Tensor) -> int:
    scores = [cosine(mu, x) for mu in router.centroids[h]]
    return scores.index(max(scores))


def top_members(router: KMeans, h: int, tokens: Tensor, real: list[bool], w: int) -> list[set[int]]:
    """For each cluster the w real tokens of the largest cosine."""
    out = []
    for mu in router.centroids[h]:
        order = sorted((t for t in range(len(tokens)) if real[t]), key=lambda t: -cosine(mu, tokens[t]))
        out.append(set(order[:w]))
    return out


def reference(router: KMeans, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """The class's formulas, one pair at a time."""
    batch, heads, n_q, _ = q.shape
    n_k, group, w = k.shape[2], heads // k.shape[1], router.per_cluster
    offset = n_k - n_q
    out = torch.zeros(batch, heads, n_q, n_k, dtype=torch.bool)
    for b in range(batch):
        k_real = [True] * n_k if mask is None else mask[b].tolist()
        q_real = [True] * n_q if mask is None else k_real[offset:]
        for h in range(heads):
            keys = k[b, h // group]
            queries = keys[offset:] if router.shared else q[b, h]
            if w is not None and not router.causal:
                key_members = top_members(router, h, keys, k_real, w)
                query_members = (
                    [{t - offset for t in members} for members in key_members]
                    if router.shared
                    else top_members(router, h, queries, q_real, w)
                )
                for query_ids, key_ids in zip(query_members, key_members, strict=True):
                    for i in query_ids:
                        for j in key_ids:
                            if 0 <= i:
                                out[b, h, i, j] = True
                continue
            key_label = [nearest_label(router, h, x) if real else -1 for x, real in zip(keys, k_real, strict=True)]
            query_label = [nearest_label(router, h, x) if real else -1 for x, real in zip(queries, q_real, strict=True)]
            for i in range(n_q):
                allowed = [
                    j for j in range(n_k) if key_label[j] == query_label[i] >= 0 and (not router.causal or j <= i + offset)
                ]
                for j in allowed if w is None else allowed[-w:]:
                    out[b, h, i, j] = True
    return out


def assert_allows(pattern: fl.Pattern, expected: Tensor) -> None:
    batch, heads, n_q, n_k = expected.shape
    assert torch.equal(pattern.dense(n_q, n_k, batch=batch, heads=heads).expand(expected.shape), expected)
    planned = fl.plan(pattern, n_q, n_k, batch=batch, heads=heads)
    planned.check()
    assert torch.equal(planned.dense(), expected)


MASK = torch.arange(29) < torch.tensor([[29], [17]])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("per_cluster", [None, 1, 6, 50])
def test_matches_the_definition(per_cluster: int | None, causal: bool, shared: bool, masked: bool) -> None:
    q, k = tensors()
    router = KMeans(4, 5, 3, per_cluster=per_cluster, causal=causal, shared=shared, seed=1).eval()
    mask = MASK if masked else None
    assert_allows(router(q, k, key_mask=mask), reference(router, q, k, mask))


@pytest.mark.parametrize("per_cluster", [None, 4])
def test_more_queries_than_keys(per_cluster: int | None) -> None:
    q, k = tensors(n_q=31, n_k=13)
    for causal in (False, True):
        router = KMeans(4, 5, 3, per_cluster=per_cluster, causal=causal).eval()
        assert_allows(router(q, k), reference(router, q, k, None))


def test_query_mask_of_another_text() -> None:
    q, k = tensors()
    router = KMeans(4, 5, 3).eval()
    every = torch.ones(2, 23, dtype=torch.bool)
    apart = router(q, k, key_mask=MASK, query_mask=every).dense(23, 29, batch=2, heads=4)
    assert torch.equal(apart, router(q, k).dense(23, 29, batch=2, heads=4) & MASK[:, None, None])


def test_more_clusters_than_bits_in_a_word() -> None:
    q, k = tensors(n_q=29)
    router = KMeans(4, 5, 130, per_cluster=3).eval()
    assert_allows(router(q, k), reference(router, q, k, None))


def test_balanced_clusters_without_overlap_are_plain_clusters() -> None:
    """Where nothing overlaps, the balanced form is the plain one."""
    x = torch.eye(4).repeat(1, 1, 3, 1)
    plain, balanced = KMeans(1, 4, 4).eval(), KMeans(1, 4, 4, per_cluster=3).eval()
    for router in (plain, balanced):
        router.centroids.copy_(torch.eye(4)[None])
    assert torch.equal(plain(x, x).dense(12), balanced(x, x).dense(12))


# ---- updates ---------------------------------------------------------------------------------------------------------
def test_moving_average_matches_the_formula() -> None:
    q, k = tensors()
    router = KMeans(4, 5, 3, decay=0.9).fit(q, k)
    before = router.centroids.clone()
    query, key = router.labels(q, k, key_mask=MASK)
    router(q, k, key_mask=MASK)
    for h in range(4):
        for c in range(3):
            members = [x / x.norm() for b in range(2) for x, at in zip(q[b, h], query[b, h], strict=True) if at == c]
            members += [x / x.norm() for b in range(2) for x, at in zip(k[b, h // 2], key[b, h], strict=True) if at == c]
            expected = before[h, c]
            if members:
                expected = 0.9 * before[h, c] + 0.1 * torch.stack(members).mean(0)
                expected = expected / expected.norm()
            torch.testing.assert_close(router.centroids[h, c], expected)
    assert not torch.equal(before, router.centroids)


def test_centroids_are_updated_after_the_choice() -> None:
    q, k = tensors()
    router, still = KMeans(4, 5, 3, decay=0.5), KMeans(4, 5, 3).eval()
    assert router(q, k) == still(q, k)
    assert not torch.equal(router.centroids, still.centroids)


def test_only_training_mode_updates_centroids_and_no_gradient_does() -> None:
    q, k = tensors()
    q.requires_grad_()
    router = KMeans(4, 5, 3).fit(q, k)
    before = router.centroids.clone()
    router.eval()(q, k)
    KMeans(4, 5, 3, decay=1.0)(q, k)
    assert torch.equal(before, router.centroids)
    assert not router.centroids.requires_grad
    assert list(router.parameters()) == []
    out = fl.attention(q, k, k, router.train()(q, k))
    out.sum().backward()
    assert q.grad is not None


def test_fit_finds_separate_clouds() -> None:
    g = torch.Generator().manual_seed(3)
    centre = torch.linalg.qr(torch.randn(6, 6, generator=g))[0][:3]
    which = torch.randint(0, 3, (1, 1, 90), generator=g)
    x = centre[which] + 0.05 * torch.randn(1, 1, 90, 6, generator=g)
    router = KMeans(1, 6, 3, seed=2).fit(x, x).eval()
    assert torch.equal(router(x, x).dense(90), which[..., None] == which[..., None, :])


def test_fewer_tokens_than_centroids() -> None:
    q, k = tensors(n_q=1, n_k=1, batch=1)
    router = KMeans(4, 5, 8).fit(q, k)
    torch.testing.assert_close(router.centroids.norm(dim=-1), torch.ones(4, 8))


def test_commitment_is_the_mean_squared_distance_with_token_gradients() -> None:
    q, k = (x.double().requires_grad_() for x in tensors())
    router = KMeans(4, 5, 3).double().fit(q, k)
    loss = router.commitment(q, k, key_mask=MASK)
    query, key = router.labels(q, k, key_mask=MASK)
    terms = []
    for x, labels, group in ((q, query, 1), (k, key, 2)):
        for b in range(2):
            for h in range(4):
                for token, c in zip(x[b, h // group], labels[b, h], strict=True):
                    if c >= 0:
                        terms.append((token / token.norm() - router.centroids[h, c]).square().sum())
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    loss.backward()
    assert q.grad is not None
    assert k.grad is not None
    assert bool((k.grad[1, :, 17:] == 0).all())


def test_state_dict_round_trip_and_copies() -> None:
    q, k = tensors()
    router = KMeans(4, 5, 3, decay=0.9)
    router(q, k)
    again = KMeans(4, 5, 3, decay=0.9, seed=9)
    again.load_state_dict(router.state_dict())
    assert set(router.state_dict()) == {"centroids", "updates"}
    for other in (again, copy.deepcopy(router)):
        assert other.eval()(q, k) == router.eval()(q, k)
        # What was loaded has been placed already: the next call moves it on, and does not start afresh.
        a, b = copy.deepcopy(other).train(), copy.deepcopy(router).train()
        a(q, k)
        b(q, k)
        assert torch.equal(a.centroids, b.centroids)


def test_half_precision_tokens() -> None:
    q, k = (x.bfloat16() for x in tensors())
    router = KMeans(4, 5, 3).eval()
    assert router(q, k) == router(q.float(), k.float())


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    q, k = tensors(batch=2)
    router = KMeans(4, 5, 3, decay=0.7)
    for _ in range(2):
        router(q[rank : rank + 1], k[rank : rank + 1])
    torch.save(router.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_update_as_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first["centroids"], second["centroids"])
    # One process with the whole batch, starting from the tokens of the first half, as ranks do from rank 0's.
    q, k = tensors(batch=2)
    one = KMeans(4, 5, 3, decay=0.7)
    one.fit(q[:1], k[:1], steps=0)
    for decay in [0.0] * 5 + [0.7]:
        one.updates.fill_(1)
        one.decay = decay
        one(q, k)
    torch.testing.assert_close(one.centroids, first["centroids"])
