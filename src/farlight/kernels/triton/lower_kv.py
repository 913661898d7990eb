"""Lowering for the dk/dv pass: from the plan's transposed tables to the row blocks of each block of keys.

A work item is a block of `block_n` keys of one key head, computed by one program for all query heads of that key head. The
plan's transposed tables list for each block of keys the (run, tile) pairs that touch it; lowering

1. cuts each tile into subtiles of `block_m` rows, the *row blocks*, and clips the run to what each sees (`key_blocks`);
2. calls a row block *whole* when all of its rows see all keys of the block, else *masked*; drops those that see none;
3. sorts row blocks and points by the block of keys they belong to (the *owner*), so that an item has, for each query head, one
   range of whole row blocks, one of masked ones and one of points;
4. cuts long items (`work_partition`): the key of a global token is seen by every row.

The first launch goes over all keys in natural order, with the runs of all layers that do not permute keys and all points. A
layer with its own order of keys takes a launch of its own over blocks of that order, which adds to the first; more than one
where the query heads of a key head order keys differently, because no two programs of a launch may own the same key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.kernels.triton.head_groups import HeadGroups, head_groups
from farlight.kernels.triton.key_blocks import MaskExtents, sort_by_owner
from farlight.kernels.triton.launches import KeyLaunch, KeyWork, checked_int32, key_launch, permutations
from farlight.kernels.triton.work_partition import partition
from farlight.plan.tables import BITS, Layer, Piece, Plan
from farlight.plan.transpose import TransposedLayer
from farlight.ragged import expand_counts, expand_ranges

__all__ = ["lower_keys"]

_RECORD_FIELDS = 7


class _Entries:
    """Row blocks and points of one launch, collected: the owner of each (a numbered block of keys), and its record."""

    def __init__(self) -> None:
        empty = torch.zeros(0, dtype=torch.int64)
        records = torch.zeros(0, _RECORD_FIELDS, dtype=torch.int64)
        self.whole_owner, self.whole = [empty], [records]
        self.masked_owner, self.masked = [empty], [records]
        self.point_owner, self.point_row, self.point_key = [empty], [empty], [empty]


@dataclass(frozen=True)
class _TouchedBlock:
    """Of each (run, tile) pair the block of keys that it touches: owner number, and keys or slots `first … last - 1`."""

    owner: Tensor
    first: Tensor
    last: Tensor


@dataclass(frozen=True)
class _PlacedLayer:
    """A layer of the plan with its numbers, its transposed tables, and the offset of its permutation (-1 = natural)."""

    piece_number: int
    piece: Piece
    layer: Layer
    transposed: TransposedLayer
    key_base: int


@dataclass(frozen=True)
class _KeyBlocks:
    """Blocks of keys of all items: batch · kv_heads + key head, first key or slot, number of keys; and `owner`
    `(items, heads_per_kv)`, the owner of each query head's entries.
    """

    batch_head: Tensor
    first: Tensor
    count: Tensor
    owner: Tensor


class _Lowering:
    """The lowering of one plan for one configuration; the methods make the launches."""

    def __init__(self, plan: Plan, block_m: int, block_n: int, heads_per_kv: int, processors: int) -> None:
        self.plan, self.block_m, self.block_n = plan, block_m, block_n
        self.heads_per_kv, self.processors = heads_per_kv, processors
        self.rows, self.keys, self.row_base, key_base = permutations(plan)
        self.extents = MaskExtents(plan, block_m)
        transposed = plan.transposed(block_n)
        self.layers = [
            _PlacedLayer(p, piece, layer, transposed.layers[p][at], key_base[p][at])
            for p, piece in enumerate(plan.pieces)
            for at, layer in enumerate(piece.layers)
        ]
        self.bits = bool((plan.masks.kind == BITS).any())

    def add_runs(
        self,
        entries: _Entries,
        placed: _PlacedLayer,
        variants: tuple[int, int],
        run: Tensor,
        tile: Tensor,
        touched: _TouchedBlock,
    ) -> None:
        """Add the row blocks of (run, tile) pairs of one variant, each to the block of keys that it touches."""
        piece, layer = placed.piece, placed.layer
        variant, layer_variant = variants
        entry = tile.long() - int(layer.entry_base[layer_variant]) + int(piece.first[variant])
        start, count = piece.start[entry].long(), piece.count[entry].long()
        pair, subtile = expand_counts((count + self.block_m - 1) // self.block_m)
        lo, hi, mask = layer.lo[run][pair].long(), layer.hi[run][pair].long(), layer.mask[run][pair].long()
        extents = self.extents.of(lo, hi, mask, subtile)
        first, last, owner = touched.first[pair], touched.last[pair], touched.owner[pair]
        is_seen = (extents.lo < last) & (extents.hi > first)
        whole = is_seen & (extents.core_lo <= first) & (extents.core_hi >= last)
        masked = is_seen & ~whole
        offset = subtile * self.block_m
        row = start[pair] + offset
        row_base = self.row_base[placed.piece_number]
        if row_base >= 0:
            row = -1 - (row + row_base)
        num_rows = (count[pair] - offset).clamp(max=self.block_m)
        bounds, bits = self.extents.mask_offsets(mask)
        record = torch.stack((row, lo - first, hi - first, bounds, bits, num_rows, offset), 1)
        entries.whole_owner.append(owner[whole])
        entries.whole.append(record[whole])
        entries.masked_owner.append(owner[masked])
        entries.masked.append(record[masked])

    def launch(self, entries: _Entries, owners: int, blocks: _KeyBlocks, *, sorted_keys: bool, add: bool) -> KeyLaunch | None:
        """The launch over blocks of keys; owner number `owners` has no entries. None where no block has work."""

        def sorted_table(owner: list[Tensor], *columns: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            """(`(items, heads_per_kv, 2)` ranges, the columns sorted by owner)."""
            order, ranges = sort_by_owner(torch.cat(owner), owners)
            no_owner = torch.zeros(1, 2, dtype=torch.int64)
            of_owner = torch.cat((torch.stack((ranges.begin, ranges.end), 1), no_owner))
            return of_owner[blocks.owner], [torch.cat(column)[order] for column in columns]

        whole_ranges, [whole] = sorted_table(entries.whole_owner, entries.whole)
        masked_ranges, [masked] = sorted_table(entries.masked_owner, entries.masked)
        point_ranges, [point_row, point_key] = sorted_table(entries.point_owner, entries.point_row, entries.point_key)
        ranges = torch.stack((whole_ranges, masked_ranges, point_ranges), 2)  # (items, heads_per_kv, 3, 2)
        batch_head, first, count = blocks.batch_head, blocks.first, blocks.count
        if add:
            has_work = (ranges[..., 1] > ranges[..., 0]).flatten(1).any(1)
            ranges, batch_head, first, count = ranges[has_work], batch_head[has_work], first[has_work], count[has_work]
        if not batch_head.numel():
            return None
        entries_per_block = torch.tensor([1, 1, self.block_m]).repeat(self.heads_per_kv)
        return key_launch(
            (batch_head, first, count),
            self.plan.sizes.heads // self.heads_per_kv,
            partition(ranges.flatten(1, 2), entries_per_block, self.processors),
            checked_int32,
            whole=checked_int32(whole),
            masked=checked_int32(masked),
            point_row=checked_int32(point_row),
            point_key=checked_int32(point_key),
            sorted_rows=any(base >= 0 for base in self.row_base),
            sorted_keys=sorted_keys,
            bits=self.bits,
            points=bool(point_row.numel()),
            add=add,
        )

    def natural_launch(self) -> KeyLaunch | None:
        """Blocks of all keys in natural order: runs of layers that do not permute keys, and the points of every layer."""
        plan, block_n = self.plan, self.block_n
        layers = [placed for placed in self.layers if placed.layer.keys is None or placed.layer.point_keys is not None]
        num_blocks = -(-plan.n_k // block_n)
        if not layers or not num_blocks:
            return None
        groups = head_groups(plan, [table for placed in layers for table in (placed.piece.variant, placed.layer.variant)])
        entries = _Entries()
        for g in range(groups.count):
            for number, placed in enumerate(layers):
                variants = groups.variants[2 * number][g], groups.variants[2 * number + 1][g]
                if placed.layer.keys is None:
                    self._add_natural_runs(entries, placed, variants, g * num_blocks, num_blocks)
                self._add_points(entries, placed, variants, g * num_blocks)
        batch_heads = plan.sizes.batch * plan.sizes.heads // self.heads_per_kv
        batch_head = torch.arange(batch_heads).repeat_interleave(num_blocks)
        block = torch.arange(num_blocks).repeat(batch_heads)
        first = block * block_n
        owner = self._query_head_groups(groups)[batch_head] * num_blocks + block[:, None]
        blocks = _KeyBlocks(batch_head, first, (plan.n_k - first).clamp(max=block_n), owner)
        return self.launch(entries, groups.count * num_blocks, blocks, sorted_keys=False, add=False)

    def _add_natural_runs(
        self, entries: _Entries, placed: _PlacedLayer, variants: tuple[int, int], first_owner: int, num_blocks: int
    ) -> None:
        transposed, begin = placed.transposed, variants[1] * num_blocks
        pointer = transposed.indptr[begin : begin + num_blocks + 1]
        block, pair = expand_ranges(pointer[:-1], pointer[1:])
        first = block * self.block_n
        touched = _TouchedBlock(first_owner + block, first, (first + self.block_n).clamp(max=self.plan.n_k))
        self.add_runs(entries, placed, variants, transposed.run[pair].long(), transposed.tile[pair], touched)

    def _add_points(self, entries: _Entries, placed: _PlacedLayer, variants: tuple[int, int], first_owner: int) -> None:
        piece, transposed, n_k = placed.piece, placed.transposed, self.plan.n_k
        if transposed.point_indptr is None or transposed.point_place is None:
            return
        begin = variants[1 if piece.rows is None else 0] * n_k
        pointer = transposed.point_indptr[begin : begin + n_k + 1]
        key, point = expand_ranges(pointer[:-1], pointer[1:])
        place = transposed.point_place[point].long()
        entries.point_owner.append(first_owner + key // self.block_n)
        entries.point_row.append(place if piece.rows is None else piece.rows[place].long())
        entries.point_key.append(key)

    def _query_head_groups(self, groups: HeadGroups) -> Tensor:
        """`(batch · kv_heads, heads_per_kv)`: the head group of each query head."""
        return groups.group_id.reshape(-1, self.heads_per_kv)

    def sorted_launches(self, placed: _PlacedLayer) -> list[KeyLaunch]:
        """Blocks of the slots of one layer that permutes keys, variant by variant.

        The first and the last block of a variant end where its slots end: beyond are the slots of other variants.
        """
        plan, block_n, piece, layer, transposed = self.plan, self.block_n, placed.piece, placed.layer, placed.transposed
        groups = head_groups(plan, [piece.variant, layer.variant])
        tile, run = transposed.tile.long(), transposed.run.long()
        block_of_pair = torch.arange(transposed.indptr.numel() - 1).repeat_interleave(transposed.indptr.diff())
        entries = _Entries()
        spans: list[_SlotSpan] = []
        owners = 0
        for g in range(groups.count):
            variant, layer_variant = groups.variants[0][g], groups.variants[1][g]
            first_tile = int(layer.entry_base[layer_variant])
            last_tile = first_tile + int(piece.first[variant + 1]) - int(piece.first[variant])
            pairs = ((tile >= first_tile) & (tile < last_tile)).nonzero().squeeze(1)
            low = int(layer.lo[run[pairs]].min()) if pairs.numel() else 0
            high = int(layer.hi[run[pairs]].max()) if pairs.numel() else 0
            span = _SlotSpan(owners, low, high, low // block_n, max(-(-high // block_n) - low // block_n, 0))
            block = block_of_pair[pairs]
            first, last = (block * block_n).clamp(min=low), ((block + 1) * block_n).clamp(max=high)
            touched = _TouchedBlock(owners + block - span.first_block, first, last)
            self.add_runs(entries, placed, (variant, layer_variant), run[pairs], tile[pairs], touched)
            spans.append(span)
            owners += span.num_blocks
        group_of = self._query_head_groups(groups)
        distinct = [sorted(set(row)) for row in group_of.tolist()]
        out = []
        for number in range(max(len(row) for row in distinct)):
            # In launch `number` each key head takes the number-th of the orders that its query heads have.
            picks = [(batch_head, row[number]) for batch_head, row in enumerate(distinct) if number < len(row)]
            blocks = self._sorted_blocks(picks, spans, group_of, owners, placed.key_base)
            launch = None if blocks is None else self.launch(entries, owners, blocks, sorted_keys=True, add=True)
            if launch is not None:
                out.append(launch)
        return out

    def _sorted_blocks(
        self, picks: list[tuple[int, int]], spans: list[_SlotSpan], group_of: Tensor, no_owner: int, key_base: int
    ) -> _KeyBlocks | None:
        """The blocks of the picked (batch · kv_heads + key head, head group); None where there are none."""
        parts = []
        for batch_head, group in picks:
            span = spans[group]
            if not span.num_blocks:
                continue
            block = torch.arange(span.num_blocks)
            first = ((span.first_block + block) * self.block_n).clamp(min=span.first_slot)
            last = ((span.first_block + block + 1) * self.block_n).clamp(max=span.last_slot)
            owner = torch.where(group_of[batch_head][None, :] == group, span.first_owner + block[:, None], no_owner)
            parts.append((torch.full_like(block, batch_head), first + key_base, last - first, owner))
        return _KeyBlocks(*(torch.cat(column) for column in zip(*parts, strict=True))) if parts else None


@dataclass(frozen=True)
class _SlotSpan:
    """The slots `first_slot … last_slot - 1` of a head group, cut into `num_blocks` blocks from number `first_block`; the owner
    number of the first.
    """

    first_owner: int
    first_slot: int
    last_slot: int
    first_block: int
    num_blocks: int


def lower_keys(plan: Plan, block_m: int, block_n: int, heads_per_kv: int, processors: int) -> KeyWork:
    """The work of the dk/dv pass of a plan, for blocks of `block_n` keys and row blocks of `block_m` rows.

    heads_per_kv: query heads for each key head; processors: of the device, over which work is balanced.
    """
    lowering = _Lowering(plan, block_m, block_n, heads_per_kv, processors)
    natural = lowering.natural_launch()
    launches = [] if natural is None else [natural]
    for placed in lowering.layers:
        if placed.layer.keys is not None:
            launches += lowering.sorted_launches(placed)
    return KeyWork(
        launches=tuple(launches),
        covers=natural is not None,
        rows=checked_int32(lowering.rows.long()),
        keys=checked_int32(lowering.keys.long()),
        data=checked_int32(plan.masks.data.long()),
    )
