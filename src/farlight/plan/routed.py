"""Router choices as sorted rows and key ranges, computed on the device without synchronisation.

A router's pattern is made on the device and differs in each step, so it does not pass through the host's planner. Its tables
map directly to work lists: tokens that attend by label are contiguous once sorted, lists of blocks are key ranges, lists of
keys are single links. All shapes here follow from the sizes alone. How much of each tensor is real (`ChosenLinks.valid`,
empty ranges) is known on the device only, until the lowering reads all counts in one transfer.

Supported: one `clusters`, list of blocks or list of keys, intersected with any number of `causal()` and, for labels and keys,
`padding(mask)`. `chosen_links` returns None for any other pattern: it is planned on the host, or, as a union with a fixed
pattern, by `routed_union`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.patterns.algebra import Intersection
from farlight.patterns.arguments import query_base
from farlight.patterns.expression import Atom, Pattern, Sizes
from farlight.patterns.packing import padding
from farlight.patterns.positional import causal
from farlight.patterns.tables import check_lists, chosen_blocks, chosen_keys, clusters
from farlight.plan.chosen_links import STEP, ChosenLinks, ExcludedLinks, IndexRange

__all__ = ["chosen_links", "labellings", "links_of_conjunction"]

# Longest per-row list of blocks that is read as one clustering per list entry: each is one more pass over the output.
_MAX_LIST = 48


@dataclass(frozen=True)
class _Side:
    """Keys at least `lag` before a row's position, None = all keys; `mirrored`: keys at least `lag` behind it.

    A mirrored side is computed as the other one on tables in reverse order of tokens.
    """

    mirrored: bool
    lag: int | None

    def causal_offset(self, sizes: Sizes) -> int | None:
        """The row at place p of the unsorted order sees the keys in slots before p + causal_offset; None = all slots."""
        if self.lag is None:
            return None
        return (sizes.n_k - sizes.n_q - sizes.q_offset if self.mirrored else sizes.q_offset) + 1 - self.lag


def chosen_links(pattern: Pattern, sizes: Sizes) -> list[ChosenLinks] | None:
    """Disjoint pieces whose union is a router's pattern; None for a pattern that is not supported here.

    Raises PatternError for tables of the wrong shape. Indices are not checked here: see `ChosenLinks.index_range`.
    """
    return links_of_conjunction(_conjunction(pattern), sizes, ExcludedLinks())


def links_of_conjunction(atoms: Sequence[Atom], sizes: Sizes, excluded: ExcludedLinks) -> list[ChosenLinks] | None:
    """`chosen_links` of the intersection of atoms, minus the excluded links."""
    if not sizes.n_q or not sizes.n_k:
        return None
    masks = [atom._tables[0] for atom in atoms if isinstance(atom, padding) and atom._tables]
    is_causal = any(isinstance(atom, causal) for atom in atoms)
    choices = [atom for atom in atoms if not isinstance(atom, causal) and not (isinstance(atom, padding) and atom._tables)]
    if len(choices) != 1 or not choices[0]._tables:
        return None
    choice = choices[0]
    is_list = isinstance(choice, chosen_blocks | chosen_keys)
    if is_list and not choice._tables[0].numel():
        return None
    for atom in atoms:
        if isinstance(atom, chosen_blocks | chosen_keys):
            check_lists(f"{type(atom).__name__}: indices", atom._tables[0], sizes, getattr(atom, "query_block", 1))
        else:
            atom.check(sizes)
    clusterings = labellings(choice, sizes)
    sides = _sides(sizes, is_causal, excluded)
    if clusterings is not None:
        pieces = [piece for query, key in clusterings for piece in _links_by_label(query, key, masks, sizes, excluded, sides)]
    elif isinstance(choice, chosen_keys):
        pieces = [_links_by_key(choice, masks, sizes, is_causal, excluded)]
    elif isinstance(choice, chosen_blocks) and choice.query_block >= STEP and not masks:
        if excluded.rows is not None or excluded.keys is not None:
            return None
        pieces = [_links_by_block(choice, sizes, side) for side in sides]
    else:
        return None
    index_range = _index_range(choice, sizes)
    return [dataclasses.replace(piece, index_range=index_range) for piece in pieces]


def _sides(sizes: Sizes, is_causal: bool, excluded: ExcludedLinks) -> list[_Side]:
    """The keys left of the band and right of it, at least one of them; without a band all keys, or the causal ones."""
    if excluded.band is None:
        return [_Side(False, 0 if is_causal else None)]
    left, right = excluded.band
    before, behind = _Side(False, left + 1), _Side(True, right + 1)
    sides = [before] if sizes.q_offset + sizes.n_q - 1 > left else []
    sides += [behind] if not is_causal and sizes.q_offset + right + 1 < sizes.n_k else []
    return sides or [before]


def _index_range(choice: Atom, sizes: Sizes) -> IndexRange | None:
    if isinstance(choice, chosen_blocks):
        limit = -(-sizes.n_k // choice.block)
        least, largest = choice._tables[0].aminmax()
        return IndexRange(least.long(), largest.long(), "chosen_blocks: indices", limit, "key blocks")
    if isinstance(choice, chosen_keys):
        return IndexRange(*choice._tables[0].aminmax(), "chosen_keys: indices", sizes.n_k, "keys")
    return None


def _conjunction(pattern: Pattern) -> list[Atom]:
    """The atoms of an intersection of atoms; empty for any other pattern."""
    if isinstance(pattern, Intersection):
        parts = [_conjunction(part) for part in pattern.parts]
        return [atom for part in parts for atom in part] if all(parts) else []
    return [pattern] if isinstance(pattern, Atom) else []


def _distinct(indices: Tensor) -> Tensor:
    """Each list (last dimension) in ascending order, duplicates replaced by -1."""
    ordered = indices.sort(-1).values
    duplicate = torch.zeros_like(ordered, dtype=torch.bool)
    duplicate[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return ordered.masked_fill(duplicate, -1)


def _lists_of_rows(choice: chosen_blocks | chosen_keys, sizes: Sizes) -> Tensor:
    """`(B or 1, H or 1, n_q, m)`: the list of each row, -1 for rows outside the table."""
    table = choice._tables[0].long()
    list_of_row, inside = choice._query_row(sizes, torch.arange(sizes.n_q, device=table.device) + sizes.q_offset)
    return torch.where(inside[:, None], table[:, :, list_of_row.clamp(0, table.shape[2] - 1)], -1)


# ---- labels ------------------------------------------------------------------------------------------------------------
def labellings(choice: Atom, sizes: Sizes) -> list[tuple[Tensor, Tensor]] | None:
    """(query labels, key labels), `(B or 1, H or 1, n)` with -1 = none, of disjoint clusterings whose union is the choice."""
    if isinstance(choice, clusters):
        return [_labels(choice, sizes)]
    clusterings = choice._clusterings()
    if clusterings is not None:
        return [_labels(clusters(*labels), sizes) for labels in clusterings]
    if not isinstance(choice, chosen_blocks) or choice.query_block >= STEP:
        return None
    table = choice._tables[0]
    if not 0 < table.shape[3] <= _MAX_LIST:
        return None
    # Rows with lists of their own: sorted by the block in one list entry, they form dense tiles.
    block_of_key = torch.arange(sizes.n_k, device=table.device) // choice.block
    return [(entry, block_of_key[None, None]) for entry in _distinct(_lists_of_rows(choice, sizes)).unbind(3)]


def _labels(clustering: clusters, sizes: Sizes) -> tuple[Tensor, Tensor]:
    def batch_and_head(table: Tensor) -> tuple[Tensor, Tensor]:
        b, h = (torch.arange(n, device=table.device) for n in table.shape[:2])
        return b[:, None, None], h[None, :, None]

    tables = clustering._tables
    i, j = (torch.arange(n, device=tables[0].device) for n in (sizes.n_q, sizes.n_k))
    query = clustering._query_label(sizes, *batch_and_head(tables[0]), i + sizes.q_offset)
    return query, clustering._key_label(*batch_and_head(tables[-1]), j).clamp(min=-1)


def _links_by_label(
    query: Tensor, key: Tensor, masks: list[Tensor], sizes: Sizes, excluded: ExcludedLinks, sides: list[_Side]
) -> list[ChosenLinks]:
    """The links of equal labels on each side; padded and excluded tokens lose their label."""
    for mask in masks:
        key = torch.where(mask[:, None], key, -1)
    if excluded.rows is not None:
        query = query.masked_fill(excluded.rows, -1)
    if excluded.keys is not None:
        key = key.masked_fill(excluded.keys, -1)
    batch, heads = torch.broadcast_shapes(query.shape[:2], key.shape[:2])
    query, key = (labels.expand(batch, heads, -1).flatten(0, 1) for labels in (query, key))
    return [_sorted_links((batch, heads), query, key, sizes, side) for side in sides]


def _sorted_links(shape: tuple[int, int], query: Tensor, key: Tensor, sizes: Sizes, side: _Side) -> ChosenLinks:
    """Rows `(V, n_q)` and keys `(V, n_k)` stably sorted by label, -1 = none; ranges by binary search of each row's label."""
    if side.mirrored:
        query, key = query.flip(1), key.flip(1)
    # Labels shifted to negative numbers, so that 0 sorts unlabelled tokens last.
    shift = torch.iinfo(torch.int64).min
    q_label, rows = torch.sort(torch.where(query >= 0, query + shift, 0), dim=1, stable=True)
    k_label, keys = torch.sort(torch.where(key >= 0, key + shift, 0), dim=1, stable=True)
    valid = q_label < 0
    lo = torch.where(valid, torch.searchsorted(k_label, q_label), 0)
    hi = torch.where(valid, torch.searchsorted(k_label, q_label, right=True), 0)
    offset = side.causal_offset(sizes)
    if offset is not None:
        # Slots are sorted by (label, position), encoded as (first slot of the label) · width + position.
        width = sizes.n_k + 1
        code = torch.searchsorted(k_label, k_label) * width + keys
        visible = (rows + offset).clamp(0, sizes.n_k)
        hi = torch.minimum(torch.maximum(torch.searchsorted(code, lo * width + visible), lo), hi)
    place = torch.arange(sizes.n_q, device=query.device).expand(query.shape[0], -1)
    start = torch.searchsorted(q_label, q_label)
    return ChosenLinks(
        shape=shape,
        rows=sizes.n_q - 1 - rows if side.mirrored else rows,
        keys=sizes.n_k - 1 - keys if side.mirrored else keys,
        row_count=valid.sum(1),
        key_count=(k_label < 0).sum(1),
        place=place,
        within=place - start,
        length=torch.searchsorted(q_label, q_label, right=True) - start,
        valid=valid,
        lo=lo[:, :, None],
        ends=lambda places: hi.gather(1, places.clamp(max=sizes.n_q - 1))[:, :, None],
        causal=offset is not None,
        covers=False,
    )


# ---- lists of blocks, lists of keys ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Groups:
    """The item grid of groups of `size` rows that begin at the places `first`, clipped to the rows; `(1, groups · steps)`."""

    place: Tensor
    within: Tensor
    length: Tensor
    valid: Tensor

    @staticmethod
    def of(first: Tensor, size: int, n_q: int) -> _Groups:
        start, stop = first.clamp(0, n_q), (first + size).clamp(0, n_q)
        within = torch.arange(0, min(size, n_q), STEP, device=first.device).expand(first.numel(), -1)
        length = (stop - start)[:, None].expand_as(within)
        place = start[:, None] + within
        return _Groups(*(x.reshape(1, -1) for x in (place, within, length, within < length)))


def _unsorted_links(
    table: Tensor,
    groups: _Groups,
    sizes: Sizes,
    lo: Tensor,
    ends: Callable[[Tensor], Tensor],
    *,
    covers: bool,
    causal_offset: int | None = None,
    mirrored: bool = False,
    points: Tensor | None = None,
) -> ChosenLinks:
    """Links over tokens in their order, or reversed (`mirrored`); one variant for each leading index of `table`."""
    shape = (table.shape[0], table.shape[1])
    variants, device = shape[0] * shape[1], table.device
    rows = keys = None
    if mirrored:
        rows, keys = (torch.arange(n, device=device).flip(0).expand(variants, -1) for n in (sizes.n_q, sizes.n_k))
    return ChosenLinks(
        shape=shape,
        rows=rows,
        keys=keys,
        row_count=torch.full((variants,), sizes.n_q, dtype=torch.int64, device=device),
        key_count=torch.full((variants,), sizes.n_k, dtype=torch.int64, device=device),
        place=groups.place,
        within=groups.within,
        length=groups.length,
        valid=groups.valid,
        lo=lo,
        ends=ends,
        causal=causal_offset is not None,
        covers=covers,
        causal_offset=causal_offset,
        points=points,
    )


def _links_by_block(choice: chosen_blocks, sizes: Sizes, side: _Side) -> ChosenLinks:
    """One group per block of queries; listed key blocks that are adjacent are coalesced to one range."""
    table, size = choice._tables[0].long(), choice.query_block
    offset = query_base("chosen_blocks: indices", table.shape[2], sizes, size) - sizes.q_offset
    first = torch.arange(table.shape[2], device=table.device) * size + offset
    groups = _Groups.of(sizes.n_q - size - first if side.mirrored else first, size, sizes.n_q)
    steps = groups.place.numel() // max(1, table.shape[2])
    # A range begins at each block whose predecessor is not listed.
    blocks = _distinct(table.flatten(0, 1))
    is_block = blocks >= 0
    previous = torch.where(is_block, blocks, -2).cummax(-1).values[..., :-1]
    previous = torch.nn.functional.pad(previous, (1, 0), value=-2)
    index = (is_block & (blocks > previous + 1)).cumsum(-1).sub(1).clamp(min=0)
    num_blocks = -(-sizes.n_k // choice.block)
    lo = torch.full_like(blocks, num_blocks).scatter_reduce(-1, index, torch.where(is_block, blocks, num_blocks), "amin")
    hi = torch.zeros_like(blocks).scatter_reduce(-1, index, torch.where(is_block, blocks + 1, 0), "amax")
    edges = (edge * choice.block for edge in (torch.minimum(lo, hi), hi))
    lo, hi = (edge.clamp(max=sizes.n_k).repeat_interleave(steps, 1) for edge in edges)
    if side.mirrored:
        lo, hi = sizes.n_k - hi, sizes.n_k - lo
    causal_offset = side.causal_offset(sizes)

    def ends(places: Tensor) -> Tensor:
        return hi if causal_offset is None else torch.minimum(hi, (places + causal_offset)[:, :, None])

    covers = not side.mirrored and offset <= 0 and table.shape[2] * size + offset >= sizes.n_q
    return _unsorted_links(table, groups, sizes, lo, ends, covers=covers, causal_offset=causal_offset, mirrored=side.mirrored)


def _links_by_key(
    choice: chosen_keys, masks: list[Tensor], sizes: Sizes, is_causal: bool, excluded: ExcludedLinks
) -> ChosenLinks:
    """The listed keys as points, without those that are causally hidden, padded or excluded."""
    keys = _lists_of_rows(choice, sizes)
    i = torch.arange(sizes.n_q, device=keys.device)[:, None] + sizes.q_offset
    if is_causal:
        keys = torch.where(keys <= i, keys, -1)
    for mask in masks:
        item = torch.arange(mask.shape[0], device=keys.device).view(-1, 1, 1, 1)
        keys = torch.where(mask[item, keys.clamp(0, sizes.n_k - 1)], keys, -1)
    if excluded.band is not None:
        left, right = excluded.band
        keys = keys.masked_fill((keys >= i - left) & (keys <= i + right), -1)
    if excluded.rows is not None:
        keys = keys.masked_fill(excluded.rows[:, None], -1)
    if excluded.keys is not None:
        keys = keys.masked_fill(excluded.keys[keys.clamp(0, sizes.n_k - 1)], -1)
    points = _distinct(keys)
    groups = _Groups.of(torch.arange(0, sizes.n_q, 128, device=keys.device), 128, sizes.n_q)
    empty = torch.zeros(points.shape[0] * points.shape[1], groups.place.shape[1], 0, dtype=torch.int64, device=keys.device)
    return _unsorted_links(points, groups, sizes, empty, lambda places: empty, covers=True, points=points.flatten(0, 1))
