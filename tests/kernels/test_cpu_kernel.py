"""The native kernels themselves: every ISA, every feature of a plan, against float64 softmax over `plan.dense()`.

The parity tests hold the backend to the pattern by way of the public function; here the kernels are called directly, with
plans of odd shapes, and are held to the plan they were given.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.errors import ArgumentError, PlanError
from farlight.kernels import cpu
from farlight.plan import Plan, TileShape
from farlight.plan.build import build
from farlight.plan.tables import BITS, BOUNDS, EMPTY
from farlight.testing import CASES, Answer, Case, Inputs, Solution, assert_answer, inputs, solve
from farlight.testing.cases import bits, table

if cpu.unavailable() is not None:
    pytest.skip(f"no native kernels: {cpu.unavailable()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poison")

ISAS = cpu.available()
SEED = 0x9E37_79B9_7F4A
SHAPE = TileShape(tile=32, gather=8, longest=16_384)
# Tiles of other sizes than the kernel's own, tiles split into parts at once, gathering everything and nothing.
SHAPES = {
    "usual": SHAPE,
    "split": TileShape(tile=32, gather=8, longest=24),
    "tile of 64, split": TileShape(tile=64, gather=8, longest=50),
    "tile of 7": TileShape(tile=7, gather=8, longest=100),
    "tile of 45": TileShape(tile=45, gather=1000, longest=4096),
    "gathered": TileShape(tile=32, gather=2, longest=4096),
}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.isa()
    cpu.use(request.param)
    yield request.param
    cpu.use(before)


@functools.lru_cache(maxsize=512)
def plan_of(case: Case, shape: TileShape = SHAPE) -> Plan:
    return build(case.pattern, case.sizes, shape)


@functools.lru_cache(maxsize=64)
def solution(case: Case, dtype: torch.dtype, shape: TileShape = SHAPE, with_grad_lse: bool = True) -> Solution:
    given = inputs(case, dtype)
    allowed = plan_of(case, shape).dense()
    return solve(case, given, dropout_seed=SEED, with_grad_lse=with_grad_lse, allowed=allowed)


def run(case: Case, given: Inputs, plan: Plan, *, with_grad_lse: bool = True) -> Answer:
    shared: dict[str, Any] = {"scale": case.scale_value, "dropout": case.dropout, "seed": SEED}
    out, lse = cpu.forward(given.q, given.k, given.v, plan, **shared)
    grad_lse = given.grad_lse if with_grad_lse else None
    dq, dk, dv = cpu.backward(given.grad_out, grad_lse, given.q, given.k, given.v, out, lse, plan, **shared)
    return Answer(out, lse, dq, dk, dv)


def check(case: Case, dtype: torch.dtype, shape: TileShape = SHAPE, *, with_grad_lse: bool = True) -> None:
    found = run(case, inputs(case, dtype), plan_of(case, shape), with_grad_lse=with_grad_lse)
    assert found.out.dtype == found.dq.dtype == found.dk.dtype == found.dv.dtype == dtype
    assert found.out.is_contiguous()
    assert assert_answer(found, solution(case, dtype, shape, with_grad_lse), f"{case.name}, {dtype}") == 5


def equal(a: Answer, b: Answer) -> bool:
    """Bitwise equality; NaN equals NaN."""
    return all(
        torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(0.0), y.nan_to_num(0.0))
        for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    )


def features_of(plan: Plan) -> set[str]:
    """The features of the plan format that a plan uses."""
    found = set()
    for piece in plan.pieces:
        found |= {"rows"} if piece.rows is not None else set()
        found |= {"parts"} if bool((piece.parts > 1).any()) else set()
        for layer in piece.layers:
            found |= {"keys"} if layer.keys is not None else set()
            found |= {"points"} if layer.point_keys is not None else set()
            found |= {"whole"} if bool((layer.mask < 0).any()) else set()
            used = plan.masks.kind[layer.mask[layer.mask >= 0].long()]
            found |= ({"bits"} if bool((used == BITS).any()) else set()) | (
                {"bounds"} if bool((used == BOUNDS).any()) else set()
            )
    return found | ({"overlapping"} if plan.overlapping else set())


FEATURES = {
    "whole": Case("whole tiles", fl.full(), 130, 150, q_offset=0, head_dim=24),
    "bounds": Case("bounds", fl.window(20), 150, heads=3, head_dim=32),
    "bits": Case("bits", fl.pairs(bits(1, 2, 97, 140)), 97, 140, q_offset=0),
    "points": Case("points", fl.window(10) | fl.random_keys(3), 120, 150, head_dim=40),
    "rows": Case("rows in another order", fl.window(5, dilation=3), 131),
    "keys": Case("keys in another order", fl.clusters(table(2, 2, 120, high=4)), 120),
    "parts": Case("rows that see much", fl.window(4) | fl.global_tokens([0, 70]), 90, 170),
    "overlapping": Case("overlapping pieces", fl.window(6) | fl.strided(7) | fl.window(4, dilation=3), 140),
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=("f32", "bf16", "f16"))
def test_plan_features(isa: str, feature: str, shape: TileShape, dtype: torch.dtype) -> None:
    check(FEATURES[feature], dtype, shape)


def test_every_plan_feature_is_covered() -> None:
    for feature, case in FEATURES.items():
        used = features_of(plan_of(case, SHAPES["split"] if feature == "parts" else SHAPE))
        assert feature in used, f"{case.name}: {used}"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("f32", "bf16"))
@pytest.mark.parametrize("name", SHAPES)
def test_every_case_in_every_shape(name: str, dtype: torch.dtype) -> None:
    """All shared cases in one test, on the fastest ISA (the parity tests report case by case)."""
    ran = 0
    for case in CASES:
        if case.head_dim > 256 or case.n_q * case.n_k > 2_000_000:
            continue
        check(case, dtype, SHAPES[name])
        ran += 1
    assert ran > 150


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("f32", "bf16"))
@pytest.mark.parametrize(
    "dim", (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 48, 63, 65, 72, 80, 96, 112, 127, 160, 255, 256)
)
def test_head_dims(isa: str, dim: int, dtype: torch.dtype) -> None:
    check(Case(f"dim {dim}", fl.window(9) | fl.global_tokens([0]) | fl.random_keys(2), 41, 61, head_dim=dim), dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("f32", "bf16"))
@pytest.mark.parametrize("dims", ((192, 128), (8, 64), (65, 31), (1, 33), (16, 256), (256, 8)), ids=str)
def test_head_dims_of_values(isa: str, dims: tuple[int, int], dtype: torch.dtype) -> None:
    """Runs, masks, gathered keys, split rows and two pieces, with v narrower and wider than k."""
    sizes = {"head_dim": dims[0], "value_dim": dims[1]}
    pattern = fl.window(9) | fl.global_tokens([0]) | fl.random_keys(2)
    check(Case(f"dims {dims}", pattern, 41, 61, heads=4, kv_heads=2, **sizes), dtype)
    check(Case(f"dims {dims}, pieces", fl.strided(3) | fl.window(4), 70, heads=1, **sizes), dtype, SHAPES["split"])


@pytest.mark.parametrize("layout", ("tokens first", "every other", "packed", "backwards", "repeated"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("f32", "bf16"))
def test_strides(isa: str, layout: Any, dtype: torch.dtype) -> None:
    check(Case("strides", fl.window(9) | fl.random_keys(2), 70, batch=2, head_dim=24, layout=layout), dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("f32", "bf16"))
def test_odd_row_strides(isa: str, dtype: torch.dtype) -> None:
    """Rows of bfloat16 that begin at odd multiples of two bytes."""
    case = Case("odd strides", fl.window(9) | fl.random_keys(2), 70, head_dim=24)
    given = inputs(case, dtype)
    odd = [torch.empty(1, 2, 70, 25, dtype=dtype)[..., 1:].copy_(x) for x in (given.q, given.k, given.v, given.grad_out)]
    moved = Inputs(odd[0], odd[1], odd[2], odd[3], given.grad_lse)
    assert equal(run(case, moved, plan_of(case)), run(case, given, plan_of(case)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("f32", "bf16"))
@pytest.mark.parametrize("heads, kv_heads", ((4, 2), (6, 1), (3, 3)))
def test_grouped_heads(isa: str, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    pattern = fl.per_head([fl.window(3 + h) | fl.random_keys(h) for h in range(heads)])
    check(Case("groups", pattern, 50, 70, batch=2, heads=heads, kv_heads=kv_heads, head_dim=16), dtype)


@pytest.mark.parametrize("dropout", (0.1, 0.5, 0.95))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("f32", "bf16"))
def test_dropout(isa: str, dropout: float, dtype: torch.dtype) -> None:
    """The links dropped are those of the specification; rows before the text have negative positions."""
    pattern = fl.window(30) | fl.random_keys(4) | fl.window(3, dilation=5)
    check(Case("dropout", pattern, 70, 60, batch=2, q_offset=-9, head_dim=16, dropout=dropout), dtype)


def test_dropout_of_all_links(isa: str) -> None:
    case = Case("all dropped", fl.window(5) | fl.random_keys(2), 40, dropout=1.0)
    found = run(case, inputs(case), plan_of(case))
    assert not found.out.any()
    assert not found.dv.any()
    kept = run(dataclasses.replace(case, dropout=0.0), inputs(case), plan_of(case))
    assert torch.equal(found.lse, kept.lse)


@pytest.mark.parametrize("scale", (0.0, 1e-38, -0.7, 3.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("f32", "bf16"))
def test_scale(isa: str, scale: float, dtype: torch.dtype) -> None:
    check(Case("scale", fl.window(9) | fl.global_tokens([0]) | fl.random_keys(2), 70, head_dim=16, scale=scale), dtype)
    # Some rows of a tile see nothing of its first 128 keys, others nothing but these; some see nothing at all.
    check(Case("scale, documents", fl.documents(lengths=[150, 100]), 300, head_dim=16, scale=scale), dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("f32", "bf16"))
def test_without_grad_lse(isa: str, dtype: torch.dtype) -> None:
    check(FEATURES["points"], dtype, with_grad_lse=False)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("f32", "bf16"))
def test_huge_values(isa: str, dtype: torch.dtype) -> None:
    """Scores of 1e9: softmax selects the largest, and nothing overflows."""
    case = Case("huge", fl.window(20) | fl.global_tokens([0]) | fl.random_keys(2), 100, head_dim=64)
    given = inputs(case, dtype)
    given = dataclasses.replace(given, q=given.q * 1e4, k=given.k * 1e4, v=given.v * 1e4)
    found = run(case, given, plan_of(case), with_grad_lse=False)
    allowed = plan_of(case).dense()
    score = (given.q.double() @ given.k.double().transpose(2, 3) * case.scale_value).masked_fill(~allowed, -math.inf)
    best, second = score.topk(2, -1).values.unbind(-1)
    clear = best - second > 1e-5 * best.abs()
    assert bool(clear.sum() > 0.9 * clear.numel())
    expected = given.v.gather(2, score.argmax(-1)[..., None].expand_as(given.q))
    torch.testing.assert_close(found.out[clear], expected[clear])
    torch.testing.assert_close(found.lse.double(), score.logsumexp(-1), rtol=1e-5, atol=0.0)
    for gradient in (found.dq, found.dk, found.dv):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("f32", "bf16"))
@pytest.mark.parametrize("keys, head_dim", ((1024, 64), (256, 64), (576, 128)))
def test_results_are_rounded_no_more_than_by_dense_attention(isa: str, keys: int, head_dim: int, dtype: torch.dtype) -> None:
    case = Case("full", fl.full(), keys, heads=4, head_dim=head_dim)
    given, plan = inputs(case, dtype), plan_of(case)
    truth = solve(case, given, allowed=plan.dense()).truth
    leaves = [x.clone().requires_grad_() for x in (given.q, given.k, given.v)]
    dense = torch.nn.functional.scaled_dot_product_attention(*leaves)
    dense.backward(given.grad_out)
    mine = run(case, given, plan, with_grad_lse=False)
    theirs = {"out": dense.detach()}
    if dtype == torch.bfloat16:  # gradients in float32 are held to torch's plain products by every other test
        theirs |= {f"d{name}": x.grad for name, x in zip("qkv", leaves, strict=True)}
    for name, other in theirs.items():
        exact = getattr(truth, name)
        errors = [float((x.double() - exact).abs().mean()) for x in (getattr(mine, name), other)]
        assert errors[0] <= 1.01 * errors[1], name


def test_an_infinite_query_affects_its_row_only(isa: str) -> None:
    """Also where float32 is split into bfloat16 parts, whose lower parts of an infinity are NaN."""
    case = FEATURES["bounds"]
    given, plan = inputs(case), plan_of(case)
    clean = run(case, given, plan)
    given.q[0, 1, 37, 0] = math.inf
    found = run(case, given, plan)
    others = torch.ones(given.q.shape[:3], dtype=torch.bool)
    others[0, 1, 37] = False
    torch.testing.assert_close(found.out[others], clean.out[others])
    torch.testing.assert_close(found.lse[others], clean.lse[others])
    assert bool(found.out[0, 1, 37].isnan().all())
    assert float(found.lse[0, 1, 37]) != float(clean.lse[0, 1, 37])


@pytest.mark.parametrize("falls", (False, True), ids=("rising", "falling"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("f32", "bf16"))
def test_rescaling_where_scores_rise_along_the_keys(isa: str, dtype: torch.dtype, falls: bool) -> None:
    """Accumulators of earlier chunks are rescaled to the new row maximum, in some rows of a tile and not in others."""
    case = Case("full", fl.full(), 400, heads=2, head_dim=32)
    given = inputs(case, dtype)
    given.k[..., 0] = torch.linspace(0, 60, 400).flip(0) if falls else torch.linspace(0, 60, 400)
    given.q[..., 0] = torch.arange(400) % 3
    found = run(case, given, plan_of(case))
    assert assert_answer(found, solve(case, given, with_grad_lse=True), f"{case.name}, {dtype}") == 5


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("f32", "bf16"))
@pytest.mark.parametrize("feature", FEATURES)
def test_nan_affects_its_row_only(isa: str, feature: str, dtype: torch.dtype) -> None:
    case = FEATURES[feature]
    for shape in (SHAPES["usual"], SHAPES["split"]):
        plan, given = plan_of(case, shape), inputs(case, dtype)
        clean = run(case, given, plan)
        ill = dataclasses.replace(given, q=given.q.clone())
        ill.q[0, 1, 37] = math.nan
        found = run(case, ill, plan)
        others = torch.ones(given.q.shape[:3], dtype=torch.bool)
        others[0, 1, 37] = False
        seeing = bool(plan.dense()[0, 1, 37].any())
        for name in ("out", "lse", "dq"):
            mine, before = getattr(found, name), getattr(clean, name)
            assert torch.equal(mine[others], before[others]), name
            assert bool(mine[0, 1, 37].isnan().all()) == seeing, name
        # Keys that no tile joins with this row keep their gradients; the other head keeps them all.
        assert torch.equal(found.dk[0, 0], clean.dk[0, 0])
        assert torch.equal(found.dv[0, 0], clean.dv[0, 0])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("f32", "bf16"))
@pytest.mark.parametrize("feature", FEATURES)
def test_masked_keys_do_not_change_the_result(isa: str, feature: str, dtype: torch.dtype) -> None:
    """Bit for bit: a key that a row does not see may hold any finite values."""
    case = FEATURES[feature]
    plan, given = plan_of(case), inputs(case, dtype)
    before = run(case, given, plan)
    other = dataclasses.replace(given, k=given.k.clone(), v=given.v.clone())
    key = case.n_k // 2
    other.k[:, :, key] *= -9.0
    other.v[:, :, key] += 100.0
    after = run(case, other, plan)
    blind = ~plan.dense()[..., key].expand(given.q.shape[:3])
    if bool(blind.any()):
        for name in ("out", "lse", "dq"):
            assert torch.equal(getattr(after, name)[blind], getattr(before, name)[blind]), name


def test_batch_items_are_independent(isa: str) -> None:
    case = dataclasses.replace(FEATURES["points"], batch=3)
    plan, given = plan_of(case), inputs(case)
    found = run(case, given, plan)
    alone = Inputs(*(getattr(given, field.name)[1:2] for field in dataclasses.fields(given)))
    single = run(dataclasses.replace(case, batch=1), alone, plan_of(dataclasses.replace(case, batch=1)))
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(getattr(found, name)[1:2], getattr(single, name)), name


CACHED = {
    "more keys than are kept": Case("full, wide", fl.full(), 70, 1200, q_offset=0, heads=1, head_dim=256),
    "two that want one place": Case(
        "window and globals, wide", fl.window(40) | fl.global_tokens(range(64)), 1250, heads=2, kv_heads=1, head_dim=256
    ),
    "every other start": Case("odd window", fl.window(37, 50), 500, batch=2, heads=2, head_dim=64),
    "blocks that break off": Case("short runs", fl.strided(3) | fl.window(70, dilation=5), 400, heads=1, head_dim=48),
    "keys at equal distances": Case("dilated, wide", fl.window(50, dilation=4), 900, heads=4, kv_heads=2, head_dim=64),
    "rows that see more than is kept": Case("long", fl.window(40) | fl.global_tokens([20, 59]), 1500, heads=2, head_dim=64),
    "keys in any order": Case("clusters", fl.clusters(torch.arange(700) * 37 % 11), 700, heads=2, kv_heads=1, head_dim=64),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("f32", "bf16"))
@pytest.mark.parametrize("case", CACHED.values(), ids=CACHED)
@pytest.mark.parametrize("name", [x for x in ISAS if x in ("amx", "avx512bf16")] or ISAS[:1])
def test_packed_cache_has_no_stale_blocks(name: str, case: Case, dtype: torch.dtype) -> None:
    """The packed cache returns no block of other keys, another head or an earlier call."""
    before = cpu.isa()
    cpu.use(name)
    try:
        check(case, dtype)
        given = inputs(case, dtype)
        first = run(case, given, plan_of(case))
        given.v.neg_()
        given.k.mul_(2.0)
        given.q.mul_(0.5)
        again = run(case, given, plan_of(case))
    finally:
        cpu.use(before)
    assert torch.equal(again.out, -first.out)
    assert torch.equal(again.lse, first.lse)


# Tensors that end (or begin) where the next page may not be read: a step outside ends the process.
GUARDED = """
import ctypes, mmap, sys
import torch
import farlight as fl
from farlight.kernels import cpu
from farlight.plan.build import build

libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
kept = []

def guarded(source, at_end):
    size = source.numel() * source.element_size()
    pages = (size + PAGE - 1) // PAGE
    room = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(start + page * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    kept.append(room)
    offset = PAGE + (pages * PAGE - size if at_end else 0)
    return torch.frombuffer(room, dtype=source.dtype, count=source.numel(), offset=offset).view(source.shape).copy_(source)

if sys.argv[2] == "step":
    x = guarded(torch.zeros(4), True)
    print("ready", flush=True)
    ctypes.string_at(x.data_ptr(), 17)
cpu.use(sys.argv[1])
mixed = fl.window(20) | fl.global_tokens([0]) | fl.random_keys(2) | fl.window(2, dilation=7)
spread = fl.window(40, dilation=3)
for pattern, dim in ((mixed, 1), (mixed, 5), (mixed, 24), (mixed, 32), (mixed, 64), (spread, 32), (spread, 64)):
    for rows, keys in ((48, 48), (37, 90), (70, 45)):
        plan = build(pattern, fl.patterns.Sizes.of(rows, keys), cpu.SHAPE)
        for dtype in (torch.float32, torch.bfloat16):
            for at_end in (True, False):
                make = lambda n: guarded(torch.randn(1, 1, n, dim).to(dtype), at_end)
                q, k, v, dout = make(rows), make(keys), make(keys), make(rows)
                out, lse = cpu.forward(q, k, v, plan, scale=0.3)
                out = guarded(out, at_end)
                for x in cpu.backward(dout, None, q, k, v, out, lse, plan, scale=0.3):
                    assert bool(x.isfinite().all())
print("inside")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_no_read_outside_a_tensor(isa: str) -> None:
    found = subprocess.run([sys.executable, "-c", GUARDED, isa, "stay"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout.strip()) == (0, "inside"), found.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_guard_page_detects_a_read_outside() -> None:
    found = subprocess.run([sys.executable, "-c", GUARDED, ISAS[-1], "step"], capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert found.stdout.strip() == "ready", found.stderr


THREADED = [
    Case("threads: skim", fl.window(40) | fl.global_tokens([0, 99]) | fl.random_keys(3), 700, batch=2, heads=3),
    Case("threads: one head", fl.window(60) | fl.global_tokens([0]), 2500, heads=1, head_dim=24),
    Case("threads: groups", fl.causal(), 600, heads=4, kv_heads=2),
    Case("threads: overlapping", fl.window(16) | fl.strided(9), 600, heads=2),
    Case("threads: dropout", fl.window(50), 900, heads=2, dropout=0.2),
]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("f32", "bf16"))
@pytest.mark.parametrize("case", THREADED, ids=str)
@pytest.mark.parametrize("longest", (150, 16_384))
def test_number_of_threads_changes_no_bit(case: Case, longest: int, dtype: torch.dtype) -> None:
    plan, given = build(case.pattern, case.sizes, TileShape(longest=longest)), inputs(case, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(case, given, plan)
        for threads in (2, 3, 8, 33):
            torch.set_num_threads(threads)
            for _ in range(2):
                assert equal(run(case, given, plan), alone), f"{threads} threads"
    finally:
        torch.set_num_threads(before)
    assert_answer(alone, solve(case, given, dropout_seed=SEED, with_grad_lse=True, allowed=plan.dense()), case.name)


def test_concurrent_callers_in_several_threads() -> None:
    """The GIL is released during a call, so several calls may use one plan at the same time."""
    from concurrent.futures import ThreadPoolExecutor

    case = THREADED[0]
    plan, given = plan_of(case), inputs(case)
    alone = run(case, given, plan)
    with ThreadPoolExecutor(4) as pool:
        assert all(equal(found, alone) for found in pool.map(lambda _: run(case, given, plan), range(12)))


POOLED_MEMORY = """
import torch
import farlight as fl
from farlight.analysis import memory

def backward(n):
    q, k, v = (torch.ones(1, 1, n, 128, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    fl.attention(q, k, v, fl.window(32), backend="cpu").sum().backward()

def resident(n):
    backward(n)
    memory._return_free_memory()
    return memory._status("VmRSS") / 2**20

before = resident(1000)
print(*(resident(n) - before for n in (131_072, 131_072, 90_000, 200_000)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="another allocator, such as a sanitizer's, may keep more itself")
def test_buffer_pool_is_bounded() -> None:
    """The dk and dv accumulators need 150 to 230 MiB here; the pool retains at most 64 MiB."""
    done = subprocess.run([sys.executable, "-c", POOLED_MEMORY], capture_output=True, text=True, timeout=300, check=True)
    growth = [float(word) for word in done.stdout.split()]
    assert all(32 < one < 64 + 24 for one in growth), growth


@pytest.mark.parametrize("n_q, n_k", ((0, 5), (5, 0), (0, 0)))
def test_empty_tensors(n_q: int, n_k: int) -> None:
    case = Case("empty", fl.full(), n_q, n_k, q_offset=0)
    found = run(case, inputs(case), plan_of(case))
    assert not found.out.any()
    assert bool((found.lse == -math.inf).all())
    assert not found.dk.any()


UNSURE = [
    Case("some rows see nothing", fl.strided(2, phase=0) & fl.window(6), 75),
    Case("two pieces, each row in one", fl.window(4) | fl.global_tokens(range(64)), 300, heads=2),
    Case("a tile of which some rows are served elsewhere", fl.window(4) | fl.global_tokens([0, 17]), 300, heads=2),
    Case("rows beyond the keys", fl.window(9), 200, 50, q_offset=0),
    Case("per head, some see nothing", fl.per_head([fl.window(3), fl.window(40) & fl.strided(7, phase=3)]), 120, heads=2),
]


def test_every_output_element_is_written() -> None:
    """The `poison` fixture fills allocated memory with NaN; none is left in an output."""
    assert bool(torch.empty(8).isnan().all())
    for case in UNSURE:
        check(case, torch.float32)
        check(case, torch.bfloat16)


@pytest.mark.parametrize("value", (-math.inf, math.inf, math.nan))
def test_rows_of_infinite_scores_are_written(value: float) -> None:
    """A tile whose rows all see a key writes them even where all their scores are -inf."""
    case = Case("lighthouses", fl.window(4) | fl.global_tokens(range(40)), 150, heads=1)
    given = inputs(case)
    given.k.fill_(value)
    given.q.fill_(1.0)
    out, lse = cpu.forward(given.q, given.k, given.v, plan_of(case), scale=1.0)
    expected, _ = cpu.forward(given.q, given.k, given.v, build(fl.full(), case.sizes, SHAPE), scale=1.0)
    assert bool((out.isnan() == expected.isnan()).all())
    assert bool((lse == -math.inf).all()) or value != -math.inf


def test_native_plan_is_built_once() -> None:
    from farlight.kernels.cpu.native import native_plan

    plan = build(fl.window(3), fl.patterns.Sizes.of(40), SHAPE)
    assert native_plan(plan) is native_plan(plan)


def test_isa_by_environment() -> None:
    code = "from farlight.kernels import cpu; print(cpu.isa() if cpu.unavailable() is None else cpu.unavailable())"
    for name in (ISAS[-1], "sse9"):
        environment = {**os.environ, "FARLIGHT_CPU_ISA": name}
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        if name in ISAS:
            assert found.stdout.strip() == name
        else:
            assert "FARLIGHT_CPU_ISA=sse9" in found.stdout
            assert ISAS[0] in found.stdout


def test_unknown_isa() -> None:
    with pytest.raises(ValueError, match="'sse9' was not compiled in or is not on this machine; there are .*portable"):
        cpu.use("sse9")


BAD_CALLS = [
    ("three dimensions", {"q": torch.zeros(2, 40, 16)}, "q is torch.float32 of shape"),
    ("two dtypes", {"k": torch.zeros(1, 2, 40, 16, dtype=torch.bfloat16)}, "k is torch.bfloat16 of shape"),
    ("float64", {"q": torch.zeros(1, 2, 40, 16, dtype=torch.float64)}, "q is torch.float64"),
    ("keys and values differ", {"v": torch.zeros(1, 2, 39, 16)}, "they must be"),
    ("heads do not fit", {"k": torch.zeros(1, 3, 40, 16), "v": torch.zeros(1, 3, 40, 16)}, "H a multiple of H_kv"),
    ("other sizes", {"q": torch.zeros(1, 2, 41, 16)}, "the plan is for 40 queries and 40 keys, the tensors have 41 and 40"),
    ("a wide head", {x: torch.zeros(1, 2, 40, 257) for x in "qkv"}, "head_dim 257 is outside 1 … 256"),
    ("a wide v", {"v": torch.zeros(1, 2, 40, 257)}, "head_dim 16 of q and k or 257 of v is outside 1 … 256"),
]


@pytest.mark.parametrize("wrong, message", [x[1:] for x in BAD_CALLS], ids=[x[0] for x in BAD_CALLS])
def test_bad_tensors(wrong: dict[str, Tensor], message: str) -> None:
    plan = build(fl.window(3), fl.patterns.Sizes.of(40, heads=2), SHAPE)
    given = {x: torch.zeros(1, 2, 40, 16) for x in "qkv"} | wrong
    with pytest.raises(ArgumentError, match=message):
        cpu.forward(given["q"], given["k"], given["v"], plan, scale=1.0)


def test_bad_gradient() -> None:
    case = Case("bad gradient", fl.window(3), 40)
    given = inputs(case)
    out, lse = cpu.forward(given.q, given.k, given.v, plan_of(case), scale=1.0)
    with pytest.raises(ArgumentError, match=r"dout has shape \(1, 2, 39, 16\)"):
        cpu.backward(given.grad_out[:, :, :39], None, given.q, given.k, given.v, out, lse, plan_of(case), scale=1.0)


def test_plan_for_other_heads() -> None:
    plan = build(fl.per_head([fl.window(2), fl.full()]), fl.patterns.Sizes.of(40, heads=2), SHAPE)
    x = torch.zeros(1, 4, 40, 16)
    with pytest.raises(ValueError, match="differs over 1 batch items and 2 heads, but q has 1 and 4"):
        cpu.forward(x, x, x, plan, scale=1.0)


# --- Malformed plans: refused, or at worst computed as they stand; never a step outside a table. ---------------------------

RICH = Case(
    "everything",
    fl.per_head(
        [
            fl.window(20) | fl.random_keys(2) | fl.window(3, dilation=4),
            fl.clusters(table(5, 96, high=3)) | fl.causal(),
            fl.pairs(bits(6, 96, 96)),
        ]
    ),
    96,
    batch=2,
    heads=3,
    head_dim=8,
)


def rich_plan() -> Plan:
    return build(RICH.pattern, RICH.sizes, TileShape(tile=32, gather=4, longest=60))


def tables_of(plan: Plan) -> list[tuple[str, ...]]:
    """The path of every table: ("masks", "data"), ("0", "2", "lo"), ("1", "rows"), …"""
    found: list[tuple[str, ...]] = [("masks", f.name) for f in dataclasses.fields(plan.masks)]
    for number, piece in enumerate(plan.pieces):
        found += [(str(number), f.name) for f in dataclasses.fields(piece) if isinstance(getattr(piece, f.name), Tensor)]
        for at, layer in enumerate(piece.layers):
            names = [f.name for f in dataclasses.fields(layer) if isinstance(getattr(layer, f.name), Tensor)]
            found += [(str(number), str(at), name) for name in names]
    return found


def get(plan: Plan, path: tuple[str, ...]) -> Tensor:
    owner: Any = plan.masks if path[0] == "masks" else plan.pieces[int(path[0])]
    if len(path) == 3:
        owner = owner.layers[int(path[1])]
    value: Tensor = getattr(owner, path[-1])
    return value


def with_table(plan: Plan, path: tuple[str, ...], value: Tensor | None) -> Plan:
    """A copy of the plan with one table replaced, and no tables derived from the plan, such as its native copy."""
    if path[0] == "masks":
        return dataclasses.replace(plan, masks=dataclasses.replace(plan.masks, **{path[-1]: value}))
    pieces = list(plan.pieces)
    piece = pieces[int(path[0])]
    if len(path) == 2:
        pieces[int(path[0])] = dataclasses.replace(piece, **{path[-1]: value})
    else:
        layers = list(piece.layers)
        layers[int(path[1])] = dataclasses.replace(layers[int(path[1])], **{path[-1]: value})
        pieces[int(path[0])] = dataclasses.replace(piece, layers=tuple(layers))
    return dataclasses.replace(plan, pieces=tuple(pieces))


def changed(x: Tensor, at: int, value: int) -> Tensor:
    x = x.clone()
    x.view(-1)[at] = value
    return x


# (pattern, table, index, value or None = one element less, what the refusal says)
DAMAGE = [
    (fl.window(5), ("masks", "kind"), 0, 7, "a mask is of no known kind"),
    (fl.window(5), ("masks", "start"), 0, 10**6, "a mask reaches outside the mask data"),
    (fl.window(5), ("masks", "start"), 0, -1, "a mask reaches outside the mask data"),
    (fl.window(5), ("masks", "core_hi"), 0, 1, "core reaches outside its run"),
    (fl.window(5), ("masks", "core_lo"), 0, None, "masks: tables differ in length"),
    (fl.window(5), ("0", "first"), 1, 10**6, "first does not divide the tiles"),
    (fl.window(5), ("0", "row_first"), 1, 7, "row_first does not divide the places"),
    (fl.window(5), ("0", "variant"), 0, 1, "a variant does not exist"),
    (fl.window(5), ("0", "variant"), 0, -1, "a variant does not exist"),
    (fl.window(5), ("0", "count"), 0, 33, "a tile has no row or too many"),
    (fl.window(5), ("0", "count"), 0, 0, "a tile has no row or too many"),
    (fl.window(5), ("0", "count"), 0, None, "tables of tiles differ in length"),
    (fl.window(5), ("0", "count"), -1, 32, "a tile reaches outside its variant's places"),
    (fl.window(5), ("0", "start"), 1, 31, "tiles overlap or are not in order"),
    (fl.window(5), ("0", "start"), 0, -5, "tiles overlap or are not in order"),
    (fl.window(5), ("0", "part"), 0, 1, "a part is not below parts"),
    (fl.window(5), ("0", "parts"), 0, 2, "the parts of a tile do not stand together"),
    (fl.window(5), ("0", "parts"), -1, 2, "the parts of a tile do not stand together"),
    (fl.window(5), ("0", "0", "indptr"), 1, 10**9, "indptr does not divide the runs"),
    (fl.window(5), ("0", "0", "indptr"), 0, -1, "indptr does not divide the runs"),
    (fl.window(5), ("0", "0", "lo"), 0, -1, "a run reaches outside the keys"),
    (fl.window(5), ("0", "0", "hi"), 0, 10**6, "a run reaches outside the keys"),
    (fl.window(5), ("0", "0", "hi"), 0, None, "lo, hi and mask differ in length"),
    (fl.window(5), ("0", "0", "mask"), 0, 10**6, "a mask does not exist"),
    (fl.window(5), ("0", "0", "mask"), 0, -2, "a mask does not exist"),
    (fl.window(5), ("0", "0", "entry_base"), 0, 3, "the tiles of a variant reach outside indptr"),
    (fl.window(5), ("0", "0", "entry_base"), 0, -1, "the tiles of a variant reach outside indptr"),
    (fl.window(5), ("0", "0", "entry_base"), 0, 2**62, "the tiles of a variant reach outside indptr"),
    (fl.window(5), ("0", "0", "variant"), 0, 3, "a variant does not exist"),
    (fl.window(5), ("0", "0", "place_base"), 0, None, "place_base has the wrong length"),
    (fl.strided(3), ("0", "rows"), 0, 10**6, "a row does not exist"),
    (fl.strided(3), ("0", "rows"), 0, 3, "a row comes twice"),
    (fl.strided(3), ("0", "0", "keys"), 0, 10**6, "a key does not exist"),
    (fl.strided(3), ("0", "0", "keys"), 0, -1, "a key does not exist"),
    (fl.random_keys(2), ("0", "0", "point_keys"), 0, 10**6, "a gathered key does not exist"),
    (fl.random_keys(2), ("0", "0", "point_indptr"), 3, 10**9, "point_indptr does not divide the points"),
    (fl.random_keys(2), ("0", "0", "place_base"), -1, 91, "the places of a variant reach outside point_indptr"),
    (fl.random_keys(2), ("0", "0", "place_base"), 0, 2**62, "the places of a variant reach outside point_indptr"),
]


@pytest.mark.parametrize("pattern, path, at, value, message", DAMAGE, ids=[f"{'.'.join(x[1])}-{x[2]}-{x[3]}" for x in DAMAGE])
def test_malformed_plans_are_refused(
    pattern: fl.Pattern, path: tuple[str, ...], at: int, value: int | None, message: str
) -> None:
    plan = build(pattern, fl.patterns.Sizes.of(90, heads=2), SHAPE)
    before = get(plan, path)
    after = before[:-1].clone() if value is None else changed(before, at, value)
    x = torch.zeros(1, 2, 90, 8)
    with pytest.raises(PlanError, match=message):
        cpu.forward(x, x, x, with_table(plan, path, after), scale=1.0)


def test_tables_of_another_dtype_are_refused() -> None:
    plan = build(fl.window(5), fl.patterns.Sizes.of(90, heads=2), SHAPE)
    x = torch.zeros(1, 2, 90, 8)
    for path in tables_of(plan):
        for wrong in (get(plan, path).double(), get(plan, path)[None], None):
            with pytest.raises(PlanError, match="malformed plan"):
                cpu.forward(x, x, x, with_table(plan, path, wrong), scale=1.0)


@pytest.mark.parametrize("seed", range(8))
def test_randomly_damaged_plans(seed: int) -> None:
    """A plan with random table entries replaced is refused or computed, without a crash. Strongest under `make sanitize`."""
    draw = random.Random(seed)
    plan, given = rich_plan(), inputs(RICH)
    assert {"rows", "keys", "parts", "points", "bits", "bounds", "whole", "overlapping"} <= features_of(plan)
    paths = tables_of(plan)
    refused = 0
    for _ in range(60):
        ill = plan
        for _ in range(draw.choice((1, 1, 2, 4))):
            path = draw.choice(paths)
            found = get(ill, path)
            if not found.numel():
                continue
            size = found.numel()
            near = int(found.view(-1)[draw.randrange(size)])
            most = torch.iinfo(found.dtype).max
            value = draw.choice((0, -1, 1, near, near + 1, near - 1, 95, 96, 97, EMPTY, most, -most, draw.randrange(300)))
            ill = with_table(ill, path, changed(found, draw.randrange(size), max(-most, min(most, value))))
        try:
            run(RICH, given, ill)
        except PlanError:
            refused += 1
    assert refused > 10
