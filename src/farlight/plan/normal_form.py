"""Normal form: a pattern as disjoint terms, each with one layout.

*Expansion.* The expression becomes a union of clauses, conjunctions of literals (disjunctive normal form). Distributing `&`
over `|` multiplies clauses, so their number is bounded: a subexpression beyond the bound stays whole, as one literal that is
read as intervals where these are cheap, else evaluated pair by pair.

*Layout.* The literals of a conjunction decide how it is laid out:

* intervals only: identity order; all such conjunctions with the same variation are one term;
* a positive *label* atom (stride, clusters, scattered globals): tokens are sorted by label, and within a label the interval
  atoms of the conjunction are intervals again;
* a positive *point* atom (random keys): single links, filtered by the rest of the conjunction.

*Disjointness.* Each term loses the links of all earlier terms: interval terms are subtracted by interval arithmetic, other
terms are evaluated on the later term's pairs. The order (`Conjunction.rank`) puts last the terms with few pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from farlight.patterns.algebra import Complement, Difference, HeadsOf, Intersection, PerHead, Union
from farlight.patterns.expression import Atom, Labels, Pattern, Sizes
from farlight.patterns.named import seen_by_all, sees_all
from farlight.patterns.positional import landmarks
from farlight.patterns.spans import Spans

__all__ = ["Conjunction", "Term", "expanded", "terms_of"]

Literal = tuple[Pattern, bool]  # a pattern, True = asserted, False = negated
Clause = tuple[Literal, ...]

_MAX_CLAUSES = 256
# Hard clauses (not made of intervals) of a product: with a factor that would have to be evaluated pair by pair if it stayed
# whole, with a factor of intervals, which loses nothing whole; and hard clauses of a union.
_MAX_PRODUCT, _MAX_PRODUCT_OF_INTERVALS, _MAX_UNION = 16, 4, 64


def expanded(pattern: Pattern, sizes: Sizes) -> list[Clause]:
    """Clauses whose union is the pattern; a clause holds where all of its literals do."""
    return [clause for clause in _Expansion(sizes, {}).clauses(pattern, True) if not _is_contradiction(clause)]


def is_intervals(pattern: Pattern, sizes: Sizes) -> bool:
    """Whether the intervals of the pattern's rows are cheap; they describe it exactly."""
    return all(atom._spans_are_cheap(sizes) for atom in pattern.atoms())


@dataclass(frozen=True)
class _Expansion:
    """The recursion of `expanded`. interval_literals: cache of `is_interval_literal`, which may read an atom's table."""

    sizes: Sizes
    interval_literals: dict[Literal, bool]

    def clauses(self, pattern: Pattern, positive: bool) -> list[Clause]:
        """The clauses of the pattern, or of its complement; negations are pushed down to the atoms (De Morgan)."""
        match pattern:
            case Complement(parts=(inner,)):
                return self.clauses(inner, not positive)
            case Union(parts=parts):
                literals = [(part, positive) for part in parts]
                return self.union(literals) if positive else self.product(literals)
            case Intersection(parts=parts):
                literals = [(part, positive) for part in parts]
                return self.product(literals) if positive else self.union(literals)
            case Difference(parts=(left, right)):
                literals = [(left, positive), (right, not positive)]
                return self.product(literals) if positive else self.union(literals)
            case PerHead():
                groups = [((HeadsOf(heads), True), (part, positive)) for part, heads in pattern.groups()]
                by_group = [_product([(heads,)], self.clauses(*literal)) for heads, literal in groups]
                fits = sum(map(len, by_group)) <= _MAX_CLAUSES
                return [clause for clauses in by_group for clause in clauses] if fits else list(groups)
        assert isinstance(pattern, Atom)
        rewritten = pattern._rewrite()
        # A negated dilated window stays an atom: "another residue, or outside the window" would be two clauses.
        if rewritten is not pattern and (positive or isinstance(rewritten, Union | Atom)):
            return self.clauses(rewritten, positive)
        return [((pattern, positive),)]

    def union(self, literals: Sequence[Literal]) -> list[Clause]:
        """Clauses of the union. Literals beyond a bound are merged into two: one of all intervals, one of the others."""
        out: dict[Clause, None] = {}
        hard = 0
        whole: dict[bool, list[Literal]] = {True: [], False: []}
        for literal in literals:
            clauses = self.clauses(*literal)
            more_hard = self.hard_count(clauses)
            if len(out) + len(clauses) > _MAX_CLAUSES or (hard and hard + more_hard > _MAX_UNION):
                whole[is_intervals(literal[0], self.sizes)].append(literal)
                continue
            out.update(dict.fromkeys(clauses))
            hard += more_hard
        return [*out, *((_merged(merged),) for merged in whole.values() if merged)]

    def product(self, literals: Sequence[Literal]) -> list[Clause]:
        """Clauses of the intersection. Factors with hard clauses are multiplied first: interval factors lose nothing whole."""
        factors = [(literal, self.clauses(*literal)) for literal in literals]
        singles = [clauses[0] for _, clauses in factors if len(clauses) == 1]
        out: list[Clause] = [tuple(dict.fromkeys(literal for clause in singles for literal in clause))]
        whole: list[Literal] = []
        factors = [factor for factor in factors if len(factor[1]) != 1]
        for literal, clauses in sorted(factors, key=lambda factor: not self.hard_count(factor[1])):
            # Counted before multiplying: a clause of the product is hard where either factor is.
            count = len(out) * len(clauses)
            hard = count - (len(out) - self.hard_count(out)) * (len(clauses) - self.hard_count(clauses))
            limit = _MAX_PRODUCT_OF_INTERVALS if is_intervals(literal[0], self.sizes) else _MAX_PRODUCT
            if len(out) > 1 and (count > _MAX_CLAUSES or hard > limit):
                whole.append(literal)
            else:
                out = _product(out, clauses)
        return _product(out, [tuple(whole)]) if whole else out

    def hard_count(self, clauses: Sequence[Clause]) -> int:
        """How many clauses are not made of intervals."""
        return sum(not all(self.is_interval_literal(literal) for literal in clause) for clause in clauses)

    def is_interval_literal(self, literal: Literal) -> bool:
        if literal not in self.interval_literals:
            pattern, positive = literal
            is_point = positive and isinstance(pattern, Atom) and pattern._form(self.sizes) == "points"
            self.interval_literals[literal] = not is_point and is_intervals(pattern, self.sizes)
        return self.interval_literals[literal]


def _product(left: Sequence[Clause], right: Sequence[Clause]) -> list[Clause]:
    return list(dict.fromkeys(tuple(dict.fromkeys((*a, *b))) for a in left for b in right))


def _merged(literals: Sequence[Literal]) -> Literal:
    """The union of the literals as one literal."""
    if len(literals) == 1:
        return literals[0]
    parts = [pattern if positive else Complement((pattern,), bounded=False) for pattern, positive in literals]
    return Union(tuple(parts), bounded=False), True


def _is_contradiction(clause: Clause) -> bool:
    literals = set(clause)
    return any((pattern, not positive) in literals for pattern, positive in clause)


@dataclass
class Conjunction:
    """The links that satisfy all literals.

    within, without: patterns that are cheap as intervals, positive and negated; labels: positive label atoms; points: at most
    one positive point atom; rest: (pattern, value) literals that only pairwise evaluation decides.
    """

    within: list[Pattern] = field(default_factory=list)
    without: list[Pattern] = field(default_factory=list)
    labels: list[Atom] = field(default_factory=list)
    points: list[Atom] = field(default_factory=list)
    rest: list[tuple[Pattern, bool]] = field(default_factory=list)

    @staticmethod
    def of(clause: Sequence[Literal], sizes: Sizes) -> Conjunction:
        """The literals of a clause by the role that each has in a layout."""
        out = Conjunction()
        for pattern, positive in clause:
            form = pattern._form(sizes) if isinstance(pattern, Atom) else None
            if positive and isinstance(pattern, Atom) and form == "labels":
                out.labels.append(pattern)
            elif positive and isinstance(pattern, Atom) and form == "points" and not out.points:
                out.points.append(pattern)
            elif is_intervals(pattern, sizes):
                (out.within if positive else out.without).append(pattern)
            else:
                out.rest.append((pattern, positive))
        return out

    @property
    def is_intervals(self) -> bool:
        """Whether `spans` is exact."""
        return not (self.rest or self.points or any(not isinstance(label, sees_all) for label in self.labels))

    @property
    def rank(self) -> int:
        """The place in the order of terms: 0 rows that see all, 1 intervals, 2 intervals with exceptions, 3 tokens sorted by
        label, 4 scattered columns, 5 points.
        """
        if self.points:
            return 5
        if all(isinstance(label, seen_by_all | landmarks) for label in self.labels):
            return 4 if self.labels else 2 if self.rest else 1
        return 0 if all(isinstance(label, sees_all) for label in self.labels) and not self.rest else 3

    @property
    def varies(self) -> bool:
        """Whether the links depend on the batch item or head."""
        return any(pattern.varies_over_batch or pattern.varies_over_heads for pattern in self.patterns())

    def spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, *, with_labels: bool) -> Spans:
        """Intervals of positions for rows (b, h, i), each (rows,): a superset of the links where `is_intervals` is False."""
        within = [*self.within, *(self.labels if with_labels else ())]
        out = within[0]._spans(sizes, b, h, i) if within else Spans.everything(i.numel(), sizes.n_k, i.device)
        for pattern in within[1:]:
            out = out & pattern._spans(sizes, b, h, i)
        for pattern in self.without:
            out = out - pattern._spans(sizes, b, h, i)
        return out

    def allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Whether each pair (b, h, i, j) satisfies all literals, elementwise."""
        out = torch.ones((), dtype=torch.bool, device=i.device)
        for pattern in (*self.within, *self.labels, *self.points):
            out = out & pattern._allows(sizes, b, h, i, j)
        for pattern in self.without:
            out = out & ~pattern._allows(sizes, b, h, i, j)
        for pattern, value in self.rest:
            out = out & (pattern._allows(sizes, b, h, i, j) == value)
        return out

    def without_points(self) -> Conjunction:
        return dataclasses.replace(self, points=[])

    def patterns(self) -> list[Pattern]:
        """The patterns of all literals."""
        return [*self.within, *self.without, *self.labels, *self.points, *(pattern for pattern, _ in self.rest)]


@dataclass(eq=False)
class Term:
    """The links of `parts` minus those of the `earlier` terms. Several parts are all intervals; any other part is alone."""

    parts: list[Conjunction]
    earlier: list[Term]

    @property
    def labels(self) -> list[Atom]:
        return self.parts[0].labels

    @property
    def points(self) -> list[Atom]:
        return self.parts[0].points

    @property
    def is_intervals(self) -> bool:
        return all(part.is_intervals for part in self.parts)

    @property
    def hard(self) -> list[Term]:
        """Earlier terms that are not intervals."""
        return [term for term in self.earlier if not term.is_intervals]

    def atoms(self) -> Iterator[Atom]:
        """The atoms of the parts, without those of the earlier terms; of a `per_head` that was not rewritten also its heads."""
        for part in self.parts:
            for pattern in part.patterns():
                yield from pattern.atoms()
                yield from _heads_of(pattern)

    def variation(self, sizes: Sizes) -> Tensor:
        """(B|1, H|1) int64 variant of each (batch, head), dense from 0: equal variants have equal links."""
        variant = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
        # An atom may occur in many terms: each distinct one counts once.
        for atom in dict.fromkeys(atom for term in (self, *self.earlier) for atom in term.atoms()):
            atom_variant = atom._variation(sizes)
            if atom_variant.numel() > 1:
                variant = variant * (int(atom_variant.max()) + 1) + atom_variant
                variant = torch.unique(variant, return_inverse=True)[1]
        return variant

    def spans(
        self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, *, with_labels: bool = True, skip: Sequence[Term] = ()
    ) -> Spans:
        """The term's intervals of positions minus those of earlier interval terms.

        `with_labels=False` leaves out the label atoms, for a caller that sorts by label. Earlier terms in `skip` are not
        subtracted, for a caller that evaluates them pair by pair (`filter`).
        """
        out = self.parts[0].spans(sizes, b, h, i, with_labels=with_labels)
        for part in self.parts[1:]:
            out = out | part.spans(sizes, b, h, i, with_labels=with_labels)
        for term in self.earlier:
            if term.is_intervals and term not in skip:
                for part in term.parts:
                    out = out - part.spans(sizes, b, h, i, with_labels=True)
        return out

    def filter(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor, pairwise: Sequence[Term]) -> Tensor:
        """What `spans` does not decide, elementwise for pairs inside it: the exceptions, and the earlier terms `pairwise`."""
        out = torch.ones((), dtype=torch.bool, device=i.device)
        for pattern, value in self.parts[0].rest:
            out = out & (pattern._allows(sizes, b, h, i, j) == value)
        for term in pairwise:
            out = out & ~term.allows(sizes, b, h, i, j)
        return out

    def allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Whether some part allows each pair, elementwise; earlier terms are not subtracted."""
        out = self.parts[0].allows(sizes, b, h, i, j)
        for part in self.parts[1:]:
            out = out | part.allows(sizes, b, h, i, j)
        return out

    def sorted_labels(self, sizes: Sizes, b: Tensor, h: Tensor) -> Labels:
        """All label atoms as one `(V, n_q)`, `(V, n_k)` labelling: labels are equal where all atoms' are, -1 where any is."""
        tables = [atom._labels(sizes, b, h) for atom in self.labels]
        query, key = tables[0].query, tables[0].key
        for table in tables[1:]:
            size = max(int(table.query.max()), int(table.key.max())) + 2
            query = torch.where((query >= 0) & (table.query >= 0), query * size + table.query, -1)
            key = torch.where((key >= 0) & (table.key >= 0), key * size + table.key, -1)
            query, key = _compressed(query, key)
        return Labels(*_compressed(query, key))


def _compressed(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The same labels renumbered to fit products without overflow, in the same order; -1 stays."""
    both = torch.cat((query.reshape(-1), key.reshape(-1))).clamp(min=-1)
    if both.numel() and int(both.max()) > both.numel():
        values, both = torch.unique(both, return_inverse=True)
        both = both - int(values[0] == -1)
    return both[: query.numel()].view_as(query), both[query.numel() :].view_as(key)


def terms_of(pattern: Pattern, sizes: Sizes) -> list[Term]:
    """Disjoint terms whose union is the pattern, in order of rank; interval conjunctions that vary over (batch, head) are
    one term, those that do not another.
    """
    conjunctions = sorted((Conjunction.of(clause, sizes) for clause in expanded(pattern, sizes)), key=lambda part: part.rank)
    intervals = [part for part in conjunctions if part.rank == 1]
    groups = [[part] for part in conjunctions if part.rank == 0]
    groups += [[part for part in intervals if part.varies == varies] for varies in (False, True)]
    groups += [[part] for part in conjunctions if part.rank > 1]
    terms: list[Term] = []
    for parts in filter(None, groups):
        terms.append(Term(parts, list(terms)))
    return terms


def _heads_of(pattern: Pattern) -> Iterator[HeadsOf]:
    """The groups of heads of every `per_head` in a pattern: what its links vary over, beside its atoms."""
    if isinstance(pattern, PerHead):
        yield from (HeadsOf(heads) for _, heads in pattern.groups())
    for part in getattr(pattern, "parts", ()):
        yield from _heads_of(part)
