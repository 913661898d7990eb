"""The links of a pattern between ranks: rows read as key intervals, without the n² pairs and without tensors of values.

Key heads (of all batch items) whose query heads have equal links form one `HeadClass`; everything is derived once for each.
Consecutive rows of a rank with equal remote keys are one group: the rows inside a window's borders need no key at all, and all
rows need the same global keys. What remains is proportional to the borders, not to the sequence.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farlight.distributed.layout import Layout
from farlight.patterns.algebra import Complement, Difference, HeadsOf, Intersection, PerHead, Union
from farlight.patterns.expression import Atom, Pattern, Sizes
from farlight.patterns.positional import window
from farlight.patterns.spans import Spans
from farlight.ragged import exclusive_cumsum, expand_ranges

__all__ = ["HeadClass", "RemoteLinks", "head_classes", "pair_costs", "remote_links", "row_spans"]

Array = NDArray[np.int64]
# Rows whose intervals are in memory at a time, and pairs that labels may give them.
_ROWS, _PAIRS = 1 << 16, 1 << 25


@dataclass(frozen=True)
class HeadClass:
    """Key heads with equal links: `rows` are batch item · H_kv + key head; `variants` has one (item, query head, number of such
    query heads of a key head) per distinct set of links.
    """

    rows: tuple[int, ...]
    variants: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class RemoteLinks:
    """Remote links of one class: the query rows `row_lo … row_hi - 1` of rank `reader` see the keys `key_lo … key_hi - 1` of
    rank `owner`. Sorted by reader and owner; entries of one group of rows share row_lo and row_hi. `local`: pairs within
    each rank, summed over the query heads of one key head.
    """

    reader: Array
    owner: Array
    row_lo: Array
    row_hi: Array
    key_lo: Array
    key_hi: Array
    local: Array


def head_classes(pattern: Pattern, sizes: Sizes, kv_heads: int) -> list[HeadClass]:
    """The key heads of all batch items, grouped by the set of links of their query heads."""
    code = torch.zeros(sizes.batch, sizes.heads, dtype=torch.int64)
    for table in _variations(pattern, sizes):
        if table.numel() > 1:
            code = torch.unique(code * (int(table.max()) + 1) + table, return_inverse=True)[1]
    per_key = sizes.heads // kv_heads
    classes: dict[tuple[tuple[int, int], ...], tuple[list[int], tuple[tuple[int, int, int], ...]]] = {}
    for b, codes in enumerate(code.tolist()):
        for kv_head in range(kv_heads):
            group = range(kv_head * per_key, (kv_head + 1) * per_key)
            first = {codes[h]: h for h in reversed(group)}
            key = tuple(sorted(Counter(codes[h] for h in group).items()))
            variants = tuple((b, first[number], count) for number, count in key)
            classes.setdefault(key, ([], variants))[0].append(b * kv_heads + kv_head)
    return [HeadClass(tuple(rows), variants) for rows, variants in classes.values()]


def _variations(pattern: Pattern, sizes: Sizes) -> Iterator[Tensor]:
    """`(B|1, H|1)` variant numbers of every atom and every choice of `per_head`."""
    if isinstance(pattern, PerHead):
        group = torch.zeros(1, sizes.heads, dtype=torch.int64)
        for number, (_, heads) in enumerate(pattern.groups()):
            group[0, list(heads)] = number
        yield group
    if isinstance(pattern, Atom):
        rewritten = pattern._rewrite()
        yield from [pattern._variation(sizes)] if rewritten is pattern else _variations(rewritten, sizes)
        return
    for part in getattr(pattern, "parts", ()):
        yield from _variations(part, sizes)


# ---- rows -----------------------------------------------------------------------------------------------------------
def row_spans(pattern: Pattern, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
    """The allowed keys of the rows (b, h, i), as `Pattern._spans`, but never at the cost of rows · n_k.

    Labels cost their pairs, after a sort; a dilated window its keys.
    """
    match pattern:
        case Union(parts=parts):
            out = row_spans(parts[0], sizes, b, h, i)
            for part in parts[1:]:
                out = out | row_spans(part, sizes, b, h, i)
            return out
        case Intersection(parts=parts):
            out = row_spans(parts[0], sizes, b, h, i)
            for part in parts[1:]:
                out = out & row_spans(part, sizes, b, h, i)
            return out
        case Difference(parts=(left, right)):
            return row_spans(left, sizes, b, h, i) - row_spans(right, sizes, b, h, i)
        case Complement(parts=(part,)):
            return ~row_spans(part, sizes, b, h, i)
        case PerHead():
            out = Spans.nothing(i.numel(), sizes.n_k, i.device)
            for part, heads in pattern.groups():
                of_heads = HeadsOf(heads)._spans(sizes, b, h, i)
                if not of_heads.is_empty():
                    out = out | (of_heads & row_spans(part, sizes, b, h, i))
            return out
    if isinstance(pattern, window) and pattern.dilation > 1:
        key = i[:, None] + pattern.dilation * torch.arange(-pattern.left, pattern.right + 1)
        return Spans.from_table(sizes.n_k, key, key + 1)
    assert isinstance(pattern, Atom)
    rewritten = pattern._rewrite()
    if rewritten is not pattern:
        return row_spans(rewritten, sizes, b, h, i)
    if pattern._spans_are_cheap(sizes):
        return pattern._spans(sizes, b, h, i)
    return _label_spans(pattern, sizes, b, h, i)


def _label_spans(atom: Atom, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
    """Rows of a labelled atom: keys sorted by label, the run of each row's label listed. One (b, h) for all rows."""
    labels, sorted_key, order = _sorted_labels(atom, sizes, int(b[0]), int(h[0]))
    query = labels[i - sizes.q_offset]
    first = torch.searchsorted(sorted_key, query.clamp(min=0))
    last = torch.where(query >= 0, torch.searchsorted(sorted_key, query, right=True), first)
    row, slot = expand_ranges(first, last)
    return Spans.from_pairs(i.numel(), sizes.n_k, row, order[slot])


@functools.lru_cache(maxsize=16)
def _sorted_labels(atom: Atom, sizes: Sizes, b: int, h: int) -> tuple[Tensor, Tensor, Tensor]:
    """(labels of the queries, sorted labels of the keys, keys in that order) of one (batch item, head)."""
    labels = atom._labels(sizes, torch.tensor([b]), torch.tensor([h]))
    return labels.query[0], *torch.sort(labels.key[0], stable=True)


def _row_chunks(pattern: Pattern, sizes: Sizes) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose intervals fit in memory."""
    per_row = sum(max(1, atom._entries_per_row(sizes)) for atom in pattern.atoms())
    if not all(atom._spans_are_cheap(sizes) for atom in pattern.atoms()):
        per_row = max(per_row, sizes.n_k // 8)
    step = max(64, min(_ROWS, _PAIRS // per_row))
    yield from ((lo, min(lo + step, sizes.n_q)) for lo in range(0, sizes.n_q, step))


def pair_costs(pattern: Pattern, n: int, longest: float, *, batch: int, heads: int) -> Array:
    """`(n,)`: the pairs computed at each position; those of rows with more than `longest` keys count at their keys."""
    sizes = Sizes.of(n, batch=batch, heads=heads)
    pattern.check(sizes)
    cost = np.zeros(n + 1, dtype=np.int64)
    for head_class in head_classes(pattern, sizes, heads):
        for b, h, count in head_class.variants:
            weight = count * len(head_class.rows)
            for lo, hi in _row_chunks(pattern, sizes):
                i = torch.arange(lo, hi)
                spans = row_spans(pattern, sizes, torch.full_like(i, b), torch.full_like(i, h), i)
                degree = spans.per_row()
                is_long = degree > longest
                cost[lo:hi] += weight * torch.where(is_long, 0, degree).numpy()
                _, key_lo, key_hi = spans.only(is_long).listed()
                step = np.bincount(key_lo.numpy(), minlength=n + 1) - np.bincount(key_hi.numpy(), minlength=n + 1)
                cost[:-1] += weight * np.cumsum(step)[:-1]
    return cost[:-1]


# ---- links between ranks --------------------------------------------------------------------------------------------
def remote_links(pattern: Pattern, sizes: Sizes, head_class: HeadClass, queries: Layout, keys: Layout) -> RemoteLinks:
    """All links of a class whose query and key have different owners, by groups of rows, and the pairs that stay."""
    owned = _owned_intervals(keys)
    columns: list[tuple[Tensor, ...]] = []
    local = torch.zeros(queries.world, dtype=torch.int64)
    edges = torch.tensor(queries.cuts)
    for lo, hi in _row_chunks(pattern, sizes) if sizes.n_k else ():
        row = torch.arange(lo, hi)
        reader = torch.from_numpy(queries.owner_of(row.numpy()))
        inside = Spans.from_table(sizes.n_k, owned[0][reader], owned[1][reader])
        remote = Spans.nothing(row.numel(), sizes.n_k, row.device)
        for b, h, count in head_class.variants:
            i = row + sizes.q_offset
            spans = row_spans(pattern, sizes, torch.full_like(i, b), torch.full_like(i, h), i)
            local.index_add_(0, reader, (spans & inside).per_row() * count)
            remote = remote | (spans - inside)
        columns.append(_grouped(remote, lo, edges))
    if not columns:
        empty = np.zeros(0, dtype=np.int64)
        return RemoteLinks(empty, empty, empty, empty, empty, empty, local.numpy())
    first, last, key_lo, key_hi = (torch.cat(column).numpy() for column in zip(*columns, strict=True))
    return _split_by_owner(first, last, key_lo, key_hi, queries, keys, local.numpy())


def _owned_intervals(keys: Layout) -> tuple[Tensor, Tensor]:
    """(lo, hi) `(world, pieces)`: the key intervals of each rank, empty ones as padding."""
    pieces = [keys.pieces(rank) for rank in range(keys.world)]
    width = max(1, max(map(len, pieces)))
    table = torch.zeros(2, keys.world, width, dtype=torch.int64)
    for rank, runs in enumerate(pieces):
        for number, run in enumerate(runs):
            table[:, rank, number] = torch.tensor(run)
    return table[0], table[1]


def _grouped(spans: Spans, first_row: int, edges: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row_lo, row_hi, key_lo, key_hi) of the intervals of each run of consecutive rows with equal intervals.

    A run ends where the owner of the rows may change, at `edges`.
    """
    row, lo, hi = spans.listed()
    counts = torch.bincount(row, minlength=spans.rows)
    begin = exclusive_cumsum(counts)
    starts = torch.ones(spans.rows, dtype=torch.bool)
    starts[1:] = counts[1:] != counts[:-1]
    # Interval t of a row against interval t of the row before, where both have as many.
    earlier = torch.arange(row.numel()) - counts[row]
    comparable = ~starts[row] & (row > 0)
    at = earlier.clamp(min=0)
    differs = comparable & ((lo[at] != lo) | (hi[at] != hi))
    starts[row[differs]] = True
    inside = edges - first_row
    starts[inside[(inside >= 0) & (inside < spans.rows)]] = True
    group = starts.nonzero().squeeze(1)
    end = torch.cat((group[1:], group.new_tensor([spans.rows])))
    owner, interval = expand_ranges(begin[group], begin[group] + counts[group])
    return group[owner] + first_row, end[owner] + first_row, lo[interval], hi[interval]


def _split_by_owner(
    row_lo: Array, row_hi: Array, key_lo: Array, key_hi: Array, queries: Layout, keys: Layout, local: Array
) -> RemoteLinks:
    """Intervals cut where the owner of the keys changes, sorted by reader and owner."""
    cuts, owners = np.array(keys.cuts, dtype=np.int64), np.array(keys.owners, dtype=np.int64)
    first = np.searchsorted(cuts, key_lo, side="right") - 1
    last = np.searchsorted(cuts, key_hi - 1, side="right")
    entry, piece = (x.numpy() for x in expand_ranges(torch.from_numpy(first), torch.from_numpy(last)))
    lo, hi = np.maximum(key_lo[entry], cuts[piece]), np.minimum(key_hi[entry], cuts[piece + 1])
    kept = lo < hi
    entry, lo, hi, owner = entry[kept], lo[kept], hi[kept], owners[piece[kept]]
    reader = queries.owner_of(row_lo[entry])
    order = np.lexsort((lo, row_lo[entry], owner, reader))
    entry = entry[order]
    return RemoteLinks(reader[order], owner[order], row_lo[entry], row_hi[entry], lo[order], hi[order], local)
