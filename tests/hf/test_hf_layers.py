"""A pattern for each layer, and routers that choose in each layer, inside Hugging Face models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaModel,
    StaticCache,
    WhisperConfig,
    WhisperModel,
)

import farlight as fl
from farlight.hf import use_pattern
from farlight.hf.attention_function import attention_forward
from farlight.hf.layers import attention_layers
from farlight.hf.lazy_mask import ModelMask
from farlight.hf.positions import resolve_named_positions
from farlight.routing import Router, TopBlocks, TopKeys

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def bert(**options: Any) -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SMALL | options)).eval()


def llama(**options: Any) -> LlamaModel:
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaModel(LlamaConfig(**SMALL | {"num_key_value_heads": 2} | tokens | options)).eval()


def ids(batch: int = 2, n: int = 20) -> Tensor:
    return torch.randint(3, 50, (batch, n), generator=torch.Generator().manual_seed(0))


def hidden(model: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens) if mask is None else mask)[0]
    return out


def close(a: Tensor, b: Tensor) -> None:
    assert a.isfinite().all()
    torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


# ---- numbers ---------------------------------------------------------------------------------------------------------
def test_layers_are_numbered_as_the_model_numbers_them() -> None:
    for model, modules in ((bert(), "encoder.layer.{}.attention.self"), (llama(), "layers.{}.self_attn")):
        actual = attention_layers(model)
        assert list(actual) == [0, 1, 2]
        assert all(module is model.get_submodule(modules.format(number)) for number, module in actual.items())


def test_where_a_model_has_no_numbers_its_layers_are_counted() -> None:
    config = DistilBertConfig(dim=16, n_heads=2, n_layers=3, hidden_dim=16, vocab_size=20)
    model = DistilBertModel(config)
    actual = attention_layers(model)
    assert [actual[n] for n in (0, 1, 2)] == [layer.attention for layer in model.transformer.layer]
    shared = AlbertModel(AlbertConfig(embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=16))
    assert list(attention_layers(shared)) == [0]
    clip = CLIPModel(CLIPConfig())
    assert list(attention_layers(clip)) == list(range(24))


def test_a_number_that_two_layers_carry_is_refused() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    whisper = WhisperModel(WhisperConfig(**sizes, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16))
    whisper.encoder.layers[0].self_attn.layer_idx = 0
    with pytest.raises(fl.UnsupportedError, match="has two attention layers with the number 0 .* could mean either"):
        attention_layers(whisper)


# ---- a pattern for each layer ----------------------------------------------------------------------------------------
def by_hand(model: Any, tokens: Tensor, patterns: dict[int, fl.Pattern], own: fl.Pattern, real: Tensor) -> Tensor:
    """transformers' own attention, each layer under its own dense 4-D mask."""
    model.set_attn_implementation("sdpa")
    hooks = []
    for number, module in attention_layers(model).items():
        pattern = own & patterns.get(number, fl.full()) & fl.padding(real)
        allowed = pattern.dense(tokens.shape[1], batch=len(tokens), heads=4)

        def replace(module: Any, args: Any, kwargs: Any, allowed: Tensor = allowed) -> Any:
            if "attention_mask" in kwargs:
                return args, kwargs | {"attention_mask": allowed}
            return (args[0], allowed, *args[2:]), kwargs

        hooks.append(module.register_forward_pre_hook(replace, with_kwargs=True))
    out = hidden(model, tokens, real.long())
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize("make, own", [(bert, fl.full()), (llama, fl.causal())])
def test_each_layer_has_its_own_pattern(make: Any, own: fl.Pattern) -> None:
    model, tokens = make(), ids()
    real = torch.ones(2, 20, dtype=torch.bool)
    real[1, :4] = False
    patterns = {0: fl.window(2), 2: fl.per_head([fl.window(1) | fl.global_tokens([0]), fl.full()] * 2)}
    # Token 0 of the text that is padded on the left stands at 4.
    named = torch.tensor([[j == 0 for j in range(20)], [j == 4 for j in range(20)]])
    in_slots = patterns | {2: fl.per_head([fl.window(1) | fl.global_tokens(named), fl.full()] * 2)}
    expected = by_hand(model, tokens, in_slots, own, real)
    for mapping in (patterns, {1: None} | patterns):
        with use_pattern(model, mapping):
            close(hidden(model, tokens, real.long())[real], expected[real])
    with use_pattern(model, {0: patterns[0]}):
        assert not torch.allclose(hidden(model, tokens, real.long())[real], expected[real], atol=1e-3)


@pytest.mark.parametrize("number", [3, -1, "1", True])
def test_a_layer_that_does_not_exist_is_refused(number: Any) -> None:
    text = rf"given for layer {number!r}, but the attention layers of BertModel are 0, 1, 2"
    with pytest.raises(fl.ArgumentError, match=text), use_pattern(bert(), {number: fl.window(2)}):
        pass


def test_what_is_not_a_pattern_is_refused() -> None:
    with pytest.raises(fl.ArgumentError, match="the pattern is str; pass a pattern such as"), use_pattern(bert(), "window(2)"):  # type: ignore[arg-type]
        pass
    with pytest.raises(fl.ArgumentError, match="the pattern of layer 1 is int"), use_pattern(bert(), {1: 3}):  # type: ignore[dict-item]
        pass


def test_attention_without_a_number_under_a_mapping_is_refused() -> None:
    model = bert()
    q = torch.zeros(1, 1, 5, 4)
    with (
        use_pattern(model, {0: fl.window(2)}),
        pytest.raises(fl.UnsupportedError, match="BertEmbeddings computes attention, but has no layer number"),
    ):
        attention_forward(model.embeddings, q, q, q, ModelMask(fl.full(), 0))


# ---- routers ---------------------------------------------------------------------------------------------------------
class Recorded(Router):
    """Answers as another router does, and keeps what it was called with."""

    def __init__(self, inner: Router) -> None:
        super().__init__()
        self.inner, self.calls = inner, []  # type: ignore[var-annotated]

    def forward(self, q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, query_mask: Tensor | None = None) -> fl.Pattern:
        actual: fl.Pattern = self.inner(q, k, key_mask=key_mask, query_mask=query_mask)
        self.calls.append((actual, key_mask))
        return actual


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("make, own", [(bert, fl.full()), (llama, fl.causal())])
def test_a_router_chooses_in_every_layer(make: Any, own: fl.Pattern, side: str | None) -> None:
    model, tokens = make(), ids()
    real = torch.ones(2, 20, dtype=torch.bool)
    if side is not None:
        real[1, slice(0, 6) if side == "left" else slice(14, 20)] = False
    router = Recorded(TopKeys(3, causal=make is llama) | fl.window(1))
    with use_pattern(model, router):
        actual = hidden(model, tokens, real.long())
    assert len(router.calls) == 3
    assert all((mask is None) == (side is None) for _, mask in router.calls)
    if side is not None:
        assert all(torch.equal(mask, real) for _, mask in router.calls)
    expected = by_hand(model, tokens, dict(enumerate(pattern for pattern, _ in router.calls)), own, real)
    close(actual[real], expected[real])


@pytest.mark.parametrize("make", [bert, llama])
def test_a_router_never_chooses_padding(make: Any) -> None:
    model, tokens = make(), ids()
    real = torch.ones(2, 20, dtype=torch.bool)
    real[1, 14:] = False
    with use_pattern(model, TopBlocks(2, block=4, causal=make is llama)):
        before = hidden(model, tokens, real.long())
        tokens[1, 14:] = 7
        assert torch.equal(hidden(model, tokens, real.long())[real], before[real])


def test_a_router_in_one_layer_and_a_pattern_in_another() -> None:
    model, tokens = bert(), ids()
    router = Recorded(TopKeys(4))
    with use_pattern(model, {0: fl.window(3), 2: router}):
        actual = hidden(model, tokens)
    (chosen, _), real = router.calls[0], torch.ones(2, 20, dtype=torch.bool)
    close(actual, by_hand(model, tokens, {0: fl.window(3), 2: chosen}, fl.full(), real))


def test_a_router_under_a_mask_of_the_users_own() -> None:
    """A 4-D mask says which keys nobody sees: they are not offered to a router."""
    model, tokens = bert(), ids()
    real = torch.ones(2, 20, dtype=torch.bool)
    real[1, 15:] = False
    allowed = (fl.padding(real) & fl.window(9)).dense(20, batch=2).expand(2, 1, 20, 20)
    router = Recorded(TopKeys(3))
    with use_pattern(model, router):
        hidden(model, tokens, allowed)
    assert all(torch.equal(mask, real) for _, mask in router.calls)


@pytest.mark.parametrize("static", [False, True])
def test_a_router_reads_the_cache_up_to_its_last_query(static: bool) -> None:
    model, tokens = llama(), ids(1)
    router = TopKeys(5, causal=True)
    with torch.no_grad(), use_pattern(model, router):
        cache = StaticCache(config=model.config, max_cache_len=32) if static else None
        pieces = []
        for part in tokens.split([7, 1, 1, 11], 1):
            out = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.last_hidden_state)
        close(torch.cat(pieces, 1), hidden(model, tokens))


def test_a_router_needs_the_queries_last() -> None:
    model, q, k = llama(), torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 5, 4)
    with (
        use_pattern(model, TopKeys(2)),
        pytest.raises(fl.UnsupportedError, match="2 queries from position 0 stand before some of the 5 keys"),
    ):
        attention_forward(model.layers[0].self_attn, q, k, k, ModelMask(fl.full(), 0))


# ---- named positions in a padded batch -------------------------------------------------------------------------------
def test_named_positions_count_the_tokens_of_each_text() -> None:
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    for positions, named in (
        ([0], [[2], [0], [1], []]),
        ([-1], [[5], [2], [3], []]),
        ([1, 3], [[3, 5], [1], [3], []]),
        ([0, -3], [[2, 3], [0], [1], []]),
        (range(4), [[2, 3, 4, 5], [0, 1, 2], [1, 3], []]),
        ([9, -9], [[], [], [], []]),
        ([], [[], [], [], []]),
    ):
        table = torch.tensor([[j in row for j in range(6)] for row in named])
        for kind in (fl.global_tokens, fl.sees_all, fl.seen_by_all):
            assert resolve_named_positions(kind(positions), real, 6) == kind(table)
            whole = ~(fl.window(1) & (fl.causal() - fl.per_head([kind(positions), fl.full()]))) | fl.strided(2)
            expected = ~(fl.window(1) & (fl.causal() - fl.per_head([kind(table), fl.full()]))) | fl.strided(2)
            assert resolve_named_positions(whole, real, 6) == expected


def test_what_names_no_position_is_left_alone() -> None:
    real = torch.tensor([[False, True, True]])
    mask = fl.global_tokens(torch.tensor([[True, False, True]]))
    for pattern in (fl.window(2), fl.random_keys(2) | fl.causal(), mask, fl.per_head([mask, fl.full()])):
        assert resolve_named_positions(pattern, real, 3) is pattern
    pattern = fl.global_tokens([0, -3]) | fl.window(1)
    assert resolve_named_positions(pattern, None, 3) is pattern
    assert resolve_named_positions(pattern, None, 2) == fl.global_tokens([0]) | fl.window(1)


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pattern", [fl.window(2) | fl.global_tokens([0, 1, -1]), fl.presets.streaming(3, 4)], ids=str)
def test_a_text_computes_in_a_batch_what_it_computes_alone(make: Any, side: str, pattern: fl.Pattern) -> None:
    model, tokens = make(), ids()
    real = torch.ones(2, 20, dtype=torch.bool)
    real[1, slice(0, 8) if side == "left" else slice(12, 20)] = False
    places = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), use_pattern(model, pattern):
        actual = model(input_ids=tokens, attention_mask=real.long(), position_ids=places)[0]
        close(actual[1][real[1]], hidden(model, tokens[1:][:, real[1]])[0])
        close(actual[:1], hidden(model, tokens[:1]))


def test_a_text_shorter_than_a_named_position_is_read() -> None:
    model, tokens = llama(), ids(1, 2)
    with use_pattern(model, fl.window(1) | fl.seen_by_all(range(4))):
        actual = hidden(model, tokens)
    close(actual, hidden(model, tokens))
