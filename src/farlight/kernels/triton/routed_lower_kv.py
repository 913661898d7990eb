"""The pass over keys for a router's choice: the lists of `key_work`, made where the choice lies.

Each variant's slots are cut into blocks. Which groups of rows see a block follows from where their stretches begin and end,
so the entries are counted by differences before any of them is written; one sort then brings them to their blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.kernels.triton.lower_kv import KeyLaunch, KeyWork, key_launch_of
from farlight.kernels.triton.lower_q import narrowed
from farlight.kernels.triton.routed_lower_q import Tiles, causal_data, classes, exclusive, orders, spread_over
from farlight.kernels.triton.work_partition import Counts, counted, deal, parts_of, picked
from farlight.patterns.expression import Sizes
from farlight.plan.chosen_links import ChosenLinks

__all__ = ["RoutedKeys"]


class _Piece:
    """One piece: its groups of rows against its blocks of keys, and one launch for each turn.

    Where the query heads of a key head sort the keys differently they take turns, so that no two programs of a launch own
    one key.
    """

    def __init__(self, piece: ChosenLinks, sizes: Sizes, height: int, width: int, group: int, workers: int, add: bool) -> None:
        # Sorted keys leave out some.
        self.piece, self.add = piece, add or piece.keys is not None
        self.tiles = tiles = Tiles(piece, height, smaller=False)
        self.blocks = -(-sizes.n_k // width)
        shape = tiles.hi.shape
        keys = piece.key_count[:, None, None]
        seen = tiles.head[:, :, None] & (tiles.hi > tiles.lo)
        self.first = torch.div(tiles.lo, width, rounding_mode="floor").expand(shape)
        last = torch.div(tiles.hi - 1, width, rounding_mode="floor")
        # A block is whole when all of its keys are seen by all rows; the last one has fewer keys.
        self.first_whole = torch.div(tiles.lo + width - 1, width, rounding_mode="floor").expand(shape)
        full = torch.div(tiles.core, width, rounding_mode="floor") - 1
        full = torch.where(tiles.core >= keys, torch.div(keys - 1, width, rounding_mode="floor"), full)
        self.last_whole = torch.minimum(full, last)
        self.count = torch.where(seen, last - self.first + 1, 0)
        whole = torch.where(seen, (self.last_whole - self.first_whole + 1).clamp(min=0), 0)
        # How many entries each block of each variant has: +1 where a stretch begins, -1 behind its end.
        step = torch.zeros(piece.variants, self.blocks + 1, dtype=torch.int64, device=piece.lo.device)
        one = seen.long().flatten(1)
        step.scatter_add_(1, torch.where(seen, self.first, 0).flatten(1), one)
        step.scatter_add_(1, torch.where(seen, last + 1, 0).flatten(1), -one)
        total = step[:, :-1].cumsum(1)
        self.listed: Tensor | None = None
        self.points = torch.zeros_like(total)
        if piece.points is not None:
            self.listed = piece.points >= 0
            block = torch.div(piece.points.clamp(min=0), width, rounding_mode="floor").flatten(1)
            self.points.scatter_add_(1, block, self.listed.long().flatten(1))
            total = total + torch.div(self.points + height - 1, height, rounding_mode="floor")
        self.asked = [piece.row_count.sum(), piece.key_count.sum(), self.count.sum(), whole.sum(), self.points.sum()]
        self.variant = classes(piece, sizes, group)
        sorted_apart = piece.keys is not None and piece.causal_offset is None
        self.turns = group if sorted_apart and piece.shape[1] > 1 and group > 1 else 1
        # (batch, key heads, blocks, group)
        of_head = total[self.variant].transpose(2, 3)
        exists = torch.arange(self.blocks, device=total.device) * width < piece.key_count[:, None]
        self.flags = []
        for turn in range(self.turns):
            mine = of_head[..., turn] if self.turns > 1 else of_head.sum(-1)
            here = exists[self.variant[:, :, turn]]
            if self.add:
                here = here & (mine > 0)
            self.flags.append(here)
            self.asked += counted(parts_of(mine, torch.where(here, mine, 0).sum(), workers), here)


class RoutedKeys:
    """`asked`: sums on the device; `made(their values)`: the tables. `after`: they add to what others wrote before them."""

    def __init__(
        self, pieces: list[ChosenLinks], sizes: Sizes, height: int, width: int, group: int, workers: int, *, after: bool = False
    ) -> None:
        self.sizes, self.height, self.width, self.group, self.workers = sizes, height, width, group, workers
        self.pieces = [_Piece(piece, sizes, height, width, group, workers, after or at > 0) for at, piece in enumerate(pieces)]
        self.asked = [number for one in self.pieces for number in one.asked]

    def made(self, numbers: list[int]) -> KeyWork:
        launches: list[KeyLaunch] = []
        tables: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
        at = rows = keys = data = 0
        for one in self.pieces:
            mine = numbers[at : at + len(one.asked)]
            at += len(mine)
            piece, device = one.piece, one.piece.lo.device
            place, rows_of, keys_of = orders(piece, self.sizes, mine[0], mine[1])
            if rows_of is not None and keys_of is not None:
                tables[0].append(rows_of)
                tables[1].append(keys_of)
            tables[2].append(causal_data(piece, place))
            launches += self._launches(one, mine, rows, keys, data)
            rows, keys = (sum(table.numel() for table in tables[which]) for which in (0, 1))
            data += tables[2][-1].numel()
        none = torch.zeros(0, dtype=torch.int64, device=device)
        all_of = [narrowed(torch.cat([none, *table])) for table in tables]
        return KeyWork(tuple(launches), not self.pieces[0].add, *all_of)

    def _launches(self, one: _Piece, numbers: list[int], rows: int, keys: int, data: int) -> list[KeyLaunch]:
        piece, blocks = one.piece, one.blocks
        owners = piece.variants * blocks
        _, _, entries, wholes, points = numbers[:5]
        whole, masked, ranges = self._entries(one, entries, wholes, rows, data)
        ranges.append(one.points.flatten())
        begins = [exclusive(count) for count in ranges]
        table = torch.stack([torch.stack((begin, begin + n), 1) for begin, n in zip(begins, ranges, strict=True)], 1)
        # What a head finds that has no part in a turn.
        table = torch.cat((table, torch.zeros_like(table[:1])))
        point_row = point_key = torch.zeros(0, dtype=torch.int64, device=whole.device)
        if piece.points is not None and one.listed is not None:
            at = picked(one.listed.flatten(), points)
            key = piece.points.flatten()[at]
            line = torch.div(at, piece.points.shape[2], rounding_mode="floor")
            variant = torch.div(line, self.sizes.n_q, rounding_mode="floor")
            order = torch.argsort(variant * self.sizes.n_k + key, stable=True)
            point_row, point_key = (line % self.sizes.n_q)[order], key[order]
        key_base = exclusive(piece.key_count) + keys
        kv_heads = one.variant.shape[1]
        out = []
        for turn, here in enumerate(one.flags):
            counts = Counts(*numbers[5 + 4 * turn : 9 + 4 * turn])
            if not counts.items:
                continue
            chosen = picked(here.flatten(), counts.items)
            lane, block = torch.div(chosen, blocks, rounding_mode="floor"), chosen % blocks
            heads = one.variant.flatten(0, 1)[lane]
            owner = heads * blocks + block[:, None]
            if one.turns > 1:
                owner = torch.where(torch.arange(self.group, device=owner.device) == turn, owner, owners)
            mine = heads[:, turn]
            slot = block * self.width
            slots = (piece.key_count[mine] - slot).clamp(max=self.width)
            unit = torch.ones(self.group, 3, dtype=torch.int64, device=owner.device)
            unit[:, 2:].fill_(self.height)
            launch = key_launch_of(
                (lane, slot + key_base[mine] if piece.keys is not None else slot, slots),
                kv_heads,
                deal(table[owner].flatten(1, 2), unit.flatten(), self.workers, counts),
                narrowed,
                whole=narrowed(whole),
                masked=narrowed(masked),
                point_row=narrowed(point_row),
                point_key=narrowed(point_key),
                ordered=piece.rows is not None,
                keyed=piece.keys is not None,
                bits=False,
                points=piece.points is not None,
                add=one.add,
            )
            out.append(launch)
        return out

    def _entries(self, one: _Piece, entries: int, wholes: int, rows: int, data: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Whole and masked entries, by block; and how many of each a block has."""
        piece, tiles, width, blocks = one.piece, one.tiles, self.width, one.blocks
        shape, owners = one.count.shape, piece.variants * blocks
        bounds = tiles.bounds(piece, data)
        row = piece.place
        if piece.rows is not None:
            row = -1 - (row + exclusive(piece.row_count)[:, None] + rows)
        source, step = spread_over(one.count.flatten(), entries)

        def of(table: Tensor) -> Tensor:
            return (table[:, :, None] if table.dim() == 2 else table).expand(shape).reshape(-1)[source]

        block = of(one.first) + step
        variant = torch.div(source, shape[1] * shape[2], rounding_mode="floor")
        owner = variant * blocks + block
        whole = (block >= of(one.first_whole)) & (block <= of(one.last_whole))
        first = block * width
        record = torch.stack(
            (of(row), of(tiles.lo) - first, of(tiles.tile_hi) - first, of(bounds), torch.full_like(first, -1),
             of(tiles.count), of(tiles.offset)), 1,
        )  # fmt: skip
        code = torch.where(whole, owner, owner + owners)
        order = torch.argsort(code, stable=True)
        record = record[order]
        counts = torch.zeros(2 * owners, dtype=torch.int64, device=code.device)
        counts.scatter_add_(0, code, torch.ones_like(code))
        return record[:wholes], record[wholes:], [counts[:owners], counts[owners:]]
