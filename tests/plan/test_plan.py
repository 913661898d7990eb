"""Plans hold exactly the pairs of their pattern, once each, in valid tables that are small and shared over heads."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.errors import PatternError
from farlight.patterns import Pattern, Sizes
from farlight.plan import Plan, TileShape, plan_for
from farlight.plan.build import build, count_pairs
from farlight.plan.tables import BITS, BITS_KEYS, BITS_WORDS, BOUNDS, Layer
from farlight.testing import CASES, Case

# The kernels' shapes, and shapes that cut, gather and split as much as possible (on the smaller cases).
SHAPES = [TileShape(), TileShape(128, 8, 4096), TileShape(8, 4, 16)]
ODD_SHAPES = [TileShape(1, 1, 8), TileShape(64, 1, 100), TileShape(5, 1000, 30), TileShape(1024, 8, 1)]
SMALL = [case for case in CASES if case.n_q * case.n_k <= 2500]
MIDDLE = [case for case in CASES if case.n_q * case.n_k * case.heads <= 12_000]


def dense_of(case: Case) -> Tensor:
    s = case.sizes
    return case.pattern.dense(s.n_q, s.n_k, batch=s.batch, heads=s.heads, q_offset=s.q_offset).expand(s.batch, s.heads, -1, -1)


def variant_of(variant: Tensor, b: int, h: int) -> int:
    return int(variant[b % variant.shape[0], h % variant.shape[1]])


def shape_name(shape: TileShape) -> str:
    return f"tile {shape.tile}, gather {shape.gather}, longest {shape.longest}"


@pytest.mark.parametrize(
    "pattern, pieces",
    [
        (fl.window(40, dilation=4) | fl.global_tokens(range(8)) | fl.random_keys(2), 2),  # the global rows are a piece too
        (fl.random_keys(2) | fl.window(40, dilation=4), 1),
        (fl.window(40, dilation=4) | fl.window(9), 2),  # a window has many short runs in another row order
    ],
    ids=str,
)
def test_points_and_global_keys_share_the_row_order_of_other_terms(pattern: Pattern, pieces: int) -> None:
    """A dilated window with global keys is one piece, so that no row is merged."""
    plan = build(pattern, Sizes.of(300), TileShape())
    assert len(plan.pieces) == pieces
    assert plan.overlapping == (pattern == fl.window(40, dilation=4) | fl.window(9))
    assert torch.equal(plan.dense(), pattern.dense(300))


@pytest.mark.parametrize("case", MIDDLE, ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=shape_name)
def test_plans_of_odd_shapes_equal_their_pattern(case: Case, shape: TileShape) -> None:
    test_plans_equal_their_pattern(case, shape)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_plans_equal_their_pattern(case: Case, shape: TileShape) -> None:
    plan, expected = build(case.pattern, case.sizes, shape), dense_of(case)
    plan.check()
    assert torch.equal(plan.dense(), expected)
    assert plan.pairs == int(expected.sum())
    assert plan.visited == expected_visited(plan)
    assert plan.visited >= plan.pairs
    assert plan.waste == (plan.visited / plan.pairs if plan.pairs else 1.0)
    assert plan.overlapping == expected_overlapping(plan)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_count_is_the_number_of_pairs(case: Case) -> None:
    assert count_pairs(case.pattern, case.sizes) == int(dense_of(case).sum())


def expected_visited(plan: Plan) -> int:
    """Rows times width over all runs, and the gathered pairs, over batch and heads."""
    total = 0
    for piece in plan.pieces:
        for b in range(plan.sizes.batch):
            for h in range(plan.sizes.heads):
                v = variant_of(piece.variant, b, h)
                first, last = int(piece.first[v]), int(piece.first[v + 1])
                for layer in piece.layers:
                    base = int(layer.entry_base[variant_of(layer.variant, b, h)])
                    bounds = layer.indptr[base : base + last - first + 1]
                    width = torch.cat((torch.zeros(1, dtype=torch.int64), (layer.hi - layer.lo).long().cumsum(0)))
                    total += int((width[bounds].diff() * piece.count[first:last]).sum())
                    if layer.point_indptr is not None:
                        place = int(layer.place_base[variant_of(layer.variant, b, h)])
                        at = layer.point_indptr[[place + int(piece.row_first[v]), place + int(piece.row_first[v + 1])]]
                        total += int(at[1] - at[0])
    return total


def expected_overlapping(plan: Plan) -> bool:
    alone = [dataclasses.replace(plan, pieces=(piece,)).dense().any(3) for piece in plan.pieces]
    return bool(alone) and bool((torch.stack(alone).sum(0) > 1).any())


# ---- the loop documented in farlight.plan.tables ---------------------------------------------------------------------
def allows(plan: Plan, mask: int, row: int, lo: int, hi: int, slot: int) -> bool:
    """As `farlight.plan.tables` says under "Masks"."""
    masks = plan.masks
    start, kind = int(masks.start[mask]), int(masks.kind[mask])
    data = masks.data[start:].tolist()
    if kind == BOUNDS:
        seen = lo + data[2 * row] <= slot < hi + data[2 * row + 1]
    else:
        assert kind == BITS
        word = data[row * BITS_WORDS + (slot - lo) // 32]
        seen = word >> (slot - lo) % 32 & 1 == 1
    if lo + int(masks.core_lo[mask]) <= slot < hi + int(masks.core_hi[mask]):
        assert seen, "every row sees the core of a mask"
    return seen


def dense_by_documented_loop(plan: Plan) -> Tensor:
    allowed = torch.zeros(plan.sizes.batch, plan.sizes.heads, plan.n_q, plan.n_k, dtype=torch.bool)
    for b, h in ((b, h) for b in range(plan.sizes.batch) for h in range(plan.sizes.heads)):
        for piece in plan.pieces:
            v = variant_of(piece.variant, b, h)
            for e in range(int(piece.first[v]), int(piece.first[v + 1])):
                rows = [
                    p if piece.rows is None else int(piece.rows[p])
                    for p in range(int(piece.start[e]), int(piece.start[e] + piece.count[e]))
                ]
                for layer in piece.layers:
                    for r, key, row in links(plan, layer, piece.first[v], e, b, h, rows):
                        assert not allowed[b, h, row, key], (r, key, row)
                        allowed[b, h, row, key] = True
                    if int(piece.part[e]) == 0 and layer.point_indptr is not None and layer.point_keys is not None:
                        for s, row in enumerate(rows):
                            p = int(layer.place_base[variant_of(layer.variant, b, h)] + piece.start[e]) + s
                            keys = layer.point_keys[int(layer.point_indptr[p]) : int(layer.point_indptr[p + 1])].tolist()
                            assert keys == sorted(set(keys)), "the gathered keys of a row are sorted and distinct"
                            assert not allowed[b, h, row, keys].any()
                            allowed[b, h, row, keys] = True
    return allowed


def links(plan: Plan, layer: Layer, first: Tensor, e: int, b: int, h: int, rows: list[int]) -> list[tuple[int, int, int]]:
    t = int(layer.entry_base[variant_of(layer.variant, b, h)] + e - first)
    out = []
    for r in range(int(layer.indptr[t]), int(layer.indptr[t + 1])):
        lo, hi, mask = int(layer.lo[r]), int(layer.hi[r]), int(layer.mask[r])
        for slot in range(lo, hi):
            key = slot if layer.keys is None else int(layer.keys[slot])
            out += [(r, key, row) for s, row in enumerate(rows) if mask < 0 or allows(plan, mask, s, lo, hi, slot)]
    return out


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_documented_loop_reads_the_plan(case: Case) -> None:
    plan = build(case.pattern, case.sizes, TileShape(8, 4, 16))
    assert torch.equal(dense_by_documented_loop(plan), dense_of(case))


# ---- sizes of the tables ---------------------------------------------------------------------------------------------
PLAIN: dict[str, Pattern] = {
    "window": fl.window(40),
    "causal window": fl.causal() & fl.window(100),
    "dilated": fl.window(8, dilation=4),
    "strided": fl.strided(16) & fl.causal(),
    "segments": fl.blocked_window(0, block=96),
    "streaming": fl.presets.streaming(4, 100),
    "longformer": fl.presets.longformer(64, (0,)),
    "lighthouses": fl.global_tokens(range(64)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_number_of_masks_does_not_grow_with_the_length(name: str) -> None:
    short, long = (build(PLAIN[name], Sizes.of(n), TileShape()).masks for n in (2048, 8192))
    assert short.kind.numel() == long.kind.numel() <= 60
    assert short.data.numel() == long.data.numel()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_mask_is_stored_twice(case: Case) -> None:
    masks = build(case.pattern, case.sizes, TileShape(8, 4, 16)).masks
    seen = set()
    for kind, start, lo, hi in zip(*(x.tolist() for x in (masks.kind, masks.start, masks.core_lo, masks.core_hi)), strict=True):
        width = 16 if kind == BOUNDS else 8 * BITS_WORDS
        seen.add((kind, lo, hi, *masks.data[start : start + width].tolist()))
    assert len(seen) == masks.kind.numel()


@pytest.mark.parametrize("name", [*PLAIN, "random", "skim", "clusters"])
def test_tables_grow_linearly_with_the_length(name: str) -> None:
    def pattern(n: int) -> Pattern:
        patterns = {
            "random": fl.random_keys(3),
            "skim": fl.window(64) | fl.global_tokens([0, 1]) | fl.random_keys(3),
            "clusters": fl.clusters(torch.arange(n) % (n // 64)),
        }
        return (PLAIN | patterns)[name]

    small, large = (build(pattern(n), Sizes.of(n, heads=2), TileShape()).nbytes for n in (4096, 16384))
    # Four times the length: at most four times the bytes.
    assert large <= 4.1 * small + 10_000
    assert large < 16384 * 400


def test_heads_and_items_with_equal_links_share_their_tables() -> None:
    single = build(fl.window(30) | fl.strided(8), Sizes.of(2000), TileShape())
    batched = build(fl.window(30) | fl.strided(8), Sizes.of(2000, batch=4, heads=12), TileShape())
    assert batched.nbytes == single.nbytes
    assert batched.pairs == 48 * single.pairs
    two_kinds = build(fl.per_head([fl.window(30), fl.strided(8)] * 6), Sizes.of(2000, heads=12), TileShape())
    assert two_kinds.nbytes < 2.5 * single.nbytes


def test_long_tiles_are_split_into_balanced_parts() -> None:
    shape = TileShape(32, 8, 1000)
    plan = build(fl.global_tokens([0, 1, 2]) | fl.window(4), Sizes.of(20_000), shape)
    plan.check()
    most_parts = 0
    for piece in plan.pieces:
        for layer in piece.layers:
            width = torch.zeros(piece.start.numel(), dtype=torch.int64)
            entry = torch.arange(piece.start.numel()).repeat_interleave(layer.indptr.diff()[: piece.start.numel()])
            width.index_add_(0, entry, (layer.hi - layer.lo).long()[: entry.numel()])
            assert int(width.max()) <= 2 * shape.longest
        most_parts = max(most_parts, int(piece.parts.max()))
    assert most_parts >= 20_000 // shape.longest


def test_a_run_of_bits_is_at_most_as_wide_as_its_words() -> None:
    plan = build(
        fl.pairs(torch.rand(60, 700, generator=torch.Generator().manual_seed(0)) < 0.5), Sizes.of(60, 700), TileShape()
    )
    for piece in plan.pieces:
        for layer in piece.layers:
            bits = (layer.mask >= 0) & (plan.masks.kind[layer.mask.clamp(min=0).long()] == BITS)
            assert bool(bits.any())
            assert int((layer.hi - layer.lo)[bits].max()) <= BITS_KEYS


@pytest.mark.parametrize(
    ("pattern", "pairs"),
    [
        (fl.window(256), 513 * 10**6 - 256 * 257),
        (fl.causal(), 10**6 * (10**6 + 1) // 2),
        (fl.full(), 10**12),
        (fl.strided(1000), 1000 * 1000**2),
        (fl.window(2, dilation=1000), 5 * 10**6 - 2 * (1000 + 2000)),
        (fl.blocked_window(0, block=64), 15625 * 64**2),
        (fl.global_tokens([0, -1, 500]), 2 * 3 * 10**6 - 9),
        (fl.random_keys(3) & fl.full(), 3 * 10**6),
        (fl.presets.streaming(4, 100), sum(min(i + 1, 100) + min(max(i - 99, 0), 4) for i in range(10**6))),
        (~fl.window(0), 10**12 - 10**6),
    ],
    ids=repr,
)
def test_count_of_a_million_tokens_is_the_closed_formula(pattern: Pattern, pairs: int) -> None:
    assert pattern.count(10**6) == pairs


# ---- the public function ---------------------------------------------------------------------------------------------
def test_plan_takes_the_conventions_of_attention() -> None:
    plan = fl.plan(fl.causal(), 3, 8)
    assert plan.sizes == Sizes(3, 8, 5)
    assert plan.pairs == 6 + 7 + 8
    assert fl.plan(fl.causal(), 3, 8, q_offset=0).pairs == 6
    assert fl.plan(fl.causal(), 8).pairs == 36
    assert fl.plan(fl.causal(), 8, batch=2, heads=3).pairs == 216
    assert (plan.n_q, plan.n_k) == (3, 8)
    assert plan.device == torch.device("cpu")
    assert fl.plan(fl.causal(), 0).waste == 1.0
    assert fl.plan(fl.causal(), 0).dense().shape == (1, 1, 0, 0)
    with pytest.raises(PatternError, match="global_tokens: the mask has 9 tokens, but there are 8 keys"):
        fl.plan(fl.global_tokens(torch.arange(9) < 1), 8)
    with pytest.raises(PatternError, match="n_q = -1: a number of tokens cannot be negative"):
        fl.plan(fl.full(), -1)


def test_a_plan_prints_what_it_is() -> None:
    text = repr(fl.plan(fl.window(2), 100))
    assert text.startswith("Plan(window(2), n_q=100, n_k=100, batch=1, heads=1, q_offset=0, tile=32: 494 pairs, waste ")
    assert text.endswith(" bytes)")


def test_a_plan_is_frozen() -> None:
    plan = fl.plan(fl.window(2), 10)
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'pairs'"):
        plan.pairs = 3  # type: ignore[misc]


def test_a_plan_made_in_inference_mode_serves_training(cold_cache: None) -> None:
    pattern = fl.window(3) | fl.clusters(torch.arange(40) % 3)
    with torch.inference_mode():
        plan = plan_for(pattern, Sizes.of(40), TileShape())
        copy = fl.plan(pattern, 40)
    assert copy is not plan
    for table in (*plan.tensors, *copy.tensors):
        assert not table.is_inference()
        assert not table.requires_grad
    assert torch.equal(plan.dense(), pattern.dense(40))


def test_plans_do_not_depend_on_default_dtype_and_device(cold_cache: None) -> None:
    pattern, sizes = fl.window(3) | fl.strided(4) | fl.random_keys(2), Sizes.of(50)
    expected = build(pattern, sizes, TileShape())
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.no_grad():
            plan = plan_for(pattern, sizes, TileShape())
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(plan.tensors) == len(expected.tensors)
    for a, b in zip(plan.tensors, expected.tensors, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
        assert a.device.type == "cpu"


def test_plans_are_the_same_each_time() -> None:
    for case in SMALL:
        a, b = (build(case.pattern, case.sizes, TileShape(8, 4, 16)) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
