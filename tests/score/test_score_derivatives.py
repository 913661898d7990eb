"""Second and higher derivatives and forward mode under score terms and sinks, against the dense formula, on every backend."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from score_formula import CASES, SETS, Dense, Terms, make_terms, supports
from torch import Tensor

import farlight as fl
from farlight.testing import Case, inputs
from parity import BACKENDS, SEED, dtype_name

functional = torch.autograd.functional
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # SDPA has no batching rule: torch loops
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated"),  # torch's own formulas of forward mode
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),  # torch.func.linearize
]
every_backend = pytest.mark.parametrize("backend", ["auto", *BACKENDS])


# ---- gradient penalties on the shared cases -----------------------------------------------------------------------------
def penalized(of: Case, terms: Terms, dtype: torch.dtype, backend: str | None, *, return_lse: bool) -> dict[str, Tensor]:
    """The gradients of Σ |first gradients|², of q, k, v, the terms and the incoming gradients; backend None: of the formula."""
    given, exact = inputs(of, dtype), torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v, dout = (x.detach().clone().requires_grad_() for x in (given.q, given.k, given.v, given.grad_out))
    dlse, leaves = given.grad_lse.detach().to(exact).requires_grad_(), terms.to(exact)
    if backend is None:
        dense = Dense(of, leaves, q, k, v)
        out, lse = dense.out, dense.lse
    else:
        options: dict[str, Any] = {"scale": of.scale, "q_offset": of.q_offset, "dropout": of.dropout, "seed": SEED}
        options |= {"score": leaves.score(), "sinks": leaves.sinks, "backend": backend, "return_lse": return_lse}
        found = fl.attention(q, k, v, of.pattern, **options)
        out, lse = found if return_lse else (found, None)
    loss = (out * dout).sum()
    if return_lse:
        loss = loss + (torch.where(lse > -torch.inf, lse, 0.0) * dlse).sum()
    wanted = {"q": q, "k": k, "v": v, **leaves.tensors}
    first = torch.autograd.grad(loss, tuple(wanted.values()), create_graph=True)
    wanted |= {"dout": dout} | ({"dlse": dlse} if return_lse else {})
    penalty = sum((x.square().sum() for x in first), loss.new_zeros(()))
    return dict(zip(wanted, torch.autograd.grad(penalty, tuple(wanted.values())), strict=True))


def check(of: Case, names: tuple[str, ...], backend: str, dtype: torch.dtype) -> bool:
    """Whether the backend serves these terms; raises where its second derivatives are not those of the formula."""
    return_lse = backend == "auto" or supports(backend, names, of, dtype)
    if not return_lse and not supports(backend, names, of, dtype, return_lse=False):
        return False
    terms = make_terms(names, of)
    found = penalized(of, terms, dtype, backend, return_lse=return_lse)
    truth = penalized(of, terms, torch.float64, None, return_lse=return_lse)
    relative = 1e-10 if dtype == torch.float64 else 1e-4
    for name, wanted in truth.items():
        what = f"{of.name}, {'+'.join(names)}, {backend}: {name}"
        assert torch.isfinite(found[name]).all(), what
        error = (found[name].double() - wanted).abs().max()
        assert error <= relative * wanted.abs().max() + 1e-12, f"{what}: {float(error):.2e} of {float(wanted.abs().max()):.2e}"
    return True


@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float64), ("cpu", torch.float32), ("dense", torch.float64)])
def test_a_penalty_under_every_set_of_terms(backend: str, dtype: torch.dtype) -> None:
    """Each set on one case in turn."""
    assert sum(check(of, names, backend, dtype) for names, of in zip(SETS, itertools.cycle(CASES), strict=False)) > 8


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@every_backend
def test_a_penalty_on_every_case(backend: str, dtype: torch.dtype) -> None:
    served = [check(of, names, backend, dtype) for names in SETS for of in CASES if backend != "auto" or len(names) != 2]
    if not any(served):
        pytest.skip(f"{backend} does not compute {dtype_name(dtype)}")


# ---- every way to ask ---------------------------------------------------------------------------------------------------
N, PATTERN = 7, fl.window(2) | fl.random_keys(1)
TERMS = ("slopes", "table", "t5_table", "key_bias", "sinks")


def operands() -> list[Tensor]:
    """q, k and v with grouped heads, another width of v, and the tensors of all terms, for two items."""
    generator = torch.Generator().manual_seed(3)
    shapes = (2, 4, N, 3), (2, 2, N, 3), (2, 2, N, 2), (4,), (4, 5), (8, 4), (2, 4, N), (4,)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def attend(backend: str | None, cap: float = 1.5) -> Callable[..., Tensor]:
    """The attention of `operands` by a backend; None: the formula."""
    case = Case("ways", PATTERN, N, batch=2, heads=4, kv_heads=2, head_dim=3, value_dim=2, scale=0.7)

    def formula(*given: Tensor) -> Tensor:
        return Dense(case, Terms(cap, *given[3:]), *given[:3]).out

    def attention(*given: Tensor) -> Tensor:
        of = torch.float32 if backend == "cpu" else torch.float64
        q, k, v, *more = (x.to(of) for x in given)
        terms = Terms(cap, *more)
        out = fl.attention(q, k, v, PATTERN, scale=0.7, score=terms.score(), sinks=terms.sinks, backend=str(backend))
        assert isinstance(out, Tensor)
        return out.double()

    return formula if backend is None else attention


def jvp(f: Callable[..., Tensor], given: list[Tensor]) -> Tensor:
    found: Tensor = torch.func.jvp(f, tuple(given), tuple(x.cos() for x in given))[1]
    return found


def loss(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given: f(*given).sin().sum()


def of_all(f: Callable[..., Tensor], given: list[Tensor]) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = torch.func.grad(loss(f), argnums=tuple(range(len(given))))(*given)
    return found


def total(found: tuple[Tensor, ...]) -> Tensor:
    return sum((x.square().sum() for x in found), torch.zeros((), dtype=torch.float64))


def hessian(f: Callable[..., Tensor], given: list[Tensor]) -> Any:
    """Of slopes and sinks."""
    return torch.func.hessian(lambda x, y: loss(f)(*given[:3], x, *given[4:7], y), (0, 1))(given[3], given[7])


def vectorized(f: Callable[..., Tensor], given: list[Tensor]) -> Any:
    """Of factors of a table, a key bias and the sinks, by the older vmap."""
    ones = torch.ones(3, dtype=torch.float64)

    def of_factors(x: Tensor) -> Tensor:
        return loss(f)(*given[:4], given[4] * x[0], given[5], given[6] * x[1], given[7] * x[2])

    return functional.hessian(of_factors, ones, vectorize=True)


def forward_over_reverse(f: Callable[..., Tensor], given: list[Tensor]) -> Any:
    return torch.func.jvp(lambda *x: of_all(f, list(x)), tuple(given), tuple(x.cos() for x in given))[1]


def third(f: Callable[..., Tensor], given: list[Tensor]) -> Tensor:
    inner = lambda y: total(of_all(f, [*given[:6], y, given[7]]))  # noqa: E731
    found: Tensor = torch.func.grad(lambda x: jvp(inner, [x]))(given[6])
    return found


def second_of_items(f: Callable[..., Tensor], given: list[Tensor]) -> Tensor:
    """A table and sinks mapped, the rest shared."""

    def of_one(table: Tensor, sinks: Tensor) -> Tensor:
        found: Tensor = torch.func.grad(lambda x: total(of_all(f, [*given[:4], x, *given[5:7], sinks])))(table)
        return found

    return torch.vmap(of_one)(*(torch.stack((x, -x)) for x in (given[4], given[7])))


WAYS: dict[str, Callable[[Callable[..., Tensor], list[Tensor]], Any]] = {
    "jvp": jvp,
    "jacfwd": lambda f, given: torch.func.jacfwd(f, argnums=(3, 7))(*given),
    "linearize": lambda f, given: torch.func.linearize(f, *given)[1](*(x.cos() for x in given)),
    "jvp of grad": forward_over_reverse,
    "hessian": hessian,
    "functional.hvp": lambda f, given: functional.hvp(loss(f), tuple(given), tuple(x.cos() for x in given))[1],
    "vectorized hessian": vectorized,
    "grad of grad": lambda f, given: torch.func.grad(lambda *x: total(of_all(f, list(x))), argnums=(0, 2, 5, 6, 7))(*given),
    "third": third,
    "vmap of jvp": lambda f, given: torch.vmap(lambda *x: jvp(f, list(x)))(*(torch.stack((x, -x)) for x in given)),
    "vmap of grad of grad": second_of_items,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", ["cpu", "torch", "dense", pytest.param("reference", marks=pytest.mark.slow)])
def test_every_way_to_ask(backend: str, way: str) -> None:
    cap = 0.0 if backend == "dense" else 1.5
    given, precise = operands(), backend != "cpu"
    found = WAYS[way](attend(backend, cap), given)
    wanted = WAYS["jvp" if way == "linearize" else way](attend(None, cap), given)
    for a, b in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(wanted), strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(
            a, b, atol=(1e-10 if precise else 5e-5) * float(b.abs().max()), rtol=1e-7 if precise else 1e-3
        )
