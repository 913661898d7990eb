"""Patterns as unions of conjunctions: what the planners of routers' choices read instead of the full normal form.

A clause of a part of `per_head` begins with the `HeadsOf` of its head.
"""

from __future__ import annotations

from collections import Counter

from farlight.patterns.algebra import HeadsOf, Intersection, PerHead, Union
from farlight.patterns.expression import Atom, Pattern

__all__ = ["Clause", "clauses_of"]

# Clauses of one head beyond which an expression is left to the general planner, which simplifies.
_MAX_CLAUSES = 16
Clause = tuple[Atom, ...]


def clauses_of(pattern: Pattern) -> list[Clause]:
    """Conjunctions of atoms whose union is the pattern; empty when other operators occur or they are too many."""
    if isinstance(pattern, Atom):
        return [(pattern,)]
    if not isinstance(pattern, Union | Intersection | PerHead):
        return []
    parts = [clauses_of(part) for part in pattern.parts]
    if not all(parts):
        return []
    if isinstance(pattern, PerHead):
        return [(HeadsOf((head,)), *clause) for head, part in enumerate(parts) for clause in part]
    if isinstance(pattern, Union):
        union = [clause for part in parts for clause in part]
        return union if len(union) <= _MAX_CLAUSES or _most_of_a_head(union) <= _MAX_CLAUSES else []
    clauses: list[Clause] = [()]
    for part in parts:
        joined = len(clauses) * len(part)
        if joined > _MAX_CLAUSES and _most_of_a_head(clauses) * _most_of_a_head(part) > _MAX_CLAUSES:
            return []
        clauses = [(*left, *right) for left in clauses for right in part]
    return clauses


def _most_of_a_head(clauses: list[Clause]) -> int:
    """An upper bound of the clauses of the head that has most."""
    by_head = Counter(next((atom.heads for atom in clause if isinstance(atom, HeadsOf)), ()) for clause in clauses)
    every = by_head.pop((), 0)
    return every + max(by_head.values(), default=0)
