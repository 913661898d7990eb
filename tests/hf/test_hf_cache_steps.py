"""A forward pass with a SparseCache is all or nothing; and a batch of one is padded like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_hf_cache import MODELS, PATTERNS, SIZES, model_of, prompt, said
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import farlight as fl
from farlight.hf import cache_layer

STREAMING = PATTERNS["streaming"]


@pytest.mark.parametrize("side", ["left", "between"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_padded_batch_of_one_writes_what_it_writes_without_a_cache(name: str, side: str, batch: int) -> None:
    model = model_of(name)
    given = prompt(batch)
    at = slice(0, 9) if side == "left" else slice(12, 14)
    given["attention_mask"][:, at] = 0
    pattern = STREAMING if side == "left" else fl.window(9)
    cache = fl.hf.SparseCache(model, pattern)
    actual = said(model, pattern, given, 12, past_key_values=cache)
    assert actual.tolist() == said(model, pattern, given, 12, use_cache=False).tolist()


class Passes:
    """Forward passes of a model over one text, in pieces, with its cache."""

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache = model, cache
        self.given = prompt(2, 40, padded=True)

    def __call__(self, start: int, stop: int) -> Tensor:
        ids, real = self.given["input_ids"][:, start:stop], self.given["attention_mask"][:, :stop]
        with torch.no_grad():
            logits: Tensor = self.model(ids, attention_mask=real, past_key_values=self.cache).logits
        return logits


PIECES = [(0, 20), (20, 21), (21, 30), (30, 31), (31, 40)]


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int, after: bool, call: Callable[[], Any]) -> None:
    """Runs `call` with a KeyboardInterrupt before or after the attention of layer `at`."""
    right = cache_layer.masked_decode
    count = 0

    def answer(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count == at + 1 and not after:
            raise KeyboardInterrupt
        actual = right(*given)
        if count == at + 1:
            raise KeyboardInterrupt
        return actual

    with monkeypatch.context() as patched:
        patched.setattr(cache_layer, "masked_decode", answer)
        with pytest.raises(KeyboardInterrupt):
            call()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["llama", "qwen, some layers slide"])
def test_an_interrupted_pass_is_taken_back(monkeypatch: pytest.MonkeyPatch, name: str, layer: int, after: bool) -> None:
    """Each piece is interrupted in some layer, then read again."""
    model = model_of(name)
    through = Passes(model, fl.hf.SparseCache(model, STREAMING))
    stopped = Passes(model, fl.hf.SparseCache(model, STREAMING))
    for piece in PIECES:
        interrupted(monkeypatch, layer, after, lambda piece=piece: stopped(*piece))
        assert stopped.cache.get_seq_length() == piece[0]
        if piece[0] == 0:
            with pytest.raises(fl.UnsupportedError, match=r"of 3 layers, .* took in the first text .* repeat the pass"):
                stopped(*piece)
        assert stopped.cache.get_seq_length() == piece[0]
        expected = through(*piece)
        torch.testing.assert_close(stopped(*piece), expected, atol=2e-4, rtol=1e-4)
        assert stopped.cache.kept == through.cache.kept
        assert {layer.num_seen for layer in stopped.cache.layers} == {piece[1]}


def test_an_interrupted_choice_of_beams_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    passes = Passes(model, fl.hf.SparseCache(model, STREAMING))
    passes(0, 20)
    monkeypatch.setattr(passes.cache.layers[1], "reorder_cache", lambda items: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        passes.cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(fl.UnsupportedError, match=r"layers hold different texts; call cache.reset\(\)"):
        passes(20, 21)
    passes.cache.reset()
    passes(0, 20)


def test_a_mask_that_changes_what_was_padding_is_refused() -> None:
    """Tokens that were padding when they came are not kept where positions count the tokens of each text."""
    model = model_of("llama")
    passes = Passes(model, fl.hf.SparseCache(model, STREAMING))
    passes(0, 20)
    passes.given["attention_mask"][:] = 1
    with pytest.raises(fl.UnsupportedError, match="other tokens for padding than"):
        passes(20, 21)


def test_a_mask_that_shows_more_than_the_cache_keeps_is_refused() -> None:
    model = model_of("mistral, sliding window")
    ids = prompt()["input_ids"]
    cache = fl.hf.SparseCache(model)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        mask = torch.ones(1, 1, 1, 21, dtype=torch.bool)
        with pytest.raises(fl.UnsupportedError, match=r"lets queries see keys that window\(8, 0\), by which this cache drops"):
            model(ids[:, 20:21], attention_mask=mask, past_key_values=cache)


@pytest.mark.slow
def test_a_compiled_model_computes_the_same_with_breaks_at_the_cache() -> None:
    """Later steps neither recompile nor differ; one graph for the whole step is refused with the reason."""
    torch.compiler.reset()
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 1})).eval()
    compiled = torch.compile(model, backend="eager")
    expected, actual = (Passes(f, fl.hf.SparseCache(model, STREAMING)) for f in (model, compiled))
    actual.model = model
    assert torch.equal(actual(0, 20), expected(0, 20))  # the prompt is not compiled, which would take as long again
    actual.model = compiled
    for at, stance in ((20, "default"), (21, "default"), (22, "fail_on_recompile"), (23, "fail_on_recompile")):
        with torch.compiler.set_stance(stance):
            assert torch.equal(actual(at, at + 1), expected(at, at + 1))
    torch.compiler.reset()
    actual.model = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a SparseCache evicts keys .*; compile without fullgraph=True"):
        actual(24, 25)
