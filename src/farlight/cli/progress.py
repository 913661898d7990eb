"""Progress of long work on stderr, and an honest estimate of the time left.

Steps differ: reading a passage with full attention takes many times as long as under a pattern. So the plan is a list of
names, each step's time is noted under its name, and what is left is the sum of what steps of these names took so far. A name
that has not come up yet is taken to be like others of its kind (what stands before a colon); where there are none, its time
is unknown and the estimate says "at least".
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

__all__ = ["Estimate", "progress"]

# A log, unlike a terminal, gets a line now and then.
_EVERY = 20.0


class Estimate:
    """Time left of a plan of named steps, from the time that steps of each name took.

    >>> moments = iter([0.0, 10.0, 11.0])
    >>> left = Estimate(["read", "judge", "read", "judge", "sum up"], lambda: next(moments))
    >>> for name in ("read", "judge", "read"):
    ...     left.begin(name)
    >>> left.seconds(), left.spoken()  # read 10 s, judge 1 s, and of "sum up" nothing is known
    ((11.0, False), 'at least 11 s left')
    """

    def __init__(self, plan: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.plan, self.clock = Counter(plan), clock
        self.total, self.done = len(plan), 0
        self._took: dict[str, list[float]] = {}
        self._now: tuple[str, float] | None = None

    def begin(self, name: str) -> None:
        """The step of this name begins; the one before it is complete."""
        moment = self.clock()
        self._complete(moment)
        self._now = (name, moment)

    def _complete(self, moment: float) -> None:
        if self._now is not None:
            name, began = self._now
            self._took.setdefault(name, []).append(moment - began)
            self.done += 1
        self._now = None

    def seconds(self) -> tuple[float, bool]:
        """(seconds left, whether every kind of step that is left has been timed)."""
        total, sure = 0.0, True
        for name, count in (self.plan - Counter({name: len(times) for name, times in self._took.items()})).items():
            kind = name.partition(": ")[0] + ": "
            like = self._took.get(name) or [t for other, times in self._took.items() if other.startswith(kind) for t in times]
            sure = sure and bool(like)
            total += count * sum(like) / max(1, len(like))
        return total, sure

    def spoken(self) -> str:
        seconds, sure = self.seconds()
        if not self._took or (not sure and seconds < 1):
            return "time left not known yet"
        words = (
            f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
        )
        return f"{'about' if sure else 'at least'} {words} left"


@contextmanager
def progress() -> Iterator[tuple[Callable[[Sequence[str]], None], Callable[[str], None]]]:
    """A bar on stderr, gone when done, or lines in a log: (start a stage with this plan of steps, begin the next step)."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1)
        left = Estimate([])
        said = time.monotonic()

        def start(plan: Sequence[str]) -> None:
            nonlocal left
            left = Estimate(plan)
            bar.reset(task, total=max(1, len(plan)), description="")

        def step(name: str) -> None:
            nonlocal said
            left.begin(name)
            words = f"{name}, {left.spoken()}" if left.total > 1 else name
            bar.update(task, completed=left.done, description=escape(words))
            if not console.is_terminal and time.monotonic() - said > _EVERY:
                said = time.monotonic()
                print(f"farlight: {left.done} of {left.total} steps, {words}", file=sys.stderr, flush=True)

        yield start, step
