"""Encoders and decoders beside torch's own, and what models need around them: causality, routers, checkpoints, compilers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import farlight as fl
from farlight.nn import (
    LearnedPositions,
    RotaryPositions,
    SparseAttention,
    SparseDecoder,
    SparseDecoderLayer,
    SparseEncoder,
    SparseEncoderLayer,
)
from farlight.routing import LSH, KMeans, TopBlocks, TopKeys

SKIM = fl.window(4) | fl.global_tokens([0, -1]) | fl.random_keys(2)
N = 33
IGNORED = torch.arange(N) >= torch.tensor([[N], [20]])


def x_of(n: int = N, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, n, 24, dtype=dtype, generator=torch.Generator().manual_seed(n))


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter away from zero and one, so that none is tested by accident of its beginning."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.3)
    return module


def grads(module: nn.Module, call: Any) -> list[Tensor]:
    """The output, and the gradients of all parameters by name."""
    module.zero_grad()
    out = call(module)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    actual = [out.detach()]
    for name, parameter in sorted(module.named_parameters()):
        assert parameter.grad is not None, name
        actual.append(parameter.grad.clone())
    return actual


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-9) -> None:
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


# ---- torch's own layers -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_layer_is_torchs(norm_first: bool, activation: str, padded: bool) -> None:
    dense = nn.TransformerEncoderLayer(24, 4, 40, 0.0, activation, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    sparse = SparseEncoderLayer(24, 4, fl.full(), mlp_dim=40, activation=activation, norm_first=norm_first, dtype=torch.float64)
    sparse.load_state_dict(randomised(dense).state_dict())
    mask = IGNORED if padded else None
    close(grads(dense, lambda m: m(x_of(), src_key_padding_mask=mask)), grads(sparse, lambda m: m(x_of(), None, mask)))


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_is_torchs_under_the_patterns_mask(norm_first: bool) -> None:
    one = nn.TransformerEncoderLayer(24, 4, 40, 0.0, "gelu", batch_first=True, norm_first=norm_first, dtype=torch.float64)
    norm = nn.LayerNorm(24, dtype=torch.float64) if norm_first else None
    dense = randomised(nn.TransformerEncoder(one, 3, norm, enable_nested_tensor=False))
    sparse = SparseEncoder(3, 24, 4, SKIM, positions=None, mlp_dim=40, norm_first=norm_first, dtype=torch.float64)
    assert list(dense.state_dict()) == list(sparse.state_dict())
    sparse.load_state_dict(dense.state_dict())
    allowed = SKIM.dense(N, batch=2, heads=4).expand(2, 4, N, N)
    mask = ~allowed.flatten(0, 1)
    close(
        grads(dense, lambda m: m(x_of(), mask, src_key_padding_mask=IGNORED)[~IGNORED]),
        grads(sparse, lambda m: m(x_of(), src_key_padding_mask=IGNORED)[~IGNORED]),
    )
    causal = nn.Transformer.generate_square_subsequent_mask(N, dtype=torch.float64)
    both = torch.zeros_like(mask, dtype=torch.float64).masked_fill(mask, float("-inf")) + causal
    close(grads(dense, lambda m: m(x_of(), both)), grads(sparse, lambda m: m(x_of(), causal, is_causal=True)))


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_decoder_is_torchs_with_cross_attention(norm_first: bool) -> None:
    one = nn.TransformerDecoderLayer(24, 4, 40, 0.0, "gelu", batch_first=True, norm_first=norm_first, dtype=torch.float64)
    norm = nn.LayerNorm(24, dtype=torch.float64) if norm_first else None
    dense = randomised(nn.TransformerDecoder(one, 2, norm))
    near = fl.window(40)
    sparse = SparseDecoder(
        2, 24, 4, fl.full(), cross_pattern=near, positions=None, mlp_dim=40, norm_first=norm_first, dtype=torch.float64
    )
    assert list(dense.state_dict()) == list(sparse.state_dict())
    sparse.load_state_dict(dense.state_dict())
    memory, ignored = x_of(19), torch.arange(19) >= torch.tensor([[19], [12]])
    mask = nn.Transformer.generate_square_subsequent_mask(N, dtype=torch.float64)
    close(
        grads(dense, lambda m: m(x_of(), memory, mask, memory_key_padding_mask=ignored)),
        grads(sparse, lambda m: m(x_of(), memory, memory_key_padding_mask=ignored)),
    )


def test_across_texts_positions_are_counted_from_each_beginning() -> None:
    near = fl.window(2)
    one = randomised(nn.TransformerDecoderLayer(24, 4, 40, 0.0, "gelu", batch_first=True, dtype=torch.float64))
    sparse = SparseDecoderLayer(24, 4, fl.full(), cross_pattern=near, mlp_dim=40, norm_first=False, dtype=torch.float64)
    sparse.load_state_dict(one.state_dict())
    memory = x_of(40)
    mask = nn.Transformer.generate_square_subsequent_mask(N, dtype=torch.float64)
    torch.testing.assert_close(
        sparse(x_of(), memory), one(x_of(), memory, mask, memory_mask=~near.dense(N, 40, q_offset=0)[0, 0])
    )


# ---- the parts ----------------------------------------------------------------------------------------------------------
def test_a_gated_mlp_and_root_mean_square_norms() -> None:
    layer = randomised(SparseEncoderLayer(24, 4, SKIM, activation="swiglu", norm="rms", bias=False, dtype=torch.float64))
    assert layer.mlp_dim == 64
    assert not [name for name in layer.state_dict() if "bias" in name]
    x = x_of()

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    y = normed(x, layer.norm1.weight)
    x1 = x + layer.self_attn(y, y, y)[0]
    gate, up = (normed(x1, layer.norm2.weight) @ layer.linear1.weight.T).split(64, -1)
    torch.testing.assert_close(layer(x), x1 + (gate * gate.sigmoid() * up) @ layer.linear2.weight.T)


def test_learned_positions_are_added_once() -> None:
    model = SparseEncoder(2, 24, 4, SKIM, positions="learned", max_positions=50, dtype=torch.float64)
    assert model.state_dict()["positions.weight"].shape == (50, 24)
    blind = SparseEncoder(2, 24, 4, SKIM, positions=None, dtype=torch.float64)
    blind.load_state_dict({k: v for k, v in model.state_dict().items() if k != "positions.weight"})
    torch.testing.assert_close(model(x_of()), blind(x_of() + model.positions.weight[:N]))
    with pytest.raises(fl.ArgumentError, match="51 tokens from position 0 on need 51 positions, and there are 50"):
        model(x_of(51))


def test_rotary_positions_are_shared_and_have_no_weights() -> None:
    model = SparseEncoder(2, 24, 4, SKIM)
    assert model.layers[0].self_attn.rotary is model.layers[1].self_attn.rotary
    assert not [name for name in model.state_dict() if "rotary" in name]
    own = RotaryPositions(6, base=500.0)
    assert SparseDecoder(2, 24, 4, SKIM, positions=own).layers[1].self_attn.rotary is own


def test_each_layer_has_its_pattern() -> None:
    patterns = [fl.window(1), fl.window(1) | fl.global_tokens([0])]
    model = SparseEncoder(2, 24, 4, patterns, positions=None, dtype=torch.float64)
    assert [layer.self_attn.pattern for layer in model.layers] == patterns
    x, other = x_of(), x_of()
    other[:, 20] += 1
    moved = (model(x) != model(other)).any(-1)[0]
    # Layer 1 takes token 20 to its neighbours; layer 2 takes them to theirs and to token 0, which sees all.
    assert moved.nonzero().flatten().tolist() == [0, 18, 19, 20, 21, 22]


def test_dropout_is_torchs_share() -> None:
    layer = SparseEncoderLayer(24, 4, SKIM, dropout=0.3).train()
    assert layer.self_attn.dropout == 0.3
    x = x_of(dtype=torch.float32)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


# ---- causality ----------------------------------------------------------------------------------------------------------
DECODERS: dict[str, Any] = {
    "pattern that looks ahead": lambda: SKIM,
    "window": lambda: fl.window(5, 0),
    "per head": lambda: fl.per_head([fl.window(3)] * 2 + [fl.strided(4)] * 2),
    "top keys": lambda: TopKeys(3, causal=True) | fl.window(2),
    "top blocks": lambda: TopBlocks(1, 4, causal=True),
    "hashing": lambda: LSH(2, causal=True) | fl.window(1),
    "rooms": lambda: KMeans(4, 6, 3, causal=True) | fl.window(1),
}


@pytest.mark.parametrize("name", DECODERS)
def test_the_future_changes_nothing(name: str) -> None:
    model = SparseDecoder(2, 24, 4, DECODERS[name](), dtype=torch.float64).double()
    model(x_of(50))
    model.eval()
    x = x_of()
    later = x.clone()
    later[:, 21:] = torch.randn(2, 12, 24, dtype=torch.float64)
    a, b = model(x), model(later)
    torch.testing.assert_close(a[:, :21], b[:, :21], atol=1e-12, rtol=1e-12)
    assert not torch.allclose(a[:, 21:], b[:, 21:])


@pytest.mark.parametrize("router", [TopKeys(3), TopBlocks(1, 4) | fl.window(2), KMeans(4, 6, 3, per_cluster=4)], ids=str)
def test_a_router_that_looks_ahead_is_refused(router: Any) -> None:
    with pytest.raises(fl.ArgumentError, match=r"\(causal=False\) may choose by what comes later.*causal=True"):
        SparseDecoder(2, 24, 4, router)


# ---- routers ------------------------------------------------------------------------------------------------------------
def test_a_router_is_copied_for_each_layer() -> None:
    model = SparseEncoder(2, 24, 4, KMeans(4, 6, 3) | fl.window(1))
    first, second = (layer.self_attn.pattern for layer in model.layers)
    assert first is not second
    model(x_of(dtype=torch.float32))
    assert not torch.equal(first.left.centroids, second.left.centroids)
    restored = SparseEncoder(2, 24, 4, KMeans(4, 6, 3) | fl.window(1))
    restored.load_state_dict(model.state_dict())
    x = x_of(dtype=torch.float32)
    assert torch.equal(model.eval()(x), restored.eval()(x))


def test_layers_may_mix_patterns_and_routers() -> None:
    router = TopKeys(2)
    model = SparseEncoder(2, 24, 4, [fl.window(2), router], dtype=torch.float64)
    assert model.layers[1].self_attn.pattern is router
    assert model(x_of(), src_key_padding_mask=IGNORED).shape == (2, N, 24)


# ---- checkpointing ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["pattern", "router", "decoder"])
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        if kind == "decoder":
            return SparseDecoder(2, 24, 4, SKIM, dropout=0.2, checkpoint=True, dtype=torch.float64)
        pattern = SKIM if kind == "pattern" else KMeans(4, 6, 3, decay=0.5) | fl.window(1)
        return SparseEncoder(2, 24, 4, pattern, dropout=0.2, checkpoint=True, dtype=torch.float64).double()

    actual = []
    for keep in (True, False):
        model = build()
        model.checkpoint = keep
        torch.manual_seed(1)
        model(x_of())
        torch.manual_seed(2)
        actual.append((grads(model, lambda m: m(x_of())), {k: v.clone() for k, v in model.state_dict().items()}))
    close(actual[0][0], actual[1][0], 1e-12)
    for name, value in actual[0][1].items():  # centroids have moved once, not twice
        torch.testing.assert_close(value, actual[1][1][name], atol=0, rtol=0)


def test_checkpointing_keeps_less() -> None:
    def kept(checkpoint: bool) -> int:
        model, sizes = SparseEncoder(3, 24, 4, SKIM, checkpoint=checkpoint), {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            held = model(x_of(400, torch.float32))
        assert held.requires_grad
        return sum(sizes.values())

    assert kept(True) < 0.4 * kept(False)


# ---- storing ------------------------------------------------------------------------------------------------------------
def test_models_can_be_stored_copied_and_pickled(tmp_path: Path) -> None:
    model = SparseDecoder(2, 24, 4, [SKIM, fl.clusters(torch.arange(N) % 3)], kv_heads=2, activation="swiglu").eval()
    x = x_of(dtype=torch.float32)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = SparseDecoder(2, 24, 4, [SKIM, fl.clusters(torch.arange(N) % 3)], kv_heads=2, activation="swiglu").eval()
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    for again in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), model(x))


# ---- autocast and compilers ---------------------------------------------------------------------------------------------
def test_autocast_trains() -> None:
    torch.manual_seed(0)
    model = SparseDecoder(2, 24, 4, SKIM)
    x = x_of(dtype=torch.float32)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert (out - exact).abs().max() < 0.1
    assert not torch.equal(out, exact)
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


COMPILED: dict[str, Any] = {
    "encoder": lambda: SparseEncoder(2, 24, 4, SKIM, dtype=torch.float64),
    "learned": lambda: SparseEncoder(1, 24, 4, SKIM, positions="learned", max_positions=64, dtype=torch.float64),
    "decoder": lambda: SparseDecoder(2, 24, 4, fl.window(5, 0), kv_heads=2, activation="swiglu", dtype=torch.float64),
    "checkpointed": lambda: SparseEncoder(2, 24, 4, SKIM, checkpoint=True, dtype=torch.float64),
}


@pytest.fixture
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_model_is_one_graph_and_gives_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = COMPILED[name]()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(grads(model, lambda m: m(x_of())), grads(model, lambda m: compiled(x_of())))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_compiled_model_reads_masks_when_it_runs(kind: str) -> None:
    torch.manual_seed(0)
    model = SparseEncoder(1, 24, 4, SKIM, dtype=torch.float64).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length in (20, 7, N):
        ignored = torch.arange(N) >= torch.tensor([[N], [length]])
        pairs = torch.ones(N, N, dtype=torch.bool).tril(-length)
        if kind == "float":
            ignored, pairs = (torch.zeros(m.shape, dtype=torch.float64).masked_fill(m, float("-inf")) for m in (ignored, pairs))
        torch.testing.assert_close(compiled(x_of(), pairs, ignored), model(x_of(), pairs, ignored))
    if kind == "float":
        with pytest.raises(RuntimeError, match="adds numbers other than 0 and minus infinity"):
            compiled(x_of(), pairs + 0.5, ignored)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_change_of_length_does_not_recompile() -> None:
    model = SparseDecoder(1, 24, 4, fl.window(5, 0), dtype=torch.float64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    compiled(x_of())
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (40, 77):
            torch.testing.assert_close(compiled(x_of(n)), model(x_of(n)))


# ---- several processes --------------------------------------------------------------------------------------------------
def small() -> nn.Module:
    torch.manual_seed(0)
    return SparseDecoder(2, 24, 4, SKIM, activation="swiglu")


def worker(rank: int, folder: str, kind: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        x = torch.load(f"{folder}/x.pt")[2 * rank : 2 * rank + 2]
        model = small()
        if kind == "ddp":
            step = nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.fsdp import fully_shard

            for layer in model.layers:
                fully_shard(layer)
            step = fully_shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            step(x).square().mean().backward()
            optimizer.step()
        state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}
        torch.save(state, f"{folder}/state{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_training_on_two_processes_is_training_on_one(kind: str, tmp_path: Path) -> None:
    x = torch.randn(4, 60, 24)
    torch.save(x, tmp_path / "x.pt")
    torch.multiprocessing.spawn(worker, args=(str(tmp_path), kind), nprocs=2, join=True)  # type: ignore[no-untyped-call]
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"state{rank}.pt").items():
            torch.testing.assert_close(value, model.state_dict()[name], atol=1e-6, rtol=1e-4)


# ---- what is refused --------------------------------------------------------------------------------------------------
X = torch.zeros(2, N, 24)
CROSS = {"cross_pattern": fl.full()}
REFUSED = [
    (lambda: SparseEncoder(3, 24, 4, [SKIM] * 2), r"SparseEncoder: the pattern is 2 of them for 3 layers; give one pattern or"),
    (lambda: SparseEncoder(3, 24, 4, "window(3)"), r"the pattern is str for 3 layers"),
    (lambda: SparseEncoder(3, 24, 4, SKIM, positions="sinus"), r"positions = 'sinus' is unknown; use 'rotary', 'learned'"),
    (lambda: SparseEncoder(3, 24, 4, SKIM, positions="learned"), r"learned positions need max_positions"),
    (lambda: SparseEncoder(3, 24, 4, SKIM, max_positions=9), r"max_positions = 9 means something for positions='learned' only"),
    (lambda: SparseEncoder(3, 24, 4, SKIM, rotary=True), r"give either positions='rotary' or rotary=…, not both"),
    (lambda: SparseEncoder(1, 24, 5, SKIM), r"embed_dim = 24, num_heads = 5"),
    (lambda: SparseEncoderLayer(24, 4, SKIM, activation="tanh"), r"activation = 'tanh' is unknown; use one of 'gelu', 'relu',"),
    (lambda: SparseEncoderLayer(24, 4, SKIM, norm="batch"), r"norm = 'batch' is unknown; use one of 'layer', 'rms'"),
    (lambda: SparseEncoder(1, 24, 4, SKIM)(X[0]), r"SparseEncoder: the input is \(33, 24\); \(batch, tokens, 24\) is needed"),
    (lambda: SparseDecoder(1, 24, 4, SKIM)(X, X), r"a memory was given, but there is no cross-attention; build it with cross_"),
    (
        lambda: SparseDecoder(1, 24, 4, SKIM, **CROSS)(X),
        r"there is cross-attention, but no memory was given; pass the encoder's",
    ),
    (lambda: SparseDecoderLayer(24, 4, SKIM, cross_pattern=True), r"cross_pattern is bool; pass a pattern such as fl.full\(\)"),
]


@pytest.mark.parametrize("wrong, message", REFUSED, ids=[row[1][:40] for row in REFUSED])
def test_what_cannot_be_is_refused_in_words(wrong: Any, message: str) -> None:
    with pytest.raises(fl.ArgumentError, match=message):
        wrong()


def test_parts_have_their_place() -> None:
    model = SparseDecoder(1, 24, 4, SKIM, positions=LearnedPositions(40, 24), **CROSS)
    assert isinstance(model.layers[0].multihead_attn, SparseAttention)
    assert "max" not in repr(model) or "40" in repr(model)
