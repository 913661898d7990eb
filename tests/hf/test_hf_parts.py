"""Encoder-decoder models under a pattern for each part: encoder, decoder, and attention from the decoder to the encoder."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers as hf
from hf_parity import answer, errors
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import farlight as fl
from farlight.hf import restore, sparsify, use_pattern

TOKENS = {"vocab_size": 50, "d_model": 32, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 2}
T5 = TOKENS | {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
BART = TOKENS | {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "dropout": 0.0, "max_position_embeddings": 64, "init_std": 0.3, "forced_eos_token_id": None,
}  # fmt: skip
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "T5": (hf.T5ForConditionalGeneration, hf.T5Config, T5),
    "BART": (hf.BartForConditionalGeneration, hf.BartConfig, BART),
}
PATTERNS = {"encoder": fl.window(4), "decoder": fl.window(3), "cross": {0: fl.window(5), 1: fl.window(2) | fl.seen_by_all([0])}}


def make(name: str) -> Any:
    fl.hf.register()
    model_class, config_class, sizes = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config_class(**sizes)).eval()
    model.set_attn_implementation("eager")
    return model


def given() -> dict[str, Any]:
    tokens = torch.randint(3, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(tokens)
    real[1, 15:] = 0
    decoder = {"decoder_input_ids": tokens[:, 3:14], "labels": tokens[:, 4:15].clone()}
    return {"input_ids": tokens, "attention_mask": real} | decoder


def masked_eager(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attention module computes a dense softmax under its own mask and the mask of PATTERNS, written here."""
    names = {module: name for name, module in model.named_modules()}

    def attend(
        module: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        dropout: float = 0.0,
        scaling: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        is_cross = "EncDec" in names[module] or "encoder_attn" in names[module]
        part = "cross" if is_cross else names[module].replace("model.", "").split(".")[0]
        pattern: Any = PATTERNS[part]
        if isinstance(pattern, dict):
            pattern = pattern[int(next(word for word in names[module].split(".") if word.isdigit()))]
        allowed = pattern.dense(q.shape[2], k.shape[2], q_offset=0)
        scores = q @ k.mT * (q.shape[3] ** -0.5 if scaling is None else scaling)
        for term in (mask, kwargs.get("position_bias")):
            scores = scores if term is None else scores + term
        weights = scores.masked_fill(~allowed, torch.finfo(torch.float32).min).softmax(3)
        return (weights @ v).transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "masked", attend)
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        monkeypatch.setattr(config, "_attn_implementation_internal", "masked")


@pytest.mark.parametrize("name", MODELS)
def test_each_part_is_the_dense_model_under_its_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name)
    ours = answer(sparsify(model, PATTERNS), given())
    restore(model)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "masked", eager_mask)
    masked_eager(model, monkeypatch)
    theirs = answer(model, given())
    for outputs, _ in (theirs, ours):  # padding in the encoder's text sees no key under the window, and means nothing
        outputs["encoder_last_hidden_state"] = outputs["encoder_last_hidden_state"][given()["attention_mask"].bool()]
    found = errors(theirs, ours)
    assert found.fine, found


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_knows_where_the_decoder_stands(name: str) -> None:
    """Token by token, the window between decoder and encoder moves as in a pass over the whole text; copies keep it."""
    model = sparsify(make(name), PATTERNS)
    inputs = {name: given()[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    with_cache = model.generate(**inputs, **options)
    assert torch.equal(with_cache, model.generate(**inputs, **options, use_cache=False))
    assert torch.equal(copy.deepcopy(model).generate(**inputs, **options), with_cache)
    assert torch.equal(pickle.loads(pickle.dumps(model)).generate(**inputs, **options), with_cache)


@pytest.mark.parametrize(
    ("pattern", "error", "text"),
    [
        ({"cross": fl.routing.TopKeys(3)}, fl.UnsupportedError, "cross: .* reads queries as tokens of the keys' text"),
        ({"cross": fl.global_tokens([0])}, fl.UnsupportedError, "cross: .* reads queries as tokens of the keys' text"),
        ({"decode": fl.window(3)}, fl.ArgumentError, "'decode', but .* has attention in 'encoder', 'decoder', 'cross' only"),
        ({"decoder": {7: fl.window(3)}}, fl.ArgumentError, "layer 7, but the attention layers of .*, decoder, are 0, 1;"),
        ({"decoder": 3}, fl.ArgumentError, "the pattern of layer 'decoder' is int"),
        (fl.window(3), fl.UnsupportedError, "Give each part its own"),
    ],
)
def test_what_no_part_can_run_under_is_refused(pattern: Any, error: type[Exception], text: str) -> None:
    model = make("T5")
    before = model(**given()).logits
    with pytest.raises(error, match=text), use_pattern(model, pattern):
        pass
    assert torch.equal(model(**given()).logits, before)
