"""`fl.evaluate`: how many questions about a long text a causal language model answers, with full attention and under patterns.

The protocol is strict: the whole text, the question and the answer are read under the pattern, in every layer. An answer counts
where greedy decoding gives it token for token. Greedy decoding gives an expected answer exactly if each of its tokens is the
most probable one after those before it, so one pass over prompt and answer decides, for patterns and routers alike.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from farlight.analysis.candidates_by_layer import Judged, Subject, subjects
from farlight.analysis.loss.language import is_language_model
from farlight.analysis.recall.tasks import TASKS, Question, question
from farlight.errors import ArgumentError, UnsupportedError
from farlight.hf.interface import use_pattern

__all__ = ["FULL", "Recall", "RecallScore", "answers_correctly", "evaluate", "recall_steps"]

# The name of the model's own attention, which is always evaluated.
FULL = "full attention"


@dataclass(frozen=True)
class RecallScore:
    """Answers of one pattern to the questions of one task at one length.

    Attributes:
        pattern, task, length: what was evaluated.
        correct: one bool per question. depths: where each answer stands in its text.
    """

    pattern: str
    task: str
    length: int
    correct: tuple[bool, ...]
    depths: tuple[float, ...]

    @property
    def share(self) -> float:
        """Share of correct answers, by exact match."""
        return sum(self.correct) / max(1, len(self.correct))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of that share (Wilson)."""
        n, z = len(self.correct), 1.959964
        if not n:
            return 0.0, 1.0
        middle = (self.share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(self.share * (1 - self.share) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Recall:
    """Scores of all patterns, tasks and lengths, the model's own attention first. Returned by `farlight.evaluate`.

    seed, questions: those of the call; the same seed gives every pattern the same questions.
    """

    model: str
    seed: int
    questions: int
    scores: tuple[RecallScore, ...]

    def score(self, pattern: str, task: str, length: int) -> RecallScore:
        """The score of this pattern's name, task and length. Raises ArgumentError for one that was not evaluated."""
        for score in self.scores:
            if (score.pattern, score.task, score.length) == (pattern, task, length):
                return score
        raise ArgumentError(f"{pattern!r} was not evaluated on {task!r} at {length} tokens.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable fields, with share and interval of each score."""
        fields = asdict(self)
        for row, score in zip(fields["scores"], self.scores, strict=True):
            row |= {"share": score.share, "interval": list(score.interval)}
        return fields


def recall_steps(
    patterns: Sequence[Judged | Subject], tasks: Sequence[str], lengths: Sequence[int], questions: int
) -> list[str]:
    """The labels that `evaluate` passes to `step`, in order; for progress bars."""
    names = [FULL, *(candidate.name for candidate in subjects(patterns))]
    return [f"{length} tokens: {name}" for length in lengths for _ in tasks for _ in range(questions) for name in names]


def evaluate(
    model: Any,
    tokenizer: Any,
    patterns: Sequence[Judged | Subject] = (),
    *,
    tasks: Sequence[str] = tuple(TASKS),
    lengths: Sequence[int] = (1024,),
    questions: int = 20,
    seed: int = 0,
    backend: str = "auto",
    results: str | os.PathLike[str] | None = None,
    step: Callable[[str], None] = lambda label: None,
) -> Recall:
    """Ask `model` generated questions about long texts, with its own attention and under each of `patterns`.

    Args:
        model: a transformers causal language model with its head, in evaluation mode.
        tokenizer: its tokenizer.
        patterns: patterns, routers, or mappings {layer number: one of these}; each is intersected with the model's own mask.
        tasks: names of `farlight.analysis.recall.TASKS`. lengths: tokens of a text, question and answer included.
        questions: of each task and length; their answers stand at depths spread evenly over the text.
        seed: of the questions, the same for every pattern.
        backend: as in `farlight.attention`.
        results: a JSON file: answers are written to it one by one, and those that it holds are not asked again.
        step: called with a label before each question, those of `recall_steps`.

    Raises:
        ArgumentError: an unknown task, a length that the model or the task cannot have, or a file of other questions.
        UnsupportedError: the model has no language head, or its attention cannot be replaced.

    >>> import farlight as fl                                                                      # doctest: +SKIP
    >>> recall = fl.evaluate(model, tokenizer, [fl.presets.streaming(4, 256)], tasks=["passkey"])  # doctest: +SKIP
    >>> [(score.pattern, score.share, score.interval) for score in recall.scores]                  # doctest: +SKIP
    """
    _check(model, lengths, questions)
    candidates = [Subject(FULL, {}), *subjects(patterns)]
    setting = {"format": "farlight.recall", "model": _model_name(model), "seed": seed, "questions": questions}
    answers = _Answers(results, setting)
    asked = {
        (task, length): [_question(task, tokenizer, length, n, questions, seed) for n in range(questions)]
        for length in lengths
        for task in tasks
    }
    for (task, length), rows in asked.items():
        for number, each in enumerate(rows):
            for candidate in candidates:
                step(f"{length} tokens: {candidate.name}")
                key = f"{candidate.name} | {task} | {length} | {number}"
                if key not in answers:
                    chosen = None if candidate is candidates[0] else candidate.chosen
                    answers[key] = answers_correctly(model, each, chosen, backend)
    scores = [
        RecallScore(
            candidate.name,
            task,
            length,
            tuple(answers[f"{candidate.name} | {task} | {length} | {number}"] for number in range(questions)),
            tuple(each.depth for each in rows),
        )
        for candidate in candidates
        for (task, length), rows in asked.items()
    ]
    return Recall(_model_name(model), seed, questions, tuple(scores))


def _check(model: Any, lengths: Sequence[int], questions: int) -> None:
    """Raise as `evaluate` does for a model that cannot answer, or lengths and numbers of questions that cannot be."""
    if not is_language_model(model):
        raise UnsupportedError(
            f"{type(model).__name__} has no language head, so it cannot answer; load it with AutoModelForCausalLM."
        )
    if isinstance(questions, bool) or questions < 1:
        raise ArgumentError(f"questions = {questions}: at least one of each task and length is needed.")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for length in lengths:
        if longest is not None and length > longest:
            raise ArgumentError(f"length = {length}: {type(model).__name__} reads at most {longest} tokens at once; give less.")


def _model_name(model: Any) -> str:
    """Class and number of parameters: answers of another model are not taken up."""
    return f"{type(model).__name__}, {sum(parameter.numel() for parameter in model.parameters()):,} parameters"


def _question(task: str, tokenizer: Any, length: int, number: int, questions: int, seed: int) -> Question:
    """Question `number` of `questions`, at a depth of its own."""
    return question(task, tokenizer, length, depth=(number + 0.5) / questions, seed=seed * 1_000_003 + number)


def answers_correctly(model: Any, each: Question, chosen: Any, backend: str) -> bool:
    """Whether greedy decoding under `chosen` (None: the model's own attention) gives the answer token for token."""
    ids = torch.tensor([each.prompt + each.answer], device=model.device)
    options: dict[str, Any] = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    count = len(each.answer)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = count + 1
    with torch.no_grad(), use_pattern(model, chosen, backend=backend):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits
    return bool((logits[0, -count - 1 : -1].argmax(-1) == ids[0, -count:]).all())


class _Answers(dict[str, bool]):
    """Answers by question and pattern, kept in a JSON file where one is given: written whole after each answer, by renaming."""

    def __init__(self, path: str | os.PathLike[str] | None, setting: dict[str, Any]) -> None:
        super().__init__()
        self._path, self._setting = None if path is None else Path(path), setting
        if self._path is None or not self._path.exists():
            return
        try:
            document = json.loads(self._path.read_text("utf-8"))
            known = {name: document[name] for name in setting}
            answers = {str(key): bool(value) for key, value in document["answers"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArgumentError(f"results {str(path)!r} is no file of evaluate ({error}); give another name.") from None
        if known != setting:
            raise ArgumentError(f"results {str(path)!r} holds {known}, but the call has {setting}; give another name.")
        self.update(answers)

    def __setitem__(self, key: str, value: bool) -> None:
        super().__setitem__(key, value)
        if self._path is not None:
            text = json.dumps(self._setting | {"answers": self}, indent=1)
            temporary = self._path.with_name(self._path.name + ".part")
            temporary.write_text(text, "utf-8")
            temporary.replace(self._path)
