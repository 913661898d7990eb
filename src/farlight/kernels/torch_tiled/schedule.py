"""Which tiles are computed together: a plan read once into Python lists, grouped by likeness.

A *group* is a run of tile entries with equal row counts, run widths and masks, for one set of (batch, head) that share the
variant of everything. Nothing here touches q, k or v.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.plan.tables import Layer, Piece, Plan
from farlight.plan.validate import mask_of_run

__all__ = ["Group", "Lanes", "Schedule", "schedule_of"]


@dataclass(frozen=True)
class Lanes:
    """Heads that are computed together: query heads `[q0, q1)` on key heads `[k0, k1)` of one batch item or of several."""

    batch: int | Tensor
    q0: int
    q1: int
    k0: int
    k1: int


@dataclass
class Group:
    """Entries that look alike. Each tile has `count` rows from place `start`, and the runs `[lo, hi)` of `tiles`, whose key
    tables are `keys` (None = slots are keys). `hidden`: stretches of columns with the mask of what is *not* seen.
    """

    piece: int
    count: int
    width: int
    keys: list[Tensor | None]
    starts: list[int]
    tiles: list[list[tuple[int, int]]]
    hidden: list[tuple[int, int, Tensor]]
    points: list[tuple[Tensor, Tensor]]  # for each tile: (count, m) keys and which of them are real


@dataclass
class Schedule:
    """The groups of each class of (batch, head) with equal variants."""

    classes: list[tuple[list[tuple[int, int]], list[Group]]]
    rows: list[Tensor | None]
    merges: bool


def schedule_of(plan: Plan, device: torch.device) -> Schedule:
    """The plan's schedule, made once for each device."""
    key = ("blocked", device)
    found = plan.derived.get(key)
    if not isinstance(found, Schedule):
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            found = plan.derived[key] = _make(plan, device)
    return found


def _make(plan: Plan, device: torch.device) -> Schedule:
    sizes = plan.sizes
    shape = (sizes.batch, sizes.heads)
    tables = [piece.variant for piece in plan.pieces] + [layer.variant for piece in plan.pieces for layer in piece.layers]
    code = torch.zeros(shape, dtype=torch.int64)
    for table in tables:
        code = code * (int(table.max()) + 1) + table
        code = torch.unique(code, return_inverse=True)[1]
    members: dict[int, list[tuple[int, int]]] = {}
    for b, codes in enumerate(code.tolist()):
        for h, number in enumerate(codes):
            members.setdefault(number, []).append((b, h))
    split = any(bool((piece.parts > 1).any()) for piece in plan.pieces)
    merges = plan.overlapping or split
    keys = {id(layer): None if layer.keys is None else layer.keys.long().to(device) for p in plan.pieces for layer in p.layers}
    classes = []
    for pairs in members.values():
        groups: list[Group] = []
        for number, piece in enumerate(plan.pieces):
            groups += _groups(plan, number, piece, pairs[0], keys, device)
        classes.append((pairs, groups))
    rows = [None if piece.rows is None else piece.rows.long().to(device) for piece in plan.pieces]
    return Schedule(classes, rows, merges)


def _pick(variant: Tensor, b: int, h: int) -> int:
    return int(variant[b if variant.shape[0] > 1 else 0, h if variant.shape[1] > 1 else 0])


def _groups(
    plan: Plan, number: int, piece: Piece, bh: tuple[int, int], keys: dict[int, Tensor | None], device: torch.device
) -> Iterator[Group]:
    v = _pick(piece.variant, *bh)
    e0, e1 = int(piece.first[v]), int(piece.first[v + 1])
    start, count, part, parts = (t[e0:e1].tolist() for t in (piece.start, piece.count, piece.part, piece.parts))
    columns = [_Runs(layer, _pick(layer.variant, *bh), e1 - e0) for layer in piece.layers]
    group: Group | None = None
    likeness: object = None
    for e in range(e1 - e0):
        runs = [(layer, run) for layer, column in enumerate(columns) for run in column.of(e)]
        points = _points(columns, start[e], count[e], device) if part[e] == 0 else None
        if not runs and points is None:
            continue
        # Parts of one tile share their rows, so they cannot be computed at once and merged after.
        shape = (
            count[e],
            part[e] if parts[e] > 1 else -1,
            points is None,
            *((layer, hi - lo, mask) for layer, (lo, hi, mask) in runs),
        )
        if group is None or shape != likeness:
            if group is not None:
                yield group
            likeness = shape
            group = Group(
                piece=number,
                count=count[e],
                width=sum(hi - lo for _, (lo, hi, _) in runs),
                keys=[keys[id(piece.layers[layer])] for layer, _ in runs],
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


class _Runs:
    """One layer's runs and points for one variant, as lists."""

    def __init__(self, layer: Layer, variant: int, entries: int) -> None:
        base = int(layer.entry_base[variant])
        self.pointer = layer.indptr[base : base + entries + 1].tolist()
        r0, r1 = self.pointer[0], self.pointer[-1]
        self.base = r0
        self.runs = list(zip(*(t[r0:r1].tolist() for t in (layer.lo, layer.hi, layer.mask)), strict=True))
        self.layer, self.place_base = layer, int(layer.place_base[variant])

    def of(self, e: int) -> list[tuple[int, int, int]]:
        return self.runs[self.pointer[e] - self.base : self.pointer[e + 1] - self.base]


def _points(columns: list[_Runs], start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """The gathered keys of a tile's rows as a table `(count, m)`, and which entries are real; None when there are none."""
    tables = []
    for column in columns:
        layer = column.layer
        if layer.point_indptr is None or layer.point_keys is None:
            continue
        at = column.place_base + start
        pointer = layer.point_indptr[at : at + count + 1]
        number = pointer.diff()
        most = int(number.max())
        if most:
            slot = torch.arange(most)
            real = slot < number[:, None]
            place = (pointer[:-1, None] + slot).clamp(max=layer.point_keys.numel() - 1)
            tables.append((torch.where(real, layer.point_keys[place].long(), 0), real))
    if not tables:
        return None
    return torch.cat([t[0] for t in tables], 1).to(device), torch.cat([t[1] for t in tables], 1).to(device)


def _hidden(plan: Plan, runs: list[tuple[int, int, int]], count: int, device: torch.device) -> list[tuple[int, int, Tensor]]:
    """The stretches of columns in which some row sees not all, with the mask of what is hidden."""
    out = []
    at = 0
    for lo, hi, mask in runs:
        if mask >= 0:
            unseen = ~mask_of_run(plan, mask, lo, hi, count)
            some = torch.nn.functional.pad(unseen.any(0).to(torch.int8), (1, 1)).diff()
            for c0, c1 in zip((some == 1).nonzero().view(-1).tolist(), (some == -1).nonzero().view(-1).tolist(), strict=True):
                out.append((at + c0, at + c1, unseen[:, c0:c1].to(device)))
        at += hi - lo
    return out
