"""The registry: one selection a call, plans as values, and a backend registered from outside the package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.kernels import registry, torch_tiled
from farlight.kernels.backend import Call, Grads, MaskBackend, Request, Saved
from farlight.patterns import Sizes
from farlight.plan import TileShape
from farlight.plan.cache import plans

PATTERN = fl.window(5) | fl.global_tokens([0])
PLAN_BACKENDS = ("cpu", "torch")


class Toy:
    """A plan backend from outside: tiles of 16 rows, computed by the torch backend's functions; it records its calls."""

    name = "toy"
    tile_shape = TileShape(tile=16, gather=4, longest=64)

    def __init__(self) -> None:
        self.calls: list[str] = []

    def reasons(self, request: Request) -> list[str]:
        return ["it knows float32 only"] if request.dtype != torch.float32 else []

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        self.calls.append("forward")
        assert call.plan.sizes.n_q == call.q.shape[2]
        return torch_tiled.BACKEND.forward(call)

    def backward(self, call: Call, saved: Saved, dout: Tensor, dlse: Tensor) -> Grads:
        self.calls.append("backward")
        return torch_tiled.BACKEND.backward(call, saved, dout, dlse)


@pytest.fixture
def toy() -> Iterator[Toy]:
    backend = Toy()
    registry.register(backend)
    yield backend
    registry.unregister("toy")


def tensors(n: int = 60, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(1, 2, n, 8).to(dtype).requires_grad_() for _ in range(3)]


def skip_where_it_cannot_run(backend: str) -> None:
    if registry.reasons(backend, Request(PATTERN, Sizes.of(60), 2, 8, 8, torch.float32, torch.device("cpu"))):
        pytest.skip(f"backend {backend} cannot run here")


def test_a_backend_from_outside_serves_both_passes(toy: Toy) -> None:
    q, k, v = tensors()
    expected = fl.attention(q, k, v, PATTERN, backend="reference")
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    out = fl.attention(q, k, v, PATTERN, backend="toy")
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert toy.calls == ["forward", "backward"]
    for computed, right in zip((out, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(computed, right)


def test_a_backend_from_outside_is_explained_planned_compiled_and_refused(toy: Toy) -> None:
    q, k, v = tensors()
    assert "  toy: can" in fl.explain(q, k, v, PATTERN).splitlines()
    plan = fl.plan(PATTERN, 60, heads=2, backend="toy")
    assert (plan.tile, plan.backend) == (16, "toy")
    torch.testing.assert_close(fl.attention(q, k, v, plan), fl.attention(q, k, v, PATTERN, backend="reference"))
    compiled = torch.compile(lambda *x: fl.attention(*x, PATTERN, backend="toy"), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), fl.attention(q, k, v, PATTERN, backend="reference"))
    with pytest.raises(fl.UnsupportedError, match="backend 'toy' cannot run .*: it knows float32 only"):
        fl.attention(*tensors(dtype=torch.float64), PATTERN, backend="toy")


def test_a_mask_backend_from_outside() -> None:
    class Full:
        name = "full"

        def reasons(self, request: Request) -> list[str]:
            return []

        def attend(
            self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float, q_offset: int, dropout: float, seed: Tensor
        ) -> tuple[Tensor, Tensor]:
            scores = (q @ k.mT * scale).masked_fill(~mask, float("-inf"))
            return scores.softmax(-1) @ v, scores.logsumexp(-1)

    backend = Full()
    assert isinstance(backend, MaskBackend)
    registry.register(backend)
    try:
        q, k, v = tensors()
        torch.testing.assert_close(
            fl.attention(q, k, v, PATTERN, backend="full"), fl.attention(q, k, v, PATTERN, backend="reference")
        )
        with pytest.raises(fl.ArgumentError, match="backend = 'full' .* a mask .*; use 'auto' or one of 'cpu'"):
            fl.plan(PATTERN, 60, backend="full")
    finally:
        registry.unregister("full")
    with pytest.raises(fl.ArgumentError, match="backend = 'full' is unknown"):
        fl.attention(*tensors(), PATTERN, backend="full")


# ---- a plan is a value --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", PLAN_BACKENDS)
def test_a_plan_is_executed_without_planning_or_looking_up(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_where_it_cannot_run(backend)
    q, k, v = tensors()
    plan = fl.plan(PATTERN, 60, heads=2, backend=backend)
    assert plan.backend == backend
    expected = fl.attention(q, k, v, PATTERN, backend="reference")

    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("a plan was given, and another one was looked up")

    monkeypatch.setattr(plans, "find", refuse)
    monkeypatch.setattr(registry, "plan_for", refuse)
    out = fl.attention(q, k, v, plan)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), q)[0], torch.autograd.grad(expected.sum(), q)[0])


@pytest.mark.parametrize("backend", PLAN_BACKENDS)
def test_exactly_the_given_tables_are_executed(backend: str) -> None:
    """A plan whose tables were changed computes other pairs: nothing finds the right ones again behind the caller's back."""
    skip_where_it_cannot_run(backend)
    q, k, v = tensors()
    plan = fl.plan(fl.window(5), 60, heads=2, backend=backend)
    assert plan.masks.data.numel()
    plan.masks.data.zero_()
    assert not torch.allclose(fl.attention(q, k, v, plan), fl.attention(q, k, v, fl.window(5), backend=backend))


def test_a_plan_and_another_backend_are_refused() -> None:
    q, k, v = tensors()
    plan = fl.plan(PATTERN, 60, heads=2, backend="torch")
    with pytest.raises(fl.PlanError, match=r"made for backend 'torch', but backend='reference' was named; make"):
        fl.attention(q, k, v, plan, backend="reference")


@pytest.mark.parametrize("backend", ["auto", "torch", "dense", "reference"])
def test_a_plan_for_no_named_backend_serves_each(backend: str) -> None:
    """float64 too, which the backend of an "auto" plan on a CPU does not take."""
    q, k, v = tensors()
    plan = fl.plan(PATTERN, 60, heads=2)
    for dtype in (torch.float32, torch.float64):
        given = (q.to(dtype), k.to(dtype), v.to(dtype))
        expected = fl.attention(*given, PATTERN, backend="reference")
        torch.testing.assert_close(fl.attention(*given, plan, backend=backend), expected)


def test_explain_names_the_backend_of_a_plan() -> None:
    q, k, v = tensors()
    assert "auto takes 'torch'" in fl.explain(q, k, v, fl.plan(PATTERN, 60, heads=2, backend="torch"))


def test_the_plan_is_looked_up_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    fl.attention(q, k, v, PATTERN, backend="torch")
    lookups: list[object] = []
    find = plans.find
    monkeypatch.setattr(plans, "find", lambda key: (lookups.append(key), find(key))[1])
    fl.attention(q, k, v, PATTERN, backend="torch").sum().backward()
    assert len(lookups) == 1


def test_a_warm_call_touches_few_modules() -> None:
    """The road of a call is short; docs/architecture.md shows what the script prints."""
    script = Path(__file__).parents[2] / "scripts" / "call_road.py"
    environment = {**os.environ, "FARLIGHT_CALIBRATE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=True)
    warm = done.stdout.split("a call that finds its plan")[1].split()
    assert 5 < len([name for name in warm if name.startswith("farlight")]) <= 14, done.stdout
