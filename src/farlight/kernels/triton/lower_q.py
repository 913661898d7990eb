"""The passes over queries, lowered: for each group of rows the list of blocks that a kernel streams through.

Runs of all layers of a piece become one list of whole blocks (natural keys first, then sorted ones), one of masked blocks, and
one of gathered keys. A *launch* is one kernel call: groups of one height, of pieces that may be computed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from farlight.errors import PlanError
from farlight.kernels.triton.head_groups import classes_of
from farlight.kernels.triton.key_blocks import Extents, grid, ranges_of, spread
from farlight.kernels.triton.work_partition import Dealt, deal
from farlight.plan.tables import Piece, Plan

__all__ = ["SMALLEST", "Launch", "QueryWork", "heights", "int32", "launch_of", "lower_queries", "narrowed"]

SMALLEST = 16


@dataclass(frozen=True)
class Launch:
    """One kernel call over groups of at most `height` rows. `add`: join to what earlier launches wrote."""

    height: int
    work: Tensor
    merges: Tensor
    slots: int
    ordered: bool
    keyed: bool
    bits: bool
    points: bool
    add: bool


@dataclass(frozen=True)
class QueryWork:
    """All launches of a plan, in order, and the lists that they index. `covers`: the first writes every row.

    earlier: work that is done before, with lists of its own.
    """

    launches: tuple[Launch, ...]
    covers: bool
    rows: Tensor
    keys: Tensor
    whole: Tensor
    masked: Tensor
    point_key: Tensor
    point_row: Tensor
    data: Tensor
    earlier: QueryWork | None = field(default=None, kw_only=True)

    def steps(self) -> Iterator[tuple[QueryWork, Launch]]:
        """Every launch in order, with the work that holds its lists."""
        if self.earlier is not None:
            yield from self.earlier.steps()
        yield from ((self, launch) for launch in self.launches)


def int32(x: Tensor) -> Tensor:
    """As the kernels read it, never empty (a kernel must be given some address)."""
    if x.numel() and (int(x.max()) >= 2**31 or int(x.min()) < -(2**31)):
        raise too_many()
    return narrowed(x)


def narrowed(x: Tensor) -> Tensor:
    """`int32` of numbers that are known to fit."""
    if x.numel() >= 2**31:
        raise too_many()
    return (x if x.numel() else torch.zeros(1, dtype=torch.int64, device=x.device)).to(torch.int32).contiguous()


def too_many() -> PlanError:
    return PlanError("the plan has more than 2^31 blocks; split the queries over several calls.")


def tables_of(plan: Plan) -> tuple[Tensor, Tensor, list[int], list[list[int]]]:
    """All orders of rows and of keys, one after another, and where each piece's and each layer's begins (-1 = natural)."""
    rows, keys = [torch.zeros(0, dtype=torch.int32)], [torch.zeros(0, dtype=torch.int32)]
    row_base, key_base = [], []
    n_rows = n_keys = 0
    for piece in plan.pieces:
        row_base.append(-1 if piece.rows is None else n_rows)
        if piece.rows is not None:
            rows.append(piece.rows)
            n_rows += piece.rows.numel()
        key_base.append([-1] * len(piece.layers))
        for number, layer in enumerate(piece.layers):
            if layer.keys is not None:
                key_base[-1][number] = n_keys
                keys.append(layer.keys)
                n_keys += layer.keys.numel()
    return torch.cat(rows), torch.cat(keys), row_base, key_base


def heights(count: Tensor, most: int) -> Tensor:
    """How many rows are computed together in tiles of `count` rows: as few as the tile needs."""
    fits = torch.full_like(count, most)
    for height in (64, SMALLEST):
        if height < most:
            fits = torch.where(count <= height, height, fits)
    return fits


@dataclass
class _Lists:
    """Entries of the three lists, collected from all classes, and how many there are."""

    whole: list[Tensor]
    masked: list[Tensor]
    point_key: list[Tensor]
    point_row: list[Tensor]
    wholes: int = 0
    maskeds: int = 0
    points: int = 0


@dataclass
class _Items:
    """Groups of rows of one piece: columns (batch, head, start, count, tile row, sorted), ranges, and the place of each group's
    first row among those of its variant.
    """

    piece: int
    height: Tensor
    columns: Tensor
    ranges: Tensor
    order: Tensor


def lower_queries(plan: Plan, height: int, width: int, group: int, workers: int) -> QueryWork:
    """The launches of a plan for groups of `height` rows, blocks of `width` keys, `group` query heads for each key head."""
    rows, keys, row_base, key_base = tables_of(plan)
    extents = {h: Extents(plan, h) for h in {SMALLEST, min(64, height), height}}
    lists = _Lists([], [], [], [])
    items = [
        one
        for number, piece in enumerate(plan.pieces)
        for one in _items(plan, number, piece, row_base[number], key_base[number], height, width, extents, lists)
    ]
    natural_first = bool(plan.pieces) and plan.pieces[0].rows is None
    if plan.overlapping:
        stages = [[n] for n in range(len(plan.pieces))]
    else:
        head = [[0]] if natural_first else []
        rest = list(range(len(head), len(plan.pieces)))
        stages = [*head, *([rest] if rest else [])]
    launches: list[Launch] = []
    for at, stage in enumerate(stages):
        add = at > 0 or len(stage) > 1
        chosen = [one for one in items if one.piece in stage]
        sizes = sorted({int(h) for one in chosen for h in one.height.unique().tolist()}, reverse=True)
        for size in sizes:
            launch = _launch(plan, chosen, size, width, group, workers, add)
            if launch is not None:
                launches.append(launch)

    def joined(parts: list[Tensor], width: int = 0) -> Tensor:
        empty = torch.zeros((0, width) if width else (0,), dtype=torch.int64)
        return torch.cat([empty, *parts])

    return QueryWork(
        launches=tuple(launches),
        covers=natural_first,
        rows=int32(rows.long()),
        keys=int32(keys.long()),
        whole=int32(joined(lists.whole)),
        masked=int32(joined(lists.masked, 5)),
        point_key=int32(joined(lists.point_key)),
        point_row=int32(joined(lists.point_row)),
        data=int32(plan.masks.data.long()),
    )


def _items(
    plan: Plan,
    number: int,
    piece: Piece,
    row_base: int,
    key_base: list[int],
    height: int,
    width: int,
    extents: dict[int, Extents],
    lists: _Lists,
) -> list[_Items]:
    out = []
    classes = classes_of(plan, [piece.variant, *(layer.variant for layer in piece.layers)])
    for c in range(classes.count):
        v, *ws = (table[c] for table in classes.variant)
        e0, e1 = int(piece.first[v]), int(piece.first[v + 1])
        if e0 == e1:
            continue
        # Parts of a tile are put together again: how work is cut depends on the device, and is decided in `deal`.
        head = piece.part[e0:e1] == 0
        tile_of_entry = head.long().cumsum(0) - 1
        start, count = piece.start[e0:e1][head].long(), piece.count[e0:e1][head].long()
        high = heights(count, height)
        subtiles = torch.div(count + high - 1, high, rounding_mode="floor")
        tile, sub = spread(torch.zeros_like(subtiles), subtiles)
        first_item = subtiles.cumsum(0) - subtiles
        offset = sub * high[tile]
        many = tile.numel()
        found: list[tuple[Tensor, ...]] = []  # owner, sorted, slot, whole, lo, hi, bounds, bits
        points: list[tuple[Tensor, Tensor, Tensor]] = []
        for layer, w, base in zip(piece.layers, ws, key_base, strict=True):
            t0 = int(layer.entry_base[w])
            pointer = layer.indptr[t0 : t0 + e1 - e0 + 1]
            entry, run = spread(pointer[:-1], pointer[1:])
            at = tile_of_entry[entry]
            # Each run once for each subtile of its tile.
            which, part = spread(torch.zeros_like(at), subtiles[at])
            run, at = run[which], at[which]
            lo, hi, mask = layer.lo[run].long(), layer.hi[run].long(), layer.mask[run].long()
            for size, extent in extents.items():
                here = high[at] == size
                if not bool(here.any()):
                    continue
                low, top, kind = lo[here], hi[here], mask[here]
                block, slot, whole = grid(extent.of(low, top, kind, part[here]), width)
                owner = (first_item[at] + part)[here][block]
                bounds, bits = extent.data(kind[block])
                placed = slot if base < 0 else slot + base
                is_keyed = torch.full_like(slot, int(base >= 0))
                found.append((owner, is_keyed, placed, whole, low[block] - slot, top[block] - slot, bounds, bits))
            if layer.point_indptr is not None and layer.point_keys is not None:
                place = int(layer.place_base[w]) + start[tile] + offset
                rows_of = torch.minimum(high[tile], count[tile] - offset)
                begin, end = layer.point_indptr[place], layer.point_indptr[place + rows_of]
                owner, at = spread(begin, end)
                row = torch.searchsorted(layer.point_indptr, at, right=True) - 1 - place[owner]
                points.append((owner, layer.point_keys[at].long(), row))
        ranges = _ranges(found, points, many, lists)
        batch, lane = classes.members(c)
        columns = torch.stack(
            (
                start[tile] + offset + max(row_base, 0),
                torch.minimum(high[tile], count[tile] - offset),
                offset,
                torch.full_like(tile, int(row_base >= 0)),
            ),
            1,
        )
        lanes = torch.stack((batch, lane), 1)
        out.append(
            _Items(
                number,
                high[tile].repeat(batch.numel()),
                torch.cat((lanes.repeat_interleave(many, 0), columns.repeat(batch.numel(), 1)), 1),
                ranges.repeat(batch.numel(), 1, 1),
                (start[tile] + offset - int(piece.row_first[v])).repeat(batch.numel()),
            )
        )
    return out


def _ranges(found: list[tuple[Tensor, ...]], points: list[tuple[Tensor, Tensor, Tensor]], many: int, lists: _Lists) -> Tensor:
    """Sort a class's entries by their owners into the lists; `(many, 4, 2)`: whole, whole with sorted keys, masked, points."""
    none = torch.zeros(0, dtype=torch.int64)
    columns = [torch.cat(column) for column in zip(*found, strict=True)] if found else [none] * 8
    owner, is_keyed, slot, whole, lo, hi, bounds, bits = columns
    whole = whole.bool()
    order, at = ranges_of(owner[whole] * 2 + is_keyed[whole], 2 * many, lists.wholes)
    lists.whole.append(slot[whole][order])
    lists.wholes += order.numel()
    some = ~whole
    order_some, at_some = ranges_of(owner[some], many, lists.maskeds)
    signed = torch.where(is_keyed[some] > 0, -1 - slot[some], slot[some])
    lists.masked.append(torch.stack((signed, lo[some], hi[some], bounds[some], bits[some]), 1)[order_some])
    lists.maskeds += order_some.numel()
    point_columns = [torch.cat(column) for column in zip(*points, strict=True)] if points else [none] * 3
    order_points, at_points = ranges_of(point_columns[0], many, lists.points)
    lists.point_key.append(point_columns[1][order_points])
    lists.point_row.append(point_columns[2][order_points])
    lists.points += order_points.numel()
    begin = torch.cat((at.begin.view(-1, 2), at_some.begin[:, None], at_points.begin[:, None]), 1)
    end = torch.cat((at.end.view(-1, 2), at_some.end[:, None], at_points.end[:, None]), 1)
    return torch.stack((begin, end), 2)


def _launch(plan: Plan, chosen: list[_Items], height: int, width: int, group: int, workers: int, add: bool) -> Launch | None:
    picks = [(one, one.height == height) for one in chosen]
    columns = torch.cat([one.columns[pick] for one, pick in picks])
    ranges = torch.cat([one.ranges[pick] for one, pick in picks])
    order = torch.cat([one.order[pick] for one, pick in picks])
    if add:
        # A row that sees nothing here keeps what it has.
        working = (ranges[..., 1] > ranges[..., 0]).any(1)
        columns, ranges, order = columns[working], ranges[working], order[working]
    if not columns.shape[0]:
        return None
    # Heads that share keys stand together, then tiles in their order.
    kv = columns[:, 0] * plan.sizes.heads + torch.div(columns[:, 1], group, rounding_mode="floor") * group
    sort = torch.argsort((kv * (int(order.max()) + 1) + order) * group + columns[:, 1] % group, stable=True)
    columns, ranges = columns[sort], ranges[sort]
    return launch_of(
        columns,
        deal(ranges, torch.tensor([1, 1, 1, width]), workers),
        int32,
        height=height,
        ordered=bool((columns[:, 5] > 0).any()),
        keyed=any(layer.keys is not None for piece in plan.pieces for layer in piece.layers),
        bits=bool((plan.masks.kind == 1).any()),
        points=bool((ranges[:, 3, 1] > ranges[:, 3, 0]).any()),
        add=add,
    )


def launch_of(columns: Tensor, dealt: Dealt, as_int: Callable[[Tensor], Tensor], **options: Any) -> Launch:
    """A launch over items (batch, head, start, count, tile row, sorted) that have been dealt."""
    cut = dealt.cut
    merged = columns[cut[:, 0]]
    merges = torch.cat((merged[:, :4], merged[:, 5:], cut[:, 1:]), 1)
    return Launch(
        work=as_int(torch.cat((columns[dealt.item], dealt.ranges.flatten(1), dealt.slot[:, None]), 1)),
        merges=as_int(merges) if cut.shape[0] else cut,
        slots=dealt.slots,
        **options,
    )
