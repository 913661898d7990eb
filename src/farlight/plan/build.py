"""Building a plan: term by term, some thousand tiles at a time, so that memory is that of the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.errors import PlanError, shorten
from farlight.patterns.expression import Labels, Pattern, Sizes
from farlight.patterns.spans import Spans
from farlight.plan.assemble import Draft, split_long_tiles
from farlight.plan.normal_form import Conjunction, Term, terms_of
from farlight.plan.order import Order, natural_order, sorted_keys, sorted_order
from farlight.plan.tables import Plan
from farlight.plan.tile_bounds import Coarse, coarse
from farlight.plan.tiling import MaskStore

__all__ = ["TileShape", "build", "count_pairs"]

_ROWS_AT_ONCE = 1 << 15
_PAIRS_AT_ONCE = 1 << 22
# Pairs, or single intervals before they are joined, that the rows at once may have.
_LARGEST_CHUNK = 1 << 22
# Questions about one atom and one pair that may be asked: some minutes.
_MOST_ASKED = 1 << 34
_FEW_KEYS, _FEW_INTERVALS = 16, 4


@dataclass(frozen=True)
class TileShape:
    """What a backend wants: rows in a tile, how dear a gathered pair is against a visited one, when a tile is long."""

    tile: int = 32
    gather: int = 8
    longest: int = 16_384


def settled_rows(labels: Labels, earlier: Term, sizes: Sizes, b: Tensor, h: Tensor) -> Tensor | None:
    """Rows `(V, n_q)` in which the earlier term's labels hold for every pair of equal `labels`, when in all others they hold
    for none; None when a group of equal labels is divided.

    So it is with a stride of 4 after a stride of 2: inside a residue the earlier term is only its intervals.
    """
    part = earlier.parts[0]
    if len(earlier.parts) > 1 or part.rest or part.points or not part.labels:
        return None
    other = earlier.sorted_labels(sizes, b, h)
    variants = labels.query.shape[0]
    groups = int(max(labels.query.max(), labels.key.max())) + 1
    if groups == 0:
        return torch.zeros_like(labels.query, dtype=torch.bool)
    base = torch.arange(variants, device="cpu")[:, None] * groups
    edges = []
    for mine, theirs in ((labels.query, other.query), (labels.key, other.key)):
        group = (base + mine)[mine >= 0]
        low = torch.full((variants * groups,), 2**62, device="cpu").scatter_reduce_(0, group, theirs[mine >= 0], "amin")
        high = torch.full((variants * groups,), -2, device="cpu").scatter_reduce_(0, group, theirs[mine >= 0], "amax")
        edges += [low, high]
    q_low, q_high, k_low, k_high = edges
    all_hold = (q_low == q_high) & (k_low == k_high) & (q_low == k_low) & (q_low >= 0)
    none_hold = (q_high < k_low) | (k_high < q_low) | (q_high < 0) | (k_high < 0)
    if not bool((all_hold | none_hold).all()):
        return None
    return all_hold[base + labels.query.clamp(min=0)] & (labels.query >= 0)


class Layout:
    """One term laid out: its variants, the order of its rows and keys, and its intervals chunk by chunk."""

    def __init__(self, term: Term, sizes: Sizes, tile: int, natural: Order) -> None:
        self.term, self.sizes = term, sizes
        self.variation = term.variation(sizes)
        self.variants = int(self.variation.max()) + 1
        # A representative (batch, head) of each variant.
        flat = self.variation.reshape(-1)
        at = torch.zeros(self.variants, dtype=torch.int64, device="cpu").scatter_(
            0, flat, torch.arange(flat.numel(), device="cpu")
        )
        self.b, self.h = at // self.variation.shape[1], at % self.variation.shape[1]
        self.order, self.keys = natural, None
        # Earlier terms whose pairs must be asked one by one, and those that are intervals in some rows and nothing in others.
        self.asked: list[Term] = []
        self.settled: list[tuple[Conjunction, Tensor]] = []
        labels = term.sorted_labels(sizes, self.b, self.h) if term.labels else None
        for earlier in term.hard:
            rows = None if labels is None else settled_rows(labels, earlier, sizes, self.b, self.h)
            if rows is None:
                self.asked.append(earlier)
            else:
                self.settled.append((earlier.parts[0], rows))
        if labels is not None:
            if bool(((labels.key >= 0).sum(1) <= _FEW_KEYS).all()):
                self.asked += [one for one in term.earlier if one.is_intervals and self._is_torn(one)]
            self.keys = sorted_keys(labels.query, labels.key)
            if bool(labels.query.any()):
                self.order = sorted_order(labels.query, tile)
        self._rows_at_once = self._bounded_rows()

    def _bounded_rows(self) -> int:
        """How many rows are laid out at once. Raises PlanError where pairs without number would be asked one by one."""
        per_row = 1 + sum(atom._entries_per_row(self.sizes) for atom in self.term.atoms())
        rest = self.term.parts[0].rest
        if self.asked or rest:
            row = torch.arange(0, self.sizes.n_q, max(1, self.sizes.n_q // 64), device="cpu")
            row = row if self.order.rows is None else self.order.rows[:: max(1, self.order.rows.numel() // 64)]
            seen = self._unasked(torch.zeros_like(row), row).count() // max(1, row.numel())
            atoms = sum(1 for p, _ in rest for _ in p.atoms()) + sum(1 for one in self.asked for _ in one.atoms())
            asked = seen * self.sizes.n_q * self.variants * atoms
            if asked > _MOST_ASKED:
                named = next(iter(rest), None) or next((p, True) for one in self.asked for p in one.parts[0].patterns())
                raise PlanError(
                    f"{shorten(named[0].text)} is no union of intervals here: it would take {asked:,} questions about single "
                    f"pairs, more than {_MOST_ASKED:,}. Bound it by a window, or unite fewer patterns inside an intersection."
                )
            per_row = max(per_row, seen)
        return min(_ROWS_AT_ONCE, _LARGEST_CHUNK // per_row)

    def _is_torn(self, term: Term) -> bool:
        """Whether the rows of an interval term see many intervals: then a few keys are sooner asked about one by one."""
        row = torch.arange(0, self.sizes.n_q, max(1, self.sizes.n_q // 64), device="cpu")
        b, h = self.b[:1].expand_as(row), self.h[:1].expand_as(row)
        spans = term.spans(self.sizes, b, h, row + self.sizes.q_offset)
        return spans.listed()[0].numel() > _FEW_INTERVALS * row.numel()

    @property
    def is_natural(self) -> bool:
        return self.order.rows is None

    def is_alike(self) -> bool:
        """Whether nearly all rows see the same intervals, as far as some of them show."""
        row = torch.arange(0, self.sizes.n_q, max(1, self.sizes.n_q // 64), device="cpu")
        at, lo, hi = self.spans(torch.zeros_like(row), row).listed()
        seen: dict[int, list[tuple[int, int]]] = {}
        for one, *interval in zip(at.tolist(), lo.tolist(), hi.tolist(), strict=True):
            seen.setdefault(one, []).append((interval[0], interval[1]))
        most = max(Counter(tuple(some) for some in seen.values()).values(), default=0)
        return 8 * most >= 7 * row.numel()

    @property
    def tiles(self) -> int:
        """Tiles over all variants of this layout."""
        return self.order.start.numel() * (self.variants if self.is_natural else 1)

    def times(self) -> Tensor:
        """How many (batch, head) each variant serves."""
        every = self.sizes.batch * self.sizes.heads // self.variation.numel()
        return torch.bincount(self.variation.reshape(-1), minlength=self.variants) * every

    def chunks(self, tile: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """(first tile, variant, row, tile in chunk, slot in tile) of the places of some tiles, all of one length."""
        step = max(1, self._rows_at_once // tile)
        per_variant = self.order.start.numel()
        for t0 in range(0, self.tiles, step):
            number = torch.arange(t0, min(t0 + step, self.tiles), device="cpu")
            local = number % per_variant if self.is_natural else number
            start, count = self.order.start[local], self.order.count[local]
            tile_of = torch.arange(number.numel(), device="cpu").repeat_interleave(count)
            slot = torch.arange(tile_of.numel(), device="cpu") - (count.cumsum(0) - count)[tile_of]
            place = start[tile_of] + slot
            if self.order.rows is None:
                variant, row = torch.div(number, per_variant, rounding_mode="floor")[tile_of], place
            else:
                variant = torch.searchsorted(self.order.row_first, place, right=True) - 1
                row = self.order.rows[place]
            yield t0, variant, row, tile_of, slot

    def spans(self, variant: Tensor, row: Tensor) -> Spans:
        """The slots that each of these rows sees."""
        out = self._unasked(variant, row)
        if not self.asked and not self.term.parts[0].rest:
            return out
        return self._asked(out, self.b[variant], self.h[variant], row + self.sizes.q_offset)

    def _unasked(self, variant: Tensor, row: Tensor) -> Spans:
        """The slots of these rows, with those whose pairs have yet to be asked."""
        b, h, i = self.b[variant], self.h[variant], row + self.sizes.q_offset
        out = self.term.spans(self.sizes, b, h, i, with_labels=not self.term.labels, asked=self.asked)
        for part, rows in self.settled:
            out = out - part.spans(self.sizes, b, h, i, with_labels=False).only(rows[variant, row])
        if self.keys is not None:
            out = self.keys.map(out, self.keys.query_code[variant, row])
        return out

    def coarse(self, variant: Tensor, row: Tensor, tile_of: Tensor) -> Coarse | None:
        """What `spans` says, by tile as far as the rows of a tile agree; None where that would save nothing."""
        if not self.is_natural or self.keys is not None:
            return None
        return coarse(self.term, self.sizes, self.b[variant], self.h[variant], row + self.sizes.q_offset, tile_of)

    def _asked(self, spans: Spans, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        """The intervals without the pairs for which the term's truth is False, a few million pairs at a time."""
        row, lo, hi = spans.listed()
        total = (hi - lo).cumsum(0)
        rows, slots = [], []
        at = 0
        while at < row.numel():
            done = int(total[at - 1]) if at else 0
            end = max(at + 1, int(torch.searchsorted(total, done + _PAIRS_AT_ONCE)))
            r, s = Spans(spans.rows, spans.keys, row[at:end], lo[at:end], hi[at:end]).expand()
            key = s if self.keys is None else self.keys.slots[s]
            true = self.term.truth(self.sizes, b[r], h[r], i[r], key, self.asked).expand_as(r)
            rows.append(r[true])
            slots.append(s[true])
            at = end
        if not rows:
            return spans
        return Spans.from_pairs(spans.rows, spans.keys, torch.cat(rows), torch.cat(slots))

    def points(self, variant: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """(row of the chunk, key) of a point term's links, sorted."""
        term, sizes = self.term, self.sizes
        b, h, i = self.b[variant], self.h[variant], row + sizes.q_offset
        keys = term.points[0]._points(sizes, b, h, i).sort(1).values
        r = torch.arange(row.numel(), device="cpu")[:, None].expand_as(keys)[keys >= 0]
        keys = keys[keys >= 0]
        at = (sizes, b[r], h[r], i[r], keys)
        true = term.parts[0].without_points().allows(*at)
        for earlier in term.earlier:
            true = true & ~earlier.allows(*at)
        true = true.expand_as(keys)
        return r[true], keys[true]


def host_of(layouts: list[Layout]) -> Layout | None:
    """The term whose order of rows the terms without one can share, so that each row is served once and no results are joined.

    It must have all rows; and the others must lose nothing by it: single keys, or intervals that are the same for nearly all
    rows, as those of global tokens are.
    """
    for host in layouts:
        rows = host.order.rows
        if rows is None or host.variants > 1 or rows.numel() < host.sizes.n_q:
            continue
        natural = (one for one in layouts if one.is_natural)
        return host if all(one.variants == 1 and (one.term.points or one.is_alike()) for one in natural) else None
    return None


def count_pairs(pattern: Pattern, sizes: Sizes) -> int:
    """The exact number of allowed pairs, over batch and heads."""
    pattern.check(sizes)
    if not sizes.n_q or not sizes.n_k:
        return 0
    natural = natural_order(sizes, 32, torch.device("cpu"))
    total = 0
    # All are laid out before any is counted: one of them may be too large.
    for layout in [Layout(term, sizes, 32, natural) for term in terms_of(pattern, sizes)]:
        term = layout.term
        times = layout.times()
        for _, variant, row, tile_of, _ in layout.chunks(32):
            if term.points:
                seen = variant[layout.points(variant, row)[0]]
                total += int(times[seen].sum())
                continue
            found = layout.coarse(variant, row, tile_of)
            in_row = layout.spans(variant, row).per_row() if found is None else found.rest.per_row()
            if found is not None:
                in_row = in_row + found.whole.per_row()[tile_of]
            total += int((in_row * times[variant]).sum())
    return total


def build(pattern: Pattern, sizes: Sizes, shape: TileShape) -> Plan:
    """The plan of a pattern for tiles of this shape; see `farlight.plan`."""
    pattern.check(sizes)
    device = torch.device("cpu")
    store = MaskStore(shape.tile, device)
    natural = natural_order(sizes, shape.tile, device)
    drafts: list[Draft] = []
    at_home = Draft(
        torch.zeros(1, 1, dtype=torch.int64, device="cpu"),
        natural.rows,
        natural.row_first,
        natural.first,
        natural.start,
        natural.count,
    )
    pairs = visited = 0
    terms = terms_of(pattern, sizes) if sizes.n_q and sizes.n_k else ()
    layouts = [Layout(term, sizes, shape.tile, natural) for term in terms]
    host = host_of(layouts)
    for layout in sorted(layouts, key=lambda one: one is not host):
        order = layout.order
        if layout.is_natural and host is not None:
            layout.order, draft = host.order, drafts[0]
        elif layout.is_natural:
            draft = at_home
        else:
            draft = Draft(layout.variation, order.rows, order.row_first, order.first, order.start, order.count)
            drafts.append(draft)
        done = draft.add(layout, store, shape)
        pairs, visited = pairs + done[0], visited + done[1]
    if at_home.layers:
        drafts.insert(0, at_home)
    masks, final = store.finish()
    pieces = tuple(split_long_tiles(draft, final, shape.longest) for draft in drafts)
    return Plan(pattern, sizes, shape.tile, shape.longest, pieces, masks, pairs, visited, _overlap(drafts, sizes))


def _overlap(drafts: list[Draft], sizes: Sizes) -> bool:
    """Whether a row sees something in two pieces."""
    if len(drafts) < 2:
        return False
    seen = torch.zeros(sizes.batch, sizes.heads, sizes.n_q, dtype=torch.int8, device="cpu")
    for draft in drafts:
        here = torch.zeros_like(seen)
        for layer in draft.layers:
            here |= layer.seen[layer.variation].expand_as(here)
        seen += here
    return bool((seen > 1).any())
