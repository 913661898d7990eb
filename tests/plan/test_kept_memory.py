"""Memory of the plan cache: everything derived from a plan is counted, and loops over lengths or patterns stay bounded."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import farlight as fl
from farlight.patterns import Sizes
from farlight.plan import TileShape, plan_for
from farlight.plan.cache import plans
from farlight.plan.footprint import Derived, held_bytes

SOURCE = Path(fl.__file__).parent

LOOP = """
import gc, sys, torch
torch.set_num_threads(1)
import farlight as fl
from farlight.plan.cache import plans

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

varied, count, backend = sys.argv[1], int(sys.argv[2]), sys.argv[3]
plans.limit = int(sys.argv[4]) * 2**20
labels = torch.Generator().manual_seed(0)

def call(i):
    n = {"lengths": 1000 + i, "patterns": 256, "tables": 700}[varied]
    pattern = fl.window(16 + i % 97, i) if varied == "patterns" else fl.window(9)
    if varied == "tables":
        pattern = fl.clusters(torch.randint(9, (1, 8, n), generator=labels))
    q = torch.zeros(1, 8, n, 8, requires_grad=i % 8 == 0)
    out = fl.attention(q, q, q, pattern, backend=backend)
    if q.requires_grad:
        out.sum().backward()

for i in range(16):  # one-time loading and allocation
    call(count - i)
plans.clear()
gc.collect()
start = resident()
for i in range(count):
    call(i)
gc.collect()
info = plans.info()
# A choice's plan goes with its pattern: each pattern of this loop dies with its call.
assert info.entries <= 1 if varied == "tables" and backend == "cpu" else 0.5 * info.limit < info.nbytes <= info.limit, info
print(resident() - start)
"""


def resident_growth(varied: str, count: int, backend: str, limit: int) -> float:
    """Growth in MiB of a process's resident memory over `count` calls, with a plan cache of `limit` MiB."""
    command = [sys.executable, "-c", LOOP, varied, str(count), backend, str(limit)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert process.returncode == 0, process.stderr[-2000:]
    return int(process.stdout) / 2**20


linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc")


@linux
def test_memory_is_bounded_over_many_lengths() -> None:
    assert resident_growth("lengths", 200, "cpu", limit=2) < 6


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("varied", "count", "backend"),
    [("lengths", 500, "cpu"), ("patterns", 5000, "cpu"), ("tables", 1000, "cpu"), ("lengths", 500, "torch")],
)
def test_memory_is_bounded_over_long_loops(varied: str, count: int, backend: str) -> None:
    assert resident_growth(varied, count, backend, limit=8) < 20


@pytest.mark.parametrize("pattern", [fl.window(30), fl.window(4) | fl.random_keys(3), fl.strided(7)], ids=lambda p: p.text)
def test_everything_derived_from_a_plan_is_counted(pattern: fl.Pattern, cold_cache: None) -> None:
    plan = plan_for(pattern, Sizes.of(2000, heads=8), TileShape(tile=32, gather=8, longest=16_384))
    first = plans.info().nbytes
    tables = sum(table.nbytes for table in pattern.tables)
    assert first > plan.nbytes + tables
    transposed = plan.transposed()
    second = plans.info().nbytes
    assert second - first >= held_bytes(transposed)
    q = torch.zeros(1, 8, 2000, 8)
    fl.attention(q, q, q, pattern, backend="cpu")
    third = plans.info().nbytes
    items = 8 * (2000 // 32)
    assert third - second > plan.nbytes + 16 * items  # a native copy, and a schedule of as many items
    leaf = q.clone().requires_grad_()
    fl.attention(leaf, q, q, pattern, backend="cpu").sum().backward()
    fourth = plans.info().nbytes
    assert fourth - third >= 16 * items  # their order in a backward pass
    fl.attention(q, q, q, pattern, backend="cpu")
    assert plans.info().nbytes == fourth
    fl.attention(q, q[:, :1], q[:, :1], pattern, backend="cpu")  # one schedule is kept: that of the last heads
    assert plans.info().nbytes < third + plan.nbytes
    fl.attention(q, q, q, pattern, backend="torch")
    assert plans.info().nbytes > third
    plans.clear()
    assert plans.info().nbytes == 0


def test_a_plan_that_grows_beyond_the_limit_is_evicted(cold_cache: None) -> None:
    plan = plan_for(fl.window(3), Sizes.of(3000), TileShape())
    before = plans.limit
    try:
        plans.limit = plans.info().nbytes + 100
        assert plans.info().entries == 1
        plan.transposed()
        assert plans.info().entries == 0
        assert plans.info().nbytes == 0
        plan.transposed(32)  # not counted: the plan is no longer in the cache
        assert plans.info().nbytes == 0
    finally:
        plans.limit = before


def test_an_evicted_plan_is_freed_at_once(cold_cache: None) -> None:
    import weakref

    gc.collect()
    gc.disable()
    try:
        plan = plan_for(fl.window(3), Sizes.of(300), TileShape())
        plan.transposed()
        reference = weakref.ref(plan)
        plans.clear()
        del plan
        assert reference() is None, "no cycle keeps it until the next collection"
    finally:
        gc.enable()


def test_derived_values_are_not_pickled() -> None:
    import pickle

    derived = Derived()
    derived["x"] = torch.zeros(3)
    assert pickle.loads(pickle.dumps(derived)) == {}


def test_shared_memory_is_counted_once() -> None:
    table = torch.zeros(1000, dtype=torch.int64)
    assert 8000 <= held_bytes([table, table[:10], table.view(10, 100)]) < 8000 + 4096


def test_every_cache_of_the_package_is_listed_with_its_bound() -> None:
    """`docs/architecture.md` names each file with a cache and what bounds it."""
    documented = (SOURCE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    caches = re.compile(r"functools\.(?:lru_)?cache\b|SizedCache\[?[^\n]*=|WeakKeyDictionary|WeakValueDictionary")
    files = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if caches.search(line) and path.name != "caching.py"
    }
    assert files
    missing = sorted(file for file in files if f"`{file}`" not in documented)
    assert not missing, f"docs/architecture.md says of no bound for caches in {missing}"


OUTPUTS = """
import gc, torch
torch.set_num_threads(1)
import farlight as fl
from farlight.plan.cache import plans

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

q = torch.zeros(1, 1, 2048, 64).expand(1, 8, 2048, 64)
fl.attention(q, q, q, fl.window(8), backend="cpu")
gc.collect()
start = resident()
for i in range(1, 201):
    fl.attention(q, q, q, fl.window(8 + i), backend="cpu")
gc.collect()
print((resident() - start) / 2**20, plans.info().nbytes / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_outputs_between_new_plans_do_not_stay() -> None:
    """200 outputs of 4 MiB, each freed before the next: plans that stay must not keep the allocator from using it again."""
    done = subprocess.run([sys.executable, "-c", OUTPUTS], capture_output=True, text=True, check=True, timeout=120)
    growth, held = map(float, done.stdout.split())
    assert growth < held + 64 * 4 + 32  # 64 values put between two trims
