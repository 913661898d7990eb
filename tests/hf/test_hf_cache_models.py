"""Whether a SparseCache attends over what it kept: as the sparse model without a cache, or refused."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import farlight as fl
from farlight.hf.layers import attention_modules

SCRIPT = Path(__file__).parents[2] / "scripts" / "small_models.py"
PATTERN = fl.presets.streaming(2, 4)
# Layers that expand keys or take values apart behind the cache.
LATENT = ["deepseek_v2", "deepseek_v3", "diffllama", "glm4_moe_lite", "jetmoe", "minicpm3", "youtu"]
SAME = ["gpt2", "llama", "mistral", "moshi", "phi3", "qwen3", "roberta"]


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("small_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL_MODELS = _script()
IDS, REAL = SMALL_MODELS.TOKENS, SMALL_MODELS.REAL


def logits(model: Any, start: int, stop: int, **options: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS[:, start:stop], attention_mask=REAL[:, :stop], **options).logits
    return out.float()


def without_a_cache(name: str) -> tuple[Any, Tensor] | None:
    """A small model of a type, and what it says under PATTERN; None where either cannot be had."""
    actual = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    kind = getattr(transformers, actual if isinstance(actual, str) else actual[0])
    for config in SMALL_MODELS.configurations(CONFIG_MAPPING[name]):
        try:
            model = SMALL_MODELS.build(kind, config)
            with fl.hf.use_pattern(model, PATTERN):
                return model, logits(model, 0, 24, use_cache=False)
        except Exception:
            continue
    return None


def verdict(model: Any, expected: Tensor) -> str:
    """`same`, or where and why a SparseCache was refused; anything else fails."""
    fl.hf.register()
    model.set_attn_implementation("farlight")
    stage = "making the cache"
    try:
        cache = fl.hf.SparseCache(model, PATTERN)
        stage = "the first pass"
        actual = [logits(model, 0, 20, past_key_values=cache, use_cache=True)]
        stage = "a later pass"
        actual += [logits(model, t, t + 1, past_key_values=cache, use_cache=True) for t in range(20, 24)]
    except fl.UnsupportedError as error:
        return f"{stage}: {error}"
    difference = (torch.cat(actual, 1) - expected)[REAL.bool()].abs().max() / expected.abs().max()
    # Random weights of deep recurrent models enlarge rounding; a wrong key shows in the first digit.
    assert float(difference) < 2e-4
    assert cache.get_seq_length() == 24
    return "same"


@pytest.mark.parametrize("name", SAME)
def test_what_the_cache_kept_is_what_is_attended_over(name: str) -> None:
    model = without_a_cache(name)
    assert model is not None
    assert verdict(*model) == "same"


@pytest.mark.parametrize("name", LATENT)
def test_keys_that_change_behind_the_cache_are_refused_at_the_first_pass(name: str) -> None:
    model = without_a_cache(name)
    assert model is not None
    said = verdict(*model)
    assert said.startswith("the first pass: SparseCache: this model computes with the keys or values of layer 0"), said
    assert "Generate under fl.hf.use_pattern(model, pattern) without SparseCache" in said


def test_the_way_that_the_error_names_gives_the_same_tokens() -> None:
    actual = without_a_cache("deepseek_v3")
    assert actual is not None
    model, _ = actual
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with fl.hf.use_pattern(model, PATTERN):
        cached, plain = (model.generate(IDS, attention_mask=REAL, use_cache=use, **options) for use in (True, False))
    assert cached.tolist() == plain.tolist()


def test_layers_that_share_keys_are_served_from_where_those_were_kept() -> None:
    gemma4 = pytest.importorskip("transformers.models.gemma4")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"global_head_dim": 8, "vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
    kinds = ["sliding_attention", "full_attention"] * 2
    config = gemma4.Gemma4TextConfig(
        **sizes, num_hidden_layers=4, num_kv_shared_layers=2, layer_types=kinds, sliding_window=6, initializer_range=0.3
    )
    torch.manual_seed(0)
    model = gemma4.Gemma4ForCausalLM(config).eval()
    with fl.hf.use_pattern(model, PATTERN):
        expected = logits(model, 0, 24, use_cache=False)
    assert verdict(model, expected) == "same"
    cache = fl.hf.SparseCache(model, PATTERN)
    logits(model, 0, 20, past_key_values=cache)
    assert cache.kept == 5  # 2 sinks, and 3 that the next token will see
    with pytest.raises(fl.ArgumentError, match="a pattern for layer 3, which keeps no keys of its own"):
        fl.hf.SparseCache(model, {3: PATTERN})


def test_a_model_whose_layers_keep_the_keys_of_images_is_refused() -> None:
    config = CONFIG_MAPPING["mllama_text_model"]()
    with pytest.raises(fl.UnsupportedError, match=r"layers \[3, 8, 13, .*\] of this model keep the keys of images"):
        fl.hf.SparseCache(config, PATTERN)


def test_heads_that_differ_by_layer() -> None:
    kinds = ["sliding_attention", "full_attention"]
    config = CONFIG_MAPPING["step3p5"](
        num_hidden_layers=2, layer_types=kinds, sliding_window=8, attention_other_setting={"num_attention_heads": 96}
    )
    assert [layer.options["heads"] for layer in fl.hf.SparseCache(config, PATTERN).layers] == [96, 64]


@pytest.mark.slow
def test_every_causal_model_is_the_same_or_refused_before_a_wrong_word() -> None:
    verdicts: Counter[str] = Counter()
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        actual = without_a_cache(name)
        if actual is None or not attention_modules(actual[0]):
            continue
        said = verdict(*actual)
        verdicts[said.split(":")[0]] += 1
        assert not said.startswith("a later pass"), f"{name}: {said}"
    print(dict(verdicts))
    assert verdicts["same"] >= 70
