"""Patterns as unions of conjunctions: what the planners of routers' choices read instead of the full normal form."""

from __future__ import annotations

from farlight.patterns.algebra import Intersection, Union
from farlight.patterns.expression import Atom, Pattern

__all__ = ["Clause", "clauses_of"]

# Clauses beyond which an expression is left to the general planner, which simplifies.
_MAX_CLAUSES = 16
Clause = tuple[Atom, ...]


def clauses_of(pattern: Pattern) -> list[Clause]:
    """Conjunctions of atoms whose union is the pattern; empty when other operators occur or they are too many."""
    if isinstance(pattern, Atom):
        return [(pattern,)]
    if not isinstance(pattern, Union | Intersection):
        return []
    parts = [clauses_of(part) for part in pattern.parts]
    if not all(parts):
        return []
    if isinstance(pattern, Union):
        union = [clause for part in parts for clause in part]
        return union if len(union) <= _MAX_CLAUSES else []
    clauses: list[Clause] = [()]
    for part in parts:
        if len(clauses) * len(part) > _MAX_CLAUSES:
            return []
        clauses = [(*left, *right) for left in clauses for right in part]
    return clauses
