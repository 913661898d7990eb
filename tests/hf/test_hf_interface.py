"""farlight inside transformers: what the model forbids stays forbidden, and nothing is dropped without a word."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_parity import CACHE
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LongformerConfig,
    LongformerModel,
    MistralConfig,
    MistralModel,
    StaticCache,
    T5Config,
    T5Model,
    masking_utils,
)

import farlight as fl
from farlight.hf import Observation, attention_function, register, use_pattern
from farlight.hf.attention_function import attention_forward
from farlight.hf.lazy_mask import ModelMask
from farlight.hf.masks import model_mask, tensor_mask
from farlight.hf.setting import ATTN_IMPLEMENTATION, SETTING, Setting

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
}
SMALL["initializer_range"] = 0.3  # far from uniform attention, so that a link more or less shows
CAUSAL = SMALL | {
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def bert(**options: Any) -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SMALL | {"max_position_embeddings": 64} | options)).eval()


def llama(**options: Any) -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(**CAUSAL | options)).eval()


def mistral(**options: Any) -> MistralModel:
    torch.manual_seed(0)
    return MistralModel(MistralConfig(**CAUSAL | {"sliding_window": 5, "head_dim": 8} | options)).eval()


MODELS: dict[str, Callable[[], Any]] = {"encoder": bert, "causal, grouped heads": llama, "sliding window": mistral}


def ids(batch: int = 2, n: int = 20, seed: int = 0) -> Tensor:
    return torch.randint(3, 50, (batch, n), generator=torch.Generator().manual_seed(seed))


def hidden(model: Any, tokens: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens) if mask is None else mask, **options)[0]
    return out


def close(a: Tensor, b: Tensor) -> None:
    assert a.isfinite().all()
    torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


# ---- the model's own mask survives -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_without_a_pattern_a_model_computes_what_it_always_did(name: str) -> None:
    model, tokens = MODELS[name](), ids()
    expected = hidden(model, tokens)
    with use_pattern(model, None):
        close(hidden(model, tokens), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_survives(name: str, side: str) -> None:
    model, tokens = MODELS[name](), ids()
    mask = torch.ones_like(tokens)
    padded = slice(0, 6) if side == "left" else slice(14, 20)
    mask[1, padded] = 0
    expected = hidden(model, tokens, mask)
    with use_pattern(model, None):
        actual = hidden(model, tokens, mask)
        tokens[1, padded] = 7
        again = hidden(model, tokens, mask)
    real = mask.bool()
    close(actual[real], expected[real])
    assert torch.equal(actual[real], again[real])
    assert actual.isfinite().all()


@pytest.mark.parametrize("pattern", [None, fl.window(4) | fl.global_tokens([0, -1])], ids=["own", "sparse"])
@pytest.mark.parametrize("make", [llama, mistral])
def test_causality_survives(make: Callable[[], Any], pattern: fl.Pattern | None) -> None:
    model, tokens = make(), ids()
    other = tokens.clone()
    other[:, 13] = (other[:, 13] + 5) % 47 + 3
    with use_pattern(model, pattern):
        before, after = hidden(model, tokens), hidden(model, other)
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.equal(before[:, 13:], after[:, 13:])


@pytest.mark.parametrize(
    "pattern",
    [
        fl.window(3),
        fl.window(2) | fl.global_tokens([0, -1]) | fl.random_keys(2),
        fl.per_head([fl.window(1), fl.full()] * 2),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_a_pattern_is_intersected_with_the_models_own_mask(name: str, pattern: fl.Pattern) -> None:
    """The witness: transformers' own SDPA path under the dense 4-D mask."""
    model, tokens = MODELS[name](), ids()
    own = {"encoder": fl.full(), "causal, grouped heads": fl.causal(), "sliding window": fl.window(4, 0)}[name]
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0, 15:] = False
    # Positions count real tokens: the last token of the shorter text stands at 14.
    last = torch.tensor([[n in (0, 14) for n in range(20)], [n in (0, 19) for n in range(20)]])
    in_slots = fl.window(2) | fl.global_tokens(last) | fl.random_keys(2) if "global_tokens" in pattern.text else pattern
    allowed = (own & in_slots & fl.padding(real)).dense(20, batch=2, heads=4)
    model.set_attn_implementation("sdpa")
    expected = hidden(model, tokens, allowed)
    with use_pattern(model, pattern):
        actual = hidden(model, tokens, real.long())
    close(actual[real], expected[real])


def test_queries_come_after_the_keys_in_the_cache() -> None:
    torch.manual_seed(0)
    model, tokens = LlamaForCausalLM(LlamaConfig(**CAUSAL)).eval(), ids(1)
    pattern = fl.window(3) | fl.global_tokens([0])
    with torch.no_grad(), use_pattern(model, pattern):
        whole = model(input_ids=tokens).logits
        cache, pieces = None, []
        for start, stop in ((0, 7), (7, 8), (8, 9), (9, 20)):
            out = model(input_ids=tokens[:, start:stop], use_cache=True, **{CACHE: cache})
            cache = getattr(out, CACHE)
            pieces.append(out.logits)
    close(torch.cat(pieces, 1), whole)


def test_slots_of_a_static_cache_that_hold_nothing_are_not_seen() -> None:
    model, tokens = llama(), ids(1)
    pattern = fl.window(3) | fl.global_tokens([0])
    cache = StaticCache(config=model.config, max_cache_len=24)
    with torch.no_grad(), use_pattern(model, pattern):
        pieces = [model(input_ids=part, **{CACHE: cache})[0] for part in tokens.split([7, 1, 12], 1)]
        close(torch.cat(pieces, 1), hidden(model, tokens))


def test_a_scale_of_its_own_is_used() -> None:
    model, tokens = bert(), ids()
    for layer in model.encoder.layer:
        layer.attention.self.scaling = 0.9
    expected = hidden(model, tokens)
    with use_pattern(model, None):
        close(hidden(model, tokens), expected)


def test_packed_sequences_do_not_see_one_another() -> None:
    model, tokens = llama(), ids(1)
    positions = torch.cat([torch.arange(9), torch.arange(11)])[None]
    with torch.no_grad(), use_pattern(model, fl.window(6)):
        packed = model(input_ids=tokens, position_ids=positions, use_cache=False)[0]
        apart = [hidden(model, part) for part in tokens.split([9, 11], 1)]
    close(packed, torch.cat(apart, 1))


def test_gradients_with_and_without_checkpoints() -> None:
    tokens = ids()
    pattern = fl.window(3) | fl.global_tokens([0])
    grads = []
    for reentrant in (None, False, True):
        model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        if reentrant is not None:
            enable = (
                getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            )  # as it was called
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with use_pattern(model, pattern):
            model(input_ids=tokens).last_hidden_state.square().sum().backward()
        grads.append(model.encoder.layer[0].attention.self.query.weight.grad)
    for again in grads[1:]:
        torch.testing.assert_close(again, grads[0], rtol=1e-4, atol=1e-5)
    # and the gradient is that of the masked model
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    model.set_attn_implementation("eager")
    model(input_ids=tokens, attention_mask=pattern.dense(20).expand(2, 1, -1, -1)).last_hidden_state.square().sum().backward()
    torch.testing.assert_close(grads[0], model.encoder.layer[0].attention.self.query.weight.grad, rtol=1e-3, atol=1e-4)


# ---- the translation of masks ----------------------------------------------------------------------------------------
def mask_functions(n: int) -> dict[str, Callable[..., Any]]:
    m = masking_utils
    packed = torch.cat([torch.zeros(n // 3), torch.ones(n // 2)]).long()
    packed = torch.nn.functional.pad(packed, (0, n - packed.numel()), value=2).expand(2, -1)
    positions = torch.cat([torch.arange(int(c)) for c in packed[0].bincount()]).expand(2, -1)
    labels = torch.tensor([0, 0, 1, 1, -1, -1, 2]).repeat(n)[:n].expand(2, -1)

    def joined(function: Callable[..., Any]) -> Callable[..., Any]:
        if hasattr(m, "packed_sequence_compatibility_function"):
            return m.packed_sequence_compatibility_function(function, positions, packed)
        return m.and_masks(function, m.packed_sequence_mask_function(packed))  # as older releases write it

    return {
        "causal": m.causal_mask_function,
        "bidirectional": m.bidirectional_mask_function,
        "sliding": m.sliding_window_causal_mask_function(4),
        "a window of nothing": m.sliding_window_causal_mask_function(0),
        "all that comes after": m.sliding_window_overlay(0),
        "some that come after": m.and_masks(m.sliding_window_overlay(0), m.sliding_window_bidirectional_overlay(3)),
        "sliding both ways": m.sliding_window_bidirectional_mask_function(3),
        "chunked": m.chunked_causal_mask_function(5, torch.tensor([0, 3])),
        "packed": joined(m.causal_mask_function),
        "packed sliding": joined(m.sliding_window_causal_mask_function(3)),
        "blockwise": m.or_masks(m.causal_mask_function, m.blockwise_overlay(labels)),
        "a user's own": m.and_masks(m.causal_mask_function, lambda b, h, q, k: (q + k) % 3 != 0),
    }


def translated(
    n_q: int, n_k: int, q_offset: int, kv_offset: int, function: Callable[..., Any], padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    call = {"batch_size": 2, "q_length": n_q, "kv_length": n_k, "q_offset": q_offset, "kv_offset": kv_offset}
    expected = masking_utils.sdpa_mask(**call, mask_function=function, attention_mask=padding, allow_is_causal_skip=False)
    actual = model_mask(**call, mask_function=function, attention_mask=padding, device="cpu")
    assert actual.shape == (2, 1, n_q, n_k)
    return actual[:, 0][:, None], expected


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", mask_functions(17))
def test_every_mask_function_is_translated_exactly(name: str, padded: bool) -> None:
    real = None
    if padded:
        real = torch.ones(2, 17, dtype=torch.bool)
        real[0, :4] = real[1, 11:] = False
    actual, expected = translated(17, 17, 0, 0, mask_functions(17)[name], real)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "n_q, n_k, q_offset, kv_offset", [(3, 17, 14, 0), (1, 17, 16, 0), (5, 17, 0, 0), (4, 9, 13, 8), (17, 0, 0, 0)]
)
@pytest.mark.parametrize("name", ["causal", "sliding", "sliding both ways", "chunked", "bidirectional"])
def test_masks_with_a_cache(name: str, n_q: int, n_k: int, q_offset: int, kv_offset: int) -> None:
    for real in (None, torch.arange(2 * 12).view(2, 12) % 7 > 1):
        actual, expected = translated(n_q, n_k, q_offset, kv_offset, mask_functions(17)[name], real)
        assert torch.equal(actual, expected)


def test_the_common_masks_cost_nothing() -> None:
    def pattern(function: Callable[..., Any], real: Tensor | None = None) -> fl.Pattern:
        return model_mask(2, 17, 17, mask_function=function, attention_mask=real).model_mask.pattern

    functions = mask_functions(17)
    assert pattern(functions["causal"], torch.ones(2, 17)) == fl.causal()
    assert pattern(functions["bidirectional"]) == fl.full()
    assert pattern(functions["sliding"]) == fl.window(3, 0)
    assert pattern(functions["a window of nothing"]) == ~fl.full()
    assert pattern(functions["sliding both ways"]) == fl.window(3)
    assert "pairs" not in pattern(functions["packed"]).text
    assert "pairs" not in pattern(functions["chunked"]).text
    assert pattern(functions["blockwise"]).text == "pairs($0)"


def test_a_function_that_only_looks_familiar_is_evaluated() -> None:
    def causal_mask_function(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k >= q

    actual, expected = translated(9, 9, 0, 0, causal_mask_function, None)
    assert torch.equal(actual, expected)


def test_an_unknown_function_over_a_long_text_is_refused() -> None:
    with pytest.raises(fl.UnsupportedError, match=r"a function farlight does not know \('.*<lambda>'\).* GiB"):
        model_mask(1, 100_000, 100_000, mask_function=lambda b, h, q, k: k <= q)
    with pytest.raises(fl.UnsupportedError, match="does not know, for 5 queries from position 2"):
        model_mask(1, 5, 5, q_offset=2, mask_function=lambda b, h, q, k: k <= q)


def test_tensor_masks() -> None:
    allowed = torch.rand(2, 1, 5, 7) > 0.4
    assert torch.equal(tensor_mask(allowed, 5, 7).pattern.dense(5, 7, batch=2), allowed)
    row = allowed[:, :, :1]  # padding, the same for every query, as LayoutLM writes it
    assert torch.equal(tensor_mask(row, 5, 7).pattern.dense(5, 7, batch=2), row.expand(-1, -1, 5, -1))
    for low in (-torch.inf, torch.finfo(torch.float32).min):
        added = torch.zeros(2, 1, 5, 7).masked_fill(~allowed, low)
        assert torch.equal(tensor_mask(added, 5, 7).pattern.dense(5, 7, batch=2), allowed)
    with pytest.raises(fl.UnsupportedError, match="a bias, which a pattern cannot express"):
        tensor_mask(torch.randn(2, 1, 5, 7), 5, 7)
    with pytest.raises(fl.UnsupportedError, match=r"shape \(2, 7\) for 5 queries and 7 keys"):
        tensor_mask(torch.ones(2, 7), 5, 7)


# ---- the interface ---------------------------------------------------------------------------------------------------
def test_both_functions_are_registered_or_neither() -> None:
    register()
    register()
    assert ATTN_IMPLEMENTATION in AttentionInterface._global_mapping
    assert ATTN_IMPLEMENTATION in AttentionMaskInterface._global_mapping


def test_from_pretrained_spelling() -> None:
    register()
    torch.manual_seed(0)
    model = BertModel._from_config(BertConfig(**SMALL), attn_implementation="farlight").eval()
    assert model.config._attn_implementation == ATTN_IMPLEMENTATION
    close(hidden(model, ids()), hidden(bert(max_position_embeddings=512), ids()))


def test_everything_is_put_back() -> None:
    model, tokens = bert(), ids()
    expected, before = hidden(model, tokens), model.config._attn_implementation
    with use_pattern(model, fl.window(1)):
        with use_pattern(model, fl.window(2)):
            inner = hidden(model, tokens)
        outer = hidden(model, tokens)
    with pytest.raises(RuntimeError, match="inside"), use_pattern(model, fl.window(1)):
        raise RuntimeError("inside")
    assert not torch.equal(inner, outer)
    assert model.config._attn_implementation == before
    assert not any("_farlight_setting" in module.__dict__ for module in model.modules())
    assert torch.equal(hidden(model, tokens), expected)


def test_two_models_under_two_patterns() -> None:
    a, tokens = bert(), ids()
    b = copy.deepcopy(a)
    with use_pattern(a, fl.window(1)), use_pattern(b, fl.window(6)):
        both = hidden(a, tokens), hidden(b, tokens)
    with use_pattern(a, fl.window(1)):
        assert torch.equal(hidden(a, tokens), both[0])
    with use_pattern(b, fl.window(6)):
        assert torch.equal(hidden(b, tokens), both[1])
    assert not torch.equal(*both)


def test_the_observer_sees_what_each_layer_computes() -> None:
    model, tokens = llama(), ids()
    seen: list[Observation] = []
    with use_pattern(model, fl.window(2), observer=seen.append):
        hidden(model, tokens)
    assert len(seen) == 2
    for place, call in enumerate(seen):
        assert call.module is model.layers[place].self_attn
        assert call.q.shape == (2, 4, 20, 8)
        assert call.k.shape == call.v.shape == (2, 2, 20, 8)
        assert call.own == fl.causal()
        assert call.q_offset == 0
        assert call.scale == pytest.approx(8**-0.5)


def test_output_is_contiguous_tokens_first() -> None:
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    out, weights = attention_forward(torch.nn.Identity(), q, k, k, ModelMask(fl.full(), 0))
    assert out.shape == (2, 6, 4, 8)
    assert out.is_contiguous()
    assert weights is None


def test_a_named_backend_reaches_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, pattern: fl.Pattern, **options: Any) -> Tensor:
        seen.append(options | {"pattern": pattern})
        return torch.zeros_like(q)

    monkeypatch.setattr(attention_function, "attention", attention)
    model = bert(attention_probs_dropout_prob=0.25).train()
    with use_pattern(model, fl.window(2), backend="torch"):
        hidden(model, ids())
    assert seen[0] == {
        "pattern": fl.window(2),
        "scale": pytest.approx(8**-0.5),
        "q_offset": 0,
        "dropout": 0.25,
        "score": None,
        "sinks": None,
        "backend": "torch",
    }


def without_mask(**flags: Any) -> Any:
    return SimpleNamespace(**flags)


def test_no_mask_means_what_it_means_for_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[fl.Pattern] = []
    monkeypatch.setattr(
        attention_function, "attention", lambda q, k, v, pattern, **options: seen.append(pattern) or torch.zeros_like(q)
    )
    q, one = torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 1, 4)
    cases = [
        (q, {"is_causal": False}, None),
        (q, {"is_causal": True}, None),
        (q, {}, None),
        (q, {"is_causal": True}, False),
        (one, {}, True),
    ]
    for query, flags, override in cases:
        attention_forward(without_mask(**flags), query, q, q, None, is_causal=override)
    assert seen == [fl.full(), fl.causal(), fl.causal(), fl.full(), fl.full()]


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, value, text",
    [
        ("sinks", torch.zeros(2), "passes sinks, which adds a sink of its own for each query"),
        ("seq_idx", torch.zeros(1, 5), "passes seq_idx, which packs several sequences"),
        ("max_length_q", 3, "passes max_length_q, which packs several sequences"),
        ("cache", object(), "passes cache, which reads keys and values from a paged cache"),
        ("novelty", 1, "passes novelty, which is not known to farlight"),
    ],
)
def test_what_would_have_to_be_dropped_is_refused(name: str, value: Any, text: str) -> None:
    q = torch.zeros(1, 1, 5, 4)
    with pytest.raises(fl.UnsupportedError, match=f"^Identity {text}.* Use 'eager' or 'sdpa'"):
        attention_forward(torch.nn.Identity(), q, q, q, ModelMask(fl.full(), 0), **{name: value})
    with pytest.raises(fl.UnsupportedError, match="mask of type SimpleNamespace"):
        attention_forward(torch.nn.Identity(), q, q, q, SimpleNamespace())  # type: ignore[arg-type]


def test_arguments_without_effect_pass() -> None:
    q = torch.zeros(1, 1, 5, 4)
    attention_forward(
        torch.nn.Identity(),
        q,
        q,
        q,
        ModelMask(fl.full(), 0),
        softcap=None,
        output_attentions=False,
        position_ids=torch.arange(5),
        sliding_window=3,
    )


def test_a_missing_mask_that_matters_is_refused() -> None:
    q, k = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 5, 4)
    with pytest.raises(fl.UnsupportedError, match="needs causality for 3 queries and 5 keys but passes no mask"):
        attention_forward(torch.nn.Identity(), q, k, k, None)
    with pytest.raises(fl.UnsupportedError, match="needs a sliding window of 4 but passes no mask"):
        attention_forward(torch.nn.Identity(), q, q, q, None, is_causal=False, sliding_window=4)


def test_a_cache_that_dropped_keys_is_refused_under_a_pattern() -> None:
    model, q = torch.nn.Identity(), torch.zeros(1, 1, 1, 4)
    attention_forward(model, q, q, q, ModelMask(fl.causal(), 0, num_dropped=3))
    register()
    with pytest.raises(fl.UnsupportedError, match="dropped the first 3 keys"):
        attention_forward(model, q, q, q, ModelMask(fl.causal(), 0, num_dropped=3), indices=torch.zeros(1, 1, 1))
    model.__dict__[SETTING] = Setting(fl.global_tokens([0]))
    with pytest.raises(fl.UnsupportedError, match="dropped the first 3 keys"):
        attention_forward(model, q, q, q, ModelMask(fl.causal(), 0, num_dropped=3))


def test_models_without_pluggable_attention_are_refused() -> None:
    config = LongformerConfig(**SMALL, attention_window=[4, 4], max_position_embeddings=64)
    with (
        pytest.raises(fl.UnsupportedError, match="LongformerModel does not take its attention from"),
        use_pattern(LongformerModel(config), None),
    ):
        pass
    with (
        pytest.raises(fl.UnsupportedError, match="Linear is not a transformers model"),
        use_pattern(torch.nn.Linear(1, 1), None),
    ):
        pass


def test_cross_attention_is_refused() -> None:
    t5 = T5Model(T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, vocab_size=50))
    for model in (t5, bert(is_decoder=True, add_cross_attention=True)):
        with pytest.raises(fl.UnsupportedError, match="has cross-attention"), use_pattern(model, fl.window(2)):
            pass


def test_the_signature_is_the_one_transformers_calls() -> None:
    named = list(inspect.signature(attention_forward).parameters)
    assert named[:5] == ["module", "query", "key", "value", "attention_mask"]
    theirs = set(inspect.signature(masking_utils.sdpa_mask).parameters)
    assert set(inspect.signature(model_mask).parameters) - {"kwargs"} <= theirs
