"""Models whose attention has terms on its scores, against transformers' eager attention: softcap, T5's tables, sinks."""

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
GEMMA = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "attn_logit_softcapping": 2.0, "sliding_window": 9}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "Gemma 2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, GEMMA),
    "T5 encoder": (hf.T5EncoderModel, hf.T5Config, T5),
    "T5": (hf.T5ForConditionalGeneration, hf.T5Config, T5),
    "mT5": (hf.MT5ForConditionalGeneration, hf.MT5Config, T5),
    "UMT5": (hf.UMT5ForConditionalGeneration, hf.UMT5Config, T5),
}


def make(name: str) -> Any:
    fl.hf.register()
    model_class, config_class, sizes = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config_class(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=2)).eval()
    with torch.no_grad():  # tables that matter, and queries that reach the cap
        for parameter_name, parameter in model.named_parameters():
            parameter.mul_(4.0 if ".q_proj" in parameter_name else 1.0)
            if "relative_attention_bias" in parameter_name:
                parameter.normal_()
    model.set_attn_implementation("eager")
    return model


def arguments(name: str, n: int = 40) -> dict[str, Any]:
    tokens = torch.randint(3, 50, (2, n), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(tokens)
    if name != "Gemma 2":
        real[1, n - 7 :] = 0
    given = {"input_ids": tokens, "attention_mask": real}
    return given | ({"decoder_input_ids": tokens[:, :13]} if "Conditional" in MODELS[name][0].__name__ else {})


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_eager(name: str) -> None:
    model, given = make(name), arguments(name)
    theirs = answer(model, given)
    model.set_attn_implementation("farlight")
    found = errors(theirs, answer(model, given))
    assert found.fine, found


@pytest.mark.parametrize("name", ["Gemma 2", "T5", "UMT5"])
def test_generated_tokens_are_those_of_eager(name: str) -> None:
    model, given = make(name), arguments(name, 12)
    given.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 128, "min_new_tokens": 128, "do_sample": False}
    theirs = model.generate(**given, **options)
    model.set_attn_implementation("farlight")
    assert torch.equal(model.generate(**given, **options), theirs)


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
