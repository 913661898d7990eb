"""The passes over queries for a router's choice: the lists of `query_work`, made where the choice lies.

First everything whose shape follows from the sizes alone, ending in a few sums (`asked`); when these have been read, the
lists at their exact lengths. What comes out is what `lower_queries` makes of a plan of the same blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.kernels.triton.lower_q import SMALLEST, Launch, QueryWork, heights, launch_of, narrowed
from farlight.kernels.triton.work_partition import Counts, counted, deal, parts_of, picked
from farlight.patterns.expression import Sizes
from farlight.plan.chosen_links import ChosenLinks

__all__ = ["RAMP", "RoutedQueries", "Tiles", "causal_data", "classes", "exclusive", "orders", "spread_over"]

# Rows of a tile: masks are laid out, and groups of rows begin anew, every so many rows.
TILE = 128
# Where in a ramp the difference 0 stands.
RAMP = TILE


class Tiles:
    """Groups of at most `height` rows of a piece, `(V, I)`, and where the stretches that they see end, `(V, I, m)`."""

    def __init__(self, piece: ChosenLinks, height: int, *, smaller: bool) -> None:
        shape = (piece.variants, piece.place.shape[1])
        place, within, length = piece.place, piece.within, piece.length
        self.offset = within % TILE
        tall = (length - (within - self.offset)).clamp(max=TILE)
        self.high = heights(tall, height) if smaller else torch.full_like(tall, height)
        head = piece.valid & (self.offset % self.high == 0)
        self.count = torch.minimum(self.high, tall - self.offset)
        self.head = head.expand(shape)
        tile = place - self.offset
        self.lo = piece.lo
        # The first row of a group sees least, the last most.
        self.core = piece.ends(place)
        self.hi = piece.ends(place + (self.count - 1).clamp(min=0))
        self.tile_hi = piece.ends(tile + (tall - 1).clamp(min=0))
        self.tile = tile

    def bounds(self, piece: ChosenLinks, base: int) -> Tensor:
        """Where the bounds of a tile's rows begin, when `causal_data` begins at `base`; -1 where no row needs any."""
        if not piece.causal:
            return torch.full_like(self.tile_hi, -1)
        if piece.causal_offset is None:
            return (base + 2 * (exclusive(piece.row_count)[:, None] + self.tile))[:, :, None].expand_as(self.tile_hi)
        ahead = self.tile[:, :, None] + piece.causal_offset - self.tile_hi
        return base + 2 * (ahead.clamp(-RAMP, 0) + RAMP)


def causal_data(piece: ChosenLinks, order: Tensor | None) -> Tensor:
    """Bounds of rows, relative to the end of their tile's stretch: of each sorted row, or a ramp that serves all tiles.

    `order`: where in `(V, n_q)` the real places are, None = rows are not sorted.
    """
    if not piece.causal:
        return torch.zeros(0, dtype=torch.int64, device=piece.lo.device)
    if order is None or piece.causal_offset is not None:
        ahead = (torch.arange(2 * TILE, device=piece.lo.device) - RAMP).clamp(max=0)
    else:
        tiles = Tiles(piece, TILE, smaller=False)
        ahead = (tiles.core - tiles.tile_hi).flatten()[order]
    return torch.stack((torch.zeros_like(ahead), ahead), 1).flatten()


def spread_over(count: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(owner, step): `count[i]` entries of every i, one after another; `total` of them."""
    owner = torch.arange(count.numel(), device=count.device).repeat_interleave(count, output_size=total)
    return owner, torch.arange(total, device=count.device) - (count.cumsum(0) - count)[owner]


def classes(piece: ChosenLinks, sizes: Sizes, group: int) -> Tensor:
    """`(B, H_kv, group)`: the variant of each query head."""
    device = piece.lo.device
    batch = torch.arange(sizes.batch, device=device)[:, None] * (piece.shape[0] > 1)
    head = torch.arange(sizes.heads, device=device)[None, :] * (piece.shape[1] > 1)
    return (batch * piece.shape[1] + head).view(sizes.batch, -1, group)


def orders(piece: ChosenLinks, sizes: Sizes, rows: int, keys: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(the real places, their rows, the keys of the real slots) of all variants, `rows` and `keys` of them; None = natural."""
    if piece.rows is None or piece.keys is None:
        return None, None, None
    device = piece.lo.device
    place, slot = (
        picked((torch.arange(n, device=device) < count[:, None]).flatten(), many)
        for n, count, many in ((sizes.n_q, piece.row_count, rows), (sizes.n_k, piece.key_count, keys))
    )
    return place, piece.rows.flatten()[place], piece.keys.flatten()[slot]


def exclusive(count: Tensor) -> Tensor:
    return count.cumsum(0) - count


class _Piece:
    """One piece, and the launches that go over it; `add`: a launch joins to what earlier ones wrote."""

    def __init__(self, piece: ChosenLinks, sizes: Sizes, height: int, width: int, workers: int, add: bool) -> None:
        self.piece, self.add = piece, add
        self.tiles = tiles = Tiles(piece, height, smaller=True)
        head = tiles.head[:, :, None]
        blocks = torch.div(tiles.hi - tiles.lo + width - 1, width, rounding_mode="floor").clamp(min=0)
        whole = torch.div(tiles.core - tiles.lo, width, rounding_mode="floor").clamp(min=0)
        self.blocks = torch.where(head, blocks, 0)
        self.whole = torch.minimum(torch.where(head, whole, 0), self.blocks)
        total = self.blocks.sum(2)
        self.listed: Tensor | None = None
        self.points = torch.zeros_like(total)
        if piece.points is not None:
            self.listed = piece.points >= 0
            before = torch.nn.functional.pad(self.listed.sum(2).cumsum(1), (1, 0))
            ends = (piece.place + tiles.count).clamp(max=sizes.n_q)
            more = before[:, ends[0]] - before[:, piece.place[0].clamp(max=sizes.n_q)]
            self.points = torch.where(tiles.head, more, 0)
            total = total + torch.div(self.points + width - 1, width, rounding_mode="floor")
        self.heights = sorted({height, *(h for h in (64, SMALLEST) if h < height)}, reverse=True)
        self.asked = [piece.row_count.sum(), piece.key_count.sum(), self.whole.sum(), (self.blocks - self.whole).sum()]
        self.asked += [self.points.sum()]
        self.flags = []
        times = sizes.batch * sizes.heads // piece.variants
        for high in self.heights:
            here = tiles.head & (tiles.high == high)
            if add:
                here = here & (total > 0)
            self.flags.append(here)
            self.asked += counted(parts_of(total, torch.where(here, total, 0).sum() * times, workers), here, times)


class RoutedQueries:
    """`asked`: sums on the device; `made(their values)`: the tables. `after`: they join what others wrote before them."""

    def __init__(
        self, pieces: list[ChosenLinks], sizes: Sizes, height: int, width: int, group: int, workers: int, *, after: bool = False
    ) -> None:
        self.sizes, self.width, self.group, self.workers = sizes, width, group, workers
        self.pieces = [_Piece(piece, sizes, height, width, workers, after or at > 0) for at, piece in enumerate(pieces)]
        self.asked = [number for one in self.pieces for number in one.asked]

    def made(self, numbers: list[int]) -> QueryWork:
        launches: list[Launch] = []
        lists: dict[str, list[Tensor]] = {
            name: [] for name in ("rows", "keys", "whole", "masked", "point_key", "point_row", "data")
        }
        self.base = dict.fromkeys(lists, 0)
        at = 0
        for one in self.pieces:
            mine = numbers[at : at + len(one.asked)]
            at += len(mine)
            launches += self._piece(one, mine, lists)
        tables = [narrowed(torch.cat(parts)) for parts in lists.values()]
        return QueryWork(tuple(launches), self.pieces[0].piece.covers, *tables)

    def _piece(self, one: _Piece, numbers: list[int], lists: dict[str, list[Tensor]]) -> list[Launch]:
        piece, tiles, width = one.piece, one.tiles, self.width
        rows, keys, wholes, maskeds, points = numbers[:5]
        device = piece.lo.device
        is_sorted = piece.rows is not None
        row_base = exclusive(piece.row_count)[:, None] + self.base["rows"]
        key_base = exclusive(piece.key_count)[:, None, None] + self.base["keys"]
        new: dict[str, Tensor] = {}
        place, rows_of, keys_of = orders(piece, self.sizes, rows, keys)
        if rows_of is not None and keys_of is not None:
            new["rows"], new["keys"] = rows_of, keys_of
        new["data"] = causal_data(piece, place)
        bounds = tiles.bounds(piece, self.base["data"])
        lo = tiles.lo + (key_base if is_sorted else 0)
        tile_hi = tiles.tile_hi + (key_base if is_sorted else 0)
        full, some = one.whole.flatten(), (one.blocks - one.whole).flatten()
        owner, step = spread_over(full, wholes)
        new["whole"] = lo.flatten()[owner] + step * width
        owner, step = spread_over(some, maskeds)
        first = lo.flatten()[owner]
        slot = first + (full[owner] + step) * width
        record = (-1 - slot if is_sorted else slot, first - slot, tile_hi.flatten()[owner] - slot, bounds.flatten()[owner])
        new["masked"] = torch.stack((*record, torch.full_like(slot, -1)), 1)
        if piece.points is not None and one.listed is not None:
            at = picked(one.listed.flatten(), points)
            row = torch.div(at, piece.points.shape[2], rounding_mode="floor") % self.sizes.n_q
            new["point_key"] = piece.points.flatten()[at]
            tall = (self.sizes.n_q - (row - row % TILE)).clamp(max=TILE)
            new["point_row"] = row % TILE % heights(tall, one.heights[0])
        ranges = self._ranges(one, is_sorted)
        shape = tiles.head.shape
        columns = [piece.place + row_base if is_sorted else piece.place, tiles.count, tiles.offset]
        columns = [column.expand(shape).flatten() for column in columns]
        found = [
            self._launch(one, high, here, Counts(*numbers[5 + 4 * turn : 9 + 4 * turn]), columns, ranges)
            for turn, (high, here) in enumerate(zip(one.heights, one.flags, strict=True))
        ]
        for name, parts in lists.items():
            width_of = (5,) if name == "masked" else ()
            parts.append(new.get(name, torch.zeros(0, *width_of, dtype=torch.int64, device=device)))
            self.base[name] += parts[-1].shape[0]
        return [launch for launch in found if launch is not None]

    def _ranges(self, one: _Piece, is_sorted: bool) -> Tensor:
        """`(V · I, 4, 2)`: whole, whole with sorted keys, masked, points."""
        counts = [one.whole.sum(2).flatten(), (one.blocks - one.whole).sum(2).flatten(), one.points.flatten()]
        names = ("whole", "masked", "point_key")
        begins = [exclusive(count) + self.base[name] for count, name in zip(counts, names, strict=True)]
        (w0, m0, p0), (w1, m1, p1) = begins, [begin + count for begin, count in zip(begins, counts, strict=True)]
        middle = w0 if is_sorted else w1
        return torch.stack([torch.stack(pair, 1) for pair in ((w0, middle), (middle, w1), (m0, m1), (p0, p1))], 1)

    def _launch(
        self, one: _Piece, height: int, here: Tensor, counts: Counts, columns: list[Tensor], ranges: Tensor
    ) -> Launch | None:
        if not counts.items:
            return None
        piece, group = one.piece, self.group
        variant = classes(piece, self.sizes, group)
        # Heads that share keys stand together, then groups of rows in their order.
        chosen = picked(here[variant].transpose(2, 3).flatten(), counts.items)
        items, kv_heads = here.shape[1], variant.shape[1]
        lane, rest = torch.div(chosen, items * group, rounding_mode="floor"), chosen % (items * group)
        batch, kv = torch.div(lane, kv_heads, rounding_mode="floor"), lane % kv_heads
        item, of_group = torch.div(rest, group, rounding_mode="floor"), rest % group
        at = variant[batch, kv, of_group] * items + item
        sorted_column = torch.full_like(at, int(piece.rows is not None))
        table = torch.stack((batch, kv * group + of_group, *(column[at] for column in columns), sorted_column), 1)
        unit = torch.ones(4, dtype=torch.int64, device=at.device)
        unit[3:].fill_(self.width)
        return launch_of(
            table,
            deal(ranges[at], unit, self.workers, counts),
            narrowed,
            height=height,
            ordered=piece.rows is not None,
            keyed=piece.keys is not None,
            bits=False,
            points=piece.points is not None,
            add=one.add,
        )
