"""Scores under compile, export, torch.func, vmap and autocast; determinism; rows without keys; large scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

import farlight as fl

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")  # torch's own formulas of forward mode

PATTERN = fl.window(6) | fl.global_tokens([0])


def operands(n: int = 40, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    q, k, v = torch.randn(3, 2, 4, n, 8, dtype=dtype)
    return q, k, v, torch.rand(4, dtype=dtype), torch.randn(16, 4, dtype=dtype), torch.randn(4, dtype=dtype)


def biased(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, table: Tensor, sinks: Tensor, backend: str = "torch") -> Tensor:
    score = fl.score.softcap(3.0) + fl.score.alibi(slopes) + fl.score.t5(table, 16, 20)
    out = fl.attention(q, k, v, PATTERN, score=score, sinks=sinks, backend=backend)
    assert isinstance(out, Tensor)
    return out


def gradients(function, given) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in given]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiled_graphs_give_the_same(backend: str) -> None:
    compiled = torch.compile(biased, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (40, 57):
        given = operands(n)
        for a, b in zip(gradients(compiled, (*given,)), gradients(biased, given), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


def test_the_function_transforms() -> None:
    given = operands(dtype=torch.float64)

    def loss(*args: Tensor) -> Tensor:
        return biased(*args).sin().sum()

    of_func = grad(loss, argnums=tuple(range(6)))(*given)
    for a, b in zip(of_func, gradients(biased, given)[1:], strict=True):
        torch.testing.assert_close(a, b)
    stacked = tuple(torch.stack([x, x.flip(0) * 0.5]) for x in given)
    mapped = vmap(biased)(*stacked)
    for n in range(2):
        torch.testing.assert_close(mapped[n], biased(*(x[n] for x in stacked)))
    each = vmap(grad(loss, argnums=(3, 4, 5)))(*stacked)
    for n in range(2):
        for a, b in zip(each, grad(loss, argnums=(3, 4, 5))(*(x[n] for x in stacked)), strict=True):
            torch.testing.assert_close(a[n], b)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_both_modes_and_orders(backend: str) -> None:
    given = [x[:1, :, :, :2] if x.dim() == 4 else x for x in operands(12, torch.float64)]
    leaves = [x.detach().requires_grad_() for x in given]

    def f(*args: Tensor) -> Tensor:
        return biased(*args, backend=backend)

    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


def test_large_scores_keep_their_second_derivatives() -> None:
    """A constant added to every score changes nothing, also where float32 holds the lse to 1/8 only; these scores are exact."""
    q, k, v, slopes, *_ = operands(24)
    exact = [*((x * 2).round() for x in (q, k)), v, (slopes * 8).round() / 8]

    def penalty(dtype: torch.dtype, constant: float) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).detach().requires_grad_() for x in exact]
        score = fl.score.key_bias(torch.full((1, 1, 24), constant)) + fl.score.alibi(leaves[3])
        out = fl.attention(*leaves[:3], PATTERN, score=score, scale=0.125, backend="torch")
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    for found, wanted in zip(penalty(torch.float32, 2.0**20), penalty(torch.float64, 0.0), strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_gradients_are_the_same_bits_each_time_and_for_any_number_of_threads(backend: str) -> None:
    given = operands(200)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        try:
            results.append(gradients(lambda *args: biased(*args, backend=backend), given))
        finally:
            torch.set_num_threads(1)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b) or backend == "reference"  # torch's own products split by threads there


def test_only_the_terms_may_require_gradients() -> None:
    q, k, v, slopes, table, sinks = operands()
    leaves = [x.requires_grad_() for x in (slopes, table, sinks)]
    found = torch.autograd.grad(biased(q, k, v, *leaves).sin().sum(), leaves)
    for a, b in zip(found, gradients(biased, (q, k, v, *leaves))[4:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_row_without_keys_sees_its_sink(backend: str) -> None:
    q = torch.randn(1, 2, 5, 8)
    sinks = torch.tensor([0.5, -2.0], requires_grad=True)
    out, lse = fl.attention(q, q, q, fl.padding([0]), sinks=sinks, return_lse=True, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(lse, sinks[None, :, None].expand(1, 2, 5))
    lse.sum().backward()
    torch.testing.assert_close(sinks.grad, torch.full((2,), 5.0))


def test_an_empty_batch_has_gradients_of_zero() -> None:
    q, slopes = torch.randn(0, 2, 5, 8), torch.rand(2, requires_grad=True)
    out = fl.attention(q, q, q, fl.full(), score=fl.score.alibi(slopes))
    out.sum().backward()
    assert out.shape == q.shape
    assert torch.equal(slopes.grad, torch.zeros(2))


def test_autocast_keeps_the_terms_exact() -> None:
    q, k, v, slopes, table, sinks = operands()
    with torch.autocast("cpu", torch.bfloat16):
        out = biased(q, k, v, slopes, table, sinks)
    wanted = biased(*(x.bfloat16() for x in (q, k, v)), slopes, table, sinks)
    assert torch.equal(out, wanted)


class Biased(nn.Module):
    """Learned slopes, a learned table, a learned key bias and learned sinks."""

    def __init__(self, backend: str, cap: float = 3.0, n: int = 24) -> None:
        super().__init__()
        _, _, _, slopes, table, sinks = operands(n)
        self.slopes, self.table, self.sinks = (nn.Parameter(x) for x in (slopes, table, sinks))
        self.key_bias = nn.Parameter(torch.linspace(-1, 1, n).repeat(1, 4, 1))
        self.backend, self.cap = backend, cap

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        terms = fl.score.alibi(self.slopes) + fl.score.t5(self.table, 16, 20) + fl.score.key_bias(self.key_bias)
        score = fl.score.softcap(self.cap) + terms if self.cap else terms
        out = fl.attention(q, k, v, PATTERN, score=score, sinks=self.sinks, backend=self.backend)
        assert isinstance(out, Tensor)
        return out


def results(of: nn.Module, given: tuple[Tensor, ...]) -> list[Tensor]:
    """Output and the gradients of inputs and parameters."""
    leaves = [*(x.detach().clone().requires_grad_() for x in given), *dict(sorted(of.named_parameters())).values()]
    out = of(*leaves[:3])
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]


@pytest.mark.parametrize("backend", ["auto", "reference", "dense"])
def test_a_module_is_compiled_whole_and_exported(backend: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    module, given = Biased(backend, 0.0 if backend == "dense" else 3.0), operands(24)[:3]
    wanted = results(module, given)
    program = torch.export.export(module, given)
    torch.export.save(program, tmp_path / "biased.pt2")
    ways = {
        "compiled": torch.compile(module, backend="aot_eager", fullgraph=True),
        "exported": program.module(),
        "loaded": torch.export.load(tmp_path / "biased.pt2").module(),
    }
    for way, of in ways.items():
        for a, b in zip(results(of, given), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5, msg=lambda text, way=way: f"{way}: {text}")


def test_an_exported_module_takes_other_lengths() -> None:
    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slopes, self.sinks = (nn.Parameter(operands()[at]) for at in (3, 5))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            score = fl.score.softcap(3.0) + fl.score.alibi(self.slopes)
            out = fl.attention(q, k, v, PATTERN, score=score, sinks=self.sinks)
            assert isinstance(out, Tensor)
            return out

    module, n = Short(), torch.export.Dim("n", min=2, max=4096)
    program = torch.export.export(module, operands(24)[:3], dynamic_shapes=[{2: n}] * 3).module()
    for length in (24, 57):
        given = operands(length)[:3]
        for a, b in zip(results(program, given), results(module, given), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
