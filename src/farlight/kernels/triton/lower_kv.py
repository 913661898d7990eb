"""The pass over keys, lowered from the plan's transposed tables: for each block of keys the list of rows that see it.

The first stage goes through all keys in their natural order, with the runs of every piece and all gathered pairs. Layers that
sort the keys come after, one stage each (more where query heads of one key head sort them differently), and add to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from farlight.kernels.triton.head_groups import Classes, classes_of
from farlight.kernels.triton.key_blocks import Extents, ranges_of, spread
from farlight.kernels.triton.lower_q import int32, tables_of
from farlight.kernels.triton.work_partition import Dealt, deal
from farlight.plan.tables import Layer, Piece, Plan
from farlight.plan.transpose import TransposedLayer

__all__ = ["KeyLaunch", "KeyWork", "key_launch_of", "lower_keys"]


@dataclass(frozen=True)
class KeyLaunch:
    """One kernel call over blocks of keys. `add`: add to what earlier launches wrote."""

    work: Tensor
    ranges: Tensor
    merges: Tensor
    slots: int
    whole: Tensor
    masked: Tensor
    point_row: Tensor
    point_key: Tensor
    ordered: bool
    keyed: bool
    bits: bool
    points: bool
    add: bool


@dataclass(frozen=True)
class KeyWork:
    """All launches of a plan's pass over keys. `covers`: the first writes every key.

    earlier: work that is done before, with lists of its own.
    """

    launches: tuple[KeyLaunch, ...]
    covers: bool
    rows: Tensor
    keys: Tensor
    data: Tensor
    earlier: KeyWork | None = field(default=None, kw_only=True)

    def steps(self) -> Iterator[tuple[KeyWork, KeyLaunch]]:
        """Every launch in order, with the work that holds its lists."""
        if self.earlier is not None:
            yield from self.earlier.steps()
        yield from ((self, launch) for launch in self.launches)


@dataclass
class _Entries:
    """Entries of one launch as collected: owners (numbered blocks of keys) and records."""

    whole_owner: list[Tensor]
    whole: list[Tensor]
    masked_owner: list[Tensor]
    masked: list[Tensor]
    point_owner: list[Tensor]
    point_row: list[Tensor]
    point_key: list[Tensor]

    @staticmethod
    def none() -> _Entries:
        return _Entries([], [], [], [], [], [], [])


def key_launch_of(
    blocks: tuple[Tensor, Tensor, Tensor], kv_heads: int, dealt: Dealt, as_int: Callable[[Tensor], Tensor], **options: Any
) -> KeyLaunch:
    """A launch over blocks of keys (batch · key heads + key head, first slot, slots) that have been dealt."""
    lane, slot, slots = blocks
    columns = torch.stack((torch.div(lane, kv_heads, rounding_mode="floor"), lane % kv_heads, slot, slots), 1)
    merges = columns[dealt.cut[:, 0]]
    sorted_keys = torch.full((merges.shape[0], 1), int(options["keyed"]), device=merges.device)
    merges = torch.cat((merges, sorted_keys, dealt.cut[:, 1:]), 1)
    return KeyLaunch(
        work=as_int(torch.cat((columns[dealt.item], dealt.slot[:, None]), 1)),
        ranges=as_int(dealt.ranges.flatten(1)),
        merges=as_int(merges) if merges.shape[0] else merges,
        slots=dealt.slots,
        **options,
    )


class _Lowering:
    def __init__(self, plan: Plan, height: int, width: int, group: int, workers: int) -> None:
        self.plan, self.height, self.width, self.group, self.workers = plan, height, width, group, workers
        self.rows, self.keys, self.row_base, self.key_base = tables_of(plan)
        self.extents = Extents(plan, height)
        self.turned = plan.transposed(width)
        self.bits = bool((plan.masks.kind == 1).any())

    def layers(self) -> list[tuple[int, int, Piece, Layer, TransposedLayer]]:
        return [
            (p, at, piece, layer, self.turned.layers[p][at])
            for p, piece in enumerate(self.plan.pieces)
            for at, layer in enumerate(piece.layers)
        ]

    def runs(self, into: _Entries, p: int, layer: Layer, v: int, w: int, items: tuple[Tensor, Tensor], block: Block) -> None:
        """Add the rows of these items (run, tile), one for each of the blocks given for them."""
        piece = self.plan.pieces[p]
        run, tile = items
        entry = tile.long() - int(layer.entry_base[w]) + int(piece.first[v])
        start, count = piece.start[entry].long(), piece.count[entry].long()
        which, sub = spread(torch.zeros_like(count), torch.div(count + self.height - 1, self.height, rounding_mode="floor"))
        lo, hi, mask = layer.lo[run][which].long(), layer.hi[run][which].long(), layer.mask[run][which].long()
        extent = self.extents.of(lo, hi, mask, sub)
        first, last, owner = block.first[which], block.last[which], block.owner[which]
        seen = (extent.lo < last) & (extent.hi > first)
        whole = seen & (extent.core_lo <= first) & (extent.core_hi >= last)
        bounds, bits = self.extents.data(mask)
        offset = sub * self.height
        row = start[which] + offset
        if self.row_base[p] >= 0:
            row = -1 - (row + self.row_base[p])
        rows = torch.minimum(count[which] - offset, torch.tensor(self.height))
        record = torch.stack((row, lo - first, hi - first, bounds, bits, rows, offset), 1)
        some = seen & ~whole
        into.whole_owner.append(owner[whole])
        into.whole.append(record[whole])
        into.masked_owner.append(owner[some])
        into.masked.append(record[some])

    def launch(
        self, entries: _Entries, owners: int, heads: Tensor, blocks: tuple[Tensor, Tensor, Tensor], keyed: bool, add: bool
    ) -> KeyLaunch | None:
        """heads: `(items, group)` the owner of each query head's entries, `owners` = none; blocks: of each item (batch · key
        heads + key head, first slot, slots).
        """

        def listed(owner: list[Tensor], *columns: list[Tensor], width: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
            none = torch.zeros(0, dtype=torch.int64)
            empty = torch.zeros(0, width, dtype=torch.int64) if width else none
            order, at = ranges_of(torch.cat([none, *owner]), owners)
            pad = torch.zeros(1, dtype=torch.int64)  # what the owner `owners` finds
            return torch.cat((at.begin, pad)), torch.cat((at.end, pad)), [torch.cat([empty, *c])[order] for c in columns]

        whole0, whole1, [whole] = listed(entries.whole_owner, entries.whole, width=7)
        masked0, masked1, [masked] = listed(entries.masked_owner, entries.masked, width=7)
        point0, point1, [point_row, point_key] = listed(entries.point_owner, entries.point_row, entries.point_key)
        ranges = torch.stack(
            [
                torch.stack((begin[heads], end[heads]), 2)
                for begin, end in ((whole0, whole1), (masked0, masked1), (point0, point1))
            ],
            2,
        )  # (items, group, 3, 2)
        lane, slot, slots = blocks
        if add:
            working = (ranges[..., 1] > ranges[..., 0]).flatten(1).any(1)
            ranges, lane, slot, slots = ranges[working], lane[working], slot[working], slots[working]
        if not lane.numel():
            return None
        dealt = deal(ranges.flatten(1, 2), torch.tensor([1, 1, self.height]).repeat(self.group), self.workers)
        return key_launch_of(
            (lane, slot, slots),
            self.plan.sizes.heads // self.group,
            dealt,
            int32,
            whole=int32(whole),
            masked=int32(masked),
            point_row=int32(point_row),
            point_key=int32(point_key),
            ordered=any(base >= 0 for base in self.row_base),
            keyed=keyed,
            bits=self.bits,
            points=point_row.numel() > 0,
            add=add,
        )

    def by_key_head(self, classes: Classes) -> Tensor:
        """(batch · key heads, group) the class of each query head."""
        return classes.of.reshape(-1, self.group)

    def natural(self) -> KeyLaunch | None:
        """All keys in their own order."""
        plan, width = self.plan, self.width
        layers = [one for one in self.layers() if one[3].keys is None or one[3].point_keys is not None]
        blocks = -(-plan.n_k // width)
        if not layers or not blocks:
            return None
        classes = classes_of(plan, [table for _, _, piece, layer, _ in layers for table in (piece.variant, layer.variant)])
        entries = _Entries.none()
        for c in range(classes.count):
            for number, (p, _, piece, layer, turned) in enumerate(layers):
                v, w = classes.variant[2 * number][c], classes.variant[2 * number + 1][c]
                if layer.keys is None:
                    pointer = turned.indptr[w * blocks : (w + 1) * blocks + 1]
                    owner, item = spread(pointer[:-1], pointer[1:])
                    first = owner * width
                    block = Block(c * blocks + owner, first, (first + width).clamp(max=plan.n_k))
                    self.runs(entries, p, layer, v, w, (turned.run[item].long(), turned.tile[item]), block)
                if turned.point_indptr is not None and turned.point_place is not None:
                    at = (w if piece.rows is None else v) * plan.n_k
                    pointer = turned.point_indptr[at : at + plan.n_k + 1]
                    key, item = spread(pointer[:-1], pointer[1:])
                    place = turned.point_place[item].long()
                    entries.point_owner.append(c * blocks + torch.div(key, width, rounding_mode="floor"))
                    entries.point_row.append(place if piece.rows is None else piece.rows[place].long())
                    entries.point_key.append(key)
        lanes = plan.sizes.batch * plan.sizes.heads // self.group
        lane = torch.arange(lanes).repeat_interleave(blocks)
        block_of = torch.arange(blocks).repeat(lanes)
        heads = self.by_key_head(classes)[lane] * blocks + block_of[:, None]
        first = block_of * width
        return self.launch(
            entries, classes.count * blocks, heads, (lane, first, (plan.n_k - first).clamp(max=width)), False, False
        )

    def sorted_layer(self, p: int, at: int, layer: Layer, turned: TransposedLayer) -> list[KeyLaunch]:
        """One layer with its own order of keys: blocks of each variant's slots."""
        plan, width, piece = self.plan, self.width, self.plan.pieces[p]
        classes = classes_of(plan, [piece.variant, layer.variant])
        tile, run = turned.tile.long(), turned.run.long()
        block_of = torch.arange(turned.indptr.numel() - 1).repeat_interleave(turned.indptr.diff())
        base = self.key_base[p][at]
        entries = _Entries.none()
        first_owner, first_slot, last_slot, block_base = [], [], [], []
        owners = 0
        for c in range(classes.count):
            v, w = classes.variant[0][c], classes.variant[1][c]
            t0 = int(layer.entry_base[w])
            mine = ((tile >= t0) & (tile < t0 + int(piece.first[v + 1]) - int(piece.first[v]))).nonzero().squeeze(1)
            low = int(layer.lo[run[mine]].min()) if mine.numel() else 0
            high = int(layer.hi[run[mine]].max()) if mine.numel() else 0
            b0, b1 = low // width, -(-high // width)
            owner = owners + block_of[mine] - b0
            # The first and the last block end where the variant's slots end: beyond are other variants' keys.
            first = (block_of[mine] * width).clamp(min=low)
            last = ((block_of[mine] + 1) * width).clamp(max=high)
            self.runs(entries, p, layer, v, w, (run[mine], tile[mine]), Block(owner, first, last))
            first_owner.append(owners)
            first_slot.append(low)
            last_slot.append(high)
            block_base.append(b0)
            owners += max(b1 - b0, 0)
        many = [b - a for a, b in zip(first_owner, [*first_owner[1:], owners], strict=True)]
        heads_of = self.by_key_head(classes)
        distinct = [sorted(set(row)) for row in heads_of.tolist()]
        out = []
        for turn in range(max(len(row) for row in distinct)):
            lanes, heads, firsts, counts = [], [], [], []
            for lane, row in enumerate(distinct):
                if turn >= len(row) or not many[row[turn]]:
                    continue
                c = row[turn]
                number = torch.arange(many[c])
                first = ((block_base[c] + number) * width).clamp(min=first_slot[c])
                last = ((block_base[c] + number + 1) * width).clamp(max=last_slot[c])
                lanes.append(torch.full_like(number, lane))
                heads.append(torch.where(heads_of[lane][None, :] == c, first_owner[c] + number[:, None], owners))
                firsts.append(first + base)
                counts.append(last - first)
            if lanes:
                blocks = (torch.cat(lanes), torch.cat(firsts), torch.cat(counts))
                launch = self.launch(entries, owners, torch.cat(heads), blocks, True, True)
                if launch is not None:
                    out.append(launch)
        return out


@dataclass(frozen=True)
class Block:
    """For each of some items the block of keys it falls in: its number among the owners, its slots `first … last - 1`."""

    owner: Tensor
    first: Tensor
    last: Tensor


def lower_keys(plan: Plan, height: int, width: int, group: int, workers: int) -> KeyWork:
    """The launches for blocks of `width` keys against `height` rows at a time."""
    lowering = _Lowering(plan, height, width, group, workers)
    natural = lowering.natural()
    launches = [] if natural is None else [natural]
    for p, at, _, layer, turned in lowering.layers():
        if layer.keys is not None:
            launches += lowering.sorted_layer(p, at, layer, turned)
    return KeyWork(
        tuple(launches), natural is not None, int32(lowering.rows.long()), int32(lowering.keys.long()),
        int32(plan.masks.data.long()),
    )  # fmt: skip
