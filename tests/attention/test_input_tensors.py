"""Every kind of tensor that torch can hand over is read as torch reads it, or refused: lazy, empty, without data, traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import farlight as fl
from farlight.errors import ArgumentError, PatternError, UnsupportedError
from farlight.kernels import cpu
from farlight.kernels.checks import addressable
from parity import BACKENDS

P = fl.window(4) | fl.global_tokens([0])
every_backend = pytest.mark.parametrize("backend", ["auto", *BACKENDS])
ISAS = cpu.available() if cpu.unavailable() is None else []


def qkv(batch: int = 1, n: int = 40, kv_heads: int = 2, **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, h, n, 8, requires_grad=True, **options) for h in (2, kv_heads, kv_heads)]


def same(found: Tensor, wanted: Tensor, rounded: torch.dtype | None) -> None:
    if rounded is None:
        assert torch.equal(found, wanted)
    else:
        torch.testing.assert_close(found, wanted)


# ---- tensors that are stored otherwise than they read ------------------------------------------------------------------
def negated(x: Tensor) -> Tensor:
    return torch._neg_view(x.neg())


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "negative bit": negated,
    "negative bit, strided": lambda x: torch._neg_view(x.neg().repeat_interleave(2, 3))[..., ::2],
    "zeros without storage": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "negative zeros without storage": lambda x: torch._neg_view(torch._efficientzerotensor(x.shape, dtype=x.dtype)),
    "copy on write": lambda x: torch._lazy_clone(x),
    "expanded": lambda x: x[:, :, :1].expand(x.shape),
    "overlapping": lambda x: x.as_strided(x.shape, (0, 1, 2, 1)),
    "parameter": nn.Parameter,
    "subclass": lambda x: x.as_subclass(type("Named", (Tensor,), {})),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@every_backend
def test_lazy_tensors_are_read_as_torch_reads_them(backend: str, kind: str, dtype: torch.dtype) -> None:
    plain = [x.detach().to(dtype) for x in qkv()]
    for place in range(3):
        given = [KINDS[kind](x) if n == place else x for n, x in enumerate(plain)]
        wanted = [x.detach().as_subclass(Tensor) + 0.0 for x in given]
        out = fl.attention(*given, P, backend=backend).detach().as_subclass(Tensor)
        # torch's own kernels add up in an order that depends on the strides.
        same(out, fl.attention(*wanted, P, backend=backend), dtype if backend in ("dense", "auto") else None)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["negative bit", "zeros without storage"])
def test_on_every_instruction_set(isa: str, kind: str) -> None:
    best = cpu.isa()
    cpu.use(isa)
    try:
        given = [KINDS[kind](x.detach()) for x in qkv()]
        wanted = fl.attention(*(x + 0.0 for x in given), P, backend="cpu")
        assert torch.equal(fl.attention(*given, P, backend="cpu"), wanted)
    finally:
        cpu.use(best)


@pytest.mark.parametrize("kind", ["negative bit", "zeros without storage", "negative zeros without storage", "expanded"])
@every_backend
def test_lazy_gradients_arrive_as_they_read(backend: str, kind: str) -> None:
    given = qkv()
    lse = backend != "dense"
    out = fl.attention(*given, P, backend=backend, return_lse=lse)
    outs = out if isinstance(out, tuple) else (out,)
    torch.manual_seed(1)
    lazy = [KINDS[kind](torch.randn(*x.shape, 1).squeeze(-1)) if x.dim() == 4 else negated(torch.randn(x.shape)) for x in outs]
    found = torch.autograd.grad(outs, given, lazy, retain_graph=True)
    wanted = torch.autograd.grad(outs, given, [x + 0.0 for x in lazy])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_imaginary_part_of_a_conjugate() -> None:
    x = torch.randn(1, 2, 64, 1, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    for backend in BACKENDS:
        torch.testing.assert_close(
            fl.attention(x, x, x, P, backend=backend), fl.attention(*[x.clone()] * 3, P, backend=backend)
        )


def freed() -> Tensor:
    x = torch.randn(1, 2, 40, 8)
    x.untyped_storage().resize_(0)
    return x


def escaped() -> Tensor:
    kept: list[Tensor] = []
    torch.func.vmap(lambda x: kept.append(x) or x)(torch.randn(3, 1, 2, 40, 8))
    return kept[0]


@pytest.mark.skipif(not ISAS, reason="no native kernels")
@pytest.mark.parametrize("make", [freed, escaped, lambda: torch._to_functional_tensor(torch.randn(1, 2, 40, 8))])
def test_tensors_without_values_are_refused(make: Callable[[], Tensor]) -> None:
    q, k, _ = (x.detach() for x in qkv())
    with pytest.raises(ArgumentError, match="v has no values in memory|v .* has no values in memory"):
        fl.attention(q, k, make(), P, backend="cpu")


def test_one_door_to_addresses() -> None:
    x = torch.randn(2, 3)
    assert addressable(x, "x") is x
    assert torch.equal(addressable(negated(x), "x"), x)
    zeros = addressable(torch._efficientzerotensor((2, 3)), "x")
    assert zeros.data_ptr()
    assert not zeros.any()
    assert addressable(torch.empty(0, 3), "x").shape == (0, 3)


# ---- no items, no data -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("device", "batch"), [("cpu", 0), ("meta", 2), ("meta", 0)])
@every_backend
def test_empty_batches_and_meta_tensors_have_shapes_and_gradients(backend: str, device: str, batch: int) -> None:
    given = [torch.zeros(batch, h, 12, 8, dtype=torch.bfloat16, device=device, requires_grad=True) for h in (4, 2, 2)]
    lse = backend != "dense"
    found = fl.attention(*given, fl.window(2), backend=backend, return_lse=lse)
    outs = found if isinstance(found, tuple) else (found,)
    assert (outs[0].shape, outs[0].dtype, outs[0].device.type) == ((batch, 4, 12, 8), torch.bfloat16, device)
    assert all((x.shape, x.dtype) == ((batch, 4, 12), torch.float32) for x in outs[1:])
    grads = torch.autograd.grad([x.sum() for x in outs], given)
    assert [(x.shape, x.dtype, x.device.type) for x in grads] == [(x.shape, x.dtype, device) for x in given]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "make",
    [
        lambda b, d: fl.padding(torch.ones(b, 12, dtype=torch.bool, device=d)),
        lambda b, d: fl.padding(torch.zeros(b, dtype=torch.int64, device=d)),
        lambda b, d: fl.chosen_keys(torch.zeros(b, 4, 12, 2, dtype=torch.int64, device=d)),
    ],
)
def test_patterns_of_an_empty_batch(make: Callable[[int, str], fl.Pattern], device: str) -> None:
    q = torch.zeros(0, 4, 12, 8, device=device)
    assert fl.attention(q, q, q, make(0, device)).shape == q.shape
    with pytest.raises(PatternError):
        fl.attention(q, q, q, make(3, device))


def layers() -> dict[str, nn.Module]:
    return {
        "attention": fl.nn.SparseAttention(32, 4, fl.window(2), rotary=True, kv_heads=2),
        "encoder": fl.nn.SparseEncoder(1, 32, 4, fl.window(1)),
        "top keys": fl.nn.SparseAttention(32, 4, fl.routing.TopKeys(2)),
        "top blocks": fl.nn.SparseAttention(32, 4, fl.routing.TopBlocks(2, 4, causal=True)),
        "k-means": fl.nn.SparseAttention(32, 4, fl.routing.KMeans(4, 8, 2)),
        "lsh": fl.nn.SparseAttention(32, 4, fl.routing.LSH(2, 1)),
    }


@pytest.mark.parametrize(("device", "batch"), [("cpu", 0), ("meta", 2), ("meta", 0)])
@pytest.mark.parametrize("name", layers())
def test_layers_on_empty_batches_and_meta_tensors(name: str, device: str, batch: int) -> None:
    layer = layers()[name].to(device)
    x, mask = torch.zeros(batch, 12, 32, device=device), torch.zeros(batch, 12, dtype=torch.bool, device=device)
    for padding in (None, mask):
        if name == "encoder":
            assert layer(x, src_key_padding_mask=padding).shape == x.shape
            continue
        out, weights = layer(x, x, x, key_padding_mask=padding, need_weights=True)
        assert (out.shape, out.device.type, weights.shape) == (x.shape, device, (batch, 12, 12))
        out.sum().backward()
    if device == "cpu":
        assert all(bool(buffer.isfinite().all()) for buffer in layer.buffers())


@pytest.mark.parametrize(("device", "batch"), [("cpu", 0), ("meta", 2), ("meta", 0)])
@pytest.mark.parametrize(
    "rule",
    [fl.presets.streaming(1, 4), fl.causal() & fl.strided(3), fl.routing.TopBlocks(2, 4, causal=True, query_block=1)],
    ids=["streaming", "strided", "routed"],
)
def test_decoding_on_empty_batches_and_meta_tensors(rule: Any, device: str, batch: int) -> None:
    cache = fl.KVCache(rule, heads=4)
    q, k = torch.zeros(batch, 4, 90, 8, device=device), torch.zeros(batch, 2, 90, 8, device=device)
    for at in (slice(0, 80), *(slice(t, t + 1) for t in range(80, 90))):
        cache.append(k[:, :, at], k[:, :, at])
        out, lse = fl.decode(q[:, :, at], cache, return_lse=True)
        assert (out.shape, lse.shape, out.device.type) == (q[:, :, at].shape, q[:, :, at].shape[:3], device)
    assert (cache.length, cache.batch) == (90, batch)


def test_decoding_reads_lazy_tensors_and_refuses_nested_ones() -> None:
    q, k, v = (x.detach() for x in qkv(n=8))
    caches = [fl.KVCache(fl.causal()) for _ in range(2)]
    caches[0].append(k, v)
    caches[1].append(negated(k), negated(v))
    assert torch.equal(fl.decode(q, caches[0]), fl.decode(negated(q), caches[1]))
    nested = torch.nested.nested_tensor([torch.zeros(2, 3, 8)], layout=torch.jagged)
    for refused in (lambda: caches[0].append(nested, nested), lambda: fl.decode(nested, caches[0])):
        with pytest.raises(UnsupportedError, match="is a nested tensor"):
            refused()
    with pytest.raises(ArgumentError, match=r"they must agree: pad v with zeros by .* keep out\[\.\.\., :4\]"):
        caches[0].append(k, v[..., :4])


@every_backend
def test_padding_by_hand_is_what_the_refusal_of_narrow_and_wide_values_says(backend: str) -> None:
    q, k, v = (x.detach() for x in qkv())
    full = fl.attention(q, k, v, P, backend=backend)
    pad = torch.nn.functional.pad
    narrow = fl.attention(q, k, pad(v[..., :5], (0, 3)), P, backend=backend)[..., :5]
    torch.testing.assert_close(narrow, full[..., :5])
    wide = fl.attention(pad(q[..., :5], (0, 3)), pad(k[..., :5], (0, 3)), v, P, scale=5**-0.5, backend=backend)
    again = fl.attention(q[..., :5], k[..., :5], v[..., :5], P, backend=backend)
    torch.testing.assert_close(wide[..., :5], again)


# ---- dropout of everything ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", [P, P | fl.random_keys(2), fl.strided(3) | fl.window(1)], ids=repr)
@pytest.mark.parametrize("backend", ["auto", *(name for name in BACKENDS if name != "dense")])
def test_dropout_of_all_links(backend: str, pattern: fl.Pattern) -> None:
    given = qkv()
    out, lse = fl.attention(*given, pattern, dropout=1.0, return_lse=True, backend=backend)
    kept = fl.attention(*given, pattern, return_lse=True, backend=backend)[1]
    assert not out.any()
    assert torch.equal(lse, kept)
    grads = torch.autograd.grad(out.sum(), given, retain_graph=True)
    assert not any(x.any() for x in grads)
    for a, b in zip(torch.autograd.grad(lse.sum(), given[:2]), torch.autograd.grad(kept.sum(), given[:2]), strict=True):
        torch.testing.assert_close(a, b)
    layer = fl.nn.SparseAttention(32, 4, pattern, dropout=1.0, backend=backend)
    x = torch.randn(1, 40, 32)
    assert torch.equal(layer(x, x, x)[0], layer.out_proj(torch.zeros_like(x)))


# ---- patterns made from tensors, in programs and modes -------------------------------------------------------------------
LENGTHS, NAMED = torch.tensor([5, 9]), torch.tensor([0, -1])
MADE: dict[str, Callable[[Tensor], fl.Pattern]] = {
    "padding": lambda x: fl.padding(x) & fl.window(3),
    "padding, one for all": lambda x: fl.padding(x[:1]),
    "padding, a number": lambda x: fl.padding(x[0]),
    "padding, ones": lambda x: fl.padding(torch.ones_like(x)),
    "documents": lambda x: fl.documents(lengths=torch.stack((x, 12 - x), 1)),
    "documents, one for all": lambda x: fl.documents(lengths=x // x * 4),
    "global": lambda x: fl.global_tokens(NAMED + 0 * x) | fl.window(1),
    "sees all": lambda x: fl.sees_all(NAMED + 0 * x),
    "seen by all": lambda x: fl.seen_by_all(NAMED + 0 * x),
    "mask": lambda x: fl.padding(torch.arange(12) < x[:, None]),
}


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("backend", "name"), [("auto", name) for name in MADE] + [(b, "padding") for b in ("torch", "dense", "reference")]
)
def test_patterns_are_made_from_tensors_in_a_compiled_program(backend: str, name: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Any:
        return fl.attention(q, k, v, MADE[name](lengths), backend=backend)

    given = qkv(batch=2, n=12)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for lengths in (LENGTHS, LENGTHS.flip(0)):
        found, wanted = compiled(*given, lengths), attend(*given, lengths)
        torch.testing.assert_close(found, wanted)
        for a, b in zip(*(torch.autograd.grad(x.sum(), given, allow_unused=True) for x in (found, wanted)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["auto", "torch", "dense", "reference"])
def test_patterns_made_in_inference_mode_serve_training(backend: str) -> None:
    with torch.inference_mode():
        labels = torch.arange(40) % 3
        pattern = fl.clusters(labels) | fl.padding(torch.arange(40) < 30)
        fl.attention(*(x.detach() for x in qkv()), pattern, backend=backend)
    fresh = fl.clusters(torch.arange(40) % 3) | fl.padding(torch.arange(40) < 30)
    assert pattern == fresh
    given = qkv()
    attend = torch.compile(lambda *x: fl.attention(*x, pattern, backend=backend), backend="aot_eager", fullgraph=True)
    wanted = torch.autograd.grad(fl.attention(*given, fresh, backend=backend).sum(), given)
    for run in (attend, lambda *x: fl.attention(*x, pattern, backend=backend)):
        for a, b in zip(torch.autograd.grad(run(*given).sum(), given), wanted, strict=True):
            torch.testing.assert_close(a, b)


# ---- programs that leave for where there is no farlight ------------------------------------------------------------------
EXPORTED = {
    "window": fl.window(3) | fl.global_tokens([0, -1]),
    "random": fl.random_keys(2) | fl.random_blocks(1, block=4),
    "tables": fl.clusters(torch.arange(12) % 3) | fl.chosen_keys(torch.randint(-1, 12, (1, 1, 12, 2))),
    "per head": fl.per_head([fl.strided(3), fl.causal()]),
    "documents": fl.documents(lengths=[5, 7]) - fl.padding([3]),
}


class Attend(nn.Module):
    def __init__(self, pattern: fl.Pattern, backend: str) -> None:
        super().__init__()
        self.pattern, self.backend = pattern, backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return fl.attention(q, k, v, self.pattern, backend=self.backend)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("backend", ["dense", "reference"])
def test_dense_backends_are_exported_as_torchs_own_operators(backend: str, name: str) -> None:
    model, given = Attend(EXPORTED[name], backend), tuple(x.detach() for x in qkv(n=12))
    program = torch.export.export(model, given).run_decompositions()
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called
    assert all(target.startswith("aten.") for target in called), called
    torch.testing.assert_close(program.module()(*given), model(*given))


def test_an_exported_dense_program_takes_any_length() -> None:
    model, n = Attend(EXPORTED["window"] | fl.random_keys(2), "reference"), torch.export.Dim("n", min=2, max=1000)
    program = torch.export.export(model, tuple(x.detach() for x in qkv(n=12)), dynamic_shapes=({2: n},) * 3)
    for length in (5, 12, 77):
        other = tuple(x.detach() for x in qkv(n=length))
        torch.testing.assert_close(program.module()(*other), model(*other))


def test_a_length_that_does_not_fit_is_not_exported() -> None:
    n = torch.export.Dim("n", min=2, max=1000)
    model = Attend(fl.padding(torch.arange(12) < 7), "reference")
    with pytest.raises(torch._dynamo.exc.UserError, match="specialized it to be a constant"):
        torch.export.export(model, tuple(x.detach() for x in qkv(n=12)), dynamic_shapes=({2: n},) * 3)


def test_onnx_refuses_what_it_has_no_operator_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    for backend in ("auto", "cpu", "torch"):
        with pytest.raises(UnsupportedError, match=rf"backend '{backend}' cannot be exported to ONNX.*backend='dense', or"):
            torch.export.export(Attend(P, backend), tuple(x.detach() for x in qkv()))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dense", "reference"])
def test_onnx_programs_hold_onnx_operators_only(backend: str) -> None:
    pytest.importorskip("onnxscript")
    given = tuple(x.detach() for x in qkv(n=12))
    program = torch.onnx.export(Attend(EXPORTED["window"] | fl.random_keys(2), backend), given, dynamo=True, verbose=False)
    assert {node.domain for node in program.model.graph} == {""}
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    found = session.run(None, {x.name: y.numpy() for x, y in zip(session.get_inputs(), given, strict=True)})[0]
    torch.testing.assert_close(torch.from_numpy(found), Attend(EXPORTED["window"] | fl.random_keys(2), backend)(*given))


# ---- a default device without data ---------------------------------------------------------------------------------------
QUESTIONS: dict[str, Callable[[fl.Pattern, list[Tensor]], Any]] = {
    "dense": lambda p, _: p.dense(24, heads=2).tolist(),
    "allows": lambda p, _: p.allows(3, 5, 24),
    "count": lambda p, _: p.count(24, heads=2),
    "plan": lambda p, _: fl.plan(p, 24, heads=2).dense().tolist(),
    "json": lambda p, _: fl.Pattern.from_json(p.to_json()) == p,
    "smallworld": lambda p, _: str(fl.smallworld(p, 24)),
    "path": lambda p, _: str(fl.path(p, 24, 1, 2)),
    "reach": lambda p, _: str(fl.reach(p, 24, 2)),
    "retention": lambda p, x: str(fl.retention(x[0], x[1], p, x[2])),
    "explain": lambda p, x: fl.explain(*x, p),
    "fit": lambda _, x: str(fl.fit(x[0], x[1], keep=0.9)),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_are_answered_on_the_host_whatever_the_default_device(name: str) -> None:
    given = [x.detach() for x in qkv(n=24)]

    def answers() -> list[Any]:
        patterns = [
            fl.window(2, dilation=2) | fl.random_keys(2),
            fl.strided(3, phase="head") | fl.global_tokens([0, -1]),
            fl.clusters([0, 1, 2] * 8) | fl.random_blocks(1, block=4),
            fl.documents([0] * 12 + [1] * 12) & fl.global_tokens([True, False] * 12),
            fl.per_head([fl.window(1), fl.blocks([[True, False] * 3] * 6, 4)]),
            fl.chosen_keys([[[[0, -1, 3]] * 24]]) | fl.documents(lengths=[5, 7]) | fl.padding([5]),
        ]
        return [QUESTIONS[name](pattern, given) for pattern in patterns]

    wanted = answers()
    torch.set_default_device("meta")
    try:
        found = answers()
    finally:
        torch.set_default_device(None)
    assert found == wanted
