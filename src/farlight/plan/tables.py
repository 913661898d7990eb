"""Plan tables: block-sparse work lists in CSR form, the only description of a pattern that kernels read.

Basics
------
A plan is the set of (query row, key) pairs to compute, split into disjoint *pieces*. A piece is a permutation of the query
rows, cut into *tiles* of at most `plan.tile` rows. Each of its *layers* has two CSR lists: per tile the *runs*, half-open
ranges of key slots with an optional mask; per row the *points*, single keys gathered by index. The dense mask is

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

`Plan.dense()` is this loop. No pair occurs twice.

Details
-------
*Variants.* (batch, head) pairs with equal links share one variant of the tables; `variant[b, h]` selects it.

*Permutations.* A *place* is an index into the piece's row order, a *slot* one into the layer's key order. `piece.rows` is
None for the identity order (place = row); then the piece has one variant. Otherwise variant v owns the places
`row_first[v] … row_first[v + 1] - 1`. Likewise `layer.keys` is None for the identity (slot = key). Sorting tokens by label
turns dilation, strides and clusters into windows and dense blocks over places and slots.

*Masks.* Distinct masks are stored once. Mask m of kind BOUNDS has `2 * tile` int32 at `data[start[m]]`: row s of the tile
sees the slots `lo + data[2 s] … hi + data[2 s + 1] - 1`, where lo, hi are the run's (the first is >= 0, the second <= 0; a
row without a key in the run has `EMPTY`, 0). Mask m of kind BITS has `BITS_WORDS` int32 words per row and its run is at most
`BITS_KEYS` wide: slot `lo + c` is seen when bit c % 32 of word c // 32 is set. The *core* `lo + core_lo[m] … hi + core_hi[m]
- 1` is seen by every row of the tile: kernels skip the mask there.

*Empty rows.* A tile may hold rows without a key in its piece. Kernels leave their outputs at the initial value (out 0, lse
-inf). `overlapping` is False when no row has keys in two pieces; otherwise the pieces' results are merged by lse.

*Split-K.* A tile with more than `plan.longest` slots to visit is split into consecutive entries with the same rows, `part` =
0 … `parts` - 1, computed independently and merged by lse. Points belong to part 0.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from farlight.patterns.expression import Pattern, Sizes
from farlight.plan.footprint import Derived

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from farlight.plan.transpose import Transposed

__all__ = ["BITS", "BITS_KEYS", "BITS_WORDS", "BOUNDS", "EMPTY", "Layer", "Masks", "Piece", "Plan", "PlanLike", "TileShape"]

BOUNDS, BITS = 0, 1
BITS_KEYS = 128
BITS_WORDS = BITS_KEYS // 32
EMPTY = 2**30


@dataclass(frozen=True)
class TileShape:
    """The tiling that a backend executes.

    tile: query rows of a tile. gather: cost of a gathered pair over that of a visited one; a run less than 1 / `gather` full
    is stored as points. longest: key slots that one tile entry visits before it is split (split-K).
    """

    tile: int = 32
    gather: int = 8
    longest: int = 16_384


class PlanLike(Protocol):
    """What every executable plan says of itself, wherever its tables are."""

    @property
    def sizes(self) -> Sizes: ...

    @property
    def visited(self) -> int: ...

    @property
    def overlapping(self) -> bool: ...


@dataclass(frozen=True, eq=False)
class Masks:
    """The distinct masks of a plan. `kind`, `start`, `core_lo`, `core_hi`: (M,) int32; `data`: (words,) int32."""

    kind: Tensor
    start: Tensor
    core_lo: Tensor
    core_hi: Tensor
    data: Tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """CSR lists of the runs of each tile and the points of each row, over one key order.

    variant: (B|1, H|1) int32; entry_base, place_base: (variants,) int64, first tile entry and first place of each variant;
    indptr: (tile entries over all variants + 1,) int64; lo, hi, mask: (runs,) int32, mask -1 = none; keys: (slots,) int32,
    None = identity; point_indptr: (places + 1,) int64, None without points; point_keys: (points,) int32, sorted in each row.
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
    """A row order cut into tile entries.

    variant: (B|1, H|1) int32; rows: (places,) int32, None = identity; row_first, first: (variants + 1,) int64, the first
    place and the first entry of each variant; start, count: (entries,) int32, first place and number of rows; part, parts:
    (entries,) int32, split-K part and number of parts.
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
    """The tables of a pattern for given sizes and one tile shape. Built by `farlight.plan`; executed by every backend.

    `pairs`: allowed pairs over batch and heads; `visited`: pairs computed, masked ones of the runs included; `waste` =
    visited / pairs; `nbytes`: bytes of the tables; `overlapping`: some row has keys in two pieces.

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
    # The backend that `fl.plan` was given; "" for "auto" and for plans of the cache, which any backend of this tile executes.
    backend: str = ""
    # What backends compute from the tables. Its bytes count in the plan cache, not in `nbytes`.
    derived: Derived = field(default_factory=Derived, init=False, repr=False)

    @property
    def n_q(self) -> int:
        return self.sizes.n_q

    @property
    def n_k(self) -> int:
        return self.sizes.n_k

    @property
    def waste(self) -> float:
        """visited / pairs: 1.0 when no masked pair is computed, and for an empty plan."""
        return self.visited / self.pairs if self.pairs else 1.0

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tables of the plan, in the order of their fields."""
        tables: list[Tensor] = []

        def collect(value: object) -> None:
            if isinstance(value, Tensor):
                tables.append(value)
            elif isinstance(value, tuple):
                for item in value:
                    collect(item)
            elif dataclasses.is_dataclass(value):
                for item in dataclasses.fields(value):
                    collect(getattr(value, item.name))

        collect(self.pieces)
        collect(self.masks)
        return tuple(tables)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return sum(table.numel() * table.element_size() for table in self.tensors)

    @property
    def device(self) -> torch.device:
        return self.masks.kind.device

    def __repr__(self) -> str:
        s = self.sizes
        return (
            f"Plan({self.pattern}, n_q={s.n_q}, n_k={s.n_k}, batch={s.batch}, heads={s.heads}, q_offset={s.q_offset}, "
            f"tile={self.tile}: {self.pairs:,} pairs, waste {self.waste:.2f}, {len(self.pieces)} pieces, {self.nbytes:,} bytes)"
        )

    def copied(self, backend: str = "") -> Plan:
        """A deep copy of the tables, without anything derived from them, for calls of this backend ("" = any of its tile)."""

        def copy(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.clone()
            if isinstance(value, tuple):
                return tuple(copy(item) for item in value)
            if isinstance(value, Masks | Layer | Piece):
                return type(value)(**{item.name: copy(getattr(value, item.name)) for item in dataclasses.fields(value)})
            return value

        with torch.inference_mode(False), torch.no_grad():
            return dataclasses.replace(self, pieces=copy(self.pieces), masks=copy(self.masks), backend=backend)

    def dense(self) -> Tensor:
        """The pairs of the tables as a bool mask `(B, H, n_q, n_k)`; O(n_q · n_k), for inspection and tests.

        Raises PlanError where a pair occurs twice.
        """
        from farlight.plan.validate import dense

        return dense(self)

    def to_block_mask(self, block: int = 128, *, device: torch.device | str | None = None) -> BlockMask:
        """The pairs as a BlockMask for `torch.nn.attention.flex_attention`: query rows and keys by index, as Flex counts them.

        Blocks are skipped, full, or read from a table of the blocks that are allowed in part; batch and heads are 1 where the
        pattern does not depend on them. Memory is that of the partial blocks. `device`: None means the CPU.

        >>> import farlight as fl
        >>> mask = fl.plan(fl.window(100), 1000).to_block_mask()
        >>> fl.from_block_mask(mask).count(1000) == fl.window(100).count(1000)
        True
        """
        from farlight.plan.to_block_mask import to_block_mask

        return to_block_mask(self, block, self.device if device is None else device)

    def transposed(self, block: int = 64) -> Transposed:
        """The transposed (CSC) tables: per block of `block` key slots the runs that touch it, per key the rows that gather it.

        A dk/dv pass over key blocks accumulates each block in one worker, without atomics.
        """
        from farlight.plan.transpose import Transposed, transpose

        key = ("transposed", block)
        transposed = self.derived.get(key)
        if not isinstance(transposed, Transposed):
            transposed = self.derived[key] = transpose(self, block)
        return transposed

    def check(self) -> None:
        """Raise PlanError when a table breaks an invariant that kernels rely on for memory safety."""
        from farlight.plan.validate import check

        check(self)
