"""Schedule of the torch backend: the plan's tiles as Python lists, grouped by shape so that they can be stacked.

A *group* is a sequence of tile entries with equal row count, run widths and masks. Groups are made once for each class of
(batch, head) that share the variant of every table. Nothing here depends on q, k or v; the schedule is cached with the plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.plan.tables import Layer, Piece, Plan
from farlight.plan.validate import mask_of_run

__all__ = ["Schedule", "TileGroup", "schedule_of"]


@dataclass
class TileGroup:
    """Tile entries of one piece that differ in their rows and keys only.

    count, width: rows of each tile and slots of its runs together; keys: the key order of each run, None = identity; starts:
    first place of each tile; tiles: the runs [lo, hi) of each tile; hidden: (first column, last column + 1, mask) of the
    masked columns, mask `(count, columns)` bool, True = not allowed; points: for each tile the gathered keys `(count, m)`
    int64 and their validity, bool; empty without points.
    """

    piece: int
    count: int
    width: int
    keys: list[Tensor | None]
    starts: list[int]
    tiles: list[list[tuple[int, int]]]
    hidden: list[tuple[int, int, Tensor]]
    points: list[tuple[Tensor, Tensor]]


@dataclass
class Schedule:
    """classes: (batch, head) pairs of equal variants, with their groups; rows: the row order of each piece, None = identity.

    merges: some row is computed in several groups (overlapping pieces, split-K), whose results are merged by lse.
    """

    classes: list[tuple[list[tuple[int, int]], list[TileGroup]]]
    rows: list[Tensor | None]
    merges: bool


def schedule_of(plan: Plan, device: torch.device) -> Schedule:
    """The plan's schedule with index tensors on `device`, cached with the plan."""
    key = ("torch_tiled", device)
    schedule = plan.derived.get(key)
    if not isinstance(schedule, Schedule):
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            schedule = plan.derived[key] = _schedule(plan, device)
    return schedule


def _schedule(plan: Plan, device: torch.device) -> Schedule:
    layers = [layer for piece in plan.pieces for layer in piece.layers]
    code = torch.zeros(plan.sizes.batch, plan.sizes.heads, dtype=torch.int64)
    for table in [*(piece.variant for piece in plan.pieces), *(layer.variant for layer in layers)]:
        code = torch.unique(code * (int(table.max()) + 1) + table, return_inverse=True)[1]
    members: dict[int, list[tuple[int, int]]] = {}
    for b, codes in enumerate(code.tolist()):
        for h, number in enumerate(codes):
            members.setdefault(number, []).append((b, h))
    keys = {id(layer): None if layer.keys is None else layer.keys.long().to(device) for layer in layers}
    classes = []
    for pairs in members.values():
        groups: list[TileGroup] = []
        for p in range(len(plan.pieces)):
            groups += _groups(plan, p, pairs[0], keys, device)
        classes.append((pairs, groups))
    rows = [None if piece.rows is None else piece.rows.long().to(device) for piece in plan.pieces]
    is_split = any(bool((piece.parts > 1).any()) for piece in plan.pieces)
    return Schedule(classes, rows, plan.overlapping or is_split)


def _variant(table: Tensor, b: int, h: int) -> int:
    return int(table[b if table.shape[0] > 1 else 0, h if table.shape[1] > 1 else 0])


def _groups(
    plan: Plan, p: int, batch_head: tuple[int, int], keys: dict[int, Tensor | None], device: torch.device
) -> Iterator[TileGroup]:
    """The groups of piece p for one (batch, head): consecutive entries of equal shape."""
    piece: Piece = plan.pieces[p]
    v = _variant(piece.variant, *batch_head)
    first, last = int(piece.first[v]), int(piece.first[v + 1])
    start, count, part, parts = (t[first:last].tolist() for t in (piece.start, piece.count, piece.part, piece.parts))
    layers = [_LayerRuns(layer, _variant(layer.variant, *batch_head), last - first) for layer in piece.layers]
    group: TileGroup | None = None
    group_shape: object = None
    for e in range(last - first):
        runs = [(number, run) for number, layer in enumerate(layers) for run in layer.of_entry(e)]
        points = _points(layers, start[e], count[e], device) if part[e] == 0 else None
        if not runs and points is None:
            continue
        # Parts of one tile share their rows: they must not be in one group, whose results are written without merging.
        shape = (
            count[e],
            part[e] if parts[e] > 1 else -1,
            points is None,
            *((number, hi - lo, mask) for number, (lo, hi, mask) in runs),
        )
        if group is None or shape != group_shape:
            if group is not None:
                yield group
            group_shape = shape
            group = TileGroup(
                piece=p,
                count=count[e],
                width=sum(hi - lo for _, (lo, hi, _) in runs),
                keys=[keys[id(piece.layers[number])] for number, _ in runs],
                starts=[],
                tiles=[],
                hidden=_hidden(plan, [run for _, run in runs], count[e], device),
                points=[],
            )
        group.starts.append(start[e])
        group.tiles.append([(lo, hi) for _, (lo, hi, _) in runs])
        if points is not None:
            group.points.append(points)
    if group is not None:
        yield group


class _LayerRuns:
    """The runs of one layer and variant as Python lists."""

    def __init__(self, layer: Layer, variant: int, entries: int) -> None:
        base = int(layer.entry_base[variant])
        self.indptr = layer.indptr[base : base + entries + 1].tolist()
        first, last = self.indptr[0], self.indptr[-1]
        self.runs = list(zip(*(table[first:last].tolist() for table in (layer.lo, layer.hi, layer.mask)), strict=True))
        self.layer, self.place_base = layer, int(layer.place_base[variant])

    def of_entry(self, e: int) -> list[tuple[int, int, int]]:
        """(lo, hi, mask) of the runs of entry e."""
        return self.runs[self.indptr[e] - self.indptr[0] : self.indptr[e + 1] - self.indptr[0]]


def _points(layers: list[_LayerRuns], start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """`(count, m)` gathered keys of a tile's rows, padded with 0, and their validity; None without any."""
    tables = []
    for runs in layers:
        layer = runs.layer
        if layer.point_indptr is None or layer.point_keys is None:
            continue
        first = runs.place_base + start
        indptr = layer.point_indptr[first : first + count + 1]
        number = indptr.diff()
        width = int(number.max())
        if width:
            column = torch.arange(width)
            valid = column < number[:, None]
            index = (indptr[:-1, None] + column).clamp(max=layer.point_keys.numel() - 1)
            tables.append((torch.where(valid, layer.point_keys[index].long(), 0), valid))
    if not tables:
        return None
    keys, is_key = (torch.cat(column, 1).to(device) for column in zip(*tables, strict=True))
    return keys, is_key


def _hidden(plan: Plan, runs: list[tuple[int, int, int]], count: int, device: torch.device) -> list[tuple[int, int, Tensor]]:
    """(first column, last column + 1, mask) of each maximal range of columns with a pair that is not allowed."""
    out = []
    begin = 0
    for lo, hi, mask in runs:
        if mask >= 0:
            hidden = ~mask_of_run(plan, mask, lo, hi, count)
            edge = torch.nn.functional.pad(hidden.any(0).to(torch.int8), (1, 1)).diff()
            starts, stops = ((edge == step).nonzero().view(-1).tolist() for step in (1, -1))
            for c0, c1 in zip(starts, stops, strict=True):
                out.append((begin + c0, begin + c1, hidden[:, c0:c1].to(device)))
        begin += hi - lo
    return out
