"""Lowering of a router's choice for the forward and dq passes, on the device where the choice lies.

The tables are those of `lower_q`; what differs is that the host never reads their contents. Lowering has two steps:

1. everything whose shape follows from the sizes alone, on a grid of possible row groups; it ends in `counts`, a few 0-d
   tensors: how many rows, keys, blocks, points, items and parts there are;
2. `build`, given the values of the counts (`routed` reads those of all passes at once), makes the tables at their exact lengths
   with operations whose output length is known beforehand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.kernels.triton.launches import QueryLaunch, QueryWork, as_int32, query_launch
from farlight.kernels.triton.lower_q import MIN_BLOCK_M, block_heights
from farlight.kernels.triton.work_partition import PartitionCounts, num_parts, partition, partition_counts, true_indices
from farlight.patterns.expression import Sizes
from farlight.plan.chosen_links import ChosenLinks
from farlight.ragged import exclusive_cumsum, expand_counts

__all__ = ["RoutedQueryLowering", "RowGroupGrid", "causal_bounds", "num_blocks", "real_permutations", "variant_of_head"]

# Rows of a tile, by which masks are laid out. Row groups begin at multiples of their height within a tile.
TILE = 128
# The index of difference 0 in a ramp of bounds.
RAMP = TILE
# Counts of a piece that come before those of its launches, and counts of each launch.
_PIECE_COUNTS, _LAUNCH_COUNTS = 5, 4


def num_blocks(length: Tensor, block: int) -> Tensor:
    """Blocks of `block` entries that hold `length`; at least 0."""
    return ((length + block - 1) // block).clamp(min=0)


class RowGroupGrid:
    """The row groups of a piece of V variants on the grid of its I possible groups, each of m stretches of keys.

    `(V or 1, I)`: offset of the group's first row within its tile, height, count of rows, is_group: a group begins here, tile:
    place of the tile's first row. `(V, I, m)`, slots: every row sees `lo … core - 1`, some row `lo … hi - 1`, some row of the
    tile `lo … tile_hi - 1`. smaller: short tiles have groups of less height, as `block_heights` says.
    """

    def __init__(self, piece: ChosenLinks, block_m: int, *, smaller: bool) -> None:
        place, within, length = piece.place, piece.within, piece.length
        self.offset = within % TILE
        tile_rows = (length - (within - self.offset)).clamp(max=TILE)
        self.height = block_heights(tile_rows, block_m) if smaller else torch.full_like(tile_rows, block_m)
        is_group = piece.valid & (self.offset % self.height == 0)
        self.count = torch.minimum(self.height, tile_rows - self.offset)
        self.is_group = is_group.expand(piece.variants, place.shape[1])
        self.tile = place - self.offset
        # A stretch ends the later, the later the row: the first row of a group sees least, the last most.
        self.lo = piece.lo
        self.core = piece.ends(place)
        self.hi = piece.ends(place + (self.count - 1).clamp(min=0))
        self.tile_hi = piece.ends(self.tile + (tile_rows - 1).clamp(min=0))

    def bounds_offset(self, piece: ChosenLinks, base: int) -> Tensor:
        """Offset in `data` of the row bounds of each tile, `causal_bounds` lying at `base`; -1 where no row needs any."""
        if not piece.causal:
            return torch.full_like(self.tile_hi, -1)
        if piece.causal_offset is None:
            first_row = exclusive_cumsum(piece.row_count)[:, None] + self.tile
            return (base + 2 * first_row)[:, :, None].expand_as(self.tile_hi)
        difference = self.tile[:, :, None] + piece.causal_offset - self.tile_hi
        return base + 2 * (difference.clamp(-RAMP, 0) + RAMP)


def causal_bounds(piece: ChosenLinks, place: Tensor | None) -> Tensor:
    """Row bounds of a causal piece, (0, end relative to the end of the tile's stretch) for each row, flat.

    Sorted rows have a pair each; rows in natural order share one ramp … -2, -1, 0, 0, 0 …, into which each tile points.
    place: the indices in `(V, n_q)` of the real places, None = rows are not sorted.
    """
    if not piece.causal:
        return torch.zeros(0, dtype=torch.int64, device=piece.lo.device)
    if place is None or piece.causal_offset is not None:
        end = (torch.arange(2 * TILE, device=piece.lo.device) - RAMP).clamp(max=0)
    else:
        grid = RowGroupGrid(piece, TILE, smaller=False)
        end = (grid.core - grid.tile_hi).flatten()[place]
    return torch.stack((torch.zeros_like(end), end), 1).flatten()


def variant_of_head(piece: ChosenLinks, sizes: Sizes, heads_per_kv: int) -> Tensor:
    """`(B, H_kv, heads_per_kv)`: the variant of each query head."""
    device = piece.lo.device
    batch = torch.arange(sizes.batch, device=device)[:, None] * (piece.shape[0] > 1)
    head = torch.arange(sizes.heads, device=device)[None, :] * (piece.shape[1] > 1)
    return (batch * piece.shape[1] + head).view(sizes.batch, -1, heads_per_kv)


def real_permutations(
    piece: ChosenLinks, sizes: Sizes, num_rows: int, num_keys: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(indices of the real places, their rows, the keys of the real slots) of all variants; None = natural order."""
    if piece.rows is None or piece.keys is None:
        return None, None, None
    device = piece.lo.device
    place, slot = (
        true_indices((torch.arange(n, device=device) < real[:, None]).flatten(), count)
        for n, real, count in ((sizes.n_q, piece.row_count, num_rows), (sizes.n_k, piece.key_count, num_keys))
    )
    return place, piece.rows.flatten()[place], piece.keys.flatten()[slot]


class _RowGroupCounts:
    """Step 1 for one piece: block counts of its row groups, and one launch for each height. `add`: earlier launches wrote rows.

    `(V, I, m)`: blocks, whole; `(V, I)`: points; launch_groups: for each height, which groups its launch computes.
    """

    def __init__(self, piece: ChosenLinks, sizes: Sizes, block_m: int, block_n: int, processors: int, add: bool) -> None:
        self.piece, self.add = piece, add
        self.grid = grid = RowGroupGrid(piece, block_m, smaller=True)
        is_group = grid.is_group[:, :, None]
        self.blocks = torch.where(is_group, num_blocks(grid.hi - grid.lo, block_n), 0)
        whole = ((grid.core - grid.lo) // block_n).clamp(min=0)
        self.whole = torch.minimum(torch.where(is_group, whole, 0), self.blocks)
        total = self.blocks.sum(2)
        self.is_point: Tensor | None = None
        self.points = torch.zeros_like(total)
        if piece.points is not None:
            self.is_point = piece.points >= 0
            points_before = torch.nn.functional.pad(self.is_point.sum(2).cumsum(1), (1, 0))
            end = (piece.place + grid.count).clamp(max=sizes.n_q)
            points = points_before[:, end[0]] - points_before[:, piece.place[0].clamp(max=sizes.n_q)]
            self.points = torch.where(grid.is_group, points, 0)
            total = total + num_blocks(self.points, block_n)
        self.counts = [piece.row_count.sum(), piece.key_count.sum(), self.whole.sum(), (self.blocks - self.whole).sum()]
        self.counts += [self.points.sum()]
        self.heights = sorted({block_m, *(h for h in (64, MIN_BLOCK_M) if h < block_m)}, reverse=True)
        self.launch_groups = []
        copies = sizes.batch * sizes.heads // piece.variants
        for height in self.heights:
            in_launch = grid.is_group & (grid.height == height)
            if add:
                in_launch = in_launch & (total > 0)
            self.launch_groups.append(in_launch)
            all_blocks = torch.where(in_launch, total, 0).sum() * copies
            self.counts += partition_counts(num_parts(total, all_blocks, processors), in_launch, copies)


class RoutedQueryLowering:
    """`lower_queries` for the pieces of a router's choice, in two steps: `counts`, then `build` with their values.

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
        self.sizes, self.block_n, self.heads_per_kv, self.processors = sizes, block_n, heads_per_kv, processors
        self.pieces = [
            _RowGroupCounts(piece, sizes, block_m, block_n, processors, after or number > 0)
            for number, piece in enumerate(pieces)
        ]
        self.counts = [count for piece in self.pieces for count in piece.counts]

    def build(self, values: list[int]) -> QueryWork:
        """The work, given the values of `counts`."""
        launches: list[QueryLaunch] = []
        tables: dict[str, list[Tensor]] = {
            name: [] for name in ("rows", "keys", "whole", "masked", "point_key", "point_row", "data")
        }
        base = dict.fromkeys(tables, 0)
        first = 0
        for piece in self.pieces:
            piece_values = values[first : first + len(piece.counts)]
            first += len(piece_values)
            new = self._tables(piece, piece_values, base)
            launches += self._launches(piece, piece_values, base)
            for name, parts in tables.items():
                parts.append(new[name])
                base[name] += new[name].shape[0]
        return QueryWork(
            tuple(launches), self.pieces[0].piece.covers, *(as_int32(torch.cat(parts)) for parts in tables.values())
        )

    def _tables(self, counts: _RowGroupCounts, values: list[int], base: dict[str, int]) -> dict[str, Tensor]:
        """What the piece adds to the tables. `base`: the tables' lengths before it."""
        piece, grid, block_n = counts.piece, counts.grid, self.block_n
        num_rows, num_keys, num_whole, num_masked, num_points = values[:_PIECE_COUNTS]
        is_sorted = piece.rows is not None
        key_base = exclusive_cumsum(piece.key_count)[:, None, None] + base["keys"] if is_sorted else 0
        empty = torch.zeros(0, dtype=torch.int64, device=piece.lo.device)
        new = dict.fromkeys(("rows", "keys", "point_key", "point_row"), empty)
        place, rows, keys = real_permutations(piece, self.sizes, num_rows, num_keys)
        if rows is not None and keys is not None:
            new["rows"], new["keys"] = rows, keys
        new["data"] = causal_bounds(piece, place)
        lo, tile_hi = (grid.lo + key_base).flatten(), (grid.tile_hi + key_base).flatten()
        whole, masked = counts.whole.flatten(), (counts.blocks - counts.whole).flatten()
        owner, step = expand_counts(whole, num_whole)
        new["whole"] = lo[owner] + step * block_n
        owner, step = expand_counts(masked, num_masked)
        slot = lo[owner] + (whole[owner] + step) * block_n
        first = -1 - slot if is_sorted else slot
        bounds = grid.bounds_offset(piece, base["data"]).flatten()[owner]
        record = (first, lo[owner] - slot, tile_hi[owner] - slot, bounds, torch.full_like(slot, -1))
        new["masked"] = torch.stack(record, 1)
        if piece.points is not None and counts.is_point is not None:
            point = true_indices(counts.is_point.flatten(), num_points)
            row = point // piece.points.shape[2] % self.sizes.n_q
            new["point_key"] = piece.points.flatten()[point]
            tile_rows = (self.sizes.n_q - (row - row % TILE)).clamp(max=TILE)
            new["point_row"] = row % TILE % block_heights(tile_rows, counts.heights[0])
        return new

    def _launches(self, counts: _RowGroupCounts, values: list[int], base: dict[str, int]) -> list[QueryLaunch]:
        piece, grid = counts.piece, counts.grid
        first_row = piece.place
        if piece.rows is not None:
            first_row = first_row + exclusive_cumsum(piece.row_count)[:, None] + base["rows"]
        columns = [column.expand(grid.is_group.shape).flatten() for column in (first_row, grid.count, grid.offset)]
        ranges = self._ranges(counts, base)
        out = []
        for number, (height, in_launch) in enumerate(zip(counts.heights, counts.launch_groups, strict=True)):
            begin = _PIECE_COUNTS + _LAUNCH_COUNTS * number
            launch_counts = PartitionCounts(*values[begin : begin + _LAUNCH_COUNTS])
            if launch_counts.items:
                out.append(self._launch(counts, height, in_launch, launch_counts, columns, ranges))
        return out

    def _ranges(self, counts: _RowGroupCounts, base: dict[str, int]) -> Tensor:
        """`(V · I, 4, 2)`: whole blocks in natural order, whole blocks in sorted order, masked blocks, points."""
        lengths = [counts.whole.sum(2).flatten(), (counts.blocks - counts.whole).sum(2).flatten(), counts.points.flatten()]
        names = ("whole", "masked", "point_key")
        begins = [exclusive_cumsum(length) + base[name] for length, name in zip(lengths, names, strict=True)]
        ends = [begin + length for begin, length in zip(begins, lengths, strict=True)]
        # All keys of a piece are in one order: one of the two ranges of whole blocks is empty.
        middle = ends[0] if counts.piece.rows is None else begins[0]
        pairs = ((begins[0], middle), (middle, ends[0]), (begins[1], ends[1]), (begins[2], ends[2]))
        return torch.stack([torch.stack(pair, 1) for pair in pairs], 1)

    def _launch(
        self,
        counts: _RowGroupCounts,
        height: int,
        in_launch: Tensor,
        launch_counts: PartitionCounts,
        columns: list[Tensor],
        ranges: Tensor,
    ) -> QueryLaunch:
        piece, heads_per_kv = counts.piece, self.heads_per_kv
        variant = variant_of_head(piece, self.sizes, heads_per_kv)
        # Order: key head, row group, query head. Heads that share keys run side by side and share them in L2.
        index = true_indices(in_launch[variant].transpose(2, 3).flatten(), launch_counts.items)
        groups, kv_heads = in_launch.shape[1], variant.shape[1]
        batch_head, rest = index // (groups * heads_per_kv), index % (groups * heads_per_kv)
        batch, kv_head = batch_head // kv_heads, batch_head % kv_heads
        group, query_head = rest // heads_per_kv, rest % heads_per_kv
        source = variant[batch, kv_head, query_head] * groups + group
        is_sorted = torch.full_like(source, int(piece.rows is not None))
        head = kv_head * heads_per_kv + query_head
        table = torch.stack((batch, head, *(column[source] for column in columns), is_sorted), 1)
        # Filled on the device: `torch.tensor` of a list would be a copy from the host.
        entries_per_block = torch.ones(4, dtype=torch.int64, device=source.device)
        entries_per_block[3:].fill_(self.block_n)
        return query_launch(
            table,
            partition(ranges[source], entries_per_block, self.processors, launch_counts),
            as_int32,
            block_m=height,
            sorted_rows=piece.rows is not None,
            sorted_keys=piece.keys is not None,
            bits=False,
            points=piece.points is not None,
            add=counts.add,
        )
