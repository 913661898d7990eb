"""`torch.func.grad`, `vjp` and `torch.vmap` give what a loop over ordinary calls gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from derivative_cases import MEMBERS, NEAR, PATTERNS, PLANNED, N, agree, attend, every_backend, formula, keys, normal
from torch import Tensor

import farlight as fl
import farlight.nn
from farlight.patterns import Pattern

functional = torch.autograd.functional
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # SDPA has no batching rule: torch loops
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated"),  # torch's own formulas of forward mode
]


# ---- torch.func and vmap ------------------------------------------------------------------------------------------------
def loss(f: Callable[..., Any]) -> Callable[..., Tensor]:
    def of(*given: Tensor) -> Tensor:
        out, lse = f(*given)
        result: Tensor = out.square().sum() + torch.where(lse == -torch.inf, 0.0, lse).square().sum()
        return result

    return of


def three(batch: int, *lead: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return (normal(*lead, batch, 2, N, 4, seed=seed), *keys(*lead, batch, seed=seed + 1))


with_lse = pytest.mark.parametrize("backend", ["auto", *PLANNED, "reference"])


@pytest.mark.parametrize("name", PATTERNS)
@with_lse
def test_func_grad_and_vjp(backend: str, name: str) -> None:
    batch, pattern = PATTERNS[name]
    given, f = three(batch), attend(pattern, backend, return_lse=True)
    leaves = tuple(x.clone().requires_grad_() for x in given)
    wanted = torch.autograd.grad(loss(attend(pattern, "reference", return_lse=True))(*leaves), leaves)
    agree(torch.func.grad(loss(f), (0, 1, 2))(*given), wanted)
    value, pull = torch.func.vjp(loss(f), *given)
    agree(pull(torch.ones(())), wanted)
    agree(value, loss(f)(*given))


@pytest.mark.parametrize("mapped", [(0, 0, 0), (0, None, None), (None, 1, 2), (None, None, 0)], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
@with_lse
def test_vmap_is_a_loop(backend: str, name: str, mapped: tuple[int | None, ...]) -> None:
    batch, pattern = PATTERNS[name]
    many, one = three(batch, 3), three(batch, seed=7)
    each = [tuple(x[n] if dim is not None else y for x, y, dim in zip(many, one, mapped, strict=True)) for n in range(3)]
    given = [y if dim is None else x.movedim(0, dim) for x, y, dim in zip(many, one, mapped, strict=True)]
    f = attend(pattern, backend, return_lse=True)
    agree(torch.vmap(f, mapped)(*given), tuple(map(torch.stack, zip(*(f(*x) for x in each), strict=True))))
    # Gradients of each element, and of the sum, also with respect to what all elements share.
    g = torch.func.grad(loss(f), (0, 1, 2))
    gradients = tuple(map(torch.stack, zip(*(g(*x) for x in each), strict=True)))
    agree(torch.vmap(g, mapped)(*given), gradients)
    total = torch.func.grad(lambda *x: torch.vmap(loss(f), mapped)(*x).sum(), (0, 1, 2))(*given)
    shared = (x.sum(0) if dim is None else x.movedim(0, dim) for x, dim in zip(gradients, mapped, strict=True))
    agree(total, tuple(shared))


@every_backend
def test_vmap_inside_vmap_and_jacrev(backend: str) -> None:
    f = attend(NEAR, backend)
    q, (k, v) = normal(2, 3, 1, 2, N, 4), keys(1)
    found = torch.vmap(torch.vmap(lambda x: f(x, k, v)))(q)
    agree(found, torch.stack([torch.stack([formula(x, k, v, NEAR) for x in row]) for row in q]))
    one = q[0, 0]
    wanted = functional.jacobian(lambda x: formula(x, k, v, NEAR), one)
    agree(torch.func.jacrev(lambda x: f(x, k, v))(one), wanted)


@pytest.mark.parametrize("name", ["fixed and random", "a table for each item"])
@every_backend
def test_batched_gradients(backend: str, name: str) -> None:
    """The older vmap, of torch.autograd."""
    batch, pattern = PATTERNS[name]
    q, k, v = three(batch)
    found = functional.jacobian(lambda x: attend(pattern, backend)(x, k, v), q, vectorize=True)
    agree(found, functional.jacobian(lambda x: formula(x, k, v, pattern), q))


@every_backend
def test_vmap_over_the_tables_of_a_pattern(backend: str) -> None:
    """A mask for each element, of one batch item and of two; and labels beside a table that all share."""
    real = torch.tensor([[True] * n + [False] * (N - n) for n in (2, 5, 6)])
    shared = fl.clusters(torch.tensor([[[0, 0, 0, 1, 1, 1]], [[0, 1, 1, 1, 0, 0]]]))
    q, k, v = three(2)

    def f(mask: Tensor, rule: Callable[[Tensor], Pattern]) -> Tensor:
        found = fl.attention(q, k, v, rule(mask), backend=backend)
        assert isinstance(found, Tensor)
        return found

    rules: list[Callable[[Tensor], Pattern]] = [
        lambda mask: fl.padding(mask) & fl.causal(),
        lambda mask: fl.padding(torch.stack((mask, mask.flip(0)))) & shared,
        lambda mask: fl.padding(mask) & fl.padding([3, 6]),
    ]
    for rule in rules:
        found = torch.vmap(lambda mask: f(mask, rule))(real)  # noqa: B023
        agree(found, torch.stack([formula(q, k, v, rule(mask)) for mask in real]))


@with_lse
def test_dropout_under_vmap(backend: str) -> None:
    q, k, v = three(1)
    many, f = torch.stack((q, q, q)), attend(fl.full(), backend, dropout=0.5, seed=11)
    # A seed that is given: every element is what it is alone.
    agree(torch.vmap(f, (0, None, None))(many, k, v), torch.stack([f(q, k, v)] * 3))
    g = torch.func.grad(lambda q: f(q, k, v).square().sum())
    agree(torch.vmap(g)(many), torch.stack([g(q)] * 3))
    seeds = torch.tensor([11, 12, 13])
    seeded = lambda q, seed: fl.attention(q, k, v, fl.full(), dropout=0.5, seed=seed, backend=backend)  # noqa: E731
    agree(torch.vmap(seeded)(many, seeds), torch.stack([seeded(q, int(seed)) for seed in seeds]))
    # One that is drawn follows `randomness`.
    drawn = lambda q: fl.attention(q, k, v, fl.full(), dropout=0.5, backend=backend)  # noqa: E731
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(drawn)(many)
    equal, apart = torch.vmap(drawn, randomness="same")(many), torch.vmap(drawn, randomness="different")(many)
    assert torch.equal(equal[0], equal[1])
    assert not torch.equal(apart[0], apart[1])


def test_an_ensemble_and_per_sample_gradients_of_a_layer() -> None:
    torch.manual_seed(0)
    layers = [fl.nn.SparseAttention(8, 2, NEAR) for _ in range(3)]
    x, real = normal(4, N, 8), torch.arange(N) < torch.tensor([3, 6, 5, 1])[:, None]

    def run(values: dict[str, Tensor], x: Tensor, real: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(layers[0], values, (x, x, x), {"key_padding_mask": ~real})[0]
        return found

    state = torch.func.stack_module_state(layers)[0]  # type: ignore[arg-type]
    agree(
        torch.vmap(run, (0, None, None))(state, x, real), torch.stack([f(x, x, x, key_padding_mask=~real)[0] for f in layers])
    )

    values = {name: p.detach() for name, p in layers[0].named_parameters()}
    g = torch.func.grad(lambda values, x, real: run(values, x[None], real[None]).square().sum())
    found = torch.vmap(g, (None, 0, 0))(values, x, real)
    for n in range(4):
        layers[0].zero_grad()
        layers[0](x[n : n + 1], x[n : n + 1], x[n : n + 1], key_padding_mask=~real[n : n + 1])[0].square().sum().backward()
        for name, p in layers[0].named_parameters():
            agree(found[name][n], p.grad)


def test_a_mask_that_cannot_be_checked_under_vmap_is_refused() -> None:
    layer, x = fl.nn.SparseAttention(8, 2, NEAR), normal(2, 1, N, 8)
    with pytest.raises(fl.UnsupportedError, match=r"under torch.vmap this cannot be checked: .* Pass a bool mask"):
        torch.vmap(lambda x, mask: layer(x, x, x, key_padding_mask=mask)[0])(x, torch.zeros(2, 1, N))


@pytest.mark.parametrize("member", MEMBERS)
def test_members_under_vmap_of_grad(member: str) -> None:
    x = normal(3, 1, 2, N, 4)
    g = torch.func.grad(lambda x, backend: MEMBERS[member](x, backend).square().sum())
    found = torch.vmap(lambda x: g(x, "auto"))(x)
    agree(found, torch.stack([g(one, "reference") for one in x]))


def test_merge_of_pieces_that_are_mapped_in_part() -> None:
    out, lse = normal(3, 1, 2, N, 4), normal(1, 2, N)
    found = torch.vmap(lambda piece: fl.merge([(out[0], lse), (piece, lse)])[0])(out)
    agree(found, torch.stack([fl.merge([(out[0], lse), (piece, lse)])[0] for piece in out]))


def test_a_compiled_gradient() -> None:
    q, (k, v) = normal(1, 2, N, 4), keys(1)
    g = torch.func.grad(lambda q: fl.attention(q, k, v, NEAR).square().sum())  # type: ignore[union-attr]
    agree(torch.compile(g, backend="aot_eager", fullgraph=True)(q), g(q))
