"""Lowering for the forward and dq passes: from a plan's runs to the work tables that a kernel streams through.

A *work item* is a group of at most `block_m` rows of one head, computed by one program. Lowering

1. cuts each tile of the plan into row groups of one height, 128, 64 or 16 rows, as few as hold the tile (`block_heights`);
2. clips each run to what a row group sees of it, and cuts it into blocks of `block_n` keys (`key_blocks`): *whole* blocks,
   which need no mask, and *masked* blocks; the plan's points, single (row, key) pairs, become *gathered* keys;
3. sorts the blocks of all layers by row group, so that an item has one range in each table: whole blocks in natural key order,
   whole blocks in sorted key order, masked blocks, points;
4. repeats the items for every (batch, head) that reads the same variants (`head_groups`), orders them so that heads with shared
   keys are neighbours, and cuts long ones (`work_partition`).

A *launch* is one kernel call over items of one height. Pieces whose rows overlap go to launches one after another, each of
which adds to what the earlier ones wrote; pieces that do not overlap share launches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farlight.kernels.triton.head_groups import head_groups
from farlight.kernels.triton.key_blocks import MaskExtents, cut_into_blocks, sort_by_owner
from farlight.kernels.triton.launches import QueryLaunch, QueryWork, checked_int32, permutations, query_launch
from farlight.kernels.triton.work_partition import partition
from farlight.plan.tables import BITS, Layer, Piece, Plan
from farlight.ragged import exclusive_cumsum, expand_counts, expand_ranges

__all__ = ["MIN_BLOCK_M", "block_heights", "lower_queries"]

MIN_BLOCK_M = 16


def block_heights(count: Tensor, block_m: int) -> Tensor:
    """The height of row groups in tiles of `count` rows: block_m, 64 or 16, the least that holds the tile."""
    heights = torch.full_like(count, block_m)
    for height in (64, MIN_BLOCK_M):
        if height < block_m:
            heights = torch.where(count <= height, height, heights)
    return heights


class _Tables:
    """The tables of a plan, collected from the variants of its pieces."""

    def __init__(self) -> None:
        empty = torch.zeros(0, dtype=torch.int64)
        self.whole, self.point_key, self.point_row = [empty], [empty], [empty]
        self.masked = [torch.zeros(0, 5, dtype=torch.int64)]
        self.lengths = dict.fromkeys(("whole", "masked", "points"), 0)

    def add(self, blocks: _Blocks, points: _Points, groups: int) -> Tensor:
        """Append one variant's entries, sorted by row group. Returns the groups' ranges, `(groups, 4, 2)`."""
        is_sorted, whole = blocks.is_sorted, blocks.whole
        order, whole_ranges = sort_by_owner(blocks.owner[whole] * 2 + is_sorted[whole], 2 * groups, self.lengths["whole"])
        self.whole.append(blocks.first[whole][order])
        masked_order, masked_ranges = sort_by_owner(blocks.owner[~whole], groups, self.lengths["masked"])
        first = torch.where(is_sorted, -1 - blocks.first, blocks.first)
        records = torch.stack((first, blocks.lo, blocks.hi, blocks.bounds, blocks.bits), 1)
        self.masked.append(records[~whole][masked_order])
        point_order, point_ranges = sort_by_owner(points.owner, groups, self.lengths["points"])
        self.point_key.append(points.key[point_order])
        self.point_row.append(points.row[point_order])
        for name, entries in (("whole", order), ("masked", masked_order), ("points", point_order)):
            self.lengths[name] += entries.numel()
        begin = torch.cat((whole_ranges.begin.view(-1, 2), masked_ranges.begin[:, None], point_ranges.begin[:, None]), 1)
        end = torch.cat((whole_ranges.end.view(-1, 2), masked_ranges.end[:, None], point_ranges.end[:, None]), 1)
        return torch.stack((begin, end), 2)


@dataclass
class _Blocks:
    """Key blocks of row groups: the row group, whether keys are sorted (bool), first key or slot, whole (bool), the run's ends
    relative to the first key, offsets of row bounds and bits.
    """

    owner: Tensor
    is_sorted: Tensor
    first: Tensor
    whole: Tensor
    lo: Tensor
    hi: Tensor
    bounds: Tensor
    bits: Tensor


@dataclass
class _Points:
    """Single pairs of row groups: owner, key, row within the group."""

    owner: Tensor
    key: Tensor
    row: Tensor


class _RowGroups:
    """The tiles of one variant of a piece, cut into row groups. Tables of tiles: start, count, height, subtiles, first_group;
    of groups: tile, offset (the first row within the tile), num_rows; of plan entries: tile_of_entry.
    """

    def __init__(self, piece: Piece, variant: int, block_m: int) -> None:
        self.first_entry, self.last_entry = int(piece.first[variant]), int(piece.first[variant + 1])
        entries = slice(self.first_entry, self.last_entry)
        # A plan may cut a tile's runs into parts. They are joined here: `work_partition` cuts for the device.
        is_first_part = piece.part[entries] == 0
        self.tile_of_entry = is_first_part.long().cumsum(0) - 1
        self.start, self.count = piece.start[entries][is_first_part].long(), piece.count[entries][is_first_part].long()
        self.height = block_heights(self.count, block_m)
        self.subtiles = (self.count + self.height - 1) // self.height
        self.first_group = exclusive_cumsum(self.subtiles)
        self.tile, subtile = expand_counts(self.subtiles)
        self.offset = subtile * self.height[self.tile]
        self.num_rows = torch.minimum(self.height[self.tile], self.count[self.tile] - self.offset)

    def blocks(self, layer: Layer, variant: int, key_base: int, block_n: int, extents: dict[int, MaskExtents]) -> list[_Blocks]:
        """The key blocks of one layer, for each height of row groups. `key_base`: offset of its permutation, -1 = none."""
        first_tile = int(layer.entry_base[variant])
        pointer = layer.indptr[first_tile : first_tile + self.last_entry - self.first_entry + 1]
        entry, run = expand_ranges(pointer[:-1], pointer[1:])
        tile = self.tile_of_entry[entry]
        # Each run comes once for each subtile of its tile.
        source, subtile = expand_counts(self.subtiles[tile])
        run, tile = run[source], tile[source]
        lo, hi, mask = layer.lo[run].long(), layer.hi[run].long(), layer.mask[run].long()
        out = []
        for height, mask_extents in extents.items():
            pick = self.height[tile] == height
            if not bool(pick.any()):
                continue
            run_lo, run_hi, run_mask = lo[pick], hi[pick], mask[pick]
            run_of_block, slot, whole = cut_into_blocks(mask_extents.of(run_lo, run_hi, run_mask, subtile[pick]), block_n)
            out.append(
                _Blocks(
                    (self.first_group[tile] + subtile)[pick][run_of_block],
                    torch.full_like(slot, key_base >= 0, dtype=torch.bool),
                    slot + max(key_base, 0),
                    whole,
                    run_lo[run_of_block] - slot,
                    run_hi[run_of_block] - slot,
                    *mask_extents.mask_offsets(run_mask[run_of_block]),
                )
            )
        return out

    def points(self, layer: Layer, variant: int) -> list[_Points]:
        """The single pairs of one layer."""
        if layer.point_indptr is None or layer.point_keys is None:
            return []
        place = int(layer.place_base[variant]) + self.start[self.tile] + self.offset
        owner, point = expand_ranges(layer.point_indptr[place], layer.point_indptr[place + self.num_rows])
        row = torch.searchsorted(layer.point_indptr, point, right=True) - 1 - place[owner]
        return [_Points(owner, layer.point_keys[point].long(), row)]


@dataclass
class _Items:
    """Work items of one piece, before they are cut: columns batch … sorted of the work table `(items, 6)`, ranges
    `(items, 4, 2)`, the height of each, and its first row's place among those of its variant, by which items are ordered.
    """

    piece: int
    height: Tensor
    columns: Tensor
    ranges: Tensor
    order: Tensor


def lower_queries(plan: Plan, block_m: int, block_n: int, heads_per_kv: int, processors: int) -> QueryWork:
    """The work of a plan for row groups of at most `block_m` rows and blocks of `block_n` keys.

    heads_per_kv: query heads for each key head; processors: of the device, over which work is balanced.
    """
    rows, keys, row_base, key_base = permutations(plan)
    extents = {height: MaskExtents(plan, height) for height in {MIN_BLOCK_M, min(64, block_m), block_m}}
    tables = _Tables()
    items = [
        group
        for number, piece in enumerate(plan.pieces)
        for group in _piece_items(plan, number, piece, row_base[number], key_base[number], block_m, block_n, extents, tables)
    ]
    launches: list[QueryLaunch] = []
    for number, stage in enumerate(_stages(plan)):
        stage_items = [group for group in items if group.piece in stage]
        for height in sorted({int(h) for group in stage_items for h in group.height.unique().tolist()}, reverse=True):
            launch = _launch(plan, stage_items, height, block_n, heads_per_kv, processors, number > 0 or len(stage) > 1)
            if launch is not None:
                launches.append(launch)
    return QueryWork(
        launches=tuple(launches),
        covers=_natural_first(plan),
        rows=checked_int32(rows.long()),
        keys=checked_int32(keys.long()),
        whole=checked_int32(torch.cat(tables.whole)),
        masked=checked_int32(torch.cat(tables.masked)),
        point_key=checked_int32(torch.cat(tables.point_key)),
        point_row=checked_int32(torch.cat(tables.point_row)),
        data=checked_int32(plan.masks.data.long()),
    )


def _natural_first(plan: Plan) -> bool:
    """Whether the first piece has all rows in natural order."""
    return bool(plan.pieces) and plan.pieces[0].rows is None


def _stages(plan: Plan) -> list[list[int]]:
    """Pieces that may run in the same launches. Where rows overlap each piece is a stage; else all but a first one that covers
    every row.
    """
    if plan.overlapping:
        return [[number] for number in range(len(plan.pieces))]
    first = [[0]] if _natural_first(plan) else []
    rest = list(range(len(first), len(plan.pieces)))
    return [*first, *([rest] if rest else [])]


def _piece_items(
    plan: Plan,
    number: int,
    piece: Piece,
    row_base: int,
    key_base: list[int],
    block_m: int,
    block_n: int,
    extents: dict[int, MaskExtents],
    tables: _Tables,
) -> list[_Items]:
    """The items of one piece, for each of its head groups; their blocks go into the tables."""
    out = []
    groups = head_groups(plan, [piece.variant, *(layer.variant for layer in piece.layers)])
    for g in range(groups.count):
        variant, *layer_variants = (table[g] for table in groups.variants)
        if int(piece.first[variant]) == int(piece.first[variant + 1]):
            continue
        row_groups = _RowGroups(piece, variant, block_m)
        blocks: list[_Blocks] = []
        points: list[_Points] = []
        for layer, layer_variant, base in zip(piece.layers, layer_variants, key_base, strict=True):
            blocks += row_groups.blocks(layer, layer_variant, base, block_n, extents)
            points += row_groups.points(layer, layer_variant)
        count = row_groups.tile.numel()
        ranges = tables.add(_concatenated(_Blocks, blocks), _concatenated(_Points, points), count)
        first_row = row_groups.start[row_groups.tile] + row_groups.offset
        is_sorted = torch.full_like(first_row, int(row_base >= 0))
        columns = torch.stack((first_row + max(row_base, 0), row_groups.num_rows, row_groups.offset, is_sorted), 1)
        batch, head = groups.members(g)
        members = batch.numel()
        out.append(
            _Items(
                number,
                row_groups.height[row_groups.tile].repeat(members),
                torch.cat((torch.stack((batch, head), 1).repeat_interleave(count, 0), columns.repeat(members, 1)), 1),
                ranges.repeat(members, 1, 1),
                (first_row - int(piece.row_first[variant])).repeat(members),
            )
        )
    return out


def _concatenated(table: type[Any], parts: list[Any]) -> Any:
    """One `_Blocks` or `_Points` of several."""
    flags, empty = ("whole", "is_sorted"), torch.zeros(0, dtype=torch.int64)
    columns = [[empty.bool() if name in flags else empty, *(getattr(x, name) for x in parts)] for name in table.__annotations__]
    return table(*(torch.cat(column) for column in columns))


def _launch(
    plan: Plan, items: list[_Items], height: int, block_n: int, heads_per_kv: int, processors: int, add: bool
) -> QueryLaunch | None:
    """The launch over the items of one height; None where there are none."""
    picks = [(group, group.height == height) for group in items]
    columns = torch.cat([group.columns[pick] for group, pick in picks])
    ranges = torch.cat([group.ranges[pick] for group, pick in picks])
    order = torch.cat([group.order[pick] for group, pick in picks])
    if add:
        # Rows that see nothing in this launch keep what they have.
        has_work = (ranges[..., 1] > ranges[..., 0]).any(1)
        columns, ranges, order = columns[has_work], ranges[has_work], order[has_work]
    if not columns.shape[0]:
        return None
    # Order: key head, row group, query head. Heads that share keys run side by side and share them in L2.
    kv_head = columns[:, 0] * plan.sizes.heads + columns[:, 1] // heads_per_kv * heads_per_kv
    rank = (kv_head * (int(order.max()) + 1) + order) * heads_per_kv + columns[:, 1] % heads_per_kv
    sort = torch.argsort(rank, stable=True)
    columns, ranges = columns[sort], ranges[sort]
    return query_launch(
        columns,
        partition(ranges, torch.tensor([1, 1, 1, block_n]), processors),
        checked_int32,
        block_m=height,
        sorted_rows=bool((columns[:, 5] > 0).any()),
        sorted_keys=any(layer.keys is not None for piece in plan.pieces for layer in piece.layers),
        bits=bool((plan.masks.kind == BITS).any()),
        points=bool((ranges[:, 3, 1] > ranges[:, 3, 0]).any()),
        add=add,
    )
