"""Lowering of a router's choice for the dk/dv pass, on the device where the choice lies. The tables are those of `lower_kv`.

The slots of each variant are cut into blocks of `block_n`. The row groups that see a block follow from where their stretches
begin and end, so that row blocks are counted by a difference array (+1 at a stretch's first block, -1 behind its last; a
cumulative sum gives the row blocks of every key block) before any is written. Two steps, `counts` and `build`, as in
`routed_lower_q`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.kernels.triton.launches import KeyLaunch, KeyWork, as_int32, key_launch
from farlight.kernels.triton.routed_lower_q import (
    RowGroupGrid,
    causal_bounds,
    num_blocks,
    real_permutations,
    variant_of_head,
)
from farlight.kernels.triton.work_partition import PartitionCounts, num_parts, partition, partition_counts, true_indices
from farlight.patterns.expression import Sizes
from farlight.plan.chosen_links import ChosenLinks
from farlight.ragged import exclusive_cumsum, expand_counts

__all__ = ["RoutedKeyLowering"]

# Counts of a piece that come before those of its launches, and counts of each launch.
_PIECE_COUNTS, _LAUNCH_COUNTS = 5, 4


class _KeyBlockCounts:
    """Step 1 for one piece: row blocks and points of its blocks of keys, and which blocks each launch computes.

    There is one launch, or, where the query heads of a key head sort keys differently, one for each of them: no two programs of
    a launch may own the same key. `(V, I, m)`, of each row group and stretch: first, the first key block; first_whole …
    last_whole, those that need no mask; row_blocks, how many. points: `(V, blocks)`. launch_blocks: for each launch, `(B, H_kv,
    blocks)`.
    """

    def __init__(
        self, piece: ChosenLinks, sizes: Sizes, block_m: int, block_n: int, heads_per_kv: int, processors: int, add: bool
    ) -> None:
        # Sorted keys leave out keys without a label, so that such a launch does not write every key.
        self.piece, self.add = piece, add or piece.keys is not None
        self.grid = grid = RowGroupGrid(piece, block_m, smaller=False)
        self.blocks = -(-sizes.n_k // block_n)
        shape = grid.hi.shape
        key_count = piece.key_count[:, None, None]
        is_seen = grid.is_group[:, :, None] & (grid.hi > grid.lo)
        self.first = (grid.lo // block_n).expand(shape)
        last = (grid.hi - 1) // block_n
        # A block is whole when all rows see all of its keys; the last block of a variant has fewer keys.
        self.first_whole = ((grid.lo + block_n - 1) // block_n).expand(shape)
        last_in_core = torch.where(grid.core >= key_count, (key_count - 1) // block_n, grid.core // block_n - 1)
        self.last_whole = torch.minimum(last_in_core, last)
        self.row_blocks = torch.where(is_seen, last - self.first + 1, 0)
        whole = torch.where(is_seen, (self.last_whole - self.first_whole + 1).clamp(min=0), 0)
        difference = torch.zeros(piece.variants, self.blocks + 1, dtype=torch.int64, device=piece.lo.device)
        weight = is_seen.long().flatten(1)
        difference.scatter_add_(1, torch.where(is_seen, self.first, 0).flatten(1), weight)
        difference.scatter_add_(1, torch.where(is_seen, last + 1, 0).flatten(1), -weight)
        total = difference[:, :-1].cumsum(1)
        self.is_point: Tensor | None = None
        self.points = torch.zeros_like(total)
        if piece.points is not None:
            self.is_point = piece.points >= 0
            block = (piece.points.clamp(min=0) // block_n).flatten(1)
            self.points.scatter_add_(1, block, self.is_point.long().flatten(1))
            total = total + num_blocks(self.points, block_m)
        self.counts = [piece.row_count.sum(), piece.key_count.sum(), self.row_blocks.sum(), whole.sum(), self.points.sum()]
        self.variant = variant_of_head(piece, sizes, heads_per_kv)
        sorts_differently = piece.keys is not None and piece.causal_offset is None and piece.shape[1] > 1
        self.num_launches = heads_per_kv if sorts_differently and heads_per_kv > 1 else 1
        blocks_of_head = total[self.variant].transpose(2, 3)  # (B, H_kv, blocks, heads_per_kv)
        exists = torch.arange(self.blocks, device=total.device) * block_n < piece.key_count[:, None]
        self.launch_blocks = []
        for number in range(self.num_launches):
            cost = blocks_of_head[..., number] if self.num_launches > 1 else blocks_of_head.sum(-1)
            in_launch = exists[self.variant[:, :, number]]
            if self.add:
                in_launch = in_launch & (cost > 0)
            self.launch_blocks.append(in_launch)
            all_blocks = torch.where(in_launch, cost, 0).sum()
            self.counts += partition_counts(num_parts(cost, all_blocks, processors), in_launch)


class RoutedKeyLowering:
    """`lower_keys` for the pieces of a router's choice, in two steps: `counts`, then `build` with their values.

    after: a fixed pattern's work is done before, so that every launch adds to what is there.
    """

    def __init__(
        self,
        pieces: list[ChosenLinks],
        sizes: Sizes,
        block_m: int,
        block_n: int,
        heads_per_kv: int,
        processors: int,
        *,
        after: bool = False,
    ) -> None:
        self.sizes, self.block_m, self.block_n = sizes, block_m, block_n
        self.heads_per_kv, self.processors = heads_per_kv, processors
        self.pieces = [
            _KeyBlockCounts(piece, sizes, block_m, block_n, heads_per_kv, processors, after or number > 0)
            for number, piece in enumerate(pieces)
        ]
        self.counts = [count for piece in self.pieces for count in piece.counts]

    def build(self, values: list[int]) -> KeyWork:
        """The work, given the values of `counts`."""
        launches: list[KeyLaunch] = []
        empty = torch.zeros(0, dtype=torch.int64, device=self.pieces[0].piece.lo.device)
        tables = {"rows": [empty], "keys": [empty], "data": [empty]}
        base = dict.fromkeys(tables, 0)
        first = 0
        for piece in self.pieces:
            piece_values = values[first : first + len(piece.counts)]
            first += len(piece_values)
            place, rows, keys = real_permutations(piece.piece, self.sizes, piece_values[0], piece_values[1])
            launches += self._launches(piece, piece_values, base)
            for name, table in (("rows", rows), ("keys", keys), ("data", causal_bounds(piece.piece, place))):
                if table is not None:
                    tables[name].append(table)
                    base[name] += table.numel()
        return KeyWork(tuple(launches), not self.pieces[0].add, *(as_int32(torch.cat(parts)) for parts in tables.values()))

    def _launches(self, counts: _KeyBlockCounts, values: list[int], base: dict[str, int]) -> list[KeyLaunch]:
        piece, blocks = counts.piece, counts.blocks
        whole, masked, whole_counts, masked_counts = self._row_blocks(counts, values[2], values[3], base)
        lengths = [whole_counts, masked_counts, counts.points.flatten()]
        begins = [exclusive_cumsum(length) for length in lengths]
        ranges = torch.stack([torch.stack((begin, begin + n), 1) for begin, n in zip(begins, lengths, strict=True)], 1)
        # The last owner has no entries: query heads that have no part in a launch.
        ranges = torch.cat((ranges, torch.zeros_like(ranges[:1])))
        no_owner = piece.variants * blocks
        point_row, point_key = self._points(counts, values[4])
        key_base = exclusive_cumsum(piece.key_count) + base["keys"]
        entries_per_block = torch.ones(self.heads_per_kv, 3, dtype=torch.int64, device=whole.device)
        entries_per_block[:, 2:].fill_(self.block_m)
        out = []
        for number, in_launch in enumerate(counts.launch_blocks):
            begin = _PIECE_COUNTS + _LAUNCH_COUNTS * number
            launch_counts = PartitionCounts(*values[begin : begin + _LAUNCH_COUNTS])
            if not launch_counts.items:
                continue
            index = true_indices(in_launch.flatten(), launch_counts.items)
            batch_head, block = index // blocks, index % blocks
            variants = counts.variant.flatten(0, 1)[batch_head]
            owner = variants * blocks + block[:, None]
            if counts.num_launches > 1:
                owner = torch.where(torch.arange(self.heads_per_kv, device=owner.device) == number, owner, no_owner)
            variant, slot = variants[:, number], block * self.block_n
            num_keys = (piece.key_count[variant] - slot).clamp(max=self.block_n)
            out.append(
                key_launch(
                    (batch_head, slot + key_base[variant] if piece.keys is not None else slot, num_keys),
                    counts.variant.shape[1],
                    partition(ranges[owner].flatten(1, 2), entries_per_block.flatten(), self.processors, launch_counts),
                    as_int32,
                    whole=as_int32(whole),
                    masked=as_int32(masked),
                    point_row=as_int32(point_row),
                    point_key=as_int32(point_key),
                    sorted_rows=piece.rows is not None,
                    sorted_keys=piece.keys is not None,
                    bits=False,
                    points=piece.points is not None,
                    add=counts.add,
                )
            )
        return out

    def _points(self, counts: _KeyBlockCounts, num_points: int) -> tuple[Tensor, Tensor]:
        """(row, key) of each single pair, sorted by variant and key."""
        points = counts.piece.points
        if points is None or counts.is_point is None:
            empty = torch.zeros(0, dtype=torch.int64, device=counts.piece.lo.device)
            return empty, empty
        index = true_indices(counts.is_point.flatten(), num_points)
        key = points.flatten()[index]
        variant_row = index // points.shape[2]
        order = torch.argsort(variant_row // self.sizes.n_q * self.sizes.n_k + key, stable=True)
        return (variant_row % self.sizes.n_q)[order], key[order]

    def _row_blocks(
        self, counts: _KeyBlockCounts, num_row_blocks: int, num_whole: int, base: dict[str, int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(whole, masked, their counts): records of row blocks `(…, 7)` by key block, and how many each key block has."""
        piece, grid, blocks = counts.piece, counts.grid, counts.blocks
        shape, owners = counts.row_blocks.shape, piece.variants * blocks
        row = piece.place
        if piece.rows is not None:
            row = -1 - (row + exclusive_cumsum(piece.row_count)[:, None] + base["rows"])
        source, step = expand_counts(counts.row_blocks.flatten(), num_row_blocks)

        def at_source(table: Tensor) -> Tensor:
            return (table[:, :, None] if table.dim() == 2 else table).expand(shape).reshape(-1)[source]

        block = at_source(counts.first) + step
        variant = source // (shape[1] * shape[2])
        whole = (block >= at_source(counts.first_whole)) & (block <= at_source(counts.last_whole))
        first = block * self.block_n
        bounds = at_source(grid.bounds_offset(piece, base["data"]))
        lo, hi = at_source(grid.lo) - first, at_source(grid.tile_hi) - first
        no_bits = torch.full_like(first, -1)
        record = torch.stack((at_source(row), lo, hi, bounds, no_bits, at_source(grid.count), at_source(grid.offset)), 1)
        # One sort brings whole row blocks to the front and each to its key block.
        owner = variant * blocks + block
        code = torch.where(whole, owner, owner + owners)
        record = record[torch.argsort(code, stable=True)]
        per_code = torch.zeros(2 * owners, dtype=torch.int64, device=code.device)
        per_code.scatter_add_(0, code, torch.ones_like(code))
        return record[:num_whole], record[num_whole:], per_code[:owners], per_code[owners:]
