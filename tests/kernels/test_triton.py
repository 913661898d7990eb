"""Backend "triton" without a GPU: reasons, the lowering of plans, autotuning, and ahead-of-time (AOT) compiles.

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
from triton_lists import pairs_of_key_work, pairs_of_query_work

import farlight as fl
from farlight.kernels import registry
from farlight.kernels import triton as backend
from farlight.kernels.triton import work_partition
from farlight.kernels.triton.autotune import fastest
from farlight.kernels.triton.configs import PASSES, Config, candidates
from farlight.kernels.triton.key_blocks import MaskExtents
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
    reasons = backend.BACKEND.reasons(request_of(of, torch.float64, return_lse=False))
    assert reasons[-2:] == ["float64 is not one of float32, bfloat16, float16", "head_dim 300 is outside 1 … 256"]


def test_a_missing_triton_is_a_reason() -> None:
    code = "import sys; sys.modules['triton'] = None\nfrom farlight.kernels.triton.device_caps import missing\nprint(missing())"
    path = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | path)
    assert process.stdout.startswith("triton is not installed; pip install 'farlight[triton]'")


def test_auto_never_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the interpreter could serve, "auto" on the CPU still takes another."""
    monkeypatch.setattr(registry, "reasons", lambda name, request: [] if name in ("triton", "torch") else ["no"])
    assert registry.plan_backend(request_of(case("skim"), torch.float32, return_lse=False)).name == "torch"


# ---- lowering: the work tables are the plan ---------------------------------------------------------------------------
def query_pairs(plan: Plan, block_m: int, block_n: int, heads_per_kv: int) -> Tensor:
    return pairs_of_query_work(lower_queries(plan, block_m, block_n, heads_per_kv, 8), plan.sizes, block_n)


def key_pairs(plan: Plan, block_m: int, block_n: int, heads_per_kv: int) -> Tensor:
    return pairs_of_key_work(lower_keys(plan, block_m, block_n, heads_per_kv, 8), plan.sizes, heads_per_kv)


def check_lowering(of: Case, shape: TileShape, *sizes: Any) -> None:
    plan = build(of.pattern, of.sizes, shape)
    expected = of.pattern.dense(of.n_q, of.n_k, batch=of.batch, heads=of.heads, q_offset=of.q_offset)
    expected = expected.expand(of.batch, of.heads, -1, -1).long()
    heads_per_kv = of.heads // of.kv_heads
    assert torch.equal(query_pairs(plan, *sizes[0], heads_per_kv), expected), of
    assert torch.equal(key_pairs(plan, *sizes[1], heads_per_kv), expected), of


@pytest.mark.parametrize("of", [case for case in CASES if case.name not in LARGE and case.n_q and case.n_k], ids=str)
def test_work_tables_hold_each_pair_once(of: Case) -> None:
    check_lowering(of, backend.SHAPE, (128, 64), (64, 64))


SHAPES = [
    (TileShape(128, 32, 64), (64, 32), (32, 128), 1),
    (TileShape(32, 8, 2**30), (128, 128), (128, 64), 1),
    (TileShape(100, 4, 40), (64, 64), (64, 32), 2),
]


@pytest.mark.parametrize("shape, queries, keys, min_blocks", SHAPES, ids=["split", "small tiles", "odd tiles"])
@pytest.mark.parametrize(
    "name",
    ["skim", "a mask with holes", "one key head, clusters", "per head, dilations", "LongNet", "grouped heads, three to one",
     "dilated windows and lighthouses", "a mask per item and head", "window, wide", "scattered lighthouses and a window"],
)  # fmt: skip
def test_lowering_for_any_shape(
    name: str, shape: TileShape, queries: Any, keys: Any, min_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where every item is split, and where the query heads of a key head sort keys differently."""
    monkeypatch.setattr(work_partition, "MIN_BLOCKS", min_blocks)
    of = case(name)
    check_lowering(of, shape, queries, keys)
    if of.heads % 2 == 0:
        check_lowering(dataclasses.replace(of, kv_heads=of.heads // 2), shape, queries, keys)


def test_a_damaged_plan_shows_in_the_work_tables() -> None:
    of = case("window, wide")
    plan = build(of.pattern, of.sizes, backend.SHAPE)
    data = plan.masks.data.clone()
    data[plan.masks.start[0] + 7] -= 1
    damaged = dataclasses.replace(plan, masks=dataclasses.replace(plan.masks, data=data))
    expected = of.pattern.dense(of.n_q).long().expand(1, 1, -1, -1)
    assert torch.equal(query_pairs(plan, 128, 64, 1), expected)
    assert not torch.equal(query_pairs(damaged, 128, 64, 1), expected)
    assert not torch.equal(key_pairs(damaged, 64, 64, 1), expected)


def test_a_window_has_whole_blocks_in_the_middle_only() -> None:
    """5 of the 7 blocks that 128 rows of a window see need no mask; halves of a tile skip what only the other half sees."""
    plan = build(fl.window(128), fl.plan(fl.window(128), 4096).sizes, backend.SHAPE)
    inner = [w for w in lower_queries(plan, 128, 64, 1, 8).launches[0].work.tolist() if 1024 <= w[2] < 3072]
    assert {(w[7] - w[6], w[11] - w[10]) for w in inner} == {(2, 4)}
    halves = [w for w in lower_queries(plan, 64, 64, 1, 8).launches[0].work.tolist() if 1024 <= w[2] < 3072]
    assert {(w[7] - w[6], w[11] - w[10]) for w in halves} == {(3, 2)}


def test_extents_of_part_of_a_tile() -> None:
    plan = build(fl.causal(), fl.plan(fl.causal(), 128).sizes, TileShape(128, 8, 2**30))
    zeros = torch.tensor([0, 0])
    extents = MaskExtents(plan, 64).of(zeros, zeros + 128, zeros, torch.tensor([0, 1]))
    assert [x.tolist() for x in (extents.lo, extents.hi, extents.core_lo, extents.core_hi)] == [
        [0, 0],
        [64, 128],
        [0, 0],
        [1, 65],
    ]


def test_long_items_are_split_and_start_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_partition, "MIN_BLOCKS", 4)
    ranges = torch.tensor([[[0, 2], [0, 0]], [[2, 12], [0, 100]], [[12, 13], [100, 101]]])
    parts = work_partition.partition(ranges, torch.tensor([1, 10]), 1000)
    assert parts.item.tolist() == [1, 1, 1, 1, 1, 0, 2]
    assert parts.ranges[:5].tolist() == [
        [[2, 6], [0, 0]], [[6, 10], [0, 0]], [[10, 12], [0, 20]], [[12, 12], [20, 60]], [[12, 12], [60, 100]],
    ]  # fmt: skip
    assert parts.partial.tolist() == [0, 1, 2, 3, 4, -1, -1]
    assert parts.split.tolist() == [[1, 0, 5]]


# ---- autotuning --------------------------------------------------------------------------------------------------------
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
    for name in PASSES:
        for dim in (8, 64, 100, 256):
            for dtype in (torch.float32, torch.bfloat16):
                for hopper in (False, True):
                    listed = candidates(name, dim, dtype, hopper=hopper)
                    assert 1 <= len(listed) <= 3
                    assert len(set(listed)) == len(listed)


# ---- in processes of their own -----------------------------------------------------------------------------------------
def interpreted(*options: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(ROOT / "tests" / "helpers" / "triton_interpreted.py"), *options]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-1000:]
    assert " passed" in process.stdout


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
    for name in PASSES:
        for config in candidates(name, dim, torch.bfloat16, hopper=capability >= 90):
            for on in ((), ("POINTS", "SPLIT")):
                resources = compiled(name, config, dim, torch.bfloat16, capability, on=on)
                where = f"{name} {config} {on} after {time.monotonic() - began:.0f} s"
                assert max(resources.spill_stores, resources.spill_loads) <= most, f"{where}: {resources}"
                assert 0 < resources.registers <= 255, where
                assert 0 < resources.shared <= 160 * 1024, where


def gpu_check(*options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable}
    command = ["sh", str(ROOT / "scripts" / "gpu_check.sh"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.skipif(torch.cuda.is_available() or sys.platform == "win32", reason="there is a GPU, or no shell")
def test_gpu_check_without_a_gpu_says_so(tmp_path: Path) -> None:
    process = gpu_check("--out", str(tmp_path / "gpu.json"))
    assert process.returncode == 3
    assert f"torch {torch.__version__} sees no GPU" in process.stderr
    assert "pip install torch --index-url" in process.stderr
    assert not list(tmp_path.iterdir())


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="ptxas comes with Triton on Linux")
def test_every_option_compiles() -> None:
    """The compiler refuses some programs that the interpreter takes. Each option of each kernel alone, and all together."""
    from farlight.kernels.triton.aot import FLAGS, SMALL_KERNELS, compiled

    small = Config(16, 32, 4, 1)
    for name in PASSES:
        for on in (*((flag,) for flag in FLAGS), ("NEGATE",), FLAGS):
            assert compiled(name, small, 16, torch.float32, 90, on=on).registers > 0
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for dim in (40, 256):
                # The default must fit the least shared memory among the devices that are supported, 99 KiB.
                config = candidates(name, dim, dtype, hopper=True)[0]
                assert compiled(name, config, dim, dtype, 90, on=("POINTS",)).shared <= 99 * 1024, (name, config, dim, dtype)
    for name in SMALL_KERNELS:
        for on in ((), ("SORTED_ROWS", "ADD", "JOIN", "WIDE")):
            assert compiled(name, Config(16, 64, 4, 2), 64, torch.bfloat16, 90, on=on).registers > 0
