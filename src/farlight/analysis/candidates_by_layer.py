"""What an analysis judges: a pattern, a router, or one of these for each layer of a model; by name, in one shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from farlight.errors import ArgumentError
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router

__all__ = ["Judged", "Subject", "pattern_for", "subjects"]

Judged = Pattern | Router | Mapping[int, Pattern | Router | None]


@dataclass(frozen=True)
class Subject:
    """`chosen` is what `use_pattern` takes; `name` is what tables call it."""

    name: str
    chosen: Judged

    def at(self, layer: int) -> Pattern | Router | None:
        """What this layer runs under; None = the model's own attention."""
        return self.chosen.get(layer) if isinstance(self.chosen, Mapping) else self.chosen


def subjects(judged: Sequence[Judged | Subject]) -> list[Subject]:
    """Each with a name: a pattern's is its text, a router's the expression that it was read from."""
    return [one if isinstance(one, Subject) else Subject(_name(one), one) for one in judged]


def _name(one: Judged) -> str:
    if isinstance(one, Pattern):
        return repr(one)
    if isinstance(one, Router):
        return one.expression or " ".join(repr(one).split())
    if isinstance(one, Mapping):
        return f"{len(one)} layers' own"
    raise ArgumentError(
        f"{type(one).__name__} cannot be judged; give a pattern, a router, or a mapping {{layer number: one of these}}."
    )


def pattern_for(chosen: Pattern | Router | None, q: Tensor, k: Tensor, key_real: Tensor | None = None) -> Pattern | None:
    """The pattern for these queries and keys: a router is asked, the rest is as it is."""
    return chosen(q, k, key_mask=key_real) if isinstance(chosen, Router) else chosen
