"""A pattern read at listed positions: what a rank computes, with the rows and keys that it holds numbered from 0.

`select` wraps every atom of an expression. Row r of the selection is row `rows[r]` of the whole problem, key c is key
`keys[c]`, and (b, h) are `(items[b, h], heads[b, h])`: so random keys, dropout and named tokens mean what they mean in the
whole.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.distributed.links import row_spans
from farlight.patterns.algebra import Complement, Difference, HeadsOf, Intersection, PerHead, Union
from farlight.patterns.expression import Atom, Form, Labels, Pattern, Sizes
from farlight.patterns.spans import Spans
from farlight.ragged import expand_ranges

__all__ = ["Places", "except_served", "select"]


@dataclass(frozen=True, eq=False)
class Places:
    """Where the rows, keys and heads of a selection stand in the whole problem.

    rows `(n_q,)`: query rows, ascending; keys `(n_k,)`: keys, ascending; items, heads `(B, H)`; whole: the sizes of the
    problem.
    """

    rows: Tensor
    keys: Tensor
    items: Tensor
    heads: Tensor
    whole: Sizes

    @property
    def sizes(self) -> Sizes:
        """The sizes of the selection; its query positions count from 0."""
        return Sizes(self.rows.numel(), self.keys.numel(), 0, *self.items.shape)

    def head_of(self, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """(batch item, head) of the whole problem, elementwise."""
        return self.items.to(b.device)[b, h], self.heads.to(b.device)[b, h]

    def position_of(self, i: Tensor) -> Tensor:
        """The absolute query positions of rows of the selection."""
        return self.rows.to(i.device)[i.clamp(0, max(0, self.rows.numel() - 1))] + self.whole.q_offset


def select(pattern: Pattern, places: Places) -> Pattern:
    """The pattern on the selection: pair (r, c) is allowed where the whole pattern allows (rows[r], keys[c])."""
    match pattern:
        case Union(parts=parts) | Intersection(parts=parts) | Difference(parts=parts) | Complement(parts=parts):
            return type(pattern)(tuple(select(part, places) for part in parts), bounded=False)
        case PerHead():
            groups = (Intersection((HeadsOf(heads), part), bounded=False) for part, heads in pattern.groups())
            return select(Union(tuple(groups), bounded=False), places)
    assert isinstance(pattern, Atom)
    return SelectedAtom(pattern, places)


class SelectedAtom(Atom):
    """One atom on a selection. Every form of the atom is kept: intervals, single keys, labels."""

    inner: Atom
    places: Places

    def __init__(self, inner: Atom, places: Places) -> None:
        tables = (places.rows, places.keys, places.items, places.heads)
        first = len(inner._tables)
        marks = ", ".join(f"${first + t}" for t in range(len(tables)))
        varies = inner.varies_over_batch or inner.varies_over_heads
        whole = dataclasses.astuple(places.whole)
        self._set(
            inner=inner,
            places=places,
            text=f"_selected({re.sub(' ', '', inner.text)}, {marks}, {list(whole)})",
            tables=(*inner._tables, *tables),
            varies_over_batch=varies,
            varies_over_heads=varies,
        )

    def check(self, sizes: Sizes) -> None:
        assert sizes == self.places.sizes

    def _batch_and_heads(self) -> tuple[int, int]:
        return self.places.sizes.batch, self.places.sizes.heads

    def _rewrite(self) -> Pattern:
        rewritten = self.inner._rewrite()
        return self if rewritten is self.inner else select(rewritten, self.places)

    def _form(self, sizes: Sizes) -> Form:
        return self.inner._form(self.places.whole)

    def _spans_are_cheap(self, sizes: Sizes) -> bool:
        return self.inner._spans_are_cheap(self.places.whole)

    def _entries_per_row(self, sizes: Sizes) -> int:
        return self.inner._entries_per_row(self.places.whole)

    def _rows_equal(self, sizes: Sizes, first: Tensor, last: Tensor) -> Tensor:
        return self.inner._rows_equal(self.places.whole, self.places.position_of(first), self.places.position_of(last))

    def _variation(self, sizes: Sizes) -> Tensor:
        whole = self.places.whole
        return self.inner._variation(whole).expand(whole.batch, whole.heads)[self.places.items, self.places.heads]

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        b, h = torch.broadcast_tensors(b, h)
        item, head = self.places.head_of(b, h)
        inside = (i >= 0) & (i < sizes.n_q)
        key = self.places.keys.to(j.device)[j]
        return self.inner._allows(self.places.whole, item, head, self.places.position_of(i), key) & inside

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        spans = row_spans(self.inner, self.places.whole, *self.places.head_of(b, h), self.places.position_of(i))
        keys = self.places.keys.to(i.device)
        if spans.is_thin:
            return Spans.thin(sizes.n_k, torch.searchsorted(keys, spans.lo), torch.searchsorted(keys, spans.hi))
        row, lo, hi = spans.listed()
        return Spans.gather(i.numel(), sizes.n_k, row, torch.searchsorted(keys, lo), torch.searchsorted(keys, hi))

    def _points(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Tensor:
        points = self.inner._points(self.places.whole, *self.places.head_of(b, h), self.places.position_of(i))
        keys = self.places.keys.to(i.device)
        if not keys.numel():
            return torch.full_like(points, -1)
        slot = torch.searchsorted(keys, points).clamp(max=keys.numel() - 1)
        return torch.where((points >= 0) & (keys[slot] == points), slot, -1)

    def _labels(self, sizes: Sizes, b: Tensor, h: Tensor) -> Labels:
        labels = self.inner._labels(self.places.whole, *self.places.head_of(b, h))
        return Labels(labels.query[:, self.places.rows.to(b.device)], labels.key[:, self.places.keys.to(b.device)])


def except_served(pattern: Pattern, group: Tensor, first: Tensor, lo: Tensor, hi: Tensor) -> Pattern:
    """`pattern` without the links that another rank computes: row r does not see the keys of the intervals of group[r].

    The ascending intervals of group g are `lo[first[g]:first[g + 1]]` and `hi[…]`, in keys of the selection.
    """
    return Difference((pattern, ServedElsewhere(group, first, lo, hi)), bounded=False) if lo.numel() else pattern


class ServedElsewhere(Atom):
    """Key intervals listed per group of rows; see `except_served`."""

    def __init__(self, group: Tensor, first: Tensor, lo: Tensor, hi: Tensor) -> None:
        self._set(text="_served_elsewhere($0, $1, $2, $3)", tables=(group, first, lo, hi))

    def _batch_and_heads(self) -> tuple[int, int]:
        return 1, 1

    def _entries_per_row(self, sizes: Sizes) -> int:
        return int(self._tables[1].diff().max())

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        group, first, lo, hi = (table.to(i.device) for table in self._tables)
        of_row = group[i.clamp(0, group.numel() - 1)]
        row, interval = expand_ranges(first[of_row], first[of_row + 1])
        return Spans.gather(i.numel(), sizes.n_k, row, lo[interval], hi[interval])

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        group, first, lo, hi = (table.to(j.device) for table in self._tables)
        width = sizes.n_k + 1
        owner = torch.arange(first.numel() - 1, device=j.device).repeat_interleave(first.diff())
        place = group[i.clamp(0, group.numel() - 1)] * width + j
        at = torch.searchsorted(owner * width + lo, place, right=True) - 1
        return (at >= 0) & (place < (owner * width + hi)[at.clamp(min=0)])
