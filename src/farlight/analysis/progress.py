"""Progress reports of long work: the protocol that analysis and reports call, and that the command line implements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Progress", "SilentProgress"]


class Progress(Protocol):
    """Receives the steps of a stage. `Progress.step` is also what functions with a `step` argument take."""

    def start(self, steps: Sequence[str]) -> None:
        """A stage begins; `steps`: the names of its steps in order, a name repeated once per repetition."""

    def step(self, name: str) -> None:
        """The step of this name begins, and the one before it has ended."""


class SilentProgress:
    """Ignores every report."""

    def start(self, steps: Sequence[str]) -> None:
        """Nothing."""

    def step(self, name: str) -> None:
        """Nothing."""
