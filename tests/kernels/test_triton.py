"""Backend "triton" as far as it shows without a GPU: reasons, the lowering of plans, and ahead-of-time compiles.

The kernels themselves run under Triton's interpreter, which must be chosen before triton is imported: `triton_interpreted.py`
is run in a process of its own.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_lists import seen_by_keys, seen_by_queries

import farlight as fl
from farlight.kernels import dispatch
from farlight.kernels import triton as backend
from farlight.kernels.triton import work_partition as dealing
from farlight.kernels.triton.autotune import fastest
from farlight.kernels.triton.configs import PASSES, Config, candidates
from farlight.kernels.triton.key_blocks import Extents
from farlight.kernels.triton.lower_kv import lower_keys
from farlight.kernels.triton.lower_q import lower_queries
from farlight.plan import Plan, TileShape
from farlight.plan.build import build
from farlight.testing import CASES, Case, case
from parity import request_of

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
LARGE = ("long row", "long rows, per head", "dropout, long row")


# ---- reasons ----------------------------------------------------------------------------------------------------------
@needs_triton
def test_on_the_cpu_it_says_why_not() -> None:
    q = torch.randn(1, 1, 8, 8)
    message = r"backend 'triton' cannot run .*the tensors are on the CPU, Triton compiles for GPUs .*TRITON_INTERPRET=1"
    with pytest.raises(fl.UnsupportedError, match=message):
        fl.attention(q, q, q, fl.window(2), backend="triton")
    assert "triton: cannot: the tensors are on the CPU" in fl.explain(q, q, q, fl.window(2))


def test_every_reason_is_given_at_once() -> None:
    of = dataclasses.replace(case("skim"), head_dim=300)
    found = backend.reasons(request_of(of, torch.float64, return_lse=False))
    assert found[-2:] == ["float64 is not one of float32, bfloat16, float16", "head_dim 300 is outside 1 … 256"]


def test_a_missing_triton_is_a_reason() -> None:
    code = "import sys; sys.modules['triton'] = None\nfrom farlight.kernels.triton.device_caps import missing\nprint(missing())"
    path = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | path)
    assert found.stdout.startswith("triton is not installed; pip install 'farlight[triton]'")


def test_auto_never_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the interpreter could serve, "auto" on the CPU still takes another."""
    monkeypatch.setattr(dispatch, "reasons", lambda name, request: [] if name in ("triton", "torch") else ["no"])
    assert dispatch.planned_backend(request_of(case("skim"), torch.float32, return_lse=False)) == "torch"


# ---- lowering: the lists of blocks are the plan -----------------------------------------------------------------------
def by_queries(plan: Plan, height: int, width: int, group: int) -> Tensor:
    return seen_by_queries(lower_queries(plan, height, width, group, 8), plan.sizes, width)


def by_keys(plan: Plan, height: int, width: int, group: int) -> Tensor:
    return seen_by_keys(lower_keys(plan, height, width, group, 8), plan.sizes, group)


def lowered_is_the_plan(of: Case, shape: TileShape, *sizes: Any) -> None:
    plan = build(of.pattern, of.sizes, shape)
    wanted = of.pattern.dense(of.n_q, of.n_k, batch=of.batch, heads=of.heads, q_offset=of.q_offset)
    wanted = wanted.expand(of.batch, of.heads, -1, -1).long()
    group = of.heads // of.kv_heads
    assert torch.equal(by_queries(plan, *sizes[0], group), wanted), of
    assert torch.equal(by_keys(plan, *sizes[1], group), wanted), of


@pytest.mark.parametrize("of", [one for one in CASES if one.name not in LARGE and one.n_q and one.n_k], ids=str)
def test_lowered_lists_hold_each_pair_once(of: Case) -> None:
    lowered_is_the_plan(of, backend.SHAPE, (128, 64), (64, 64))


SHAPES = [
    (TileShape(128, 32, 64), (64, 32), (32, 128), 1),
    (TileShape(32, 8, 2**30), (128, 128), (128, 64), 1),
    (TileShape(100, 4, 40), (64, 64), (64, 32), 2),
]


@pytest.mark.parametrize("shape, queries, keys, least", SHAPES, ids=["split", "small tiles", "odd tiles"])
@pytest.mark.parametrize(
    "name",
    ["skim", "a mask with holes", "one key head, clusters", "per head, dilations", "LongNet", "grouped heads, three to one",
     "dilated windows and lighthouses", "a mask per item and head", "window, wide", "scattered lighthouses and a window"],
)  # fmt: skip
def test_lowering_for_any_shape(
    name: str, shape: TileShape, queries: Any, keys: Any, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where everything is cut in parts, and where a key head's query heads sort the keys differently."""
    monkeypatch.setattr(dealing, "LEAST", least)
    of = case(name)
    lowered_is_the_plan(of, shape, queries, keys)
    if of.heads % 2 == 0:
        lowered_is_the_plan(dataclasses.replace(of, kv_heads=of.heads // 2), shape, queries, keys)


def test_a_damaged_table_shows_in_the_lists() -> None:
    of = case("window, wide")
    plan = build(of.pattern, of.sizes, backend.SHAPE)
    data = plan.masks.data.clone()
    data[plan.masks.start[0] + 7] -= 1
    harmed = dataclasses.replace(plan, masks=dataclasses.replace(plan.masks, data=data))
    wanted = of.pattern.dense(of.n_q).long().expand(1, 1, -1, -1)
    assert torch.equal(by_queries(plan, 128, 64, 1), wanted)
    assert not torch.equal(by_queries(harmed, 128, 64, 1), wanted)
    assert not torch.equal(by_keys(harmed, 64, 64, 1), wanted)


def test_a_window_has_whole_blocks_in_the_middle_only() -> None:
    """5 of the 7 blocks that 128 rows of a window see need no mask; halves of a tile skip what only the other half sees."""
    plan = build(fl.window(128), fl.plan(fl.window(128), 4096).sizes, backend.SHAPE)
    inner = [w for w in lower_queries(plan, 128, 64, 1, 8).launches[0].work.tolist() if 1024 <= w[2] < 3072]
    assert {(w[7] - w[6], w[11] - w[10]) for w in inner} == {(2, 4)}
    halves = [w for w in lower_queries(plan, 64, 64, 1, 8).launches[0].work.tolist() if 1024 <= w[2] < 3072]
    assert {(w[7] - w[6], w[11] - w[10]) for w in halves} == {(3, 2)}


def test_extents_of_part_of_a_tile() -> None:
    plan = build(fl.causal(), fl.plan(fl.causal(), 128).sizes, TileShape(128, 8, 2**30))
    one = torch.tensor([0, 0])
    found = Extents(plan, 64).of(one, one + 128, one, torch.tensor([0, 1]))
    assert [x.tolist() for x in (found.lo, found.hi, found.core_lo, found.core_hi)] == [[0, 0], [64, 128], [0, 0], [1, 65]]


def test_long_items_are_cut_and_start_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dealing, "LEAST", 4)
    ranges = torch.tensor([[[0, 2], [0, 0]], [[2, 12], [0, 100]], [[12, 13], [100, 101]]])
    dealt = dealing.deal(ranges, torch.tensor([1, 10]), 1000)
    assert dealt.item.tolist() == [1, 1, 1, 1, 1, 0, 2]
    assert dealt.ranges[:5].tolist() == [
        [[2, 6], [0, 0]], [[6, 10], [0, 0]], [[10, 12], [0, 20]], [[12, 12], [20, 60]], [[12, 12], [60, 100]],
    ]  # fmt: skip
    assert dealt.slot.tolist() == [0, 1, 2, 3, 4, -1, -1]
    assert dealt.cut.tolist() == [[1, 0, 5]]


# ---- tuning ------------------------------------------------------------------------------------------------------------
def test_the_fastest_candidate_wins_and_a_refused_one_is_left_out() -> None:
    now = [0.0]
    cost = {64: 3.0, 32: 1.0, 16: 2.0}

    def run(config: Config) -> None:
        if config.keys == 128:
            raise RuntimeError("out of shared memory")
        now[0] += cost[config.keys]

    listed = tuple(Config(64, keys, 4, 2) for keys in (64, 128, 32, 16))
    assert fastest(listed, run, lambda: now[0]).keys == 32
    with pytest.raises(RuntimeError, match="out of shared memory"):
        fastest(listed[1:2], run, lambda: now[0])


def test_every_list_begins_with_a_default() -> None:
    for what in PASSES:
        for dim in (8, 64, 100, 256):
            for dtype in (torch.float32, torch.bfloat16):
                for hopper in (False, True):
                    listed = candidates(what, dim, dtype, hopper=hopper)
                    assert 1 <= len(listed) <= 3
                    assert len(set(listed)) == len(listed)


# ---- in processes of their own -----------------------------------------------------------------------------------------
def interpreted(*options: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(ROOT / "tests" / "helpers" / "triton_interpreted.py"), *options]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-1000:]
    assert " passed" in found.stdout


@needs_triton
def test_kernels_under_the_interpreter() -> None:
    interpreted("-m", "not slow")


@needs_triton
@pytest.mark.slow
def test_kernels_under_the_interpreter_in_16_bits() -> None:
    interpreted("-m", "slow")


# Bytes spilled at head_dim 64, at most, where the compiler of a Triton release spills: stores or loads of one kernel.
SPILLED = {"3.5": 36, "3.6": 36}


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="ptxas comes with Triton on Linux")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dim", [64, 128])
def test_nothing_is_spilled(dim: int, capability: int) -> None:
    from farlight.kernels.triton.aot import compiled

    release = ".".join(importlib.metadata.version("triton").split(".")[:2])
    most = SPILLED.get(release, 0) if dim == 64 else 0
    began = time.monotonic()
    for what in PASSES:
        for config in candidates(what, dim, torch.bfloat16, hopper=capability >= 90):
            for on in ((), ("POINTS", "SPLIT")):
                found = compiled(what, config, dim, torch.bfloat16, capability, on=on)
                where = f"{what} {config} {on} after {time.monotonic() - began:.0f} s"
                assert max(found.spill_stores, found.spill_loads) <= most, f"{where}: {found}"
                assert 0 < found.registers <= 255, where
                assert 0 < found.shared <= 160 * 1024, where


def gpu_check(*options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable}
    command = ["sh", str(ROOT / "scripts" / "gpu_check.sh"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.skipif(torch.cuda.is_available() or sys.platform == "win32", reason="there is a GPU, or no shell")
def test_gpu_check_without_a_gpu_says_so(tmp_path: Path) -> None:
    found = gpu_check("--out", str(tmp_path / "gpu.json"))
    assert found.returncode == 3
    assert f"torch {torch.__version__} sees no GPU" in found.stderr
    assert "pip install torch --index-url" in found.stderr
    assert not list(tmp_path.iterdir())


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="ptxas comes with Triton on Linux")
def test_every_option_compiles() -> None:
    """What the interpreter takes, a compiler may refuse: each option of each kernel once, and all together."""
    from farlight.kernels.triton.aot import FLAGS, SMALL, compiled

    small = Config(16, 32, 4, 1)
    for what in PASSES:
        for on in (*((flag,) for flag in FLAGS), ("NEGATE",), FLAGS):
            assert compiled(what, small, 16, torch.float32, 90, on=on).registers > 0
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for dim in (40, 256):
                # The default must fit the least shared memory among the devices that are supported, 99 KiB.
                config = candidates(what, dim, dtype, hopper=True)[0]
                assert compiled(what, config, dim, dtype, 90, on=("POINTS",)).shared <= 99 * 1024, (what, config, dim, dtype)
    for what in SMALL:
        for on in ((), ("ORDERED", "ADD", "WIDE")):
            assert compiled(what, Config(16, 64, 4, 2), 64, torch.bfloat16, 90, on=on).registers > 0
