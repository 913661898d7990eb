"""Packed sequences: cumulative lengths, unequal lengths of queries and keys, jagged tensors; the law: each document alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import farlight as fl

OF_Q, OF_K = [0, 3, 3, 10, 18], [0, 7, 9, 13, 21]
PATTERNS = {
    "causal": fl.causal(),
    "window": fl.window(2, 1) | (fl.causal() & fl.strided(3)),
    "named": fl.window(1) | fl.global_tokens([0]),
    "router": fl.routing.TopBlocks(1, 2, causal=True),
}


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, OF_Q[-1], 8), (2, OF_K[-1], 8), (2, OF_K[-1], 5))
    return [torch.randn(1, *size, generator=generator, dtype=dtype, requires_grad=True) for size in sizes]


def by_document(q: Tensor, k: Tensor, v: Tensor, pattern: Any, **options: Any) -> tuple[Tensor, Tensor]:
    found = [
        fl.attention(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], pattern, backend="reference", return_lse=True, **options)
        for (a, b), (c, d) in zip(pairwise(OF_Q), pairwise(OF_K), strict=True)
        if b > a
    ]
    return torch.cat([out for out, _ in found], 2), torch.cat([lse for _, lse in found], 2)


def gradients(out: Tensor, lse: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    total = out.sin().sum() + torch.where(lse.isinf(), 0.0, lse).cos().sum()
    return torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("name", PATTERNS)
def test_each_document_is_a_sequence_of_its_own(name: str) -> None:
    inputs = tensors()
    options = {"sinks": torch.linspace(-1, 1, 4).double(), "score": fl.score.alibi(torch.rand(4).double())}
    expected = by_document(*inputs, PATTERNS[name], **options)
    actual = fl.packed_attention(*inputs, PATTERNS[name], torch.tensor(OF_Q), OF_K, return_lse=True, **options)
    for a, b in zip((*actual, *gradients(*actual, inputs)), (*expected, *gradients(*expected, inputs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_more_queries_than_keys_see_nothing_before_the_first_key() -> None:
    q, k, v = (x.detach().float() for x in tensors(torch.float32))
    out, lse = fl.packed_attention(q, k, v, fl.causal(), OF_Q, OF_K, return_lse=True)
    assert bool((lse[:, :, 3:6] == -torch.inf).all())
    assert not bool(out[:, :, 3:6].any())
    assert bool(lse[:, :, 6:10].isfinite().all())


@pytest.mark.parametrize("name", PATTERNS)
def test_every_backend_serves_packed_documents(name: str) -> None:
    inputs = [x.detach().float() for x in tensors(torch.float32)]
    expected, _ = by_document(*inputs, PATTERNS[name])
    for backend in ("auto", "cpu", "torch", "dense", "reference"):
        if backend != "cpu" or fl.kernels.cpu.unavailable() is None:
            out = fl.packed_attention(*inputs, PATTERNS[name], OF_Q, OF_K, backend=backend)
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", [fl.causal(), fl.window(1) | fl.global_tokens([0])], ids=repr)
def test_no_document_and_documents_without_keys_or_queries(pattern: fl.Pattern) -> None:
    q, k, v = (x.detach().half() for x in tensors(torch.float32))
    out, lse = fl.packed_attention(q[:, :, :0], k[:, :, :0], v[:, :, :0], pattern, [0], return_lse=True)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((1, 4, 0, 5), torch.half, (1, 4, 0), torch.float32)
    out, lse = fl.packed_attention(q, k[:, :, :0], v[:, :, :0], pattern, [0, 18], [0, 0], return_lse=True)
    assert not bool(out.any())
    assert bool((lse == -torch.inf).all())
    assert fl.packed_attention(q[:, :, :0], k, v, pattern, [0, 0], [0, 21]).shape == (1, 4, 0, 5)


@pytest.mark.parametrize("name", ["window", "named"])
def test_dropout_of_documents_is_reproducible(name: str) -> None:
    """By one call its links are drawn at their places in the row, by a call for each document d from seed + d."""
    inputs = [x.detach() for x in tensors()]
    first, again, other = (
        fl.packed_attention(*inputs, PATTERNS[name], OF_Q, OF_K, dropout=0.5, seed=seed) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    if name == "named":
        q, k, v = inputs
        last = fl.attention(q[:, :, 10:], k[:, :, 13:], v[:, :, 13:], PATTERNS[name], dropout=0.5, seed=3 + 3)
        torch.testing.assert_close(first[:, :, 10:], last)


def test_cumulative_lengths_are_lengths() -> None:
    assert fl.documents(cu_seqlens=torch.tensor([0, 2, 2, 5])) == fl.documents(lengths=[2, 0, 3])
    compiled = torch.compile(
        lambda x, ends: fl.attention(x, x, x, fl.documents(cu_seqlens=ends) & fl.causal()), backend="eager", fullgraph=True
    )
    x = torch.randn(1, 2, 9, 4)
    expected = fl.attention(x, x, x, fl.documents(lengths=[4, 5]) & fl.causal())
    torch.testing.assert_close(compiled(x, torch.tensor([0, 4, 9])), expected)
    for wrong in ([], [1, 2], [0, 3, 2]):
        with pytest.raises(fl.PatternError, match="must begin with 0 and never fall"):
            fl.documents(cu_seqlens=wrong)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["causal", "named"])
def test_jagged_tensors_in_and_out(name: str) -> None:
    inputs = tensors()
    jagged = [
        torch.nested.nested_tensor_from_jagged(x[0].transpose(0, 1), torch.tensor(ends)).transpose(1, 2)
        for x, ends in zip(inputs, (OF_Q, OF_K, OF_K), strict=True)
    ]
    out, lse = fl.attention(*jagged, PATTERNS[name], return_lse=True)
    assert out.is_nested
    assert out.layout is torch.jagged
    assert [tuple(x.shape) for x in out.unbind()][2] == (4, 7, 5)
    expected = by_document(*inputs, PATTERNS[name])
    actual = tuple(x.transpose(1, 2).values().transpose(0, 1)[None] for x in (out, lse))
    for a, b in zip((*actual, *gradients(*actual, inputs)), (*expected, *gradients(*expected, inputs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    plain = fl.attention(*jagged, PATTERNS[name])
    torch.testing.assert_close((plain + 0 * out).transpose(1, 2).values(), out.transpose(1, 2).values())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_jagged_tensors_with_unused_rows_are_refused() -> None:
    values = torch.randn(12, 2, 4)
    x = torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 5, 12]), torch.tensor([3, 6])).transpose(1, 2)
    with pytest.raises(fl.FarlightError, match="nested"):
        fl.attention(x, x, x, fl.causal())


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = (x.detach() for x in tensors(torch.float32))
    for ends in ([0, 5], [0, 9, 3, 18]):
        with pytest.raises(fl.PatternError, match="must begin with 0, never fall and end with 18, the number of tokens"):
            fl.packed_attention(q, k, v, fl.causal(), ends, OF_K)
    with pytest.raises(fl.ArgumentError, match="1 documents of queries, but 4"):
        fl.packed_attention(q, k, v, fl.causal(), [0, 18], OF_K)
    with pytest.raises(fl.ArgumentError, match="packed documents lie in one row"):
        fl.packed_attention(q.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1), fl.causal(), OF_Q, OF_K)
    with pytest.raises(fl.UnsupportedError, match="key_bias names each key"):
        fl.packed_attention(q, k, v, fl.causal(), OF_Q, OF_K, score=fl.score.key_bias(torch.zeros(1, 1, 21)))
    with pytest.raises(fl.ArgumentError, match="a plan is for one sequence"):
        fl.packed_attention(q, k, v, fl.plan(fl.causal(), 18, 21), OF_Q, OF_K)
