"""The section of docs/quality.md on recall, from the answers that `farlight recall --save` keeps."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from farlight.analysis.recall import RecallScore
from farlight.analysis.recall.answers import FULL
from quality.rules import SINKS

__all__ = ["recall_section"]

Key = tuple[int, str, str]  # length, task, pattern

_HEAD = """## Recall

Generated questions (RULER, arXiv:2404.06654) by `farlight recall`: text, question and answer are read under the rule in every
layer, an answer counts where greedy decoding gives it token for token. 95 % intervals are Wilson's. *Both*: questions that the
rule and full attention both answer; *only full*, *only the rule*: one of them. Runs of fewer questions than their command asks
were stopped. `share=0.11` keeps twice as many keys at 2048 tokens as at 1024, where it loses nearly every pass key.

```
{commands}
```

| tokens | task | attention | correct | 95 % interval | both | only full | only the rule |
|---|---|---|---|---|---|---|---|
"""


def recall_section(folder: Path) -> str:
    """A table of all answers in the folder's recall-*.json, those of different seeds added up; "" where there are none."""
    given: dict[Key, dict[tuple[int, int], bool]] = defaultdict(dict)
    commands: dict[str, None] = {}
    for path in sorted(folder.glob("recall-*.json")):
        content = json.loads(path.read_text("utf-8"))
        seed, questions = content["seed"], content["questions"]
        for key, correct in content["answers"].items():
            pattern, task, length, number = key.rsplit(" | ", 3)
            given[int(length), task, pattern][seed, int(number)] = correct
            if pattern != FULL:
                commands[_command(pattern, task, length, questions, seed)] = None
    if not given:
        return ""
    lines = [_row(key, answers, given[key[0], key[1], FULL]) for key, answers in sorted(given.items(), key=_order)]
    return _HEAD.format(commands="\n".join(commands)) + "\n".join(lines) + "\n"


def _command(pattern: str, task: str, length: str, questions: int, seed: int) -> str:
    """The command that asks these questions, to be run from the root of the repository."""
    pattern = f"benchmarks/results/quality/{pattern}" if pattern.endswith(".json") else pattern
    asked = f"--task {task} --length {length} --questions {questions}" + (f" --seed {seed}" if seed else "")
    return f"farlight recall --model smollm2 {asked} --pattern '{pattern}'"


def _order(item: tuple[Key, dict[tuple[int, int], bool]]) -> tuple[int, str, bool, str]:
    length, task, pattern = item[0]
    return length, task, pattern != FULL, pattern


def _row(key: Key, answers: dict[tuple[int, int], bool], full: dict[tuple[int, int], bool]) -> str:
    """One line of the table; only questions that full attention was asked too."""
    length, task, pattern = key
    pairs = [(answers[place], full[place]) for place in answers if place in full]
    score = RecallScore(pattern, task, length, tuple(own for own, _ in pairs), (0.0,) * len(pairs))
    low, high = score.interval
    name = pattern if pattern == FULL else f"`{pattern.replace(SINKS, 'sinks')}`".replace("|", "\\|")
    cells = [f"{length}", task, name, f"{sum(score.correct)} of {len(pairs)}", f"{low:.0%} … {high:.0%}"]
    counts = ((True, True), (False, True), (True, False))
    cells += ["", "", ""] if pattern == FULL else [str(pairs.count(pair)) for pair in counts]
    return "| " + " | ".join(cells) + " |"
