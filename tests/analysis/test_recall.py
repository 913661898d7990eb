"""`fl.evaluate` and `farlight recall`: what the generated questions hold, strict answers, resuming, errors."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_audit import run
from test_language import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import farlight as fl
from farlight.analysis.recall import TASKS, RecallScore, question
from farlight.analysis.recall.answers import FULL, recall_steps
from farlight.hf import use_pattern, write_layers


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: place for place, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


TOKENIZER = byte_tokenizer()


def model(**options: Any) -> Any:
    return llama(vocab_size=256, max_position_embeddings=4096, **options)


def text_of(each: Any) -> tuple[str, str]:
    return TOKENIZER.decode(each.prompt), TOKENIZER.decode(each.answer)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [2048, 3001])
def test_a_question_has_its_length_and_follows_from_its_seed(task: str, length: int) -> None:
    each = question(task, TOKENIZER, length, depth=0.3, seed=5)
    assert len(each.prompt) + len(each.answer) == length
    assert each == question(task, TOKENIZER, length, depth=0.3, seed=5)
    assert each.answer != question(task, TOKENIZER, length, depth=0.3, seed=6).answer


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_answer_stands_at_its_depth(depth: float) -> None:
    each = question("passkey", TOKENIZER, 4000, depth=depth)
    prompt, answer = text_of(each)
    assert prompt.count(answer.strip()) == 2
    assert prompt.index("The pass key is") / len(prompt) == pytest.approx(each.depth, abs=1e-9)
    assert each.depth == pytest.approx(depth, abs=0.08)


def test_each_task_can_be_answered_from_its_text() -> None:
    prompt, answer = text_of(question("keys", TOKENIZER, 3000))
    name = prompt.rpartition("special magic number for ")[2].partition(" ")[0]
    assert f"One of the special magic numbers for {name} is: {answer.strip()}." in prompt
    assert prompt.count("One of the special magic numbers for") == 4

    prompt, answer = text_of(question("lookup", TOKENIZER, 3000))
    key = prompt.rpartition("\n")[2]
    assert [line for line in prompt.splitlines()[:-1] if line.startswith(key)] == [f"{key}{answer}"]

    prompt, answer = text_of(question("variables", TOKENIZER, 3000))
    body, _, ask = prompt.partition("Question:")
    value = ask.partition("the value ")[2].partition(",")[0]
    chain = []
    while f" = {value}. " in body:
        name = body.partition(f" = {value}. ")[0].rpartition("VAR ")[2]
        chain.append(name)
        value = f"VAR {name}"
    assert chain == answer.split()
    assert len(chain) == 4

    prompt, answer = text_of(question("words", TOKENIZER, 8000))
    body = prompt.partition("Question:")[0].partition("\n")[2]
    counts = Counter(body.split())
    assert sorted(word for word, count in counts.most_common(3)) == answer.split()
    assert counts.most_common(4)[3][1] <= 3


def test_an_answer_counts_where_greedy_decoding_gives_it() -> None:
    """Against transformers' own greedy generation, on questions whose answer is what the model says, and on others."""
    recall_model = model()
    each = question("passkey", TOKENIZER, 300, depth=0.5)
    prompt = torch.tensor([each.prompt])
    generated = recall_model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=3, pad_token_id=0, eos_token_id=None
    )
    from dataclasses import replace

    from farlight.analysis.recall.answers import answers_correctly

    said = tuple(generated[0, len(each.prompt) :].tolist())
    assert answers_correctly(recall_model, replace(each, answer=said), None, "auto")
    assert answers_correctly(recall_model, replace(each, answer=said), fl.causal(), "auto")
    assert not answers_correctly(recall_model, replace(each, answer=(*said[:2], said[2] ^ 1)), None, "auto")
    with use_pattern(recall_model, fl.window(1, 0)), torch.no_grad():
        other = recall_model(torch.tensor([each.prompt])).logits[0, -1].argmax().item()
    assert answers_correctly(recall_model, replace(each, answer=(other,)), fl.window(1, 0), "auto")


def test_causal_gives_the_models_own_answers_and_results_are_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer of a first run is found in the file; the model is not run for it again."""
    recall_model, file = model(), tmp_path / "recall.json"
    options: dict[str, Any] = {"tasks": ["passkey", "lookup"], "lengths": [300], "questions": 3, "seed": 4, "results": file}
    labels: list[str] = []
    result = fl.evaluate(recall_model, TOKENIZER, [fl.causal()], step=labels.append, **options)
    assert labels == recall_steps([fl.causal()], ["passkey", "lookup"], [300], 3)
    for task in ("passkey", "lookup"):
        assert result.score("causal()", task, 300).correct == result.score(FULL, task, 300).correct
    assert result.scores[0].depths == tuple(sorted(result.scores[0].depths))

    def fail(*args: Any) -> bool:
        raise AssertionError("asked again")

    monkeypatch.setattr("farlight.analysis.recall.answers.answers_correctly", fail)
    assert fl.evaluate(recall_model, TOKENIZER, [fl.causal()], **options) == result
    with pytest.raises(AssertionError, match="asked again"):
        fl.evaluate(recall_model, TOKENIZER, [fl.window(2, 0)], **options)
    with pytest.raises(fl.ArgumentError, match="give another name"):
        fl.evaluate(recall_model, TOKENIZER, [], **options | {"seed": 5})
    file.write_text("{")
    with pytest.raises(fl.ArgumentError, match="is no file of evaluate"):
        fl.evaluate(recall_model, TOKENIZER, [], **options)


def test_intervals_are_wilsons() -> None:
    score = RecallScore("p", "passkey", 100, (True,) * 8 + (False,) * 2, (0.5,) * 10)
    assert score.share == 0.8
    assert score.interval == pytest.approx((0.4902, 0.9433), abs=1e-4)  # published for 8 of 10


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(fl.ArgumentError, match="no such task"):
        question("riddle", TOKENIZER, 1000)
    with pytest.raises(fl.ArgumentError, match="needs at least"):
        question("variables", TOKENIZER, 200)
    with pytest.raises(fl.ArgumentError, match="reads at most 4096"):
        fl.evaluate(model(), TOKENIZER, lengths=[5000])
    with pytest.raises(fl.UnsupportedError, match="no language head"):
        fl.evaluate(model().model, TOKENIZER)


def test_the_command_prints_recall_and_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    arguments = ["recall", "--model", str(folder), "--task", "passkey", "--length", "300", "--questions", "2", "--seed", "7"]
    write_layers({0: fl.window(8, 0), 1: "topkeys(4, causal=True)"}, tmp_path / "fit.json")
    patterns = ["--pattern", "window(8, 0)", "--pattern", str(tmp_path / "fit.json")]
    status, out, err = run(capsys, *arguments, *patterns, "--json")
    assert status == 0, err
    data = json.loads(out)
    assert data["seed"] == 7
    assert [row["pattern"] for row in data["scores"]] == [FULL, "window(8, 0)", "fit.json"]
    assert {"share", "interval", "depths"} <= set(data["scores"][0])
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    assert "seed 7" in out
    assert "passkey, 300 tokens" in out
