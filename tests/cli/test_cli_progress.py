"""Progress of the commands: the steps announced at the start of a stage are the steps that are reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_audit import encoder, tokenizer, words

from farlight.cli import main
from farlight.cli.progress import TimeLeft


class Recorder:
    """A `Progress` that stores the announced and the reported steps of each stage."""

    def __init__(self) -> None:
        self.stages: list[tuple[list[str], list[str]]] = []

    def start(self, steps: Sequence[str]) -> None:
        self.stages.append((list(steps), []))

    def step(self, name: str) -> None:
        self.stages[-1][1].append(name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder and a text."""
    root = tmp_path_factory.mktemp("progress")
    encoder().save_pretrained(root / "model")
    tokenizer().save_pretrained(root / "model")
    (root / "text.txt").write_text(words(700))
    return root


@pytest.mark.parametrize(
    "options, stages",
    [
        (["audit", "--pattern", "window(3)", "--pattern", "full()", "--html", "{place}/page.html"], 2),
        (["audit", "--keep", "0.6", "--candidate", "window", "--passages", "3", "--length", "48"], 3),
        (["embed", "--query", "the w3", "--positions", "128", "--passage", "16", "--top", "2"], 3),
    ],
    ids=["audit with a report", "fit and audit", "embed"],
)
def test_announced_steps_are_reported(
    options: list[str], stages: int, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()

    @contextmanager
    def progress_bar() -> Iterator[Recorder]:
        yield recorder

    for command in ("audit", "embed"):
        monkeypatch.setattr(f"farlight.cli.{command}.progress_bar", progress_bar, raising=False)
    monkeypatch.setattr("farlight.cli.progress.progress_bar", progress_bar)
    arguments = [option.format(place=place) for option in options]
    with pytest.raises(SystemExit) as ended:
        main([arguments[0], str(place / "text.txt"), "--model", str(place / "model"), *arguments[1:]])
    assert not ended.value.code, capsys.readouterr().err
    assert len(recorder.stages) == stages
    for announced, reported in recorder.stages:
        assert Counter(reported) == Counter(announced)


def test_the_estimate_does_not_jump() -> None:
    """Kinds of steps that differ thirtyfold: the end that is shown moves by half of what the plain estimate moves at most."""
    durations = {"full attention": 3.0, "window": 0.4, "timed: full": 6.0, "timed: window": 0.9, "long text: window": 12.0}
    steps = ["full attention", "window"] * 6 + ["timed: full", "timed: window"] + ["long text: window"] * 2
    now = [0.0]
    left = TimeLeft(steps, lambda: now[0])
    shown, total = [], sum(durations[name] for name in steps)
    for name in steps:
        left.begin(name)
        plain, text = now[0] + left.seconds(), left.text()
        if text.endswith(" s left"):
            end = now[0] + float(text.split()[-3])
            assert not shown or abs(end - shown[-1]) <= abs(plain - shown[-1]) / 2 + 1
            shown.append(end)
        assert text.startswith("about") == (len(shown) == 15)  # "at least" until a long text was timed
        now[0] += durations[name]
    assert len(shown) == len(steps) - 1
    assert shown[-1] == pytest.approx(total, rel=0.2)
