"""BLOOM, MPT and Falcon, whose attention modules are replaced: patterns, padding, long positions, restoring, refusals.

Parity, generation and gradients of the whole models are in test_hf_score.py.
"""

from __future__ import annotations

import copy
import io
import pickle
import sys
from typing import Any

import pytest
import torch
import transformers as hf
from hf_parity import answer, errors
from torch import Tensor

import farlight as fl
from farlight.hf import restore, sparsify, use_pattern

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 50, "initializer_range": 0.3}
FALCON = TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "attn_implementation": "sdpa"}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "BLOOM": (hf.BloomForCausalLM, hf.BloomConfig, TOKENS | {"hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "MPT": (hf.MptForCausalLM, hf.MptConfig, TOKENS | {"d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 64}),
    "Falcon": (hf.FalconForCausalLM, hf.FalconConfig, FALCON | {"alibi": True, "multi_query": False, "bias": True}),
    "Falcon, rotary": (hf.FalconForCausalLM, hf.FalconConfig, FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
}


def make(name: str, **options: Any) -> Any:
    model_class, config_class, sizes = MODELS[name]
    torch.manual_seed(0)
    return model_class(config_class(**sizes | options)).eval()


def ids(n: int = 40) -> Tensor:
    return torch.randint(3, 50, (2, n), generator=torch.Generator().manual_seed(1))


def real(kind: str, n: int = 40) -> Tensor:
    mask = torch.ones(2, n, dtype=torch.long)
    mask[1, {"left": slice(0, 7), "right": slice(n - 7, n), "inside": slice(9, 14)}[kind]] = 0
    return mask


def dense(model: Any, name: str, allowed: Tensor, given: dict[str, Any], patch: pytest.MonkeyPatch) -> Any:
    """The answer of transformers' own attention under a dense additive mask `(B, 1, n, n)`."""
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    file = sys.modules[type(model).__module__]
    with patch.context() as patched:
        patched.setattr(file, "create_causal_mask", lambda **_: additive)
        return answer(model, given)


@pytest.mark.parametrize("kind", ["left", "right", "inside"])
@pytest.mark.parametrize("name", MODELS)
def test_a_sparse_model_is_the_dense_one_under_the_mask_of_the_pattern(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs of real tokens and all gradients; positions that the pattern names count the real tokens of each text."""
    model, mask = make(name), real(kind)
    predicted = mask * torch.nn.functional.pad(mask, (1, -1))  # real tokens after a real token: rows of padding mean nothing
    labels = ids().masked_fill(predicted == 0, -100)
    given = {"input_ids": ids(), "attention_mask": mask, "labels": labels}
    allowed = (fl.window(6) & fl.causal()).dense(40).expand(2, 1, -1, -1).clone()
    first = mask.argmax(1)
    for text in range(2):
        allowed[text, :, :, first[text]] = fl.causal().dense(40)[0, 0, :, first[text]]
    allowed &= mask.bool()[:, None, None, :]
    theirs = dense(model, name, allowed, given, monkeypatch)
    sparsify(model, fl.window(6) | fl.seen_by_all([0]))
    ours = answer(model, given)
    for outputs, _ in (theirs, ours):
        outputs["logits"] = outputs["logits"][mask.bool()]
    found = errors(theirs, ours)
    assert found.fine, found


@pytest.mark.parametrize("name", MODELS)
def test_restore_gives_back_the_modules_the_configuration_and_the_bits(name: str) -> None:
    model = make(name)
    modules, text, before = dict(model.named_modules()), model.config.to_json_string(), model(ids()).logits
    seen: list[int] = []
    attention = next(module for path, module in modules.items() if path.endswith(("attention", "attn")))
    attention.register_forward_hook(lambda *_: seen.append(1))
    sparsify(model, {0: fl.window(3)})
    assert list(model.state_dict()) == list(make(name).state_dict())
    sparse = model(ids()).logits
    assert len(seen) == 1
    sparsify(model, fl.window(5))  # restore goes back to the state before the first call
    assert torch.equal(copy.deepcopy(model)(ids()).logits, model(ids()).logits)
    assert not torch.equal(sparse, before)
    restore(model)
    assert dict(model.named_modules()) == modules
    assert model.config.to_json_string() == text
    assert torch.equal(model(ids()).logits, before)
    with use_pattern(model, {0: fl.window(3)}):
        assert torch.equal(model(ids()).logits, sparse)
    assert torch.equal(model(ids()).logits, before)


@pytest.mark.parametrize("name", MODELS)
def test_a_pickled_sparse_model_stays_sparse_and_can_be_restored(name: str) -> None:
    model = make(name)
    before = model(ids()).logits
    sparsify(model, fl.window(5))
    again = pickle.load(io.BytesIO(pickle.dumps(model)))
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    assert torch.equal(restore(again)(ids()).logits, before)


@pytest.mark.parametrize("name", MODELS)
def test_probabilities_are_those_of_the_model(name: str) -> None:
    model = make(name, **({"attn_implementation": "eager"} if name == "Falcon, rotary" else {}))
    given = {"input_ids": ids(), "attention_mask": real("left"), "output_attentions": True}
    theirs = None if name == "Falcon" else model(**given).attentions  # Falcon adds ALiBi twice, see below
    sparsify(model)
    ours = model(**given).attentions
    assert len(ours) == 2
    for layer, weights in enumerate(ours):
        torch.testing.assert_close(weights.sum(3)[0], torch.ones(weights.shape[1:3]))
        if theirs is not None:
            rows = real("left").bool()
            torch.testing.assert_close(weights.transpose(1, 2)[rows], theirs[layer].transpose(1, 2)[rows], rtol=1e-4, atol=1e-6)
    assert torch.equal(model(ids()).logits, model(ids(), output_attentions=True).logits)


def test_falcon_adds_alibi_once_as_its_sdpa_path_does() -> None:
    """transformers' eager path adds it twice: in the scores and in the mask. This pins the difference."""
    model = make("Falcon")
    sdpa = model(ids()).logits.detach()
    eager = make("Falcon", attn_implementation="eager")(ids()).logits.detach()
    assert float((sdpa - eager).abs().max() / sdpa.abs().max()) > 0.01
    torch.testing.assert_close(sparsify(model)(ids()).logits, sdpa, rtol=1e-4, atol=1e-5)


def test_falcon_rounds_its_bias_to_16_bits_and_farlight_keeps_it() -> None:
    """Positions beyond 256 are no longer bfloat16 numbers: the bias is not slope · distance, and farlight adds theirs."""
    model = make("Falcon")
    before = model(ids(600)).logits
    torch.testing.assert_close(sparsify(model)(ids(600)).logits, before, rtol=1e-4, atol=1e-5)


def test_mpt_continues_beyond_max_seq_len() -> None:
    """ALiBi has no last position: where transformers' module fails, the slope goes on."""
    model = make("MPT")
    with pytest.raises(RuntimeError):
        model(ids(80))
    longer = make("MPT", max_seq_len=80)(ids(80)).logits
    torch.testing.assert_close(sparsify(model)(ids(80)).logits, longer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_sparse_cache_generates_the_tokens_of_the_model_s_own(name: str) -> None:
    model, pattern = make(name), fl.presets.streaming(2, 8)
    cache = fl.hf.SparseCache(model, pattern)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    # The default of MPT's configuration: `generate` passes the whole text at every step, whatever the cache.
    with pytest.raises(fl.UnsupportedError, match="was given a cache with use_cache=False, under which generate passes the"):
        model.generate(ids(20), past_key_values=fl.hf.SparseCache(model, pattern), use_cache=False, **options)
    options["use_cache"] = True
    found = model.generate(ids(20), past_key_values=cache, **options)
    assert cache.kept < 20
    with use_pattern(model, pattern):
        assert torch.equal(model.generate(ids(20), **options), found)


def test_falcon_with_a_4d_mask_is_refused() -> None:
    model = sparsify(make("Falcon"))
    with pytest.raises(fl.UnsupportedError, match="a 4-D attention mask, which does not say which keys are padding"):
        model(ids(), attention_mask=torch.zeros(2, 1, 40, 40))


def test_mpt_reads_a_4d_mask_as_transformers_does() -> None:
    """Bidirectional attention: the bias is one by key, which ALiBi by distance is not."""
    model = make("MPT")
    additive = torch.zeros(2, 1, 40, 40).masked_fill(~fl.window(9).dense(40), torch.finfo(torch.float32).min)
    before = model(ids(), attention_mask=additive).logits
    torch.testing.assert_close(sparsify(model)(ids(), attention_mask=additive).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo on BLOOM's GELU
@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_model_is_one_graph(name: str) -> None:
    model = sparsify(make(name), fl.window(6) | fl.seen_by_all([0]))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for kind in ("left", "inside"):
        given = {"input_ids": ids(), "attention_mask": real(kind), "use_cache": False}
        with torch.no_grad():
            rows = real(kind).bool()
            torch.testing.assert_close(compiled(**given).logits[rows], model(**given).logits[rows], rtol=1e-4, atol=1e-5)
