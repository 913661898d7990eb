"""From an expression to terms that can be planned one by one: disjoint, each with one natural way to be laid out.

An expression becomes a union of conjunctions of atoms (disjunctive normal form), or of parts of the expression where that would
be too many (`plan/expansion.py`). A conjunction is read by its kinds:

* intervals only: the rows stay where they are (all such conjunctions with the same variation are one term);
* with a positive *label* atom (stride, clusters, scattered globals): tokens are sorted by label, and within a label the
  interval atoms of the conjunction are intervals again;
* with a positive *point* atom (random keys): single links, filtered by the rest of the conjunction.

Terms are made disjoint by order: each loses what an earlier one has. Where the earlier is made of intervals the later's
intervals are subtracted; where it is not, its truth is evaluated on the later's pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from farlight.patterns.expression import Atom, Labels, Pattern, Sizes
from farlight.patterns.named import seen_by_all, sees_all
from farlight.patterns.positional import landmarks
from farlight.patterns.spans import Spans
from farlight.plan.expansion import Literal, expanded, is_intervals

__all__ = ["Term", "terms_of"]


@dataclass
class Conjunction:
    """All of these hold: spans inside `within` and outside `without`, equal labels, drawn as a point, truth of `rest`."""

    within: list[Pattern] = field(default_factory=list)
    without: list[Pattern] = field(default_factory=list)
    labels: list[Atom] = field(default_factory=list)
    points: list[Atom] = field(default_factory=list)
    rest: list[tuple[Pattern, bool]] = field(default_factory=list)

    @property
    def is_intervals(self) -> bool:
        """Whether `spans` alone says everything."""
        return not (self.rest or self.points or any(not isinstance(label, sees_all) for label in self.labels))

    @property
    def rank(self) -> int:
        """Which conjunctions come first: rows that see all, intervals, intervals with exceptions, sorted tokens, scattered
        columns, points. What comes later has fewer pairs, for it may have to be asked pair by pair.
        """
        if self.points:
            return 5
        if all(isinstance(label, seen_by_all | landmarks) for label in self.labels):
            return 4 if self.labels else 2 if self.rest else 1
        return 0 if all(isinstance(label, sees_all) for label in self.labels) and not self.rest else 3

    def spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, *, with_labels: bool) -> Spans:
        """The intervals that bound this conjunction, in order of position."""
        within = [*self.within, *(self.labels if with_labels else ())]
        out = within[0]._spans(sizes, b, h, i) if within else Spans.everything(i.numel(), sizes.n_k, i.device)
        for pattern in within[1:]:
            out = out & pattern._spans(sizes, b, h, i)
        for pattern in self.without:
            out = out - pattern._spans(sizes, b, h, i)
        return out

    def allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        out = torch.ones((), dtype=torch.bool, device=i.device)
        for pattern in (*self.within, *self.labels, *self.points):
            out = out & pattern._allows(sizes, b, h, i, j)
        for pattern in self.without:
            out = out & ~pattern._allows(sizes, b, h, i, j)
        for pattern, wanted in self.rest:
            out = out & (pattern._allows(sizes, b, h, i, j) == wanted)
        return out

    def without_points(self) -> Conjunction:
        return dataclasses.replace(self, points=[])

    def patterns(self) -> list[Pattern]:
        return [*self.within, *self.without, *self.labels, *self.points, *(pattern for pattern, _ in self.rest)]


@dataclass(eq=False)
class Term:
    """Several interval conjunctions, or one of another kind, without what the `earlier` terms hold."""

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
        """Earlier terms that are more than intervals."""
        return [term for term in self.earlier if not term.is_intervals]

    def atoms(self) -> Iterator[Atom]:
        """The atoms of the parts, those of the earlier terms left out."""
        for part in self.parts:
            for pattern in part.patterns():
                yield from pattern.atoms()

    def variation(self, sizes: Sizes) -> Tensor:
        """Integers `(B|1, H|1)`, dense from 0: equal numbers have the same links."""
        classes = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
        # An atom stands in many terms; equal ones vary alike.
        for atom in dict.fromkeys(atom for term in (self, *self.earlier) for atom in term.atoms()):
            more = atom._variation(sizes)
            if more.numel() > 1:
                classes = classes * (int(more.max()) + 1) + more
                classes = torch.unique(classes, return_inverse=True)[1]
        return classes

    def spans(
        self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, *, with_labels: bool = True, asked: Sequence[Term] = ()
    ) -> Spans:
        """The term's intervals in order of position, without those of earlier terms made of intervals.

        `with_labels=False` leaves out the label atoms, for a caller that applies them by sorting; the earlier terms in
        `asked` stay in, for a caller that asks them pair by pair.
        """
        out = self.parts[0].spans(sizes, b, h, i, with_labels=with_labels)
        for part in self.parts[1:]:
            out = out | part.spans(sizes, b, h, i, with_labels=with_labels)
        for term in self.earlier:
            if term.is_intervals and term not in asked:
                for part in term.parts:
                    out = out - part.spans(sizes, b, h, i, with_labels=True)
        return out

    def truth(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor, hard: list[Term]) -> Tensor:
        """What `spans` could not say, elementwise, for pairs inside them: exceptions, and the earlier terms given."""
        out = torch.ones((), dtype=torch.bool, device=i.device)
        for pattern, wanted in self.parts[0].rest:
            out = out & (pattern._allows(sizes, b, h, i, j) == wanted)
        for term in hard:
            out = out & ~term.allows(sizes, b, h, i, j)
        return out

    def allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Elementwise truth of the parts (what earlier terms hold is not taken away)."""
        out = self.parts[0].allows(sizes, b, h, i, j)
        for part in self.parts[1:]:
            out = out | part.allows(sizes, b, h, i, j)
        return out

    def sorted_labels(self, sizes: Sizes, b: Tensor, h: Tensor) -> Labels:
        """The label atoms' tables `(V, n_q)`, `(V, n_k)` as one: equal where all agree, -1 where any is none."""
        tables = [atom._labels(sizes, b, h) for atom in self.labels]
        query, key = tables[0].query, tables[0].key
        for table in tables[1:]:
            size = max(int(table.query.max()), int(table.key.max())) + 2
            query = torch.where((query >= 0) & (table.query >= 0), query * size + table.query, -1)
            key = torch.where((key >= 0) & (table.key >= 0), key * size + table.key, -1)
            query, key = _compressed(query, key)
        return Labels(*_compressed(query, key))


def _compressed(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The same labels as small numbers in the same order, -1 kept."""
    both = torch.cat((query.reshape(-1), key.reshape(-1))).clamp(min=-1)
    if both.numel() and int(both.max()) > both.numel():
        values, both = torch.unique(both, return_inverse=True)
        both = both - int(values[0] == -1)
    return both[: query.numel()].view_as(query), both[query.numel() :].view_as(key)


def terms_of(pattern: Pattern, sizes: Sizes) -> list[Term]:
    """Disjoint terms whose union is the pattern."""
    conjunctions = [read(clause, sizes) for clause in expanded(pattern, sizes)]
    terms: list[Term] = []
    still: list[Conjunction] = []
    varying: list[Conjunction] = []
    for part in sorted(conjunctions, key=lambda part: part.rank):
        if part.rank == 1:
            (varying if _varies(part) else still).append(part)
    for part in sorted(conjunctions, key=lambda part: part.rank):
        if part.rank == 0:
            terms.append(Term([part], list(terms)))
    for group in (still, varying):
        if group:
            terms.append(Term(group, list(terms)))
    for part in sorted(conjunctions, key=lambda part: part.rank):
        if part.rank > 1:
            terms.append(Term([part], list(terms)))
    return terms


def _varies(part: Conjunction) -> bool:
    return any(p.varies_over_batch or p.varies_over_heads for p in part.patterns())


def read(literals: tuple[Literal, ...], sizes: Sizes) -> Conjunction:
    """Sort a conjunction's literals by what the planner can do with them."""
    out = Conjunction()
    for pattern, positive in literals:
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
