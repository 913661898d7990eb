"""`Plan.check` refuses each kind of malformed table; `Plan.dense` refuses pairs that occur twice."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.errors import PlanError
from farlight.patterns import Sizes
from farlight.plan import Plan, TileShape, validate
from farlight.plan.build import build
from farlight.plan.tables import BITS, BOUNDS

SHAPE = TileShape(8, 4, 16)
SIZES = Sizes.of(60, 70, batch=2, heads=2)


def valid_plan() -> Plan:
    """Both kinds of masks, two pieces, split-K parts, points, row and key orders, variants per item and head."""
    torch.manual_seed(0)
    holes = fl.pairs(torch.rand(60, 70) < 0.4)
    by_label = fl.clusters(torch.randint(-1, 4, (2, 2, 70)))
    plan = build((holes & fl.window(9)) | by_label | fl.random_keys(2) | fl.sees_all([30]), SIZES, SHAPE)
    plan.check()
    assert {BOUNDS, BITS} <= set(plan.masks.kind.tolist())
    assert plan.pieces[0].rows is None
    assert any(piece.rows is not None for piece in plan.pieces)
    assert any(int(piece.parts.max()) > 1 for piece in plan.pieces)
    assert any(layer.keys is not None for piece in plan.pieces for layer in piece.layers)
    return plan


PLAN = valid_plan()
ROWS = next(n for n, piece in enumerate(PLAN.pieces) if piece.rows is not None and piece.first.numel() > 2)
PARTS = next(n for n, piece in enumerate(PLAN.pieces) if int(piece.parts.max()) > 1)


def layer_where(condition: Callable[[Any], bool]) -> tuple[int, int]:
    return next((p, a) for p, piece in enumerate(PLAN.pieces) for a, layer in enumerate(piece.layers) if condition(layer))


RUNS = layer_where(lambda layer: layer.lo.numel() > 3)
KEYS = layer_where(lambda layer: layer.keys is not None and layer.lo.numel() > 0)
POINTS = layer_where(lambda layer: layer.point_keys is not None)
WIDE = layer_where(lambda layer: bool((layer.mask >= 0).any()))


def with_masks(**changes: Any) -> Plan:
    return dataclasses.replace(PLAN, masks=dataclasses.replace(PLAN.masks, **changes))


def with_piece(number: int, **changes: Any) -> Plan:
    pieces = list(PLAN.pieces)
    pieces[number] = dataclasses.replace(pieces[number], **changes)
    return dataclasses.replace(PLAN, pieces=tuple(pieces))


def with_layer(place: tuple[int, int], **changes: Any) -> Plan:
    number, at = place
    layers = list(PLAN.pieces[number].layers)
    layers[at] = dataclasses.replace(layers[at], **changes)
    return with_piece(number, layers=tuple(layers))


def layer_of(place: tuple[int, int]) -> Any:
    return PLAN.pieces[place[0]].layers[place[1]]


def put(table: Tensor, index: int, value: int) -> Tensor:
    out = table.clone()
    out.view(-1)[index] = value
    return out


def with_foreign_rows(piece: Any) -> Tensor:
    """The first tile, all parts of it, with rows of the second variant."""
    return torch.cat((piece.row_first[1].int().expand(int(piece.parts[0])), piece.start[int(piece.parts[0]) :]))


def wide_bits() -> Plan:
    """A run of bits over more keys than its words hold."""
    plan = build(fl.pairs(torch.rand(8, 400) < 0.4), Sizes.of(8, 400), SHAPE)
    layer = plan.pieces[0].layers[0]
    wide = dataclasses.replace(layer, hi=put(layer.hi, 0, 400))
    return dataclasses.replace(plan, pieces=(dataclasses.replace(plan.pieces[0], layers=(wide,)),))


p, m = PLAN.pieces, PLAN.masks
RUNNING, KEYED, POINTED, MASKED = (layer_of(place) for place in (RUNS, KEYS, POINTS, WIDE))
bound = int((m.kind == BOUNDS).nonzero()[0])
MALFORMED: list[tuple[Callable[[], Plan], str]] = [
    (lambda: dataclasses.replace(PLAN, tile=0), r"tile = 0 rows is outside 1 … 1024\."),
    (lambda: dataclasses.replace(PLAN, tile=2000), r"tile = 2000 rows is outside 1 … 1024\."),
    (lambda: with_masks(kind=put(m.kind, 0, 7)), "a mask is neither of bounds nor of bits"),
    (lambda: with_masks(start=put(m.start, 0, -1)), "a mask reaches outside the mask data"),
    (lambda: with_masks(data=m.data[:-1]), "a mask reaches outside the mask data"),
    (lambda: with_masks(core_lo=put(m.core_lo, 0, -1)), "a mask's core reaches outside its run"),
    (lambda: with_masks(core_hi=put(m.core_hi, 0, 1)), "a mask's core reaches outside its run"),
    (lambda: with_masks(data=put(m.data, int(m.start[bound]), -1)), "the bounds of a mask reach outside its run"),
    (lambda: with_masks(data=put(m.data, int(m.start[bound]) + 1, 1)), "the bounds of a mask reach outside its run"),
    (lambda: with_piece(0, variant=torch.zeros(3, 1, dtype=torch.int32)), "piece 0: variant has the wrong shape"),
    (lambda: with_piece(0, variant=torch.ones(1, 1, dtype=torch.int32)), "piece 0: a variant does not exist"),
    (lambda: with_piece(0, variant=-torch.ones(1, 1, dtype=torch.int32)), "piece 0: a variant does not exist"),
    (lambda: with_piece(0, first=put(p[0].first, 1, 10**6)), "piece 0: first does not run from 0 to"),
    (lambda: with_piece(ROWS, first=put(p[ROWS].first, 1, 10**6)), f"piece {ROWS}: first decreases"),
    (lambda: with_piece(0, row_first=put(p[0].row_first, 0, 1)), "piece 0: row_first does not run from 0 to 60"),
    (lambda: with_piece(ROWS, rows=None), f"piece {ROWS}: row_first does not run from 0 to 60"),
    (
        lambda: with_piece(0, first=torch.tensor([0, 0, p[0].start.numel()]), row_first=torch.tensor([0, 0, 60])),
        "piece 0: an order that is not stored has one variant",
    ),
    (lambda: with_piece(ROWS, rows=put(p[ROWS].rows, 0, 60)), f"piece {ROWS}: a row does not exist"),
    (lambda: with_piece(ROWS, rows=put(p[ROWS].rows, 0, -1)), f"piece {ROWS}: a row does not exist"),
    (lambda: with_piece(0, count=p[0].count[:-1]), "piece 0: count has the wrong length"),
    (lambda: with_piece(0, part=p[0].part[:-1]), "piece 0: part has the wrong length"),
    (lambda: with_piece(0, parts=p[0].parts[:-1]), "piece 0: parts has the wrong length"),
    (lambda: with_piece(0, count=put(p[0].count, 0, 0)), "piece 0: a tile has no row or too many"),
    (lambda: with_piece(0, count=put(p[0].count, 0, 9)), "piece 0: a tile has no row or too many"),
    (lambda: with_piece(0, start=put(p[0].start, 0, -1)), "piece 0: a tile reaches outside the order"),
    (lambda: with_piece(0, start=put(p[0].start, -1, 59)), "piece 0: a tile reaches outside the order"),
    (lambda: with_piece(PARTS, part=put(p[PARTS].part, 0, 99)), f"piece {PARTS}: a part is not below parts"),
    (lambda: with_piece(PARTS, parts=p[PARTS].parts + 1), f"piece {PARTS}: the parts of a tile do not stand together"),
    (lambda: with_piece(ROWS, start=with_foreign_rows(p[ROWS])), "a tile holds rows of another variant"),
    (lambda: with_layer(RUNS, variant=torch.zeros(1, 5, dtype=torch.int32)), "layer .: variant has the wrong shape"),
    (lambda: with_layer(RUNS, variant=torch.full((1, 1), 9, dtype=torch.int32)), "layer .: a variant does not exist"),
    (lambda: with_layer(RUNS, place_base=torch.zeros(9, dtype=torch.int64)), "layer .: place_base has the wrong length"),
    (lambda: with_layer(RUNS, indptr=put(RUNNING.indptr, 0, 1)), "layer .: indptr does not run from 0 to"),
    (lambda: with_layer(RUNS, indptr=put(RUNNING.indptr, 1, 10**6)), "layer .: indptr decreases"),
    (lambda: with_layer(RUNS, indptr=RUNNING.indptr[:0]), "layer .: indptr does not run from 0 to"),
    (lambda: with_layer(RUNS, hi=RUNNING.hi[:-1]), "layer .: lo, hi and mask differ in length"),
    (lambda: with_layer(RUNS, hi=put(RUNNING.hi, 0, 71)), "layer .: a run is empty or reaches outside the keys"),
    (lambda: with_layer(RUNS, lo=put(RUNNING.lo, 0, -1)), "layer .: a run is empty or reaches outside the keys"),
    (lambda: with_layer(RUNS, lo=RUNNING.hi), "layer .: a run is empty or reaches outside the keys"),
    (lambda: with_layer(WIDE, mask=put(MASKED.mask, 0, m.kind.numel())), "layer .: a mask does not exist"),
    (lambda: with_layer(WIDE, mask=put(MASKED.mask, 0, -2)), "layer .: a mask does not exist"),
    (wide_bits, "layer 0: a run masked by bits is wider than 128"),
    (lambda: with_layer(KEYS, keys=put(KEYED.keys, 0, 70)), "layer .: a key does not exist"),
    (lambda: with_layer(POINTS, point_keys=None), "layer .: points have pointers without keys, or keys without"),
    (lambda: with_layer(POINTS, point_indptr=None), "layer .: points have pointers without keys, or keys without"),
    (lambda: with_layer(POINTS, point_keys=put(POINTED.point_keys, 0, 70)), "layer .: a gathered key does not exist"),
    (lambda: with_layer(POINTS, point_keys=POINTED.point_keys[:-1]), "layer .: point_indptr does not run from 0 to"),
    (lambda: with_layer(POINTS, point_indptr=put(POINTED.point_indptr, 1, 10**6)), "layer .: point_indptr decreases"),
    (lambda: with_layer(RUNS, entry_base=RUNNING.entry_base + 10**6), "the tiles of a variant reach outside indptr"),
    (lambda: with_layer(RUNS, entry_base=RUNNING.entry_base - 1), "the tiles of a variant reach outside indptr"),
    (lambda: with_layer(POINTS, place_base=POINTED.place_base + 10**6), "the places of a variant reach outside point_indptr"),
    (lambda: with_layer(POINTS, place_base=POINTED.place_base - 1), "the places of a variant reach outside point_indptr"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "says"), MALFORMED, ids=[f"{n}: {says[:50]}" for n, (_, says) in enumerate(MALFORMED)])
def test_a_malformed_plan_is_refused(make: Callable[[], Plan], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        make().check()


def test_every_error_text_is_tested() -> None:
    """Each text that `check` may raise is matched by a row of MALFORMED."""
    source = ast.parse(inspect.getsource(validate))
    texts = []
    for node in ast.walk(source):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("_need", "_check_pointers"):
            words = node.args[1 if node.func.id == "_need" else 2]  # type: ignore[attr-defined]
            texts += [
                part.value.strip(": ")
                for part in ast.walk(words)
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
    says = " / ".join(re.sub(r"layer \.|piece \d", "", text) for _, text in MALFORMED)
    untested = [text for text in texts if len(text) > 4 and text not in says and text not in ("piece", "layer")]
    assert not untested
    assert len(texts) > 20


def test_a_pair_covered_twice_is_refused() -> None:
    piece = PLAN.pieces[0]
    twice = with_piece(0, layers=(*piece.layers, piece.layers[0]))
    twice.check()
    with pytest.raises(PlanError, match=r"the pair \(row \d+, key \d+\) of batch item 0, head 0 is covered 2 times\."):
        twice.dense()
    with pytest.raises(PlanError, match="is covered 2 times"):
        dataclasses.replace(PLAN, pieces=(*PLAN.pieces, PLAN.pieces[ROWS])).dense()
