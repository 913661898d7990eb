"""Models made sparse for good, and dense again; patterns for each layer in a file."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    BigBirdConfig,
    BigBirdModel,
    LlamaConfig,
    LlamaForCausalLM,
    LongformerConfig,
    LongformerModel,
    LongT5Config,
    LongT5EncoderModel,
    T5Config,
    T5Model,
    XLNetConfig,
    XLNetModel,
)

import farlight as fl
from farlight.hf import read_layers, restore, sparsify, use_pattern, write_layers
from farlight.routing import KMeans, TopBlocks, TopKeys, read_router

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def bert(**options: Any) -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SMALL | options)).eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()


def ids(batch: int = 2, n: int = 20) -> Tensor:
    return torch.randint(3, 50, (batch, n), generator=torch.Generator().manual_seed(0))


def out(model: Any, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        actual: Tensor = model(input_ids=ids() if tokens is None else tokens)[0]
    return actual


def under(model: Any, pattern: Any) -> Tensor:
    with use_pattern(model, pattern):
        return out(model)


# ---- sparsify and restore --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize(
    "pattern", [None, fl.window(3), TopKeys(3), {1: fl.window(2)}, {0: TopBlocks(1, block=4), 1: None}], ids=str
)
def test_a_sparse_model_computes_what_use_pattern_does(make: Any, pattern: Any) -> None:
    model = make()
    dense, expected = out(model), under(model, pattern)
    assert sparsify(model, pattern) is model
    assert torch.equal(out(model), expected)
    assert restore(model) is model
    assert torch.equal(out(model), dense)
    assert pattern is None or not torch.allclose(expected, dense, atol=1e-3)


def test_everything_is_put_back() -> None:
    model = bert()
    before = model.config._attn_implementation
    state = {name: value.clone() for name, value in model.state_dict().items()}
    sparsify(model, fl.window(1))
    assert model.config._attn_implementation == "farlight"
    assert model.state_dict().keys() == state.keys()
    sparsify(model, fl.window(5))  # the pattern is replaced; what is put back is what was there before the first
    assert torch.equal(out(model), under(bert(), fl.window(5)))
    restore(model)
    assert model.config._attn_implementation == before
    assert not any(name.startswith("_farlight") for module in model.modules() for name in module.__dict__)
    with pytest.raises(fl.ArgumentError, match=r"this BertModel was not made sparse by fl\.hf\.sparsify"):
        restore(model)


def test_a_configuration_that_differs_by_layer_is_put_back() -> None:
    """Gemma 4 and its kin: reading such a setting, or comparing two configurations, raises in transformers."""
    gemma4 = pytest.importorskip("transformers.models.gemma4")
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "vocab_size_per_layer_input": 50}
    kinds = ["sliding_attention", "full_attention"]
    config = gemma4.Gemma4TextConfig(**SMALL | sizes, layer_types=kinds, hidden_size_per_layer_input=8)
    model = gemma4.Gemma4TextModel(config).eval()
    dense = out(model)
    for restores in (lambda: restore(sparsify(model, fl.window(2, 0))), lambda: under(model, fl.window(2, 0))):
        restores()
        assert model.config is config
        assert torch.equal(out(model), dense)


def test_a_failed_call_changes_nothing() -> None:
    model = bert()
    dense, before = out(model), model.config._attn_implementation
    for wrong in ({7: fl.window(1)}, {0: 3}, 3):
        with pytest.raises(fl.ArgumentError):
            sparsify(model, wrong)
    with pytest.raises(fl.ArgumentError, match="backend = 'fast' is unknown"):
        sparsify(model, fl.window(1), backend="fast")
    assert model.config._attn_implementation == before
    assert torch.equal(out(model), dense)


def test_use_pattern_inside_a_sparse_model() -> None:
    model = sparsify(bert(), fl.window(2))
    expected = out(model)
    assert torch.equal(under(model, fl.window(6)), under(bert(), fl.window(6)))
    assert torch.equal(out(model), expected)


def test_a_decoder_stays_causal() -> None:
    model = sparsify(llama(), fl.window(4) | fl.global_tokens([19]))
    tokens = ids()
    other = tokens.clone()
    other[:, 12:] = 7
    assert torch.equal(out(model, tokens)[:, :12], out(model, other)[:, :12])


def test_a_backend_is_used() -> None:
    model = bert()
    torch.testing.assert_close(
        out(sparsify(model, fl.window(2), backend="reference")), under(bert(), fl.window(2)), atol=1e-5, rtol=0
    )


# ---- copies and files ------------------------------------------------------------------------------------------------
def test_a_copy_is_sparse_and_independent() -> None:
    model = sparsify(bert(), {0: fl.window(1), 1: TopKeys(4)})
    twin = copy.deepcopy(model)
    assert torch.equal(out(twin), out(model))
    restore(twin)
    assert torch.equal(out(twin), out(bert()))
    assert torch.equal(out(model), under(bert(), {0: fl.window(1), 1: TopKeys(4)}))


def test_a_pickled_model_is_sparse_in_another_process(tmp_path: Path) -> None:
    model = sparsify(bert(), fl.window(2) | fl.global_tokens([0]))
    expected = out(model)
    assert torch.equal(out(pickle.loads(pickle.dumps(model))), expected)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    assert torch.equal(out(torch.load(stored, weights_only=False)), expected)
    (tmp_path / "model").write_bytes(pickle.dumps((model, ids(), expected)))
    code = (
        "import pickle, sys, torch\n"
        "model, tokens, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
        "with torch.no_grad(): found = model(input_ids=tokens)[0]\n"
        "assert torch.equal(found, expected)\n"
        "import farlight; farlight.hf.restore(model); print(model.config._attn_implementation)"
    )
    source = str(Path(fl.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r})\n{code}", str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "sdpa"


def test_a_saved_model_is_the_dense_one(tmp_path: Path) -> None:
    model = sparsify(bert(), fl.window(2))
    model.save_pretrained(tmp_path)
    assert "farlight" not in (tmp_path / "config.json").read_text()
    loaded = BertModel.from_pretrained(tmp_path).eval()
    assert torch.equal(out(loaded), out(bert()))
    assert torch.equal(out(sparsify(loaded, fl.window(2))), out(model))


def test_training_a_sparse_model_trains_the_same_parameters() -> None:
    model = sparsify(bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), fl.window(3)).train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=ids()).last_hidden_state.square().mean().backward()
    step.step()
    weight = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(dict(model.named_parameters())[weight], before[weight])
    restore(model)
    assert dict(model.named_parameters()).keys() == before.keys()


# ---- a file of patterns ----------------------------------------------------------------------------------------------
def test_a_file_round_trip(tmp_path: Path) -> None:
    layers = {0: fl.per_head([fl.window(n) for n in range(4)]), 1: fl.pairs(torch.rand(20, 20) > 0.5)}
    text = write_layers(layers, tmp_path / "fit.json", model={"name": "tiny"})
    assert json.loads(text)["model"] == {"name": "tiny"}
    for source in (tmp_path / "fit.json", str(tmp_path / "fit.json"), text):
        assert read_layers(source) == layers
        assert torch.equal(out(sparsify(bert(), source)), under(bert(), layers))


def test_routers_and_gaps_in_a_file() -> None:
    text = write_layers({1: "topkeys(3) | window(1)", 3: None, 5: read_router("topblocks(2, block=4)")})
    assert [entry is None for entry in json.loads(text)["layers"]] == [True, False, True, True, True, False]
    actual = read_layers(text)
    assert list(actual) == [1, 5]
    assert write_layers(actual) == text
    assert torch.equal(under(bert(), {1: actual[1]}), under(bert(), {1: TopKeys(3) | fl.window(1)}))
    assert read_layers(write_layers({})) == {}


@pytest.mark.parametrize(
    "text, message",
    [
        ("{]", "the text is not JSON"),
        ('{"layers": []}', "the text is of format None, not 'farlight.fit'"),
        ('{"format": "farlight.fit", "version": 9}', "the text is of version 9; this farlight reads version 1"),
        ('{"format": "farlight.fit", "version": 1}', "'layers' is NoneType; it must be a list"),
        ('{"format": "farlight.fit", "version": 1, "layers": [3]}', "layer 0 is 3; it must be"),
        ('{"format": "farlight.fit", "version": 1, "layers": [null, {"pattern": 3}]}', "layer 1 is {'pattern': 3}; it must"),
        (
            '{"format": "farlight.fit", "version": 1, "layers": [{"pattern": "", "router": ""}]}',
            "layer 0 is {'pattern': '', 'router': ''}; it must",
        ),
        ('{"format": "farlight.fit", "version": 1, "layers": [{"router": "topkeys(-1)"}]}', "layer 0: cannot read the router"),
        ('{"format": "farlight.fit", "version": 1, "layers": [{"pattern": "window(1)"}]}', "layer 0: "),
    ],
)
def test_what_is_not_such_a_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(fl.PatternError) as error:
        read_layers(text)
    assert message in str(error.value)
    (tmp_path / "fit.json").write_text("[1]")
    with pytest.raises(fl.PatternError, match=r"fit\.json is of format 'list', not 'farlight\.fit'"):
        sparsify(bert(), tmp_path / "fit.json")
    with pytest.raises(FileNotFoundError):
        sparsify(bert(), "nowhere.json")


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(fl.ArgumentError, match="layer 0 has a KMeans, which does not say how it was written"):
        write_layers({0: KMeans(4, 8, 2)})
    with pytest.raises(fl.ArgumentError, match="layer 2 has a int, which does not say"):
        write_layers({2: 3})  # type: ignore[dict-item]
    with pytest.raises(fl.ArgumentError, match="-1 is not the number of a layer"):
        write_layers({-1: fl.window(1)})
    with pytest.raises(fl.ArgumentError, match="model cannot be written as JSON"):
        write_layers({}, model={"weights": torch.zeros(2)})
    with pytest.raises(fl.PatternError, match="cannot read the router 'topkeys"):
        write_layers({0: "topkeys("})


# ---- models that cannot be made sparse -------------------------------------------------------------------------------
def test_refusals() -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4, "vocab_size": 50}
    with pytest.raises(fl.UnsupportedError, match="T5Model has cross-attention"):
        sparsify(T5Model(T5Config(**sizes)), fl.window(2))
    with pytest.raises(fl.UnsupportedError, match="XLNetModel does not take its attention from"):
        sparsify(XLNetModel(XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=16, vocab_size=50)), fl.window(2))
    # LongT5's file uses AttentionInterface, but its local attention does not.
    encoder = LongT5EncoderModel(LongT5Config(**sizes, is_encoder_decoder=False, encoder_attention_type="local"))
    with pytest.raises(fl.UnsupportedError, match="LongT5EncoderModel does not take its attention from"):
        sparsify(encoder)
    with pytest.raises(fl.UnsupportedError, match="Linear is not a transformers model"):
        sparsify(torch.nn.Linear(1, 1))


def test_a_pattern_that_would_not_reach_every_attention_is_refused() -> None:
    class HomemadeAttention(torch.nn.Module):
        pass

    model = bert()
    model.encoder.layer[1].attention = HomemadeAttention()
    with pytest.raises(fl.UnsupportedError, match=r"holds HomemadeAttention, which .* give a mapping .* of 0\."):
        sparsify(model, fl.window(2))
    assert model.config._attn_implementation == "sdpa"
    sparsify(model, {0: fl.window(2)})


# ---- models that bring a sparse attention of their own ---------------------------------------------------------------
def longformer() -> LongformerModel:
    torch.manual_seed(0)
    return LongformerModel(LongformerConfig(**SMALL, attention_window=[4, 4])).eval()


def bigbird() -> BigBirdModel:
    torch.manual_seed(0)
    return BigBirdModel(BigBirdConfig(**SMALL | {"max_position_embeddings": 128}, block_size=4, num_random_blocks=1)).eval()


@pytest.mark.parametrize("make", [longformer, bigbird])
def test_their_own_attention_is_replaced(make: Any) -> None:
    model, tokens = make(), ids(1, 60)
    expected, before = out(model, tokens), {type(module) for module in model.modules()}
    assert sparsify(model) is model
    assert any(type(module).__module__.startswith("farlight") for module in model.modules())
    torch.testing.assert_close(out(model, tokens), expected, atol=2e-5, rtol=0)
    assert restore(model) is model
    assert {type(module) for module in model.modules()} == before
    assert torch.equal(out(model, tokens), expected)
    with pytest.raises(fl.ArgumentError, match="was not made sparse"):
        restore(model)
    with pytest.raises(fl.ArgumentError, match=f"{type(model).__name__} brings a sparse attention of its own"):
        sparsify(model, fl.window(2))


def test_options_go_to_the_models_that_have_them() -> None:
    model, tokens = longformer(), ids(1, 40)
    other = tokens.clone()
    other[:, 25:] = 7
    sparsify(model, autoregressive=True)
    assert torch.equal(out(model, tokens)[:, :25], out(model, other)[:, :25])
    with pytest.raises(fl.ArgumentError, match="'autoregressive' is not an option for BertModel"):
        sparsify(bert(), fl.window(2), autoregressive=True)
