"""A real language model under causal(): its own loss and its own answers. SmolLM2-135M-Instruct, where it is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_language import own_losses

import farlight as fl
from farlight.analysis.loss.language import LanguageReader
from farlight.analysis.passages import cut_passages
from farlight.analysis.recall.tasks import question
from farlight.cli.inputs import read_text
from farlight.hf import use_pattern
from farlight.hf.loading import LoadedModel, load_model

pytestmark = pytest.mark.slow
TOKENS, QUESTIONS = 512, 5


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    try:
        return load_model("smollm2")
    except fl.ArgumentError as error:
        pytest.skip(str(error))


def test_loss_under_causal_is_the_models_own(loaded: LoadedModel) -> None:
    ids = cut_passages(read_text(None)[1], loaded.tokenizer, TOKENS, 1).ids
    own = own_losses(loaded.model, ids).double()
    with use_pattern(loaded.model, fl.causal()):
        losses = LanguageReader(loaded.model)(ids)[1]
    assert losses is not None
    assert losses.double().mean().item() == pytest.approx(own.mean().item(), abs=1e-4)
    torch.testing.assert_close(losses.double(), own, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("task", ["passkey", "lookup"])
def test_recall_under_causal_gives_the_models_own_answers(loaded: LoadedModel, task: str) -> None:
    def answer(number: int) -> Any:
        """Whether transformers' own attention answers the question of `fl.evaluate`."""
        asked = question(task, loaded.tokenizer, TOKENS, depth=(number + 0.5) / QUESTIONS, seed=number)
        ids = torch.tensor([asked.prompt + asked.answer])
        with torch.no_grad():
            logits = loaded.model(ids, use_cache=False, logits_to_keep=len(asked.answer) + 1).logits[0, :-1]
        return tuple(logits.argmax(-1).tolist()) == asked.answer

    recall = fl.evaluate(loaded.model, loaded.tokenizer, [fl.causal()], tasks=[task], lengths=[TOKENS], questions=QUESTIONS)
    own = tuple(map(answer, range(QUESTIONS)))
    assert recall.score("causal()", task, TOKENS).correct == own
    assert any(own) or task != "passkey"
