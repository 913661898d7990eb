"""What a model shares with its caller and with other models: configuration, hooks, buffers. Sparsifying touches none of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import farlight as fl
from farlight.hf import lengthen, restore, sparsify

SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
SEQ2SEQ: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 50, "max_position_embeddings": 64, "init_std": 0.3,
}  # fmt: skip


def nested() -> Any:
    text = {**SMALL, "num_key_value_heads": 1}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8,
              "patch_size": 4}  # fmt: skip
    return hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)


FAMILIES: dict[str, tuple[Any, Callable[[], Any], Any]] = {
    "Longformer": (hf.LongformerModel, lambda: hf.LongformerConfig(attention_window=4, **SMALL), None),
    "LED": (hf.LEDModel, lambda: hf.LEDConfig(attention_window=4, **SEQ2SEQ), None),
    "BigBird": (hf.BigBirdModel, lambda: hf.BigBirdConfig(block_size=4, num_random_blocks=1, **SMALL), None),
    "BigBird-Pegasus": (
        hf.BigBirdPegasusModel, lambda: hf.BigBirdPegasusConfig(block_size=4, num_random_blocks=1, **SEQ2SEQ), None,
    ),
    "BERT": (hf.BertModel, lambda: hf.BertConfig(**SMALL), fl.window(2)),
    "Llama": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(num_key_value_heads=1, **SMALL), fl.window(2)),
    "CLIP": (hf.CLIPModel, nested, fl.window(2)),
}  # fmt: skip
every_family = pytest.mark.parametrize("name", FAMILIES)


def made(name: str, config: Any = None) -> Any:
    kind, make, _ = FAMILIES[name]
    torch.manual_seed(0)
    return kind(make() if config is None else config).eval()


def sparse(name: str, model: Any) -> Any:
    return sparsify(model, FAMILIES[name][2])


def inputs(name: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    more = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))} if name == "CLIP" else {}
    return {"input_ids": ids, "attention_mask": mask} | more


def out(name: str, model: Any) -> Tensor:
    with torch.no_grad():
        actual = model(**inputs(name))
    first: Tensor = actual.logits_per_text if name == "CLIP" else actual[0]
    return first


def written(config: Any) -> dict[str, Any]:
    """All that a configuration holds, private attributes and inner configurations included."""
    return {
        name: written(value) if hasattr(value, "sub_configs") else copy.deepcopy(value) for name, value in vars(config).items()
    }


@every_family
def test_the_callers_configuration_stays_as_it_is(name: str) -> None:
    config = FAMILIES[name][1]()
    sibling, model = made(name, config), made(name, config)
    before, expected = written(config), out(name, sibling)
    sparse(name, model)
    sparse(name, model)
    assert written(config) == before
    assert torch.equal(out(name, sibling), expected)
    for again in (config, copy.deepcopy(config), model.config):
        assert out(name, made(name, again)).isfinite().all()
    restore(model)
    assert model.config is config
    assert written(config) == before
    assert torch.equal(out(name, model), expected)


@every_family
def test_what_is_changed_in_a_configuration_meanwhile_is_kept(name: str) -> None:
    model = made(name)
    implementation = model.config._attn_implementation
    sparse(name, model).config.num_labels = 7
    restore(model)
    assert model.config.num_labels == 7
    assert model.config._attn_implementation == implementation


def attention_of(name: str, model: Any) -> nn.Module:
    place = {
        "Longformer": "encoder.layer.0.attention.self", "LED": "encoder.layers.0.self_attn.longformer_self_attn",
        "BigBird": "encoder.layer.0.attention.self", "BigBird-Pegasus": "encoder.layers.0.self_attn.self",
        "BERT": "encoder.layer.0.attention.self", "Llama": "model.layers.0.self_attn",
        "CLIP": "text_model.encoder.layers.0.self_attn",
    }[name]  # fmt: skip
    actual: nn.Module = model.get_submodule(place)
    return actual


@every_family
def test_hooks_of_attention_modules_are_called_before_while_and_after(name: str) -> None:
    model, seen = made(name), []
    attention_of(name, model).register_forward_hook(lambda module, given, actual: seen.append("old"))
    attention_of(name, model).register_forward_pre_hook(lambda module, given: seen.append("before"))
    out(name, model)
    assert seen == ["before", "old"]
    sparse(name, model)
    handle = attention_of(name, model).register_forward_hook(lambda module, given, actual: seen.append("new"))
    out(name, model)
    assert seen[2:] == ["before", "old", "new"]
    restore(model)
    out(name, model)
    assert seen[5:] == ["before", "old", "new"]
    handle.remove()
    out(name, model)
    assert seen[8:] == ["before", "old"]


@pytest.mark.parametrize("name", ["BigBird", "BERT", "Llama"])
@torch.no_grad()
def test_attentions_are_captured_after_hidden_states_of_a_sparse_model(name: str) -> None:
    model = made(name)
    sparse(name, model)
    hidden = model(**inputs(name), output_hidden_states=True).hidden_states
    restore(model)
    model.set_attn_implementation("eager")
    actual = model(**inputs(name), output_hidden_states=True, output_attentions=True)
    assert len(actual.hidden_states) == len(hidden) == 3
    assert [weights.shape[:2] for weights in actual.attentions] == [(2, 2), (2, 2)]


@every_family
def test_buffers_and_parameters_of_attention_modules_stay(name: str) -> None:
    model = made(name)
    attention_of(name, model).register_buffer("counts", torch.ones(3))
    state = {key: value.data_ptr() for key, value in model.state_dict().items()}
    sparse(name, model)
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == state
    attention_of(name, model).register_parameter("added", nn.Parameter(torch.zeros(2)))
    model.double()
    restore(model)
    assert attention_of(name, model).get_buffer("counts").dtype == torch.float64
    assert attention_of(name, model).get_parameter("added").dtype == torch.float64
    assert list(model.state_dict()) != list(state)


@pytest.mark.parametrize("name", ["Longformer", "BigBird", "BERT", "Llama"])
def test_lengthen_leaves_the_callers_configuration_alone(name: str) -> None:
    config = FAMILIES[name][1]()
    sibling, model = made(name, config), made(name, config)
    before, expected = written(config), out(name, sibling)
    length = 200
    lengthen(model, length)
    assert written(config) == before
    assert torch.equal(out(name, sibling), expected)
    with pytest.raises(fl.FarlightError):
        lengthen(sibling, 3)
    assert sibling.config is config
