"""Compiled, exported, checkpointed and distributed programs take the same road and give the same answers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import farlight as fl
from farlight import ops
from farlight.kernels import dense, registry
from farlight.kernels.cost import Estimate
from farlight.patterns import Pattern
from farlight.testing import Case, case, inputs
from parity import BACKENDS, request_of, same, skip_unless_supported

CLUSTERED = fl.clusters(torch.arange(40) % 3) | fl.window(2)
PATTERNS = {
    "skim": fl.window(5) | fl.global_tokens([0, -1]) | fl.random_keys(2),
    "causal": fl.causal() & fl.window(9),
    "dilated": fl.window(3, dilation=3),
    "strided": fl.strided(4),
    "per head": fl.per_head([fl.window(2), fl.causal()]),
    "tables": CLUSTERED,
}
every_backend = pytest.mark.parametrize("backend", ["auto", *BACKENDS])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def qkv(n: int = 40, n_k: int | None = None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    q = torch.randn(1, 2, n, 8, generator=g, **options)
    k, v = torch.randn(2, 1, 2, n if n_k is None else n_k, 8, generator=g, **options).unbind(0)
    return tuple(x.requires_grad_() for x in (q, k, v))  # type: ignore[return-value]


def module(pattern: Pattern, **options: Any) -> nn.Module:
    class Attend(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return fl.attention(q * 1.0, k, v, pattern, **options)

    return Attend()


def run(f: Callable[..., Any], *given: Tensor) -> list[Tensor]:
    """Outputs and gradients."""
    for x in given:
        x.grad = None
    found = f(*given)
    found = found if isinstance(found, tuple) else (found,)
    torch.autograd.backward(list(found), [torch.ones_like(x) for x in found])
    return [*(x.detach() for x in found), *(x.grad for x in given if x.grad is not None)]


# ---- torch.compile ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("backend", "name"),
    [("auto", name) for name in PATTERNS] + [(backend, name) for backend in BACKENDS for name in ("skim", "tables")],
)
def test_a_compiled_call_is_one_graph_and_gives_the_same(backend: str, name: str) -> None:
    f = module(PATTERNS[name], backend=backend)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    given = qkv()
    for a, b in zip(run(f, *given), run(compiled, *given), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "dense"])
def test_a_compiled_call_with_lse_and_a_scale(backend: str) -> None:
    f = module(PATTERNS["skim"], backend=backend, return_lse=True, scale=0.3, q_offset=4)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    given = qkv(30, 40)
    for a, b in zip(run(f, *given), run(compiled, *given), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("backend", "name"), [(backend, "skim") for backend in ("auto", "cpu", "torch", "dense")] + [("auto", "per head")]
)
def test_a_change_of_length_recompiles_nothing(backend: str, name: str) -> None:
    f = module(PATTERNS[name], backend=backend)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    run(compiled, *qkv(40))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (50, 77, 1000):
            given = qkv(n)
            for a, b in zip(run(compiled, *given), run(f, *given), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_auto_traced_is_auto_eager_with_the_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where full attention is estimated to be faster, an eager call without the lse takes it, and no other call does."""
    monkeypatch.setattr(registry, "estimate", lambda name, *_, **__: Estimate(1.0 if name == "dense" else 9.0, 1))
    taken: list[str] = []

    def record(owner: Any, name: str, kind: str) -> None:
        run = getattr(owner, name)

        def recorded(*args: Any, **more: Any) -> Any:
            taken.append(kind)
            return run(*args, **more)

        monkeypatch.setattr(owner, name, recorded)

    record(dense, "attend", "dense")
    for name in ("cpu", "torch"):
        record(registry.backend_named(name), "forward", "plan")
    q, k, v = (x.detach() for x in qkv())
    compiled = torch.compile(lambda q: fl.attention(q, k, v, CLUSTERED), backend="eager", fullgraph=True)
    out = fl.attention(q, k, v, CLUSTERED)
    with_lse, _ = fl.attention(q, k, v, CLUSTERED, return_lse=True)
    traced = [compiled(q), torch.vmap(lambda q: fl.attention(q, k, v, CLUSTERED))(q[None])[0]]
    assert taken == ["dense", "plan", "plan", "plan"]
    torch.testing.assert_close(out, with_lse, atol=1e-6, rtol=1e-6)
    assert all(torch.equal(x, with_lse) for x in traced)


def test_queries_and_keys_change_their_numbers_apart() -> None:
    f = module(PATTERNS["skim"])
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    run(compiled, *qkv(30, 40))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n, n_k in ((20, 50), (77, 60), (2, 64)):
            given = qkv(n, n_k)
            for a, b in zip(run(compiled, *given), run(f, *given), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_no_mask_enters_the_graph() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example: object) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(module(PATTERNS["skim"]), backend=keep, fullgraph=True)(*qkv(40))
    (graph,) = graphs
    called = [node for node in graph.graph.nodes if "farlight" in str(node.target)]
    assert [str(node.target) for node in called] == ["farlight.attend.default"]
    shapes = [
        tuple(node.meta["example_value"].shape)
        for node in graph.graph.nodes
        if isinstance(node.meta.get("example_value"), Tensor)
    ]
    assert all(shape[-2:] != (40, 40) for shape in shapes)
    assert "window(5) | global_tokens([0, -1]) | random_keys(2)" in str(called[0].args) + str(called[0].kwargs)


def test_dropout_in_a_compiled_program_differs_by_call_and_can_be_seeded() -> None:
    compiled = torch.compile(module(PATTERNS["skim"], dropout=0.5), backend="aot_eager", fullgraph=True)
    given = qkv()
    first, second = compiled(*given), compiled(*given)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    one = compiled(*given)
    torch.manual_seed(5)
    same(one.detach(), compiled(*given).detach(), "seeded")
    fixed = torch.compile(module(PATTERNS["skim"], dropout=0.5, seed=9), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fixed(*given), module(PATTERNS["skim"], dropout=0.5, seed=9)(*given), atol=1e-6, rtol=1e-6)


def test_inside_a_larger_compiled_model() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            found = fl.attention(q, k, v, PATTERNS["skim"])
            assert isinstance(found, Tensor)
            return x + self.out(found.transpose(1, 2).flatten(2))

    block = Block()
    x = torch.randn(2, 40, 16)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x), atol=1e-5, rtol=1e-5)
    loss = compiled(x).square().mean()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in block.parameters())


@pytest.mark.slow
def test_inductor_compiles_the_first_call_of_a_cold_process() -> None:
    code = (
        "import torch, farlight as fl\n"
        "p = fl.window(5) | fl.global_tokens([0])\n"
        "f = torch.compile(lambda q: fl.attention(q, q, q, p), fullgraph=True)\n"
        "q = torch.randn(1, 2, 40, 8)\n"
        "torch.testing.assert_close(f(q), fl.attention(q, q, q, p), atol=1e-5, rtol=1e-5)\n"
        "print('compiled')\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert found.stdout.strip() == "compiled", found.stderr[-2000:]


# ---- torch.export -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PATTERNS)
def test_an_exported_program_runs_stored_and_loaded(name: str, tmp_path: Path) -> None:
    f, given = module(PATTERNS[name]), tuple(x.detach() for x in qkv())
    program = torch.export.export(f, given)
    assert any("farlight.attend" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*given), f(*given), atol=1e-6, rtol=1e-6)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    torch.testing.assert_close(loaded.module()(*given), f(*given), atol=1e-6, rtol=1e-6)


def test_an_exported_program_takes_any_length() -> None:
    f, given = module(PATTERNS["skim"]), tuple(x.detach() for x in qkv())
    n = torch.export.Dim("n", min=2, max=100_000)
    program = torch.export.export(f, given, dynamic_shapes=({2: n}, {2: n}, {2: n}))
    for length in (7, 40, 333):
        other = tuple(x.detach() for x in qkv(length))
        torch.testing.assert_close(program.module()(*other), f(*other), atol=1e-5, rtol=1e-5)


# ---- the operators ----------------------------------------------------------------------------------------------------
def operator_arguments(of: Case, backend: str, *, requires_grad: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    given = inputs(of, dtype, requires_grad=requires_grad)
    tables = list(of.pattern.tables)
    return (
        given.q,
        given.k,
        given.v,
        tables,
        torch.tensor(7),
        of.pattern.text,
        of.scale_value,
        of.sizes.q_offset,
        of.dropout,
        backend,
    )


OPERATED = ["skim", "clusters per item", "grouped heads", "strides, every other", "causal, last queries", "no query", "dropout"]


@pytest.mark.parametrize(
    ("backend", "name"), [("auto", "skim")] + [(backend, name) for backend in ("cpu", "torch") for name in OPERATED]
)
def test_opcheck(backend: str, name: str) -> None:
    of = case(name)
    if backend != "auto":
        skip_unless_supported(backend, request_of(of, torch.float32, return_lse=True))
    for requires_grad in (False, True):
        torch.library.opcheck(ops.attend, operator_arguments(of, backend, requires_grad=requires_grad))
    args = operator_arguments(of, backend, requires_grad=False)
    out, lse = ops.attend(*args)
    given = inputs(of)
    torch.library.opcheck(ops.attend_backward, (given.grad_out, given.grad_lse, *args[:3], out, lse, *args[3:]))


def test_opcheck_of_the_mask() -> None:
    for pattern in PATTERNS.values():
        torch.library.opcheck(ops.pattern_mask, (torch.zeros(1), list(pattern.tables), pattern.text, 40, 40, 0, 1, 2))


SMALL = [
    Case("skim", fl.window(1) | fl.global_tokens([0]) | fl.random_keys(1), 7, head_dim=3, heads=1),
    Case("grouped", fl.strided(2) | fl.window(1), 5, 6, heads=2, kv_heads=1, head_dim=2),
    Case("empty rows", fl.causal() & fl.window(1), 6, 4, head_dim=2, heads=1),
    Case("per item", fl.clusters(torch.tensor([[[0, 1, 0, 1]], [[0, 0, -1, 1]]])), 4, batch=2, heads=1, head_dim=2),
    Case("dropout", fl.full(), 5, dropout=0.4, heads=1, head_dim=2),
]


@pytest.mark.parametrize("of", SMALL, ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(backend: str, of: Case) -> None:
    given = inputs(of, torch.float64, requires_grad=True)

    def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = fl.attention(
            q, k, v, of.pattern, q_offset=of.q_offset, dropout=of.dropout, seed=3, return_lse=True, backend=backend
        )
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    assert torch.autograd.gradcheck(f, (given.q, given.k, given.v))


def test_fake_tensors_get_shapes_and_no_plan(cold_cache: None) -> None:
    from farlight.plan.cache import plans

    before = plans.info().misses
    with torch._subclasses.FakeTensorMode():
        q, k = torch.empty(2, 4, 1000, 16, dtype=torch.bfloat16), torch.empty(2, 2, 2000, 16, dtype=torch.bfloat16)
        out, lse = fl.attention(q, k, k, PATTERNS["skim"], return_lse=True)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((2, 4, 1000, 16), torch.bfloat16, (2, 4, 1000), torch.float32)
    assert plans.info().misses == before


# ---- checkpointing, distributed -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("reentrant", [False, True])
@every_backend
def test_activation_checkpointing(backend: str, reentrant: bool, dropout: float) -> None:
    of = Case("checkpointed", PATTERNS["skim"], 40, head_dim=8, dropout=dropout)
    if backend != "auto":
        skip_unless_supported(backend, request_of(of, torch.float32, return_lse=False))
    f = module(of.pattern, backend=backend, dropout=dropout)
    given = qkv()
    torch.manual_seed(1)
    plain = run(f, *given)
    torch.manual_seed(1)
    saved = run(lambda *x: checkpoint(f, *x, use_reentrant=reentrant), *given)
    for a, b in zip(plain, saved, strict=True):
        same(a, b, "checkpointed: the links dropped again are the same")


def distributed_worker(rank: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(projected())
        x = torch.load(f"{folder}/x.pt")[2 * rank : 2 * rank + 2]
        model(x).square().mean().backward()
        torch.save([p.grad for p in model.parameters()], f"{folder}/grads{rank}.pt")
    finally:
        dist.destroy_process_group()


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        found = fl.attention(q, k, v, PATTERNS["skim"])
        assert isinstance(found, Tensor)
        return found


def projected() -> nn.Module:
    torch.manual_seed(0)
    return Projected()


@pytest.mark.slow
def test_data_parallel_training_on_two_processes(tmp_path: Path) -> None:
    x = torch.randn(4, 60, 16)
    torch.save(x, tmp_path / "x.pt")
    torch.multiprocessing.spawn(distributed_worker, args=(str(tmp_path),), nprocs=2, join=True)  # type: ignore[no-untyped-call]
    model = projected()
    model(x).square().mean().backward()
    for rank in range(2):
        for found, p in zip(torch.load(tmp_path / f"grads{rank}.pt"), model.parameters(), strict=True):
            assert p.grad is not None
            torch.testing.assert_close(found, p.grad, atol=1e-6, rtol=1e-4)
