"""The plan: where the work is. Plain integer tables that every kernel, analysis and cache reads; no kernel sees a pattern.

Basics
------
A plan says which (query row, key) pairs are computed, as *pieces* whose sets of pairs are disjoint. A piece is an order of
the query rows, cut into *tiles* of at most `plan.tile` rows; each of its *layers* lists for every tile the *runs* of keys
that the tile must visit, and for every row the *points*: single keys gathered one by one. The dense mask is

    for piece in plan.pieces:
        for b, h in all batch items and heads:
            v = piece.variant[b, h]                                # shared dimensions have size 1
            for e in range(piece.first[v], piece.first[v + 1]):    # tile entries
                for layer in piece.layers:
                    w = layer.variant[b, h]
                    t = layer.entry_base[w] + e - piece.first[v]
                    for r in range(layer.indptr[t], layer.indptr[t + 1]):
                        for s in range(piece.count[e]):            # rows of the tile
                            row = order(piece.start[e] + s)        # piece.rows[...], or the place itself
                            for slot in range(layer.lo[r], layer.hi[r]):
                                key = layer.keys[slot] if layer.keys is not None else slot
                                if layer.mask[r] < 0 or masks.allows(layer.mask[r], s, slot):
                                    allowed[b, h, row, key] = True
                    if piece.part[e] == 0 and layer.point_indptr is not None:
                        for s in range(piece.count[e]):
                            p = layer.place_base[w] + piece.start[e] + s
                            for x in range(layer.point_indptr[p], layer.point_indptr[p + 1]):
                                allowed[b, h, order(piece.start[e] + s), layer.point_keys[x]] = True

`Plan.dense()` is this loop. No pair comes up twice.

Details
-------
*Orders.* `piece.rows` is None when place = row; then the piece has one variant. Otherwise variant v owns the places
`row_first[v] … row_first[v + 1]`. Likewise `layer.keys` is None when slot = key; otherwise slots index that table. This is
how dilation, strides and clusters become plain windows and dense blocks: tokens are sorted, the links are not touched.

*Masks.* Equal masks are stored once. Mask m of kind BOUNDS has `2 * tile` numbers at `data[start[m]]`: row s of the tile
sees the slots from `lo + data[2 s]` to before `hi + data[2 s + 1]`, where lo, hi are the run's (so the first is >= 0 and the
second <= 0; a row that sees nothing has `EMPTY`, 0). Mask m of kind BITS has `BITS_WORDS` words for each row and a run at
most `BITS_KEYS` wide: slot `lo + c` is seen when bit c % 32 of word c // 32 is set. Slots from `lo + core_lo[m]` to before
`hi + core_hi[m]` are seen by every row of the tile, so that no mask need be looked at there.

*Rows that see nothing.* A tile may hold rows that see nothing in its piece: a kernel leaves what stands for them (out 0,
lse -inf at the start) untouched. `overlapping` is False when no row sees something in two pieces; otherwise results of the
pieces are merged by lse.

*Long rows.* A tile with more than `plan.longest` slots to visit comes as several consecutive entries with the same rows,
`part` = 0 … `parts` - 1, to be computed apart and merged by their lse. Points belong to part 0.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from farlight.patterns.expression import Pattern, Sizes
from farlight.plan.footprint import Derived

if TYPE_CHECKING:
    from farlight.plan.transpose import Transposed

__all__ = ["BITS", "BITS_KEYS", "BITS_WORDS", "BOUNDS", "EMPTY", "Layer", "Masks", "Piece", "Plan"]

BOUNDS, BITS = 0, 1
BITS_KEYS = 128
BITS_WORDS = BITS_KEYS // 32
EMPTY = 2**30


@dataclass(frozen=True, eq=False)
class Masks:
    """The distinct masks of a plan. `kind`, `start`, `core_lo`, `core_hi`: (M,) int32; `data`: int32."""

    kind: Tensor
    start: Tensor
    core_lo: Tensor
    core_hi: Tensor
    data: Tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """For each tile its runs, for each row its points; in one order of keys.

    variant: (B|1, H|1) int32; entry_base, place_base: (variants,) int64; indptr: (tile entries over all variants + 1,) int64;
    lo, hi, mask: (runs,) int32, mask -1 = whole; keys: (slots,) int32 or None; point_indptr: (places + 1,) int64 or None;
    point_keys: (points,) int32, sorted in each row.
    """

    variant: Tensor
    entry_base: Tensor
    place_base: Tensor
    indptr: Tensor
    lo: Tensor
    hi: Tensor
    mask: Tensor
    keys: Tensor | None
    point_indptr: Tensor | None
    point_keys: Tensor | None


@dataclass(frozen=True, eq=False)
class Piece:
    """An order of query rows, cut into tiles.

    variant: (B|1, H|1) int32; rows: (places,) int32 or None; row_first, first: (variants + 1,) int64;
    start, count, part, parts: (entries,) int32.
    """

    variant: Tensor
    rows: Tensor | None
    row_first: Tensor
    first: Tensor
    start: Tensor
    count: Tensor
    part: Tensor
    parts: Tensor
    layers: tuple[Layer, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """Where the work of a pattern is, for given sizes. Made by `farlight.plan`; read by every backend.

    `pairs` is the number of allowed pairs over batch and heads, `visited` the number of pairs that the tiles cover,
    `waste = visited / pairs`, `nbytes` the size of the tables. `overlapping` says that some row is served by two pieces.

    >>> import farlight as fl
    >>> plan = fl.plan(fl.window(256), 16_384)
    >>> plan.pairs, round(plan.waste, 2)
    (8339200, 1.06)
    """

    pattern: Pattern
    sizes: Sizes
    tile: int
    longest: int
    pieces: tuple[Piece, ...]
    masks: Masks
    pairs: int
    visited: int
    overlapping: bool
    # Not counted in `nbytes`, but by the cache that keeps the plan.
    derived: Derived = field(default_factory=Derived, init=False, repr=False)

    @property
    def n_q(self) -> int:
        return self.sizes.n_q

    @property
    def n_k(self) -> int:
        return self.sizes.n_k

    @property
    def waste(self) -> float:
        """Pairs visited for each pair wanted (1.0 = none in vain; 1.0 for an empty plan)."""
        return self.visited / self.pairs if self.pairs else 1.0

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every table of the plan."""
        found: list[Tensor] = []

        def collect(value: object) -> None:
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, tuple):
                for item in value:
                    collect(item)
            elif dataclasses.is_dataclass(value):
                for item in dataclasses.fields(value):
                    collect(getattr(value, item.name))

        collect(self.pieces)
        collect(self.masks)
        return tuple(found)

    @property
    def nbytes(self) -> int:
        return sum(table.numel() * table.element_size() for table in self.tensors)

    @property
    def device(self) -> torch.device:
        return self.masks.kind.device

    def __repr__(self) -> str:
        s = self.sizes
        return (
            f"Plan({self.pattern!r}, n_q={s.n_q}, n_k={s.n_k}, batch={s.batch}, heads={s.heads}, q_offset={s.q_offset}, "
            f"tile={self.tile}: {self.pairs:,} pairs, waste {self.waste:.2f}, {len(self.pieces)} pieces, {self.nbytes:,} bytes)"
        )

    def copied(self) -> Plan:
        """An equal plan with tables of its own."""

        def copy(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.clone()
            if isinstance(value, tuple):
                return tuple(copy(item) for item in value)
            if isinstance(value, Masks | Layer | Piece):
                return type(value)(**{item.name: copy(getattr(value, item.name)) for item in dataclasses.fields(value)})
            return value

        with torch.inference_mode(False), torch.no_grad():
            return dataclasses.replace(self, pieces=copy(self.pieces), masks=copy(self.masks))

    def dense(self) -> Tensor:
        """The pairs that the tables cover as a bool tensor `(B, H, n_q, n_k)`, and proof that none comes up twice.

        Raises PlanError where a pair is covered twice. Costs n_q · n_k; for people and tests.
        """
        from farlight.plan.validate import dense

        return dense(self)

    def transposed(self, block: int = 64) -> Transposed:
        """The plan read from the keys' side: for each block of keys the runs that visit it, for each key the rows that
        gather it. What a backward pass needs that sums dk and dv without two workers writing to one place.
        """
        from farlight.plan.transpose import Transposed, transpose

        key = ("transposed", block)
        found = self.derived.get(key)
        if not isinstance(found, Transposed):
            found = self.derived[key] = transpose(self, block)
        return found

    def check(self) -> None:
        """Raise PlanError when a table is malformed: a kernel may trust a plan that passed."""
        from farlight.plan.validate import check

        check(self)
