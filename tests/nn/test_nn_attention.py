"""`fl.nn.SparseAttention` beside `nn.MultiheadAttention`: the same call, weights, outputs and gradients where all is allowed,
and the dense layer under the pattern's mask where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import farlight as fl
from farlight.nn import LearnedPositions, RotaryPositions, SparseAttention
from farlight.patterns import Pattern
from farlight.routing import KMeans, TopKeys

SKIM = fl.window(4) | fl.global_tokens([0, -1]) | fl.random_keys(2)


def both(pattern: Pattern, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.MultiheadAttention, SparseAttention]:
    """A dense and a sparse layer with the same weights (biases that are not zero)."""
    dense = nn.MultiheadAttention(24, 4, batch_first=True, dtype=dtype, **options)
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.3)
    sparse = SparseAttention(24, 4, pattern, dtype=dtype, **options)
    sparse.load_state_dict(dense.state_dict())
    return dense, sparse


def agree(dense: nn.Module, sparse: nn.Module, call: Any, *given: Tensor, tolerance: float = 1e-10) -> None:
    """Outputs, and gradients of inputs and of all parameters."""
    results = []
    for layer in (dense, sparse):
        layer.zero_grad()
        inputs = [x.detach().clone().requires_grad_() for x in given]
        out = call(layer, *inputs)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs), *(p.grad for _, p in sorted(layer.named_parameters()))])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, atol=tolerance, rtol=tolerance)


def x_of(batch: int = 2, n: int = 33, dim: int = 24, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, n, dim, dtype=dtype, generator=torch.Generator().manual_seed(n))


def dense_mask(pattern: Pattern, n_q: int, n_k: int | None = None, batch: int = 2, q_offset: int | None = None) -> Tensor:
    """torch's attn_mask `(B · H, n_q, n_k)`, True = forbidden."""
    allowed = pattern.dense(n_q, n_k, batch=batch, heads=4, q_offset=q_offset)
    return ~allowed.expand(batch, 4, *allowed.shape[2:]).flatten(0, 1)


# ---- the same layer -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [True, False])
def test_full_attention_is_torchs_outputs_and_gradients(bias: bool) -> None:
    dense, sparse = both(fl.full(), bias=bias)
    agree(dense, sparse, lambda layer, x: layer(x, x, x, need_weights=False)[0], x_of())


def test_in_float32() -> None:
    dense, sparse = both(fl.full(), torch.float32)
    agree(dense, sparse, lambda layer, x: layer(x, x, x, need_weights=False)[0], x_of(dtype=torch.float32), tolerance=2e-5)


def test_a_pattern_is_torchs_layer_under_its_mask() -> None:
    dense, sparse = both(SKIM)
    mask = dense_mask(SKIM, 33)
    agree(dense, sparse, lambda layer, x: layer(x, x, x, attn_mask=mask if layer is dense else None)[0], x_of())


def test_a_forgotten_link_would_be_seen() -> None:
    """The comparison above can fail."""
    dense, sparse = both(SKIM - fl.pairs(torch.arange(33)[:, None] * 33 + torch.arange(33) == 5 * 33 + 6))
    mask = dense_mask(SKIM, 33)
    with pytest.raises(AssertionError):
        agree(dense, sparse, lambda layer, x: layer(x, x, x, attn_mask=mask if layer is dense else None)[0], x_of())


@pytest.mark.parametrize("options", [{}, {"kdim": 10, "vdim": 14}, {"kdim": 10}])
def test_cross_attention_with_sizes_of_its_own(options: dict[str, int]) -> None:
    dense, sparse = both(fl.full(), **options)
    k, v = (x_of(n=19, dim=options.get(name, 24)) for name in ("kdim", "vdim"))
    agree(dense, sparse, lambda layer, *x: layer(*x, need_weights=False)[0], x_of(), k, v)


def test_two_texts_count_from_where_the_caller_says() -> None:
    near = fl.window(3)
    dense, sparse = both(near)
    memory = x_of(n=20)
    mask = dense_mask(near, 33, 20, q_offset=0)
    mask[:, 23:] = False  # torch gives NaN where a row sees nothing

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        if layer is dense:
            return layer(x, memory, memory, attn_mask=mask)[0][:, :23]
        out: Tensor = layer(x, memory, memory, q_offset=0)[0][:, :23]
        return out

    agree(dense, sparse, call, x_of())


def test_a_single_text_without_batch() -> None:
    dense, sparse = both(fl.full())
    agree(dense, sparse, lambda layer, x: layer(x, x, x, need_weights=False)[0], x_of()[0])
    ignored = torch.arange(33) > 20
    agree(dense, sparse, lambda layer, x: layer(x, x, x, ignored, need_weights=False)[0], x_of()[0])


def test_weights_load_in_both_directions() -> None:
    dense, sparse = both(SKIM)
    assert list(dense.state_dict()) == list(sparse.state_dict())
    dense.load_state_dict(sparse.state_dict())
    dense, sparse = both(SKIM, kdim=8)
    assert list(dense.state_dict()) == list(sparse.state_dict())


def test_it_begins_as_torch_begins() -> None:
    torch.manual_seed(3)
    dense = nn.MultiheadAttention(24, 4, batch_first=True)
    torch.manual_seed(3)
    sparse = SparseAttention(24, 4, SKIM)
    torch.testing.assert_close(sparse.in_proj_weight.std(), dense.in_proj_weight.std(), atol=0.01, rtol=0.05)
    assert not sparse.in_proj_bias.any()
    assert not sparse.out_proj.bias.any()


# ---- masks as torch means them ----------------------------------------------------------------------------------------
IGNORED = torch.arange(33) >= torch.tensor([[33], [20]])


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_true_means_ignore(kind: str) -> None:
    dense, sparse = both(fl.full())
    mask = IGNORED if kind == "bool" else torch.zeros(2, 33, dtype=torch.float64).masked_fill(IGNORED, float("-inf"))
    agree(dense, sparse, lambda layer, x: layer(x, x, x, mask, need_weights=False)[0], x_of())


def test_what_is_ignored_changes_nothing() -> None:
    sparse = SparseAttention(24, 4, SKIM, dtype=torch.float64)
    x, other = x_of(), x_of()
    other[1, 20:] = 7.0
    kept = sparse(x, x, x, IGNORED)[0], sparse(x, other, other, IGNORED)[0]
    assert torch.equal(*kept)
    assert not torch.equal(sparse(x, x, x)[0], sparse(x, other, other)[0])


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_mask_of_pairs(dims: int, kind: str) -> None:
    g = torch.Generator().manual_seed(5)
    mask = torch.rand(*([8] if dims == 3 else []), 33, 33, generator=g) > 0.4
    mask[..., torch.arange(33), torch.arange(33)] = False
    if kind == "float":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, float("-inf"))
    dense, sparse = both(fl.full())
    agree(dense, sparse, lambda layer, x: layer(x, x, x, attn_mask=mask, need_weights=False)[0], x_of())


def test_masks_narrow_the_pattern() -> None:
    dense, sparse = both(SKIM)
    mask = dense_mask(SKIM & fl.causal() & fl.padding(~IGNORED), 33)
    seen = {"attn_mask": torch.ones(33, 33, dtype=torch.bool).triu(1), "key_padding_mask": IGNORED}
    agree(dense, sparse, lambda layer, x: layer(x, x, x, **({"attn_mask": mask} if layer is dense else seen))[0], x_of())
    alone = {"is_causal": True, "key_padding_mask": IGNORED}
    agree(dense, sparse, lambda layer, x: layer(x, x, x, **({"attn_mask": mask} if layer is dense else alone))[0], x_of())


def test_a_mask_may_be_a_pattern() -> None:
    packed = fl.documents(lengths=[10, 23])
    dense, sparse = both(SKIM)
    mask = dense_mask(SKIM & packed, 33)
    agree(dense, sparse, lambda layer, x: layer(x, x, x, attn_mask=mask if layer is dense else packed)[0], x_of())


def test_torchs_causal_mask_costs_what_causal_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = fl.nn.attention.attention
    monkeypatch.setattr(fl.nn.attention, "attention", lambda *a, **o: seen.append(a[3]) or real(*a, **o))
    sparse = SparseAttention(24, 4, fl.window(6), dtype=torch.float64)
    x = x_of()
    sparse(x, x, x, attn_mask=nn.Transformer.generate_square_subsequent_mask(33, dtype=torch.float64), is_causal=True)
    sparse(x, x, x, attn_mask=nn.Transformer.generate_square_subsequent_mask(33, dtype=torch.float64))
    sparse(x, x, x, torch.zeros(2, 33, dtype=torch.bool))
    assert seen == [fl.window(6) & fl.causal(), fl.window(6) & fl.causal(), fl.window(6)]


def test_a_row_that_sees_nothing_gives_the_bias() -> None:
    sparse = SparseAttention(24, 4, fl.causal() - fl.window(0), dtype=torch.float64)
    nn.init.normal_(sparse.out_proj.bias)
    x = x_of().requires_grad_()
    out, weights = sparse(x, x, x, need_weights=True)
    torch.testing.assert_close(out[:, 0], sparse.out_proj.bias.expand(2, -1))
    assert not weights[:, 0].any()
    out.sum().backward()
    assert bool(x.grad.isfinite().all())


# ---- weights ----------------------------------------------------------------------------------------------------------
def test_weights_are_not_formed_unless_asked_for() -> None:
    dense, sparse = both(SKIM)
    x, mask = x_of(), dense_mask(SKIM, 33)
    assert sparse(x, x, x)[1] is None
    for average in (True, False):
        wanted = dense(x, x, x, attn_mask=mask, average_attn_weights=average)[1]
        actual = sparse(x, x, x, need_weights=True, average_attn_weights=average)[1]
        torch.testing.assert_close(actual, wanted, atol=1e-10, rtol=1e-10)


def test_weights_have_gradients() -> None:
    dense, sparse = both(SKIM)
    mask = dense_mask(SKIM, 33)

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        weights: Tensor = layer(x, x, x, attn_mask=mask if layer is dense else None, need_weights=True)[1]
        return weights + layer.out_proj.bias.sum() * layer.out_proj.weight.sum()

    agree(dense, sparse, call, x_of())


def test_weights_of_a_long_text_are_refused() -> None:
    layer = SparseAttention(8, 2, fl.window(1))
    x = torch.zeros(1, 20_000, 8)
    with pytest.raises(fl.UnsupportedError, match=r"need_weights=True for 1 x 2 x 20000 x 20000 pairs would form 3.0 GiB"):
        layer(x, x, x, need_weights=True)


# ---- more than torch's layer --------------------------------------------------------------------------------------------
def test_grouped_heads_are_repeated_ones() -> None:
    _, sparse = both(SKIM)
    grouped = SparseAttention(24, 4, SKIM, kv_heads=2, dtype=torch.float64)
    assert grouped.in_proj_weight.shape == (24 + 2 * 12, 24)
    q, k, v = grouped.in_proj_weight.split([24, 12, 12])
    twice = [part.unflatten(0, (2, 6)).repeat_interleave(2, 0).flatten(0, 1) for part in (k, v)]
    with torch.no_grad():
        sparse.in_proj_weight.copy_(torch.cat([q, *twice]))
        sparse.in_proj_bias.zero_()
        sparse.out_proj.load_state_dict(grouped.out_proj.state_dict())
    x = x_of()
    torch.testing.assert_close(grouped(x, x, x)[0], sparse(x, x, x)[0])


def test_rotary_positions_know_distances_only() -> None:
    layer = SparseAttention(24, 4, fl.window(5), rotary=True, dtype=torch.float64)
    x = x_of()
    moved = torch.cat([x_of(n=11), x], 1)
    torch.testing.assert_close(layer(x, x, x)[0][:, 5:], layer(moved, moved, moved)[0][:, 16:])
    blind = SparseAttention(24, 4, fl.full(), dtype=torch.float64)
    seeing = SparseAttention(24, 4, fl.full(), rotary=True, dtype=torch.float64)
    order = torch.randperm(33)
    torch.testing.assert_close(blind(x, x, x)[0][:, order], blind(*[x[:, order]] * 3)[0])
    assert not torch.allclose(seeing(x, x, x)[0][:, order], seeing(*[x[:, order]] * 3)[0])


def test_rotary_positions_of_the_last_queries() -> None:
    layer = SparseAttention(24, 4, fl.window(5, 0), rotary=True, dtype=torch.float64)
    x = x_of()
    torch.testing.assert_close(layer(x[:, 30:], x, x)[0], layer(x, x, x)[0][:, 30:])


def test_rotary_positions_are_llamas() -> None:
    pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

    x = torch.randn(2, 3, 50, 16)
    cos, sin = LlamaRotaryEmbedding(LlamaConfig(hidden_size=48, num_attention_heads=3))(x, torch.arange(50)[None])
    wanted, _ = apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(RotaryPositions(16)(x, torch.arange(50)), wanted, atol=1e-5, rtol=1e-5)


def test_rotary_angles_stay_exact_far_out() -> None:
    """In float32 an angle of a million radians is off by hundredths."""
    rotary = RotaryPositions(8)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float32).unbind(0)
    near = (rotary(q, torch.tensor([7])) * rotary(k, torch.tensor([4]))).sum()
    far = (rotary(q, torch.tensor([2**20 + 7])) * rotary(k, torch.tensor([2**20 + 4]))).sum()
    torch.testing.assert_close(far, near, atol=1e-5, rtol=1e-5)


def test_pressed_positions() -> None:
    x = torch.randn(1, 1, 20, 8)
    torch.testing.assert_close(RotaryPositions(8, scale=2)(x, 2 * torch.arange(20)), RotaryPositions(8)(x, torch.arange(20)))


def test_any_rotation_may_be_given() -> None:
    layer = SparseAttention(24, 4, fl.full(), rotary=lambda x, at: x * (at < 3).to(x.dtype)[:, None], dtype=torch.float64)
    x = x_of()
    weights = layer(x, x, x, need_weights=True)[1]
    torch.testing.assert_close(weights[:, 3:], torch.full_like(weights[:, 3:], 1 / 33))


# ---- routers ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("before", [False, True])
def test_a_router_decides_in_each_call(before: bool) -> None:
    layer = SparseAttention(24, 4, TopKeys(3) | fl.window(1), rotary=True, route_before_rotary=before, dtype=torch.float64)
    for n in (9, 33):
        x = x_of(n=n)
        q, k, _ = layer._project(x, x, x)
        turned = layer.rotary(q, torch.arange(n)), layer.rotary(k, torch.arange(n))
        pattern = TopKeys(3)(*((q, k) if before else turned)) | fl.window(1)
        fixed = SparseAttention(24, 4, pattern, rotary=True, dtype=torch.float64)
        fixed.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x, x, x)[0], fixed(x, x, x)[0])


def test_a_router_does_not_see_padding() -> None:
    layer = SparseAttention(24, 4, TopKeys(3) | fl.window(2), dtype=torch.float64)
    x, other = x_of(), x_of()
    other[1, 20:] = 50 * torch.randn(13, 24, dtype=torch.float64)
    actual = [layer(y, y, y, IGNORED)[0] for y in (x, other)]
    assert torch.equal(actual[0][0], actual[1][0])
    assert torch.equal(actual[0][1, :20], actual[1][1, :20])


def test_a_routers_centroids_belong_to_the_layer() -> None:
    router = KMeans(4, 6, 3)
    layer = SparseAttention(24, 4, router | fl.window(1))
    names = [name for name in layer.state_dict() if name.startswith("pattern.")]
    assert names
    x = x_of(dtype=torch.float32)
    layer(x, x, x)
    other = SparseAttention(24, 4, KMeans(4, 6, 3) | fl.window(1))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x, x, x)[0], other.eval()(x, x, x)[0])


def test_a_remembered_choice_is_used_again() -> None:
    layer = SparseAttention(24, 4, TopKeys(2), dtype=torch.float64)
    x, chosen = x_of(), []
    first = layer(x, x, x, chosen=chosen)[0]
    assert len(chosen) == 1
    layer.pattern = TopKeys(5)
    assert torch.equal(layer(x, x, x, chosen=chosen)[0], first)
    assert not torch.equal(layer(x, x, x)[0], first)


# ---- dropout, autocast ------------------------------------------------------------------------------------------------
def test_dropout_falls_in_training_only() -> None:
    layer = SparseAttention(24, 4, SKIM, dropout=0.5)
    x = x_of(dtype=torch.float32)
    assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])
    plain = SparseAttention(24, 4, SKIM)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x, x, x)[0], plain(x, x, x)[0])
    torch.manual_seed(4)
    one = layer.train()(x, x, x)[0]
    torch.manual_seed(4)
    assert torch.equal(one, layer(x, x, x)[0])


def test_autocast_gives_what_torchs_layer_gives() -> None:
    dense, sparse = both(SKIM, torch.float32)
    x, mask = x_of(dtype=torch.float32), dense_mask(SKIM, 33)
    exact = dense(x, x, x, attn_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = sparse(x, x, x, need_weights=True)
        torchs = dense(x, x, x, attn_mask=mask, need_weights=False)[0]
    assert out.dtype == torchs.dtype == torch.bfloat16
    error, allowed = (out - exact[0]).abs().max(), (torchs - exact[0]).abs().max()
    assert error <= 2 * allowed + 0.01
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 33), atol=1e-4, rtol=0)


# ---- inside torch's own layers ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_drop_in_for_torchs_encoder(training: bool, norm_first: bool) -> None:
    """In evaluation torch's layers would take the weights and compute full attention by themselves."""
    torch.manual_seed(0)
    kind = {"dim_feedforward": 32, "dropout": 0.0, "batch_first": True, "norm_first": norm_first, "dtype": torch.float64}
    dense = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, **kind), 2, enable_nested_tensor=False).train(training)
    sparse = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, **kind), 2, enable_nested_tensor=False).train(training)
    sparse.load_state_dict(dense.state_dict())
    for layer in sparse.layers:
        layer.self_attn = SparseAttention.from_dense(layer.self_attn, SKIM)
    x, mask = x_of(), dense_mask(SKIM, 33)
    with torch.set_grad_enabled(training):
        wanted = dense(x, mask=mask, src_key_padding_mask=IGNORED)
        actual = sparse(x, src_key_padding_mask=IGNORED)
        real = ~IGNORED
        torch.testing.assert_close(actual[real], wanted[real], atol=1e-10, rtol=1e-10)
        assert not torch.allclose(actual, dense(x, src_key_padding_mask=IGNORED))


def test_from_dense_shares_the_parameters() -> None:
    dense = nn.MultiheadAttention(24, 4, dropout=0.1, batch_first=True).eval()
    sparse = SparseAttention.from_dense(dense, SKIM, rotary=True)
    assert sparse.in_proj_weight is dense.in_proj_weight
    assert sparse.out_proj.weight is dense.out_proj.weight
    assert (sparse.dropout, sparse.training) == (0.1, False)
    for name, parameter in SparseAttention.from_dense(
        nn.MultiheadAttention(24, 4, kdim=8, batch_first=True), SKIM
    ).named_parameters():
        assert parameter.device.type == "cpu", name


# ---- what is refused --------------------------------------------------------------------------------------------------
def build(*given: Any, **options: Any) -> Any:
    return lambda: SparseAttention(*given, **options)


def call(*given: Any, **options: Any) -> Any:
    layer = options.pop("layer", None) or SparseAttention(24, 4, SKIM)
    return lambda: layer(*given, **options)


X = torch.zeros(2, 33, 24)
REFUSED = [
    (build(24, 5, SKIM), fl.ArgumentError, r"embed_dim = 24, num_heads = 5, kv_heads = 5: each must be a multiple of the next"),
    (build(24, 4, SKIM, kv_heads=3), fl.ArgumentError, r"kv_heads = 3: each must be"),
    (build(0, 4, SKIM), fl.PatternError, r"embed_dim = 0: it must be a whole number >= 1"),
    (build(24, 4, "window(3)"), fl.ArgumentError, r"the pattern is str; pass a pattern such as fl.window\(256\), or a router"),
    (build(24, 4, SKIM, dropout=1.5), fl.ArgumentError, r"dropout = 1.5: it is a share of links"),
    (build(24, 4, SKIM, backend="best"), fl.ArgumentError, r"best"),
    (build(24, 8, SKIM, rotary=True), fl.ArgumentError, r"head_dim = 3 is odd"),
    (build(24, 4, SKIM, rotary=RotaryPositions(8)), fl.ArgumentError, r"heads have 6 dimensions, .* made for 8; pass Rotary"),
    (build(24, 4, SKIM, rotary="yes"), fl.ArgumentError, r"rotary is str; pass True, a RotaryPositions"),
    (lambda: RotaryPositions(8, base=0), fl.ArgumentError, r"base = 0; a positive number is needed"),
    (lambda: RotaryPositions(8)(torch.zeros(1, 1, 2, 6), torch.arange(2)), fl.ArgumentError, r"the tensor has head_dim 6"),
    (lambda: LearnedPositions(8, 6)(torch.zeros(1, 9, 6)), fl.ArgumentError, r"9 tokens .* need 9 positions, and there are 8"),
    (call(X[..., :5], X, X), fl.ArgumentError, r"query is \(2, 33, 5\); \(batch, tokens, 24\) is needed"),
    (call(X, X, X[:, :5]), fl.ArgumentError, r"the number of tokens in key and value"),
    (call(X[0], X, X), fl.ArgumentError, r"query is \(33, 24\)"),
    (
        call(X, X, X, torch.zeros(2, 32, dtype=torch.bool)),
        fl.ArgumentError,
        r"key_padding_mask has shape \(2, 32\); \(2, 33\) is",
    ),
    (
        call(X, X, X, torch.zeros(2, 33, dtype=torch.int64)),
        fl.ArgumentError,
        r"key_padding_mask is of torch.int64; pass a bool",
    ),
    (call(X, X, X, torch.ones(2, 33)), fl.UnsupportedError, r"key_padding_mask adds numbers other than 0 and minus infinity"),
    (call(X, X, X, attn_mask=torch.ones(33, 33)), fl.UnsupportedError, r"attn_mask adds numbers .* a bias, which a pattern"),
    (
        call(X, X, X, attn_mask=torch.ones(5, 33) > 0),
        fl.ArgumentError,
        r"attn_mask has shape \(5, 33\); \(33, 33\) or \(8, 33, 33\)",
    ),
    (
        call(X, X, X, attn_mask=torch.eye(33) > 0, is_causal=True),
        fl.UnsupportedError,
        r"is_causal=True says that attn_mask is the",
    ),
    (call(X, X, X, attn_mask=torch.eye(33) > 0, q_offset=3), fl.UnsupportedError, r"such a table would be read by position"),
    (call(X, X, X, layer=SparseAttention(24, 4, TopKeys(2)), q_offset=3), fl.UnsupportedError, r"q_offset = 3 for 33 queries"),
    (
        lambda: SparseAttention.from_dense(nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True), SKIM),
        fl.UnsupportedError,
        r"has add_bias_kv",
    ),
    (
        lambda: SparseAttention.from_dense(nn.MultiheadAttention(8, 2, batch_first=True, add_zero_attn=True), SKIM),
        fl.UnsupportedError,
        r"has add_zero_attn",
    ),
    (
        lambda: SparseAttention.from_dense(nn.MultiheadAttention(8, 2, batch_first=True), SKIM, kv_heads=1),
        fl.UnsupportedError,
        r"kv_heads = 1 needs other weights",
    ),
    (lambda: SparseAttention.from_dense(nn.Linear(2, 2), SKIM), fl.ArgumentError, r"Linear is not an nn.MultiheadAttention"),
]


@pytest.mark.parametrize("wrong, kind, message", REFUSED, ids=[row[2][:40] for row in REFUSED])
def test_what_cannot_be_is_refused_in_words(wrong: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        wrong()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(3, 24), torch.zeros(5, 24)])
    with pytest.raises(fl.UnsupportedError, match="query is a nested tensor.*enable_nested_tensor=False"):
        SparseAttention(24, 4, SKIM)(nested, nested, nested)
