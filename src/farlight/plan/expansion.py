"""From an expression to a union of conjunctions of literals, with a bound on their number.

Distributing `&` over `|` doubles the conjunctions with every factor, and each conjunction that is more than intervals must be
made disjoint from every other. What would exceed the bounds stays whole: a part of the expression is then a literal itself,
read by its intervals where they are cheap, else asked pair by pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from farlight.patterns.algebra import Complement, Difference, HeadsOf, Intersection, PerHead, Union
from farlight.patterns.expression import Atom, Pattern, Sizes

__all__ = ["Literal", "expanded", "is_intervals"]

Literal = tuple[Pattern, bool]
Clause = tuple[Literal, ...]

_MOST_CLAUSES = 256
# Clauses that are more than intervals: in a product of unions, which has more of them than the text has parts, and in a union.
# A factor that is intervals loses nothing where it stays whole.
_MOST_MULTIPLIED, _MOST_LOSSLESS, _MOST_UNITED = 16, 4, 64


def expanded(pattern: Pattern, sizes: Sizes) -> list[Clause]:
    """Clauses whose union is the pattern; a clause holds where all of its literals do."""
    return [clause for clause in _Expansion(sizes, {}).of(pattern, True) if not _contradicts(clause)]


def is_intervals(pattern: Pattern, sizes: Sizes) -> bool:
    """Whether the intervals of the pattern's rows are cheap; they say everything about it."""
    return all(atom._spans_are_cheap(sizes) for atom in pattern.atoms())


@dataclass(frozen=True)
class _Expansion:
    sizes: Sizes
    easy: dict[Literal, bool]  # asked many times, and an atom may read its table to answer

    def of(self, pattern: Pattern, positive: bool) -> list[Clause]:
        match pattern:
            case Complement(parts=(inner,)):
                return self.of(inner, not positive)
            case Union(parts=parts):
                return self.any([(part, positive) for part in parts]) if positive else self.all([(p, False) for p in parts])
            case Intersection(parts=parts):
                return self.all([(part, positive) for part in parts]) if positive else self.any([(p, False) for p in parts])
            case Difference(parts=(left, right)):
                both = [(left, positive), (right, not positive)]
                return self.all(both) if positive else self.any(both)
            case PerHead():
                groups = [((HeadsOf(heads), True), (part, positive)) for part, heads in pattern.groups()]
                by_head = [_product([(heads,)], self.of(*literal)) for heads, literal in groups]
                few = sum(map(len, by_head)) <= _MOST_CLAUSES
                return [clause for clauses in by_head for clause in clauses] if few else list(groups)
        assert isinstance(pattern, Atom)
        simpler = pattern._rewrite()
        # A dilated window keeps its own name where it is denied: "not this stride or not this near" would be two terms.
        if simpler is not pattern and (positive or isinstance(simpler, Union | Atom)):
            return self.of(simpler, positive)
        return [((pattern, positive),)]

    def any(self, literals: list[Literal]) -> list[Clause]:
        """Where one of these holds. Those past a bound are one literal together, of its own where they are intervals."""
        out: dict[Clause, None] = {}
        hard = 0
        whole: dict[bool, list[Literal]] = {True: [], False: []}
        for literal in literals:
            clauses = self.of(*literal)
            more = self.hard(clauses)
            if len(out) + len(clauses) > _MOST_CLAUSES or (hard and hard + more > _MOST_UNITED):
                whole[is_intervals(literal[0], self.sizes)].append(literal)
                continue
            out.update(dict.fromkeys(clauses))
            hard += more
        return [*out, *((_united(some),) for some in whole.values() if some)]

    def all(self, literals: list[Literal]) -> list[Clause]:
        """Where all of these hold. Factors that are more than intervals are multiplied first: the others lose nothing whole."""
        factors = [(literal, self.of(*literal)) for literal in literals]
        out: list[Clause] = [tuple(dict.fromkeys(one for _, clauses in factors if len(clauses) == 1 for one in clauses[0]))]
        whole: list[Literal] = []
        factors = [factor for factor in factors if len(factor[1]) != 1]
        for literal, clauses in sorted(factors, key=lambda factor: not self.hard(factor[1])):
            # Counted before anything is multiplied: a clause is hard where a factor is.
            count = len(out) * len(clauses)
            hard = count - (len(out) - self.hard(out)) * (len(clauses) - self.hard(clauses))
            most = _MOST_LOSSLESS if is_intervals(literal[0], self.sizes) else _MOST_MULTIPLIED
            if len(out) > 1 and (count > _MOST_CLAUSES or hard > most):
                whole.append(literal)
            else:
                out = _product(out, clauses)
        return _product(out, [tuple(whole)]) if whole else out

    def hard(self, clauses: Sequence[Clause]) -> int:
        """How many of the clauses are more than intervals."""
        return sum(not all(self.is_easy(literal) for literal in clause) for clause in clauses)

    def is_easy(self, literal: Literal) -> bool:
        if literal not in self.easy:
            pattern, positive = literal
            drawn = positive and isinstance(pattern, Atom) and pattern._form(self.sizes) == "points"
            self.easy[literal] = not drawn and is_intervals(pattern, self.sizes)
        return self.easy[literal]


def _product(left: Sequence[Clause], right: Sequence[Clause]) -> list[Clause]:
    return list(dict.fromkeys(tuple(dict.fromkeys((*a, *b))) for a in left for b in right))


def _united(literals: Sequence[Literal]) -> Literal:
    """Where one of the literals holds, as one literal."""
    if len(literals) == 1:
        return literals[0]
    parts = [pattern if positive else Complement((pattern,), bounded=False) for pattern, positive in literals]
    return Union(tuple(parts), bounded=False), True


def _contradicts(clause: Clause) -> bool:
    held = set(clause)
    return any((pattern, not positive) in held for pattern, positive in clause)
