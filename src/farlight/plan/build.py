"""Plan construction: expression → disjoint terms → layouts → tiles → tables.

`terms_of` (normal_form) splits a pattern into disjoint terms. `TermLayout` gives each a row and a key order. `PieceBuilder`
(assemble) tiles them and writes the tables. Terms in identity order share one piece, or join the piece of a term with a row
order of its own (`shared_row_order`). Memory is that of the result plus one chunk of rows.
"""

from __future__ import annotations

import torch

from farlight.patterns.expression import Pattern, Sizes
from farlight.plan.assemble import PieceBuilder, overlapping
from farlight.plan.layout import RowOrder, TermLayout
from farlight.plan.normal_form import terms_of
from farlight.plan.tables import Plan, TileShape
from farlight.plan.tiling import MaskStore

__all__ = ["TileShape", "build", "count_pairs"]


def build(pattern: Pattern, sizes: Sizes, shape: TileShape) -> Plan:
    """The plan of a pattern for tiles of this shape, uncached; see `farlight.plan`. Raises PatternError and PlanError."""
    pattern.check(sizes)
    masks = MaskStore()
    terms = terms_of(pattern, sizes) if sizes.n_q and sizes.n_k else ()
    layouts = [TermLayout(term, sizes, shape.tile) for term in terms]
    host = shared_row_order(layouts)
    identity = PieceBuilder(torch.zeros(1, 1, dtype=torch.int64, device="cpu"), RowOrder.identity(sizes, shape.tile))
    pieces: list[PieceBuilder] = []
    for layout in sorted(layouts, key=lambda layout: layout is not host):
        if not layout.is_identity:
            piece = PieceBuilder(layout.variation, layout.order)
            pieces.append(piece)
        elif host is not None:
            layout.order, piece = host.order, pieces[0]
        else:
            piece = identity
        piece.add(layout, masks, shape)
    if identity.layers:
        pieces.insert(0, identity)
    mask_tables, mask_number = masks.finish()
    overlaps = len(pieces) > 1 and overlapping(pieces, sizes.batch, sizes.heads, sizes.n_q)
    return Plan(
        pattern=pattern,
        sizes=sizes,
        tile=shape.tile,
        longest=shape.longest,
        pieces=tuple(piece.finish(mask_number, shape.longest) for piece in pieces),
        masks=mask_tables,
        pairs=sum(piece.pairs for piece in pieces),
        visited=sum(piece.visited for piece in pieces),
        overlapping=overlaps,
    )


def shared_row_order(layouts: list[TermLayout]) -> TermLayout | None:
    """The layout whose row order all terms in identity order can adopt, so that no row's results need merging; None without.

    It has one variant and holds all rows. The adopting terms must keep their runs dense in any row order: points, or
    intervals that are equal for nearly all rows (global keys).
    """
    for host in layouts:
        rows = host.order.rows
        if rows is None or host.variants > 1 or rows.numel() < host.sizes.n_q:
            continue
        guests = [layout for layout in layouts if layout.is_identity]
        fits = all(guest.variants == 1 and (guest.term.points or guest.rows_mostly_agree()) for guest in guests)
        return host if fits else None
    return None


def count_pairs(pattern: Pattern, sizes: Sizes) -> int:
    """The exact number of allowed pairs over batch and heads, from intervals, without building tables."""
    pattern.check(sizes)
    if not sizes.n_q or not sizes.n_k:
        return 0
    total = 0
    # All layouts are made first: one that has too many pairs to evaluate raises before any time is spent on the others.
    for layout in [TermLayout(term, sizes, TileShape().tile) for term in terms_of(pattern, sizes)]:
        multiplicity = layout.multiplicity()
        for chunk in layout.chunks():
            if layout.term.points:
                index, _ = layout.points(chunk.variant, chunk.row)
                total += int(multiplicity[chunk.variant[index]].sum())
                continue
            split = layout.tile_spans(chunk)
            degree = (layout.spans(chunk.variant, chunk.row) if split is None else split.rest).per_row()
            if split is not None:
                degree = degree + split.whole.per_row()[chunk.tile]
            total += int((degree * multiplicity[chunk.variant]).sum())
    return total
