"""Subjects of an analysis: a pattern, a router, or a mapping {layer: pattern or router}, each with a name for tables."""

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
    """A named candidate: `chosen` is the argument of `use_pattern`, `name` its label in tables and JSON."""

    name: str
    chosen: Judged

    def at(self, layer: int) -> Pattern | Router | None:
        """The pattern or router of one layer; None: the model's own attention."""
        return self.chosen.get(layer) if isinstance(self.chosen, Mapping) else self.chosen


def subjects(judged: Sequence[Judged | Subject]) -> list[Subject]:
    """Each as a `Subject`: a pattern's name is its expression, a router's the expression it was parsed from, else its repr."""
    return [item if isinstance(item, Subject) else Subject(_name(item), item) for item in judged]


def _name(item: Judged) -> str:
    if isinstance(item, Pattern):
        return str(item)
    if isinstance(item, Router):
        return item.expression or " ".join(repr(item).split())
    if isinstance(item, Mapping):
        return f"{len(item)} layers' own"
    raise ArgumentError(
        f"{type(item).__name__} cannot be judged; give a pattern, a router, or a mapping {{layer number: one of these}}."
    )


def pattern_for(chosen: Pattern | Router | None, q: Tensor, k: Tensor, key_real: Tensor | None = None) -> Pattern | None:
    """The pattern for q, k of shape `(B, H, N, D)`: a router's choice (`key_real`: bool mask of real keys), else unchanged."""
    return chosen(q, k, key_mask=key_real) if isinstance(chosen, Router) else chosen
