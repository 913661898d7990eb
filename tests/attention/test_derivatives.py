"""Derivatives of every order and mode are right: `torch.func`, `torch.vmap`, forward mode, second and higher derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from derivative_cases import FUSED, MEMBERS, NEAR, PATTERNS, N, agree, attend, every_backend, formula, keys, normal
from torch import Tensor, nn
from torch.autograd import forward_ad

import farlight as fl
import farlight.nn

functional = torch.autograd.functional
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # SDPA has no batching rule: torch loops
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated"),  # torch's own formulas of forward mode
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),  # torch.func.linearize
]


# ---- forward mode -------------------------------------------------------------------------------------------------------
def dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        assert tangent is not None
        return tangent


def jvp(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]


FORWARD: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "jvp": jvp,
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](torch.ones_like(x)),
    "dual numbers": dual,
    "jvp of grad": lambda f, x: jvp(torch.func.grad(lambda y: f(y).square().sum()), x),
    "hessian": lambda f, x: torch.func.hessian(lambda y: f(y).square().sum())(x),
    "vmap of jvp": lambda f, x: torch.vmap(lambda y: jvp(f, y))(torch.stack((x, -x))),
    "jvp of vmap": lambda f, x: jvp(torch.vmap(f), torch.stack((x, -x))),
    "grad of jvp": lambda f, x: torch.func.grad(lambda y: jvp(f, y).sum())(x),
}


def kind(backend: str) -> torch.dtype:
    """The most precise dtype of a backend."""
    return torch.float32 if backend == "cpu" else torch.float64


@pytest.mark.parametrize("way", FORWARD)
@every_backend
def test_forward_mode_is_right(backend: str, way: str) -> None:
    x, (k, v) = normal(1, 2, N, 4, dtype=torch.float64), keys(1, dtype=torch.float64)
    of = kind(backend)
    found = FORWARD[way](lambda x: attend(NEAR, backend)(x, k.to(of), v.to(of)), x.to(of))
    plain = FORWARD["jvp" if way == "linearize" else way]  # of the formula, whose mask it would trace too
    agree(found.double(), plain(lambda x: formula(x, k, v, NEAR), x))
    assert found.abs().max() > 0.01


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_forward_mode_through_members(backend: str, member: str) -> None:
    x = normal(1, 2, N, 4, dtype=torch.float64)
    found, step = jvp(lambda x: MEMBERS[member](x, backend), x), 1e-5
    up, down = (MEMBERS[member](x + sign * step, backend) for sign in (1, -1))
    torch.testing.assert_close(found, (up - down) / (2 * step), atol=1e-7, rtol=1e-6)


def test_a_constant_inside_a_forward_derivative_is_served() -> None:
    q, (k, v) = normal(1, 2, N, 4), keys(1)
    for backend in FUSED:
        agree(jvp(lambda x: x * fl.attention(q, k, v, NEAR, backend=backend), torch.ones(())), formula(q, k, v, NEAR))  # noqa: B023


# ---- second derivatives -------------------------------------------------------------------------------------------------
def penalty(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The incoming gradient needs none itself, as under a frozen projection."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), x)[0]


def scalar(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: f(x).square().sum()


SECOND: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "penalty": penalty,
    "main loss and penalty": lambda f, x: penalty(lambda y: f(y) + f(y).square(), x),
    "functional.hessian": lambda f, x: functional.hessian(scalar(f), x),
    "functional.hvp": lambda f, x: functional.hvp(scalar(f), x, torch.ones_like(x))[1],
    "functional.vhp": lambda f, x: functional.vhp(scalar(f), x, torch.ones_like(x))[1],
    "functional.jvp": lambda f, x: functional.jvp(f, x, torch.ones_like(x))[1],
    "vectorized hessian": lambda f, x: functional.hessian(scalar(f), x, vectorize=True),
    "grad of grad": lambda f, x: torch.func.grad(lambda y: torch.func.grad(scalar(f))(y).sum())(x),
    "jacrev of jacrev": lambda f, x: torch.func.jacrev(torch.func.jacrev(scalar(f)))(x),
    "vmap of grad of grad": lambda f, x: torch.vmap(
        torch.func.grad(lambda y: torch.func.grad(lambda z: f(z).sum())(y).square().sum())
    )(torch.stack((x, -x))),
}


@pytest.mark.parametrize("way", SECOND)
@every_backend
def test_second_derivatives_are_right(backend: str, way: str) -> None:
    x, (k, v) = normal(1, 2, N, 4, dtype=torch.float64), keys(1, dtype=torch.float64)
    of = kind(backend)
    found = SECOND[way](lambda x: attend(NEAR, backend)(x, k.to(of), v.to(of)), x.to(of))
    agree(found.double(), SECOND[way](lambda x: formula(x, k, v, NEAR), x))
    assert found.abs().max() > 0.01


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_second_derivatives_through_members(backend: str, member: str) -> None:
    x = normal(1, 2, N, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: MEMBERS[member](x, backend), (x,), fast_mode=backend == "torch")


@pytest.mark.parametrize("of", ["rows that see nothing", "a table for each item", "per head", "dropout"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_both_modes_and_orders(backend: str, of: str) -> None:
    batch, pattern = PATTERNS.get(of, (1, fl.full()))
    q = normal(batch, 2, N, 3, dtype=torch.float64).requires_grad_()
    k, v = (x[..., :3].clone().requires_grad_() for x in keys(batch, dtype=torch.float64))

    def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        dropout = 0.4 if of == "dropout" else 0.0
        out, lse = fl.attention(q, k, v, pattern, return_lse=True, dropout=dropout, seed=3, backend=backend)
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    fast = backend == "torch"  # random directions
    assert torch.autograd.gradcheck(f, (q, k, v), check_forward_ad=True, check_batched_grad=True, fast_mode=fast)
    assert torch.autograd.gradgradcheck(f, (q, k, v), check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=fast)


@every_backend
def test_third_derivatives_are_right(backend: str) -> None:
    x, (k, v) = normal(1, 2, N, 4, dtype=torch.float64), keys(1, dtype=torch.float64)

    def third(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        inner = torch.func.grad(lambda y: torch.func.grad(scalar(f))(y).square().sum())
        return jvp(lambda y: torch.func.grad(lambda z: inner(z).square().sum())(y), x)

    of = kind(backend)
    found, wanted = (
        third(lambda x: attend(NEAR, backend)(x, k.to(of), v.to(of)), x.to(of)),
        third(lambda x: formula(x, k, v, NEAR), x),
    )
    torch.testing.assert_close(found.double(), wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-4)


@every_backend
def test_a_graph_that_is_not_differentiated_costs_nothing(backend: str) -> None:
    q = normal(1, 2, N, 4).requires_grad_()
    k, v = keys(1)
    (found,) = torch.autograd.grad(attend(NEAR, backend)(q, k, v).square().sum(), q, create_graph=True)
    (wanted,) = torch.autograd.grad(formula(q, k, v, NEAR).square().sum(), q)
    assert found.requires_grad
    agree(found.detach(), wanted)


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch", "dense", "reference"])
def test_a_layer_with_a_frozen_projection(backend: str) -> None:
    x = normal(1, N, 8)

    def loss(backend: str) -> tuple[Tensor, nn.Parameter]:
        torch.manual_seed(0)
        layer = fl.nn.SparseAttention(8, 2, fl.window(1), backend=backend)
        layer.out_proj.requires_grad_(False)
        y = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(layer(y, y, y)[0].sum(), y, create_graph=True)
        return g.square().sum(), layer.in_proj_weight

    total, weight = loss(backend)
    total.backward()
    assert weight.grad is not None
    step = 1e-3
    with torch.no_grad():
        found = []
        for sign in (1, -1):
            torch.manual_seed(0)
            layer = fl.nn.SparseAttention(8, 2, fl.window(1))
            layer.in_proj_weight[0, 0] += sign * step
            with torch.enable_grad():
                y = x.clone().requires_grad_()
                (g,) = torch.autograd.grad(layer(y, y, y)[0].sum(), y)
            found.append(g.square().sum())
    torch.testing.assert_close(weight.grad[0, 0], (found[0] - found[1]) / (2 * step), atol=2e-3, rtol=2e-2)


def test_decoding_refuses_forward_mode() -> None:
    cache, x = fl.KVCache(fl.causal()), normal(1, 1, 1, 4)
    with pytest.raises(fl.UnsupportedError, match="KVCache.append: called inside a forward-mode"):
        jvp(lambda y: cache.append(y, y), x)  # type: ignore[arg-type, return-value]
    cache.append(x, x)
    with pytest.raises(fl.UnsupportedError, match="decode: called inside a forward-mode"):
        jvp(lambda y: fl.decode(y, cache), x)  # type: ignore[arg-type, return-value]


def test_the_operators_themselves() -> None:
    """As an exported program calls them."""
    q, (k, v) = normal(1, 2, N, 4), keys(1)
    program = torch.export.export(Attend(), (q, k, v)).module()
    for way in (jvp, penalty):
        agree(way(lambda q: program(q, k, v), q), way(lambda q: formula(q, k, v, NEAR), q))
    agree(torch.vmap(lambda q: program(q, k, v))(q[None]), formula(q, k, v, NEAR)[None])


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = fl.attention(q, k, v, NEAR)
        assert isinstance(found, Tensor)
        return found


def test_a_transformers_model_is_twice_differentiable() -> None:
    """A gradient penalty on the embeddings of a causal model with grouped heads, with and without farlight."""
    transformers = pytest.importorskip("transformers")
    import farlight.hf

    farlight.hf.register()
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    x = normal(1, 12, 32)

    def penalized(implementation: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = transformers.LlamaModel._from_config(config, attn_implementation=implementation).eval()
        embedded = x.clone().requires_grad_()
        out = model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        # Not the sum of squares, which the last normalization keeps constant.
        (g,) = torch.autograd.grad((out * normal(12, 32, seed=1)).sum(), embedded, create_graph=True)
        g.square().sum().backward()
        assert embedded.grad is not None
        return [embedded.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    for found, wanted in zip(penalized("farlight"), penalized("eager"), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-3)
