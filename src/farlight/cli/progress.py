"""A progress bar on stderr with an estimate of the time left, for `farlight.analysis.progress.Progress`.

Steps differ in length: a passage under full attention takes many times as long as under a pattern. So a stage is a list of
step names, durations are recorded per name, and the time left is the sum over the remaining names of their mean duration. A
name without a duration takes the mean of its kind (the names with the same text before ": "); where its kind has none either,
that of all steps. What is shown is smoothed, so that it does not jump when a step of a new kind turns out long or short.
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

    total: number of steps; done: completed ones. `seconds` is the plain estimate; `text` shows it smoothed: each new estimate
    moves the moment at which the stage is expected to end by half of the difference.

    >>> moments = iter([0.0, 10.0, 11.0, 11.0, 11.0])
    >>> left = TimeLeft(["read", "judge", "read", "judge", "sum up"], lambda: next(moments))
    >>> for name in ("read", "judge", "read"):
    ...     left.begin(name)
    >>> left.seconds()  # read 10 s, judge 1 s, sum up not known: the mean of those, 5.5 s
    16.5
    """

    def __init__(self, steps: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.steps, self.clock = Counter(steps), clock
        self.total, self.done = len(steps), 0
        self._durations: dict[str, list[float]] = {}
        self._running: tuple[str, float] | None = None
        self._end: float | None = None  # when the stage is expected to end

    def begin(self, name: str) -> None:
        """The step of this name begins; the one before it is complete."""
        now = self.clock()
        if self._running is not None:
            previous, start = self._running
            self._durations.setdefault(previous, []).append(now - start)
            self.done += 1
        self._running = (name, now)

    def seconds(self) -> float:
        """Expected seconds left, the running step included."""
        remaining = self.steps - Counter({name: len(durations) for name, durations in self._durations.items()})
        total = sum(count * self._expected(name) for name, count in remaining.items())
        if self._running is not None:
            name, start = self._running
            total -= min(self.clock() - start, self._expected(name))
        return max(0.0, total)

    def _expected(self, name: str) -> float:
        """Mean duration of the steps of a name; of its kind, where it has none yet; of all, where its kind has none."""
        kind = name.partition(": ")[0] + ": "
        of_kind = [seconds for other, known in self._durations.items() if other.startswith(kind) for seconds in known]
        durations = self._durations.get(name) or of_kind or [s for known in self._durations.values() for s in known]
        return sum(durations) / max(1, len(durations))

    def _all_known(self) -> bool:
        """Whether each kind of step that remains, the running one included, has a duration."""
        kinds = {name.partition(": ")[0] for name in self._durations}
        remaining = self.steps - Counter({name: len(durations) for name, durations in self._durations.items()})
        return all(name.partition(": ")[0] in kinds for name in remaining)

    def text(self) -> str:
        """`about 5 s left`; `at least 5 s left` while some kind of step has not run yet; `time left not known yet`."""
        if not self._durations:
            return "time left not known yet"
        now = self.clock()
        estimate = now + self.seconds()
        self._end = estimate if self._end is None else self._end + (estimate - self._end) / 2
        seconds = max(0.0, self._end - now)
        duration = (
            f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
        )
        return f"{'about' if self._all_known() else 'at least'} {duration} left"


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
