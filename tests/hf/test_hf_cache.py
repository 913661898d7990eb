"""Hugging Face's generate with a cache that forgets: token for token what the sparse model says without any cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import farlight as fl
from farlight.routing import TopBlocks

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 90,
}
END: dict[str, Any] = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
GPT2: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": 3, "vocab_size": 90, "n_positions": 300}
HALF: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **END)),
    "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(**SIZES, **END, sliding_window=9)),
    "qwen, some layers slide": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **END, **HALF)),
    "gpt2, learned positions": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, **END)),
}
PATTERNS = {
    "streaming": fl.presets.streaming(3, 12),
    "dilated": fl.causal() & (fl.window(4, dilation=3) | fl.seen_by_all([0])),
    "per head": fl.per_head([fl.window(3), fl.window(20), fl.strided(4), fl.full()]),
    "the model's own": None,
}


def model_of(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # small random weights would say the same token for ever
    fl.hf.register()
    model.set_attn_implementation("farlight")
    return model


def prompt(batch: int = 1, n: int = 30, padded: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(1, 90, (batch, n), generator=torch.Generator().manual_seed(n))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :11] = 0
        ids[0, :11] = 0
    return {"input_ids": ids, "attention_mask": mask}


def said(model: Any, pattern: fl.Pattern | None, given: dict[str, Tensor], steps: int, **options: Any) -> Any:
    """What the model generates under `pattern`."""
    with fl.hf.use_pattern(model, pattern):
        return model.generate(**given, max_new_tokens=steps, do_sample=False, **options)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", MODELS)
def test_generation_is_that_of_the_sparse_model_without_a_cache(name: str, pattern: str) -> None:
    """A batch of two texts, one of them padded on the left."""
    model, chosen = model_of(name), PATTERNS[pattern]
    given = prompt(2, padded=True)
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
    cache = fl.hf.SparseCache(model, chosen)
    actual = said(model, chosen, given, 16, past_key_values=cache, **options)
    true = said(model, chosen, given, 16, use_cache=False, **options)
    assert actual.sequences.tolist() == true.sequences.tolist()
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(true.logits), atol=2e-4, rtol=1e-4)
    assert len(set(true.sequences[-1, 30:].tolist())) > 4
    assert cache.get_seq_length() == 45
    if pattern == "streaming" and name != "mistral, sliding window":
        assert cache.kept == 15
        dense = said(model, None, given, 16)
        assert dense.tolist() != true.sequences.tolist()


@pytest.mark.slow
def test_256_tokens_are_identical() -> None:
    for name in MODELS:
        model, pattern = model_of(name, 1), fl.presets.streaming(4, 32)
        given = prompt(2, padded=True)
        cache = fl.hf.SparseCache(model, pattern)
        actual = said(model, pattern, given, 256, past_key_values=cache)
        assert actual.tolist() == said(model, pattern, given, 256, use_cache=False).tolist()
        assert cache.kept == (9 if name.startswith("mistral") else 36)


def test_layers_may_have_patterns_of_their_own() -> None:
    model = model_of("llama")
    cache = fl.hf.SparseCache(model, {0: fl.window(4), 2: fl.presets.streaming(1, 8)})
    model.generate(**prompt(), max_new_tokens=10, do_sample=False, past_key_values=cache)
    assert [layer.cache.kept for layer in cache.layers] == [5, 39, 9]
    assert cache.nbytes == sum(layer.cache.nbytes for layer in cache.layers)


def test_a_cache_prints_as_one_line() -> None:
    model = model_of("llama")
    cache = fl.hf.SparseCache(model, {0: fl.presets.streaming(2, 3)})
    assert repr(cache) == "SparseCache(3 layers, each with 0 of 0 keys; 0 bytes)"
    with torch.no_grad():
        model(torch.arange(1, 41)[None], past_key_values=cache)
    assert repr(cache) == f"SparseCache(3 layers, each with 4 to 40 of 40 keys; {cache.nbytes:,} bytes)"


def test_sliding_layers_forget_what_slides_out() -> None:
    model = model_of("qwen, some layers slide")
    cache = fl.hf.SparseCache(model)
    model.generate(**prompt(), max_new_tokens=10, do_sample=False, past_key_values=cache)
    assert [layer.cache.kept for layer in cache.layers] == [39, 9, 9]


def test_a_router_chooses_in_every_layer() -> None:
    """With room for every block it reads everything; with less it reads something else."""
    model, given = model_of("llama"), prompt(2)
    dense = model.generate(**given, max_new_tokens=20, do_sample=False)
    actual = []
    for count in (50, 1):
        router = fl.routing.TopBlocks(count, 4, causal=True)
        cache = fl.hf.SparseCache(model, router)
        actual.append(model.generate(**given, max_new_tokens=20, do_sample=False, past_key_values=cache).tolist())
        assert cache.kept == 49
    assert actual[0] == dense.tolist() != actual[1]
    with torch.no_grad(), pytest.raises(fl.UnsupportedError, match="which counts the tokens of each text or reads their"):
        model(**prompt(2, padded=True), past_key_values=fl.hf.SparseCache(model, router))


def test_a_text_can_go_on_in_a_second_call() -> None:
    model, pattern = model_of("llama"), PATTERNS["streaming"]
    first = prompt()
    cache = fl.hf.SparseCache(model, pattern)
    once = said(model, pattern, first, 10, past_key_values=cache)
    longer = torch.cat((once, prompt(n=7)["input_ids"]), 1)
    given = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    actual = said(model, pattern, given, 10, past_key_values=cache)
    assert actual.tolist() == said(model, pattern, given, 10, use_cache=False).tolist()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert said(model, pattern, first, 10, past_key_values=cache).tolist() == once.tolist()


def test_a_sparsified_model_needs_no_second_naming_of_its_pattern() -> None:
    model, given = fl.hf.sparsify(model_of("llama"), {0: fl.window(5), 2: fl.presets.streaming(1, 8)}), prompt()
    cache = fl.hf.SparseCache(model)
    actual = model.generate(**given, max_new_tokens=10, do_sample=False, past_key_values=cache)
    assert [layer.cache.kept for layer in cache.layers] == [6, 39, 9]
    assert actual.tolist() == model.generate(**given, max_new_tokens=10, do_sample=False, use_cache=False).tolist()


@pytest.mark.parametrize("name", ["GPT-OSS, sinks", "Gemma 2, softcap"])
def test_terms_of_the_model_on_its_scores_are_honoured(name: str) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "head_dim": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    sizes |= {**SIZES, "num_hidden_layers": 2} | END | {"sliding_window": 6}
    if name.startswith("Gemma"):
        capped = Gemma2Config(**sizes, attn_logit_softcapping=0.5, final_logit_softcapping=None, query_pre_attn_scalar=2)
        model: Any = Gemma2ForCausalLM(capped).eval()
    else:
        model = GptOssForCausalLM(GptOssConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    fl.hf.register()
    model.set_attn_implementation("farlight")
    pattern, given = fl.presets.streaming(2, 12), prompt(2, padded=True)
    cache = fl.hf.SparseCache(model, pattern)
    actual = said(model, pattern, given, 20, past_key_values=cache)
    assert actual.tolist() == said(model, pattern, given, 20, use_cache=False).tolist()
    assert [layer.cache.kept for layer in cache.layers] == [6, 14]


@pytest.mark.parametrize(
    ("pattern", "right", "why"),
    [
        (fl.seen_by_all([0]) | fl.blocked_window(0, block=8), False, r"blocked_window\(0, block=8\) counts places in the rows"),
        (fl.seen_by_all([0]) | fl.window(8), True, "the padding does not stand before the texts"),
    ],
    ids=["blocks", "right"],
)
def test_padding_under_which_positions_would_mean_two_things(pattern: fl.Pattern, right: bool, why: str) -> None:
    model, given = model_of("llama"), prompt(2, padded=True)
    if right:
        given = {name: value.flip(1) for name, value in given.items()}
    with torch.no_grad(), pytest.raises(fl.UnsupportedError, match=why):
        model(**given, past_key_values=fl.hf.SparseCache(model, pattern))


def test_beams_and_samples() -> None:
    model, pattern = model_of("llama"), PATTERNS["streaming"]
    given = prompt(2, padded=True)
    for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        actual = said(model, pattern, given, 12, past_key_values=fl.hf.SparseCache(model, pattern), **options)
        assert actual.tolist() == said(model, pattern, given, 12, use_cache=False, **options).tolist()
    cache = fl.hf.SparseCache(model, pattern)
    with torch.no_grad():
        model(**given, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert cache.layers[0].cache.batch == 2


@pytest.mark.parametrize("dtype", [None, "int8"], ids=str)
@pytest.mark.parametrize("rule", ["streaming", "router"])
def test_assisted_generation_and_prompt_lookup_write_what_greedy_search_writes(rule: str, dtype: Any) -> None:
    """Drafts are refused again and again, so tokens are taken back; the text is that of one token at a time."""
    model, draft = model_of("llama"), model_of("llama", seed=1)
    draft.set_attn_implementation("eager")
    pattern = fl.presets.streaming(2, 6) if rule == "streaming" else TopBlocks(2, 4, causal=True) | fl.window(3)
    given = {"input_ids": torch.arange(30)[None] % 7 + 3, "attention_mask": torch.ones(1, 30, dtype=torch.int64)}

    def written(**options: Any) -> list[int]:
        cache = fl.hf.SparseCache(model, pattern, dtype=dtype)
        out = model.generate(**given, past_key_values=cache, max_new_tokens=24, do_sample=False, **options)
        assert cache.get_seq_length() <= out.shape[1]
        text: list[int] = out[0].tolist()
        return text

    plain = written()
    assert written(prompt_lookup_num_tokens=3) == plain
    assert written(assistant_model=draft) == plain
    assert written(assistant_model=model_of("llama", seed=2)) == plain


def test_a_cache_refuses_an_attention_that_does_not_know_what_is_left() -> None:
    model = model_of("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(fl.UnsupportedError, match="attn_implementation='sdpa'. does not ask which are left"):
        model(**prompt(), past_key_values=fl.hf.SparseCache(model.config, PATTERNS["streaming"]))


@pytest.mark.parametrize("before", ["untouched", "farlight", "sparse under another pattern", "its own", "sparse by layers"])
def test_a_cache_switches_the_model(before: str) -> None:
    """As README prints it: no `register`, no other call, whatever the model ran under."""
    model, pattern, given = model_of("llama"), fl.presets.streaming(2, 6), prompt()
    expected = said(model, pattern, given, 12, use_cache=False).tolist()
    model.set_attn_implementation("sdpa")
    assert model.generate(**given, max_new_tokens=12, do_sample=False).tolist() != expected
    if before == "farlight":
        fl.hf.sparsify(model)
    if before == "sparse under another pattern":
        fl.hf.sparsify(model, fl.causal() & fl.window(2))
    if before == "its own":
        fl.hf.sparsify(model, pattern)
    if before == "sparse by layers":
        fl.hf.sparsify(model, {1: fl.window(2)})
    cache = fl.hf.SparseCache(model, pattern)
    assert model.generate(**given, past_key_values=cache, max_new_tokens=12, do_sample=False).tolist() == expected
    assert cache.kept == 8
    assert model.generate(**given, use_cache=False, max_new_tokens=12, do_sample=False).tolist() == expected
    fl.hf.restore(model)
    assert model.config._attn_implementation == "sdpa"


def test_continuous_batching_is_refused_under_farlight() -> None:
    """transformers' paged caches know other attentions only; nothing is generated without the pattern."""
    model = fl.hf.sparsify(model_of("llama"), PATTERNS["streaming"])
    with pytest.raises(ValueError, match="farlight is not supported for continuous batching"):
        model.generate_batch([[1, 2, 3]], GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1))


def test_a_model_under_another_pattern_is_refused() -> None:
    model = model_of("llama")
    cache = fl.hf.SparseCache(model, fl.presets.streaming(1, 5))
    with (
        torch.no_grad(),
        fl.hf.use_pattern(model, fl.presets.streaming(2, 5)),
        pytest.raises(fl.UnsupportedError, match=r"runs under .*\[0, 1\].*but its cache was made for"),
    ):
        model(**prompt(), past_key_values=cache)


def test_what_was_dropped_is_not_taken_back() -> None:
    """Beyond the last pass and `keep_back` tokens more, keys are gone; a refused crop changes nothing."""
    model, pattern, given = model_of("llama"), fl.presets.streaming(1, 5), prompt()
    cache = fl.hf.SparseCache(model, pattern, keep_back=2)
    cache.crop(0)
    ids = model.generate(**given, past_key_values=cache, max_new_tokens=12, do_sample=False)
    with pytest.raises(fl.UnsupportedError, match=r"7 tokens cannot be taken back.*it can go back to 38.*keep_back"):
        cache.crop(-7)
    with pytest.raises(fl.ArgumentError, match="pass a negative number"):
        cache.crop(3)
    assert cache.get_seq_length() == 41
    cache.crop(-2)
    assert cache.get_seq_length() == 39
    longer = model.generate(ids[:, :40], past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert longer.tolist() == said(model, pattern, given, 16, use_cache=False).tolist()
    assert cache.is_croppable
    with pytest.raises(fl.UnsupportedError, match="stays on the model's device"):
        cache.layers[0].offload()


def test_dropout_is_refused() -> None:
    model = copy.deepcopy(model_of("llama"))
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    with torch.no_grad(), pytest.raises(fl.UnsupportedError, match=r"has dropout = 0.5 .* call model.eval\(\) first"):
        model(**prompt(), past_key_values=fl.hf.SparseCache(model, fl.window(3)))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((3, fl.window(3)), "int is neither a transformers model nor a configuration"),
        ((LlamaConfig(**SIZES), "window(3)"), "the pattern is str; pass a pattern"),
        ((LlamaConfig(**SIZES), {1: 4}), "the pattern of layer 1 is int; pass a pattern"),
        ((LlamaConfig(**SIZES), {3: fl.window(3)}), "a pattern for layer 3, but the model has layers 0 … 2"),
        ((LlamaConfig(**SIZES), fl.global_tokens([-1])), "counts from the end of the text"),
        ((MambaConfig(num_hidden_layers=1), None), "keeps its past in a .*, which holds more than keys and values"),
    ],
    ids=["int", "text", "layer's int", "layer 3", "no length", "mamba"],
)
def test_what_cannot_be_right_is_said(arguments: Any, why: str) -> None:
    with pytest.raises((fl.ArgumentError, fl.PatternError, fl.UnsupportedError), match=why):
        fl.hf.SparseCache(*arguments)


def test_it_is_what_transformers_expects() -> None:
    cache = fl.hf.SparseCache(Gemma2Config(), fl.window(3), max_length=100)
    assert len(cache) == len(DynamicCache(config=Gemma2Config()).layers)
    assert cache.get_max_length() == 100
    assert not cache.is_compileable
    assert cache.get_mask_sizes(5, 0) == (5, 0)
