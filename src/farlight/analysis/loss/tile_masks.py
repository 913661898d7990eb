"""The mask of a pattern in a tile of full attention: some rows, batch items and heads, and the first keys.

A pattern is evaluated part by part: an operation combines the masks of its parts by broadcasting, small ones first, so that a
part that does not differ between heads is evaluated once for all of them, and once for all tiles of the same rows. A list of
keys or key blocks is scattered into its mask, one row per query block. Any other primitive that differs between batch items or
heads is drawn from its key intervals where these are few; the rest are evaluated pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from farlight.patterns.algebra import Complement, Difference, Intersection, PerHead, Union
from farlight.patterns.expression import Pattern, Sizes
from farlight.patterns.tables import chosen_blocks, chosen_keys

__all__ = ["TileFrame", "tile_mask"]


@dataclass(frozen=True)
class TileFrame:
    """Query rows, batch items and heads of a tile, and the number of its keys, in a problem of `sizes`.

    `shared`: masks of patterns that do not differ between batch items and heads; frames of the same rows and keys may share it.
    """

    rows: slice
    items: slice
    heads: slice
    keys: int
    sizes: Sizes
    device: torch.device
    shared: dict[Pattern, Tensor] = field(default_factory=dict)

    @cached_property
    def positions(self) -> Tensor:
        """`(rows,)` int64: the positions of the query rows."""
        return torch.arange(self.rows.start, self.rows.stop, device=self.device) + self.sizes.q_offset

    @cached_property
    def key_positions(self) -> Tensor:
        """`(keys,)` int64."""
        return torch.arange(self.keys, device=self.device)

    def leading(self, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """(batch items `(B' or 1,)`, heads `(H' or 1,)`) int64: those for which the pattern's masks may differ."""
        items = self.items if pattern.varies_over_batch else slice(0, 1)
        heads = self.heads if pattern.varies_over_heads else slice(0, 1)
        b = torch.arange(items.start, items.stop, device=self.device)
        return b, torch.arange(heads.start, heads.stop, device=self.device)


def tile_mask(pattern: Pattern, frame: TileFrame) -> Tensor:
    """The mask of `pattern` in a tile, `(B' or 1, H' or 1, rows, keys)` bool.

    Raises PatternError for a pattern that does not fit the sizes.
    """
    pattern.check(frame.sizes)
    batch = frame.items.stop - frame.items.start if pattern.varies_over_batch else 1
    heads = frame.heads.stop - frame.heads.start if pattern.varies_over_heads else 1
    shape = (batch, heads, frame.rows.stop - frame.rows.start, frame.keys)
    if not frame.keys:
        return torch.zeros(shape, dtype=torch.bool, device=frame.device)
    return _evaluate(pattern, frame).expand(shape)


def _evaluate(pattern: Pattern, frame: TileFrame) -> Tensor:
    """The mask of a pattern, broadcastable to `(B', H', rows, keys)`."""
    if pattern._tables or pattern.varies_over_batch or pattern.varies_over_heads:
        return _evaluate_parts(pattern, frame)
    if pattern not in frame.shared:
        frame.shared[pattern] = _evaluate_parts(pattern, frame)
    return frame.shared[pattern]


def _evaluate_parts(pattern: Pattern, frame: TileFrame) -> Tensor:
    match pattern:
        case Union():
            return _combined([_evaluate(part, frame) for part in pattern.parts], torch.bitwise_or)
        case Intersection():
            return _combined([_evaluate(part, frame) for part in pattern.parts], torch.bitwise_and)
        case Difference():
            return _evaluate(pattern.parts[0], frame) & ~_evaluate(pattern.parts[1], frame)
        case Complement():
            return ~_evaluate(pattern.parts[0], frame)
        case PerHead() if pattern.varies_over_heads:
            return _per_head(pattern, frame)
        case PerHead():
            return _evaluate(pattern.parts[0], frame)
        case chosen_blocks():
            return _of_lists(pattern, frame, pattern.block)
        case chosen_keys():
            return _of_lists(pattern, frame, 1)
    b, h = frame.leading(pattern)
    b, h, i = b.view(-1, 1, 1), h.view(1, -1, 1), frame.positions.view(1, 1, -1)
    is_cheap = all(atom._spans_are_cheap(frame.sizes) for atom in pattern.atoms())
    if (pattern.varies_over_batch or pattern.varies_over_heads) and is_cheap:
        shape = torch.broadcast_shapes(b.shape, h.shape, i.shape)
        rows = (x.expand(shape).flatten() for x in (b, h, i))
        return _of_spans(pattern, frame, *rows).view(*shape, frame.keys)
    return pattern._allows(frame.sizes, b[..., None], h[..., None], i[..., None], frame.key_positions.view(1, 1, 1, -1))


def _combined(masks: Sequence[Tensor], operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The masks under an associative and commutative operation, the small ones first."""
    first, *others = sorted(masks, key=Tensor.numel)
    for mask in others:
        first = operation(first, mask)
    return first


def _per_head(pattern: PerHead, frame: TileFrame) -> Tensor:
    """The masks of the parts of the tile's heads, side by side; a part without heads of its own is evaluated once."""
    shared: dict[Pattern, Tensor] = {}
    masks = []
    for head in range(frame.heads.start, frame.heads.stop):
        part, head_frame = pattern.parts[head], replace(frame, heads=slice(head, head + 1))
        if part.varies_over_heads:
            masks.append(_evaluate(part, head_frame))
            continue
        if part not in shared:
            shared[part] = _evaluate(part, head_frame)
        masks.append(shared[part])
    shape = torch.broadcast_shapes(*(mask.shape for mask in masks), (1, 1, frame.rows.stop - frame.rows.start, frame.keys))
    return torch.cat([mask.expand(shape) for mask in masks], 1)


def _of_lists(pattern: chosen_blocks | chosen_keys, frame: TileFrame, block: int) -> Tensor:
    """`(B' or 1, H' or 1, rows, keys)`: the listed blocks of `block` keys, each list scattered once for its query block."""
    row, inside = pattern._query_row(frame.sizes, frame.positions)
    table = pattern._tables[0].to(frame.device)
    table = table[frame.items if table.shape[0] > 1 else slice(None), frame.heads if table.shape[1] > 1 else slice(None)]
    row = row.clamp(0, table.shape[2] - 1)
    # Positions ascend, so the lists of the tile stand side by side.
    first = int(row[0])
    lists = table[:, :, first : int(row[-1]) + 1].long()
    blocks = -(-frame.keys // block)
    # Padding, and blocks behind the tile's last key, fall on one more column.
    chosen = torch.zeros(*lists.shape[:3], blocks + 1, dtype=torch.bool, device=frame.device)
    chosen.scatter_(3, torch.where(lists < 0, blocks, lists.clamp(max=blocks)), True)
    chosen = chosen[..., :blocks]
    if block > 1:
        chosen = chosen.unsqueeze(-1).expand(*chosen.shape, block).flatten(3)[..., : frame.keys]
    mask = chosen.index_select(2, row - first)
    return mask if bool(inside.all()) else mask & inside[:, None]


def _of_spans(pattern: Pattern, frame: TileFrame, b: Tensor, h: Tensor, i: Tensor) -> Tensor:
    """`(n, keys)` bool: the pattern's key intervals of the n rows (b, h, i), written as steps of a running sum."""
    row, lo, hi = pattern._spans(frame.sizes, b, h, i).listed()
    steps = torch.zeros(b.numel(), frame.keys + 1, dtype=torch.int8, device=b.device)
    # Intervals of a row neither overlap nor touch, so each end is written once; those beyond the tile fall on the last column.
    steps[row, lo.clamp(max=frame.keys)] = 1
    steps[row, hi.clamp(max=frame.keys)] = -1
    return steps[:, : frame.keys].cumsum(1, dtype=torch.int8).bool()
