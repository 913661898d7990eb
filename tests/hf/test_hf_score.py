"""Models whose attention has terms on its scores, wide keys or sinks, against transformers' eager attention.

Outputs, the gradient of every parameter, and 128 tokens of generation; a decoder's prompts are padded on the left. Small shapes
run with the suite, those of published models as `slow`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from hf_parity import answer, errors

import farlight as fl
from farlight.hf.attention_function import attention_forward
from farlight.hf.lazy_mask import ModelMask

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {"initializer_range": 0.3}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
GEMMA = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "attn_logit_softcapping": 2.0, "sliding_window": 9}
BLOOM = {"vocab_size": 50, "hidden_size": 48, "n_layer": 2, "n_head": 6} | WIDE
MPT = {"vocab_size": 50, "d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 256} | WIDE
FALCON = SIZES | WIDE | {"alibi": True, "multi_query": False, "bias": True}
LATENT = SIZES | WIDE | {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
SINKS = SIZES | WIDE | {
    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 9, "num_local_experts": 2, "num_experts_per_tok": 1,
}  # fmt: skip
BART = {
    "vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0, "max_position_embeddings": 400,
    "init_std": 0.3, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
Case = tuple[type, type, dict[str, Any]]
MODELS: dict[str, Case] = {
    "Gemma 2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, GEMMA),
    "T5 encoder": (hf.T5EncoderModel, hf.T5Config, T5),
    "T5": (hf.T5ForConditionalGeneration, hf.T5Config, T5),
    "mT5": (hf.MT5ForConditionalGeneration, hf.MT5Config, T5),
    "UMT5": (hf.UMT5ForConditionalGeneration, hf.UMT5Config, T5),
    "BLOOM": (hf.BloomForCausalLM, hf.BloomConfig, BLOOM),
    "MPT": (hf.MptForCausalLM, hf.MptConfig, MPT),
    "Falcon": (hf.FalconForCausalLM, hf.FalconConfig, FALCON),
    "DeepSeek, latent": (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config, LATENT),
    "GPT-OSS": (hf.GptOssForCausalLM, hf.GptOssConfig, SINKS),
    "BART": (hf.BartForConditionalGeneration, hf.BartConfig, BART),
}
# The attention of published models, with fewer layers, words and experts and smaller multilayer perceptrons.
FEW = {"vocab_size": 4096, "num_hidden_layers": 2, "intermediate_size": 2048}
LITE = FEW | {
    "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 256, "first_k_dense_replace": 1,
}  # fmt: skip
BASE = BART | {
    "vocab_size": 4096, "d_model": 768, "encoder_attention_heads": 12, "decoder_attention_heads": 12, "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072, "init_std": 0.02,
}  # fmt: skip
RW = FEW | {"hidden_size": 2048, "num_attention_heads": 32, "alibi": True, "multi_query": False, "bias": True}
SMALL = {"vocab_size": 4096, "dropout_rate": 0.0}
PUBLISHED: dict[str, Case] = {
    # Without relu: at its kink the rounding of the attention decides a derivative.
    "T5-small": (hf.T5ForConditionalGeneration, hf.T5Config, SMALL | {"feed_forward_proj": "gated-gelu"}),
    "mT5-small": (hf.MT5ForConditionalGeneration, hf.MT5Config, SMALL),
    "UMT5-small": (hf.UMT5ForConditionalGeneration, hf.UMT5Config, SMALL),
    "BART-base": (hf.BartForConditionalGeneration, hf.BartConfig, BASE),
    "Gemma-2-2b": (hf.Gemma2ForCausalLM, hf.Gemma2Config, FEW | {"sliding_window": 128}),
    "BLOOM-560m": (hf.BloomForCausalLM, hf.BloomConfig, {"vocab_size": 4096, "hidden_size": 1024, "n_layer": 2, "n_head": 16}),
    "MPT-1b": (hf.MptForCausalLM, hf.MptConfig, {"vocab_size": 4096, "d_model": 2048, "n_layers": 2, "n_heads": 16}),
    "Falcon-RW-1b": (hf.FalconForCausalLM, hf.FalconConfig, RW),
    "DeepSeek-V2-Lite": (hf.DeepseekV2ForCausalLM, hf.DeepseekV2Config, LITE),
    "GPT-OSS-20b": (hf.GptOssForCausalLM, hf.GptOssConfig, FEW | {"num_local_experts": 2, "num_experts_per_tok": 1}),
}


def make(name: str) -> Any:
    fl.hf.register()
    model_class, config_class, sizes = (MODELS | PUBLISHED)[name]
    torch.manual_seed(0)
    model = model_class(config_class(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=2)).eval()
    with torch.no_grad():  # tables and sinks that matter, and queries that reach the cap
        for parameter_name, parameter in model.named_parameters():
            parameter.mul_(4.0 if ".q_proj" in parameter_name and "emma" in type(model).__name__ else 1.0)
            if "relative_attention_bias" in parameter_name or "sinks" in parameter_name:
                parameter.normal_()
    if "Falcon" not in name:  # whose eager attention adds ALiBi twice; SDPA, its default, does not
        model.set_attn_implementation("eager")
    return model


def arguments(name: str, n: int = 40) -> dict[str, Any]:
    """Two texts, the second padded: on the left for a decoder, whose loss leaves out what a row of padding predicts."""
    seq2seq = "Conditional" in (MODELS | PUBLISHED)[name][0].__name__
    tokens = torch.randint(3, 50, (2, n), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(tokens)
    pads_right = seq2seq or "encoder" in name
    real[1, slice(n - 7, n) if pads_right else slice(0, 7)] = 0
    given = {"input_ids": tokens, "attention_mask": real}
    return given | ({"decoder_input_ids": tokens[:, : n // 3]} if seq2seq else {})


def compared(name: str, n: int = 40) -> Any:
    """The errors of outputs (of real tokens) and gradients under farlight."""
    model, given = make(name), arguments(name, n)
    real = given["attention_mask"]
    if "Causal" in type(model).__name__:
        predicted = real * torch.nn.functional.pad(real, (1, -1))
        given["labels"] = given["input_ids"].masked_fill(predicted == 0, -100)
    theirs = answer(model, given)
    ours = answer(fl.hf.sparsify(model), given)
    for outputs, _ in (theirs, ours):
        outputs.update({key: x[real.bool()] for key, x in outputs.items() if x.shape[:2] == real.shape})
    return errors(theirs, ours)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_eager(name: str) -> None:
    found = compared(name)
    print(f"{name}: outputs {found.output:.1e}, gradients {found.gradient:.1e} ({found.where})")
    assert found.fine, found


def generations(name: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """128 tokens of transformers' own attention and of farlight's, greedy, with a cache."""
    model, given = make(name), arguments(name, n)
    given.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 128, "min_new_tokens": 128, "do_sample": False}
    return model.generate(**given, **options), fl.hf.sparsify(model).generate(**given, **options)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("Gemma 2", "T5", "BLOOM") else pytest.mark.slow)
        for name in MODELS
        if name != "T5 encoder"
    ],
)
def test_generated_tokens_are_those_of_eager(name: str) -> None:
    theirs, ours = generations(name, 12)
    assert torch.equal(theirs, ours)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name: str) -> None:
    found = compared(name, 300)
    print(f"{name}: outputs {found.output:.1e}, gradients {found.gradient:.1e} ({found.where})")
    assert found.fine, found
    theirs, ours = generations(name, 40)
    assert theirs.shape[1] >= 128
    assert torch.equal(theirs, ours)


def test_an_encoder_with_tables_under_a_pattern_is_the_dense_model_under_its_mask() -> None:
    """The pattern restricts the pairs; the bias is that of the distance."""
    model, given = make("T5 encoder"), arguments("T5 encoder")
    model.set_attn_implementation("farlight")
    whole = model(**given).last_hidden_state
    same = fl.hf.sparsify(model, fl.window(39))(**given).last_hidden_state
    torch.testing.assert_close(same, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"position_bias": torch.randn(1, 1, 5, 5)}, "farlight needs a function of the distance alone"),
        ({"position_bias": torch.ones(2, 1, 5, 5)}, r"passes position_bias \(2, 1, 5, 5\); farlight needs \(1, 1, 5, 5\)"),
        ({"position_bias": torch.ones(1, 1, 5, 4)}, "the cache has dropped keys"),
    ],
)
def test_what_cannot_be_read_is_refused(options: dict[str, Any], text: str) -> None:
    q = torch.zeros(1, 1, 5, 4)
    with pytest.raises(fl.UnsupportedError, match=text):
        attention_forward(torch.nn.Identity(), q, q, q, ModelMask(fl.full(), 0), **options)
