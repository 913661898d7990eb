"""`farlight recall`: how many generated questions about a long text a language model answers, by full and sparse attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farlight.cli.numbers import count
from farlight.cli.outputs import check_place
from farlight.cli.progress import progress_bar
from farlight.cli.screen import screen_width
from farlight.cli.tables import Column, Table, as_text
from farlight.errors import ArgumentError

if TYPE_CHECKING:
    from farlight.analysis.recall import Recall

__all__ = ["EXAMPLES", "recall_command"]

EXAMPLES = (
    "farlight recall --model smollm2 --task passkey --length 1024 --length 2048",
    "farlight recall --model smollm2 --pattern 'streaming(4, 256)' --questions 50 --save recall.json",
)

_DEFAULT_TASKS = ("passkey", "keys")


def recall_command(
    model: Annotated[str, typer.Option("--model", help="A causal LM: a folder, a Hugging Face name, or smollm2.")] = "smollm2",
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            "--pattern",
            metavar="PATTERN",
            help='A pattern or router, e.g. "streaming(4, 256)", or the file of a fit, fit.json. Repeat for several.',
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="TASK",
            help="passkey, keys, lookup, variables or words. Repeat for several. Default: the first two.",
        ),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option("--length", parser=count, metavar="TOKENS", help="Tokens of a text. Repeat for several. Default: 1024."),
    ] = None,
    questions: Annotated[
        int, typer.Option("--questions", parser=count, metavar="N", help="Questions of each task and length.")
    ] = 20,
    seed: Annotated[int, typer.Option("--seed", parser=count, metavar="N", help="Seed of the questions.")] = 0,
    save: Annotated[
        Path | None, typer.Option("--save", help="Write each answer to this JSON file, and go on from those that it holds.")
    ] = None,
    backend: Annotated[str, typer.Option("--backend", help="Which backend computes sparse attention.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Print the share of questions that a model answers by exact match, with full attention and under each pattern.

    Text, question and answer are read under the pattern in every layer.
    """
    from farlight.analysis.recall.answers import evaluate, recall_steps
    from farlight.analysis.recall.tasks import TASKS
    from farlight.cli.inputs import read_subjects
    from farlight.hf.loading import load_model
    from farlight.kernels import registry

    patterns = read_subjects(pattern or ())
    tasks, lengths = list(dict.fromkeys(task or _DEFAULT_TASKS)), list(dict.fromkeys(length or (1024,)))
    for name in tasks:
        if name not in TASKS:
            raise ArgumentError(f"--task {name}: there is no such task; known are {', '.join(TASKS)}.")
    registry.check_name(backend)
    if save is not None:
        check_place("--save", save)
    with progress_bar() as progress:
        progress.start(["loading the model"])
        progress.step("loading the model")
        loaded = load_model(model)
        progress.start(recall_steps(patterns, tasks, lengths, questions))
        result = evaluate(
            loaded.model,
            loaded.tokenizer,
            patterns,
            tasks=tasks,
            lengths=lengths,
            questions=questions,
            seed=seed,
            backend=backend,
            results=save,
            step=progress.step,
        )
    if as_json:
        print(json.dumps(result.to_dict(), indent=2, allow_nan=False))
    else:
        print("\n".join(_lines(result, loaded.name, screen_width())))


def _lines(result: Recall, model: str, width: int | None) -> list[str]:
    """A table for each task and length, then what the numbers are."""
    tables = []
    for task, length in dict.fromkeys((score.task, score.length) for score in result.scores):
        rows = tuple(score for score in result.scores if (score.task, score.length) == (task, length))
        tables.append(Table(f"{task}, {length:,} tokens", _COLUMNS, tuple(row.pattern for row in rows), rows))
    settings = f"{model}: {result.questions} questions of each task and length, seed {result.seed}"
    note = "recall: exact match of greedy decoding; text, question and answer under the pattern in every layer."
    return [settings, *as_text(tables, width), note]


_COLUMNS = (
    Column("recall", "recall", lambda row: row.share, "{:.1%}".format, 100),
    Column("interval", "95 %\ninterval", lambda row: row.interval, lambda ends: "{:.0%} … {:.0%}".format(*ends), 90),
    Column("correct", "correct", lambda row: sum(row.correct), str, 80),
    Column("missed", "depths\nmissed", lambda row: _missed(row), str, 10, left=True),
)


def _missed(row: object) -> str:
    """The depths of up to four questions without a correct answer."""
    from farlight.analysis.recall import RecallScore

    assert isinstance(row, RecallScore)
    depths = [depth for depth, correct in zip(row.depths, row.correct, strict=True) if not correct]
    return " ".join(f"{depth:.2f}" for depth in depths[:4]) + (" …" if len(depths) > 4 else "")
