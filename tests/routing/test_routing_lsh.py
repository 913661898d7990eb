"""`LSH` against its definition in plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import farlight as fl
from farlight.routing import LSH
from farlight.routing.lsh import rotations


def tensors(n_q: int = 23, n_k: int = 29, batch: int = 2, heads: int = 4, kv: int = 2, dim: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    return torch.randn(batch, heads, n_q, dim, generator=g), torch.randn(batch, kv, n_k, dim, generator=g)


def bucket(rotation: Tensor, x: Tensor) -> int:
    """argmax [xR; -xR]."""
    rotated = [float(x.double() @ column) for column in rotation.T]
    both = rotated + [-t for t in rotated]
    return both.index(max(both))


def reference(router: LSH, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    batch, heads, n_q, dim = q.shape
    n_k, group = k.shape[2], heads // k.shape[1]
    offset = n_k - n_q
    rotation = rotations(router.seed, router.rounds, heads, dim, router.buckets // 2)
    out = torch.zeros(batch, heads, n_q, n_k, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for r in range(router.rounds):
                of_k = [bucket(rotation[r, h], x) for x in k[b, h // group]]
                of_q = of_k[offset:] if router.shared else [bucket(rotation[r, h], x) for x in q[b, h]]
                for i in range(n_q):
                    for j in range(n_k):
                        real = mask is None or bool(mask[b, j] & mask[b, i + offset])
                        if of_q[i] == of_k[j] and real and (not router.causal or j <= i + offset):
                            out[b, h, i, j] = True
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("buckets, rounds", [(2, 1), (6, 1), (6, 3)])
def test_matches_the_definition(buckets: int, rounds: int, causal: bool, shared: bool, masked: bool) -> None:
    q, k = tensors()
    router = LSH(buckets, rounds, seed=2**33 + 7, causal=causal, shared=shared)
    mask = torch.arange(29) < torch.tensor([[29], [17]]) if masked else None
    pattern, expected = router(q, k, key_mask=mask), reference(router, q, k, mask)
    assert torch.equal(pattern.dense(23, 29, batch=2, heads=4), expected)
    planned = fl.plan(pattern, 23, 29, batch=2, heads=4)
    assert torch.equal(planned.dense(), expected)
    assert planned.pairs == int(expected.sum())


def test_rotations_are_normal_and_functions_of_seed_head_and_round() -> None:
    many = rotations(1, 4, 6, 32, 32)
    assert abs(float(many.mean())) < 0.01
    assert abs(float(many.std()) - 1) < 0.01
    assert abs(float((many**4).mean()) - 3) < 0.1
    fewer = rotations(1, 2, 3, 32, 32)
    assert torch.equal(many[:2, :3], fewer)
    assert not torch.equal(fewer, rotations(2, 2, 3, 32, 32))
    rows = many.flatten(0, 1).flatten(1)
    assert float(torch.corrcoef(rows).fill_diagonal_(0).abs().max()) < 0.15


def test_scaled_vectors_share_a_bucket_and_opposite_ones_do_not() -> None:
    q, k = tensors()
    router = LSH(8, 2)
    assert router(q, k) == router(4 * q, 0.5 * k)
    assert router(q, -q).dense(23, batch=2, heads=4).diagonal(dim1=2, dim2=3).sum() == 0


def test_kept_rotations_serve_every_mode() -> None:
    """Drawn once for a size; those drawn in a mode of other tensors, or in inference mode, are not mixed with the others."""
    q = torch.randn(1, 2, 16, 8)
    router = LSH(4, seed=91)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(q)
        assert isinstance(router(fake, fake)._tables[0], FakeTensor)
    with torch.inference_mode():
        expected = router(q, q)._tables[0].clone()
    assert not rotations(91, 1, 2, 8, 2).is_inference()
    assert rotations(91, 1, 2, 8, 2) is rotations(91, 1, 2, 8, 2)
    assert torch.equal(router(q, q)._tables[0], expected)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(q)
        assert isinstance(router(fake, fake)._tables[0], FakeTensor)
