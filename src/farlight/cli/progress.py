"""A progress bar on stderr with an estimate of the time left, for `farlight.analysis.progress.Progress`.

Steps differ in length: a passage under full attention takes many times as long as under a pattern. So a stage is a list of
step names, durations are recorded per name, and the time left is the sum over the remaining names of their mean duration. A
name without a duration takes the mean of its kind (the names with the same text before ": "); where its kind has none
either, it is left out of the sum and the estimate reads "at least".
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from farlight.analysis.progress import Progress

__all__ = ["TimeLeft", "progress_bar"]

# Seconds between lines of a log; a terminal is updated at every step.
_LOG_INTERVAL = 20.0


class TimeLeft:
    """Time left of a stage of named steps, from the durations of completed steps of each name.

    total: number of steps; done: completed ones.

    >>> moments = iter([0.0, 10.0, 11.0])
    >>> left = TimeLeft(["read", "judge", "read", "judge", "sum up"], lambda: next(moments))
    >>> for name in ("read", "judge", "read"):
    ...     left.begin(name)
    >>> left.seconds(), left.text()  # read 10 s, judge 1 s, sum up unknown
    ((11.0, False), 'at least 11 s left')
    """

    def __init__(self, steps: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.steps, self.clock = Counter(steps), clock
        self.total, self.done = len(steps), 0
        self._durations: dict[str, list[float]] = {}
        self._running: tuple[str, float] | None = None

    def begin(self, name: str) -> None:
        """The step of this name begins; the one before it is complete."""
        now = self.clock()
        if self._running is not None:
            previous, start = self._running
            self._durations.setdefault(previous, []).append(now - start)
            self.done += 1
        self._running = (name, now)

    def seconds(self) -> tuple[float, bool]:
        """(seconds left, whether a duration is known for every kind of step that is left)."""
        total, complete = 0.0, True
        completed = Counter({name: len(durations) for name, durations in self._durations.items()})
        for name, count in (self.steps - completed).items():
            kind = name.partition(": ")[0] + ": "
            durations = self._durations.get(name) or [
                duration for other, known in self._durations.items() if other.startswith(kind) for duration in known
            ]
            complete = complete and bool(durations)
            total += count * sum(durations) / max(1, len(durations))
        return total, complete

    def text(self) -> str:
        """`about 5 s left`, `at least 2 min left` or `time left not known yet`."""
        seconds, complete = self.seconds()
        if not self._durations or (not complete and seconds < 1):
            return "time left not known yet"
        amount = (
            f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
        )
        return f"{'about' if complete else 'at least'} {amount} left"


class _Bar:
    """The `Progress` of a `rich.progress.Progress` bar with one task."""

    def __init__(self, bar: Any, console: Any) -> None:
        self._bar, self._console = bar, console
        self._task = bar.add_task("", total=1)
        self._left = TimeLeft([])
        self._last_line = time.monotonic()

    def start(self, steps: Sequence[str]) -> None:
        self._left = TimeLeft(steps)
        self._bar.reset(self._task, total=max(1, len(steps)), description="")

    def step(self, name: str) -> None:
        from rich.markup import escape

        left = self._left
        left.begin(name)
        text = f"{name}, {left.text()}" if left.total > 1 else name
        self._bar.update(self._task, completed=left.done, description=escape(text))
        if not self._console.is_terminal and time.monotonic() - self._last_line > _LOG_INTERVAL:
            self._last_line = time.monotonic()
            print(f"farlight: {left.done} of {left.total} steps, {text}", file=sys.stderr, flush=True)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on a terminal, removed at the end; elsewhere a line every 20 seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(file=sys.stderr)
    with RichProgress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield _Bar(bar, console)
