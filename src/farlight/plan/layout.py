"""Layout of one term: its row order and key order, and the intervals of its rows, one chunk of tiles at a time.

A term without labels keeps the identity order. A term with labels (stride, clusters, scattered globals) is sorted by label:
rows by (variant, label, row), keys by (variant, label, position). In that order the keys of one label are consecutive slots,
and an interval of positions within a label is an interval of slots, found by binary search. A dilated window becomes a
window over slots, a cluster a dense block.

The rows of a term are laid out `Chunk` by `Chunk`, so that planning needs memory for one chunk beside the plan. The intervals
of a chunk's rows follow in three steps, the next one only where the one before does not suffice:

1. interval arithmetic on `Spans`: the term's own intervals minus those of earlier interval terms;
2. subtraction of an earlier labelled term whose labels are constant within this term's label groups (stride 4 after stride 2);
3. evaluation pair by pair (`TermLayout.pairwise`): exceptions that are no intervals, and the other earlier terms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.errors import PlanError, shorten
from farlight.patterns.expression import Labels, Sizes
from farlight.patterns.spans import Spans
from farlight.plan.normal_form import Conjunction, Term
from farlight.plan.tile_bounds import TileSpans, tile_spans
from farlight.ragged import expand_counts

__all__ = ["Chunk", "KeyOrder", "RowOrder", "TermLayout"]

# Rows of a chunk; pairs or unmerged intervals of a chunk; pairs evaluated at a time.
_MAX_ROWS, _MAX_INTERVALS, _MAX_PAIRS = 1 << 15, 1 << 22, 1 << 22
# Evaluations of one atom on one pair that a term may need: some minutes.
_MAX_EVALUATIONS = 1 << 34
# A labelled term with at most _FEW_KEYS keys evaluates an earlier term of more than _FEW_INTERVALS intervals per row pair by
# pair: fewer operations than a subtraction of all its intervals.
_FEW_KEYS, _FEW_INTERVALS = 16, 4
_SAMPLED_ROWS = 64


@dataclass
class RowOrder:
    """A permutation of the query rows of all variants, cut into tiles.

    rows: (places,) the row at each place, None = identity; row_first, first: (variants + 1,) first place and first tile of
    each variant; start, count: (tiles,) first place and number of rows of each tile. All int64.
    """

    rows: Tensor | None
    row_first: Tensor
    first: Tensor
    start: Tensor
    count: Tensor

    @staticmethod
    def identity(sizes: Sizes, tile: int) -> RowOrder:
        """Rows in their order, one variant, tiles of `tile` rows."""
        start = torch.arange(0, sizes.n_q, tile, device="cpu")
        bounds = torch.tensor([0, 1], device="cpu")
        return RowOrder(None, bounds * sizes.n_q, bounds * start.numel(), start, (sizes.n_q - start).clamp(max=tile))

    @staticmethod
    def by_label(query: Tensor, tile: int) -> RowOrder:
        """Rows of each variant sorted by (label, row). `query`: `(variants, n_q)` labels; rows with label -1 are left out.

        Tiles hold one label each: a new one begins at each label and after every `tile` rows of a label.
        """
        variants, n_q = query.shape
        device = query.device
        order = torch.argsort(query, dim=1, stable=True)
        label = query.gather(1, order)
        labelled = label >= 0
        rows, label = order[labelled], label[labelled]
        variant = torch.arange(variants, device=device)[:, None].expand(-1, n_q)[labelled]
        place = torch.arange(rows.numel(), device=device)
        is_first = torch.ones_like(place, dtype=torch.bool)
        is_first[1:] = (label[1:] != label[:-1]) | (variant[1:] != variant[:-1])
        group_start = torch.where(is_first, place, 0).cummax(0).values
        start = place[(place - group_start) % tile == 0]
        count = torch.diff(start, append=torch.tensor([rows.numel()], device=device))
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        row_first = torch.cat((zero, torch.bincount(variant, minlength=variants).cumsum(0)))
        first = torch.cat((zero, torch.bincount(variant[start], minlength=variants).cumsum(0)))
        return RowOrder(rows, row_first, first, start, count)


@dataclass
class KeyOrder:
    """Keys sorted by code = (variant · labels + label) · n_k + position.

    slots: (slots,) the key at each slot; code: (slots,) its code, ascending; query_code: `(variants, n_q)` the code of
    (variant, label of the row, position 0). All int64.
    """

    slots: Tensor
    code: Tensor
    query_code: Tensor

    @staticmethod
    def by_label(labels: Labels) -> KeyOrder | None:
        """The order of labelled keys, label -1 left out; None when all labels are 0: then it is the identity."""
        query, key = labels.query, labels.key
        if not bool(key.any()) and not bool((query > 0).any()):
            return None
        variants, n_k = key.shape
        device = key.device
        base = torch.arange(variants, device=device)[:, None] * max(1, _label_count(labels))
        labelled = key >= 0
        code = ((base + key) * n_k + torch.arange(n_k, device=device))[labelled]
        code, order = torch.sort(code)
        slots = torch.arange(n_k, device=device).expand(variants, -1)[labelled][order]
        return KeyOrder(slots, code, (base + query.clamp(min=0)) * n_k)

    def to_slots(self, spans: Spans, query_code: Tensor) -> Spans:
        """Intervals of positions as intervals of slots among the keys of each row's label; `query_code`: (rows,)."""
        row, lo, hi = spans.listed()
        base = query_code[row]
        lo, hi = torch.searchsorted(self.code, torch.stack((base + lo, base + hi)))
        return Spans.gather(spans.rows, self.slots.numel(), row, lo, hi)


@dataclass(frozen=True)
class Chunk:
    """The rows of consecutive tiles. count: (tiles,) rows of each tile; the others have one entry per row.

    variant, row: the query row; tile: its tile, counted from `first_tile`; tile_row: its index within the tile. All int64.
    """

    first_tile: int
    count: Tensor
    variant: Tensor
    row: Tensor
    tile: Tensor
    tile_row: Tensor


def _label_count(labels: Labels) -> int:
    return 1 + max(int(table.max()) if table.numel() else -1 for table in (labels.query, labels.key))


def constant_rows(labels: Labels, earlier: Term, sizes: Sizes, b: Tensor, h: Tensor) -> Tensor | None:
    """`(variants, n_q)` bool: rows whose whole label group satisfies the label equality of `earlier`; the others satisfy it
    for no key. None when some group of equal `labels` is divided, or `earlier` is no conjunction of labels and intervals.

    Example: a stride of 4 after a stride of 2. Within a residue mod 4 the residue mod 2 is constant, so that there the
    earlier term is its intervals alone. Decided by the minimum and maximum of the earlier labels over each group.
    """
    part = earlier.parts[0]
    if len(earlier.parts) > 1 or part.rest or part.points or not part.labels:
        return None
    other = earlier.sorted_labels(sizes, b, h)
    variants, groups = labels.query.shape[0], _label_count(labels)
    if groups == 0:
        return torch.zeros_like(labels.query, dtype=torch.bool)
    base = torch.arange(variants, device="cpu")[:, None] * groups
    edges = []
    for table, other_table in ((labels.query, other.query), (labels.key, other.key)):
        group = (base + table)[table >= 0]
        values = other_table[table >= 0]
        edges.append(torch.full((variants * groups,), 2**62, device="cpu").scatter_reduce_(0, group, values, "amin"))
        edges.append(torch.full((variants * groups,), -2, device="cpu").scatter_reduce_(0, group, values, "amax"))
    q_min, q_max, k_min, k_max = edges
    all_equal = (q_min == q_max) & (k_min == k_max) & (q_min == k_min) & (q_min >= 0)
    none_equal = (q_max < k_min) | (k_max < q_min) | (q_max < 0) | (k_max < 0)
    if not bool((all_equal | none_equal).all()):
        return None
    return all_equal[base + labels.query.clamp(min=0)] & (labels.query >= 0)


class TermLayout:
    """One term laid out in tiles of `tile` rows.

    variation: (B|1, H|1) int64, the variant of each (batch, head); variants: their number; order, keys: the row and key order
    (keys None = identity); pairwise: earlier terms that are evaluated pair by pair. Raises PlanError when the pairs to
    evaluate are too many.
    """

    def __init__(self, term: Term, sizes: Sizes, tile: int) -> None:
        self.term, self.sizes, self.tile = term, sizes, tile
        self.variation = term.variation(sizes)
        self.variants = int(self.variation.max()) + 1
        # One (batch, head) of each variant, in which the term is evaluated.
        flat = self.variation.reshape(-1)
        index = torch.zeros(self.variants, dtype=torch.int64, device="cpu")
        index.scatter_(0, flat, torch.arange(flat.numel(), device="cpu"))
        self.b, self.h = index // self.variation.shape[1], index % self.variation.shape[1]
        self.order, self.keys = RowOrder.identity(sizes, tile), None
        self.pairwise: list[Term] = []
        # Earlier terms that are their intervals in some rows and empty in the others, with these rows (variants, n_q).
        self._constant: list[tuple[Conjunction, Tensor]] = []
        labels = term.sorted_labels(sizes, self.b, self.h) if term.labels else None
        for earlier in term.hard:
            rows = None if labels is None else constant_rows(labels, earlier, sizes, self.b, self.h)
            if rows is None:
                self.pairwise.append(earlier)
            else:
                self._constant.append((earlier.parts[0], rows))
        if labels is not None:
            if bool(((labels.key >= 0).sum(1) <= _FEW_KEYS).all()):
                self.pairwise += [earlier for earlier in term.earlier if earlier.is_intervals and self._is_fragmented(earlier)]
            self.keys = KeyOrder.by_label(labels)
            if bool(labels.query.any()):
                self.order = RowOrder.by_label(labels.query, tile)
        self._chunk_rows = self._rows_per_chunk()

    @property
    def is_identity(self) -> bool:
        """Whether rows are in identity order."""
        return self.order.rows is None

    @property
    def tiles(self) -> int:
        """Tiles over all variants."""
        return self.order.start.numel() * (self.variants if self.is_identity else 1)

    def multiplicity(self) -> Tensor:
        """(variants,) int64: how many (batch, head) share each variant."""
        repeats = self.sizes.batch * self.sizes.heads // self.variation.numel()
        return torch.bincount(self.variation.reshape(-1), minlength=self.variants) * repeats

    def chunks(self) -> Iterator[Chunk]:
        """The rows of all tiles of all variants."""
        step = max(1, self._chunk_rows // self.tile)
        per_variant = self.order.start.numel()
        for first in range(0, self.tiles, step):
            number = torch.arange(first, min(first + step, self.tiles), device="cpu")
            index = number % per_variant if self.is_identity else number
            count = self.order.count[index]
            tile, tile_row = expand_counts(count)
            place = self.order.start[index][tile] + tile_row
            if self.order.rows is None:
                variant, row = (number // per_variant)[tile], place
            else:
                variant = torch.searchsorted(self.order.row_first, place, right=True) - 1
                row = self.order.rows[place]
            yield Chunk(first, count, variant, row, tile, tile_row)

    def spans(self, variant: Tensor, row: Tensor) -> Spans:
        """The key slots of each of these rows, exactly."""
        bound = self._bounding_spans(variant, row)
        if not self.pairwise and not self.term.parts[0].rest:
            return bound
        return self._filter_pairs(bound, self.b[variant], self.h[variant], row + self.sizes.q_offset)

    def tile_spans(self, chunk: Chunk) -> TileSpans | None:
        """`spans` of a chunk split into a part common to each tile and a rest by row; None where this saves nothing."""
        if not self.is_identity or self.keys is not None:
            return None
        b, h = self.b[chunk.variant], self.h[chunk.variant]
        return tile_spans(self.term, self.sizes, b, h, chunk.row + self.sizes.q_offset, chunk.tile, chunk.count)

    def points(self, variant: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """(index into `row`, key) of the links of a point term, sorted; links of earlier terms are filtered out."""
        term, sizes = self.term, self.sizes
        b, h, i = self.b[variant], self.h[variant], row + sizes.q_offset
        keys = term.points[0]._points(sizes, b, h, i).sort(1).values
        index = torch.arange(row.numel(), device="cpu")[:, None].expand_as(keys)[keys >= 0]
        keys = keys[keys >= 0]
        pairs = (sizes, b[index], h[index], i[index], keys)
        allowed = term.parts[0].without_points().allows(*pairs)
        for earlier in term.earlier:
            allowed = allowed & ~earlier.allows(*pairs)
        allowed = allowed.expand_as(keys)
        return index[allowed], keys[allowed]

    def rows_mostly_agree(self) -> bool:
        """Whether 7/8 of a sample of rows have the same intervals."""
        row = self._sample()
        index, lo, hi = (column.tolist() for column in self.spans(torch.zeros_like(row), row).listed())
        intervals: dict[int, list[tuple[int, int]]] = {}
        for r, *interval in zip(index, lo, hi, strict=True):
            intervals.setdefault(r, []).append((interval[0], interval[1]))
        largest = max(Counter(map(tuple, intervals.values())).values(), default=0)
        return 8 * largest >= 7 * row.numel()

    def _sample(self) -> Tensor:
        """About _SAMPLED_ROWS rows, evenly spaced."""
        return torch.arange(0, self.sizes.n_q, max(1, self.sizes.n_q // _SAMPLED_ROWS), device="cpu")

    def _is_fragmented(self, term: Term) -> bool:
        """Whether sampled rows have more than _FEW_INTERVALS intervals of this term on average."""
        row = self._sample()
        b, h = self.b[:1].expand_as(row), self.h[:1].expand_as(row)
        spans = term.spans(self.sizes, b, h, row + self.sizes.q_offset)
        return spans.listed()[0].numel() > _FEW_INTERVALS * row.numel()

    def _rows_per_chunk(self) -> int:
        """The rows of a chunk, bounded by its intervals and pairs. Raises PlanError when the pairs to evaluate are too many."""
        per_row = 1 + sum(atom._entries_per_row(self.sizes) for atom in self.term.atoms())
        rest = self.term.parts[0].rest
        if (self.pairwise or rest) and not self.term.points:  # a point term evaluates its points alone
            row = self._sample()
            if self.order.rows is not None:
                row = self.order.rows[:: max(1, self.order.rows.numel() // _SAMPLED_ROWS)]
            pairs = self._bounding_spans(torch.zeros_like(row), row).count() // max(1, row.numel())
            atoms = sum(1 for pattern, _ in rest for _ in pattern.atoms())
            atoms += sum(1 for term in self.pairwise for _ in term.atoms())
            evaluations = pairs * self.sizes.n_q * self.variants * atoms
            if evaluations > _MAX_EVALUATIONS:
                patterns = [pattern for pattern, _ in rest] or [p for term in self.pairwise for p in term.parts[0].patterns()]
                raise PlanError(
                    f"{shorten(patterns[0].text)} is no union of intervals here: it would take {evaluations:,} evaluations of "
                    f"single pairs, more than {_MAX_EVALUATIONS:,}. Bound it by a window, or unite fewer patterns inside an "
                    "intersection."
                )
            per_row = max(per_row, pairs)
        return min(_MAX_ROWS, _MAX_INTERVALS // per_row)

    def _bounding_spans(self, variant: Tensor, row: Tensor) -> Spans:
        """The slots of these rows by interval arithmetic alone: a superset while pairs remain to be evaluated."""
        b, h, i = self.b[variant], self.h[variant], row + self.sizes.q_offset
        spans = self.term.spans(self.sizes, b, h, i, with_labels=not self.term.labels, skip=self.pairwise)
        for part, rows in self._constant:
            spans = spans - part.spans(self.sizes, b, h, i, with_labels=False).only(rows[variant, row])
        if self.keys is not None:
            spans = self.keys.to_slots(spans, self.keys.query_code[variant, row])
        return spans

    def _filter_pairs(self, spans: Spans, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        """The pairs of `spans` that the term allows, evaluated _MAX_PAIRS at a time."""
        row, lo, hi = spans.listed()
        total = (hi - lo).cumsum(0)
        rows, slots = [], []
        first = 0
        while first < row.numel():
            done = int(total[first - 1]) if first else 0
            end = max(first + 1, int(torch.searchsorted(total, done + _MAX_PAIRS)))
            r, slot = Spans(spans.rows, spans.keys, row[first:end], lo[first:end], hi[first:end]).expand()
            key = slot if self.keys is None else self.keys.slots[slot]
            allowed = self.term.filter(self.sizes, b[r], h[r], i[r], key, self.pairwise).expand_as(r)
            rows.append(r[allowed])
            slots.append(slot[allowed])
            first = end
        if not rows:
            return spans
        return Spans.from_pairs(spans.rows, spans.keys, torch.cat(rows), torch.cat(slots))
