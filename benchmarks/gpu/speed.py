"""Seconds of our kernels beside FlexAttention and full attention, timed in turn on the same tensors, with the roofline.

For each problem: the plan and its upload, the first call (compiling, and timing candidates where none is on file), then forward
and forward + backward. FlexAttention's block mask is built and timed apart. Full attention is torch's own, without a mask.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import farlight as fl
from farlight.bench.timing import Contender, interleaved
from farlight.kernels import triton as backend
from farlight.patterns import Sizes
from farlight.plan import plan_for
from farlight.plan.cache import plans
from gpu.problems import Problem, problems

__all__ = ["run"]

# tokens, heads, head_dim, which problems (by number), with gradients
SETTINGS = (
    (16_384, 16, 64, (0, 1, 2, 3, 4, 5)),
    (65_536, 16, 64, (0, 1, 2, 3, 5)),
    (1_048_576, 12, 64, (0,)),
    (16_384, 16, 128, (0, 1, 3)),
    (262_144, 12, 64, (0, 2)),
)
REHEARSED = ((160, 2, 16, (0, 1, 2, 3, 4, 5)),)
# Full attention is timed up to so many tokens, FlexAttention's mask built up to so many.
FULL, FLEX = 131_072, 262_144
ROW_SECONDS = 45.0


def run(report: Any, left: Callable[[], float], rehearsal: bool) -> int:
    device = "cpu" if rehearsal else "cuda"
    report.data["rates"] = rates = ceilings(device, rehearsal)
    print(f"  rates: {rates}", flush=True)
    report.write()
    failed = 0
    for n, heads, dim, numbers in REHEARSED if rehearsal else SETTINGS:
        for number in numbers:
            name = f"{problems[number].__name__}, {n} tokens, {heads} heads, head_dim {dim}"
            if left() < (0 if rehearsal else ROW_SECONDS):
                report.skip(name, f"{left():.0f} s were left of the time given")
                continue
            try:
                row = _row(report, problems[number](n, heads, device), n, heads, dim, device, rates)
            except Exception as error:  # out of memory, or what a compiler raises: a row with its reason
                report.skip(name, f"{type(error).__name__}: {error}"[:400])
                failed += 1
                continue
            failed += row["wrong"] is not None
            report.data["rows"].append(row)
            report.write()
            torch._dynamo.reset()
            if not rehearsal:
                torch.cuda.empty_cache()
    return failed


def ceilings(device: str, rehearsal: bool) -> dict[str, float]:
    """TFLOP/s of a large bfloat16 product, GB/s of a copy, TFLOP/s of torch's full attention without a mask."""
    size = 256 if rehearsal else 8192
    dtype = torch.float32 if rehearsal else torch.bfloat16
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(2**20 if rehearsal else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n, heads = (256, 2) if rehearsal else (16_384, 16)
    out = {}
    contenders = [Contender("matmul", lambda: a @ b), Contender("copy", lambda: target.copy_(source))]
    for dim in (64, 128):
        q = torch.randn(1, heads, n, dim, device=device, dtype=dtype)
        contenders.append(Contender(f"full {dim}", lambda q=q: scaled_dot_product_attention(q, q, q)))
    found = interleaved(contenders, repeats=5, budget=10)
    out["matmul_tflops"] = 2 * size**3 / found["matmul"].seconds / 1e12
    out["copy_gbs"] = 2 * source.numel() / found["copy"].seconds / 1e9
    for dim in (64, 128):
        out[f"full_attention_{dim}_tflops"] = 4 * dim * heads * n * n / found[f"full {dim}"].seconds / 1e12
    return out


def _row(report: Any, problem: Problem, n: int, heads: int, dim: int, device: str, rates: dict[str, float]) -> dict[str, Any]:
    rehearsal = device == "cpu"
    dtype = torch.float32 if rehearsal else torch.bfloat16
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    grad = torch.randn_like(q)
    where = f"{problem.name}, {n} tokens"
    plans.clear()
    planning = _seconds(lambda: plan_for(problem.pattern, Sizes.of(n, heads=heads), backend.SHAPE))
    plan = plan_for(problem.pattern, Sizes.of(n, heads=heads), backend.SHAPE)

    def ours() -> Tensor:
        out = fl.attention(q, k, v, problem.pattern, backend="triton")
        assert isinstance(out, Tensor)
        return out

    first = _seconds(ours) if rehearsal else _seconds(lambda: (ours(), torch.cuda.synchronize()))
    contenders = {"ours": ours}
    row: dict[str, Any] = {
        "pattern": problem.name, "tokens": n, "heads": heads, "head_dim": dim, "dtype": str(dtype).removeprefix("torch."),
        "density": plan.pairs / (heads * n * n), "waste": plan.waste, "plan_seconds": planning, "plan_mib": plan.nbytes / 2**20,
        "first_call_seconds": first, "wrong": None, "passes": {},
    }  # fmt: skip
    flex = _flex(report, problem, n, heads, q, k, v, where, row)
    if flex is not None:
        contenders["flex"] = flex
        row["wrong"] = _compared(ours(), flex())
    if problem.radius is not None:
        windowed = _flash_window(report, problem.radius, q, k, v, where)
        if windowed is not None:
            contenders["flash window"] = windowed
    if n <= FULL:
        contenders["full"] = lambda: scaled_dot_product_attention(q, k, v)
    else:
        report.skip(f"full attention, {where}", f"quadratic; timed up to {FULL} tokens")

    def backwards(call: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call(), (q, k, v), grad)

    def without(call: Callable[[], Tensor]) -> Callable[[], Any]:
        def quiet() -> Tensor:
            with torch.no_grad():
                return call()

        return quiet

    for name, wrap, per_pair in (("forward", without, 4), ("forward + backward", backwards, 14)):
        timed = [Contender(one, wrap(call)) for one, call in contenders.items()]
        if not rehearsal:
            torch.cuda.reset_peak_memory_stats()
        found = interleaved(timed, repeats=1 if rehearsal else 7, budget=8)
        cells: dict[str, Any] = {one: timing.row() for one, timing in found.items()}
        for one, timing in found.items():
            if timing.error is not None:
                report.skip(f"{one}, {name}, {where}", timing.error[:300])
        if found["ours"].error is None:
            flops = per_pair * dim * plan.pairs
            moved = (4 if name == "forward" else 12) * heads * n * dim * q.element_size()
            least = max(flops / (rates["matmul_tflops"] * 1e12), moved / (rates["copy_gbs"] * 1e9))
            cells["useful_tflops"] = flops / found["ours"].seconds / 1e12
            cells["visited_tflops"] = cells["useful_tflops"] * plan.waste
            cells["roofline_seconds"], cells["of_roofline"] = least, least / found["ours"].seconds
            if name == "forward":
                cells["of_full_attention_rate"] = (
                    cells["visited_tflops"] / rates[f"full_attention_{64 if dim <= 64 else 128}_tflops"]
                )
        row["passes"][name] = cells
    if not rehearsal:
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    print(f"  {where}: {_short(row)}", flush=True)
    return row


def _flex(
    report: Any, problem: Problem, n: int, heads: int, q: Tensor, k: Tensor, v: Tensor, where: str, row: dict[str, Any]
) -> Callable[[], Tensor] | None:
    """The compiled call of FlexAttention; its mask and its first call are timed into the row."""
    if q.device.type == "cpu":
        report.skip(f"FlexAttention, {where}", "a rehearsal compiles nothing")
        return None
    if n > FLEX:
        report.skip(f"FlexAttention, {where}", f"its block mask asks about all n² pairs; built up to {FLEX} tokens")
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    try:
        made: list[Any] = []

        def build() -> None:
            mask = create_block_mask(
                problem.rule, None, heads if problem.by_head else None, n, n, device=q.device.type, _compile=True
            )
            made.append(mask)
            torch.cuda.synchronize()

        row["flex_mask_first_seconds"] = _seconds(build)
        row["flex_mask_seconds"] = _seconds(build)
        compiled = torch.compile(flex_attention, dynamic=False)

        def call() -> Tensor:
            out = compiled(q, k, v, block_mask=made[-1])
            assert isinstance(out, Tensor)
            return out

        row["flex_first_call_seconds"] = _seconds(lambda: (call(), torch.cuda.synchronize()))
        row["flex_sparsity_percent"] = float(made[-1].sparsity())
    except Exception as error:  # whatever its compiler raises is why it is not in the table
        report.skip(f"FlexAttention, {where}", f"{type(error).__name__}: {error}"[:400])
        return None
    return call


def _flash_window(report: Any, radius: int, q: Tensor, k: Tensor, v: Tensor, where: str) -> Callable[[], Tensor] | None:
    """FlashAttention's own sliding window, where that package is installed."""
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        report.skip(f"FlashAttention's window, {where}", f"{error}; torch's own attention has no window")
        return None

    def call() -> Tensor:
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), window_size=(radius, radius))
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return call


def _compared(ours: Tensor, theirs: Tensor) -> str | None:
    """Why the two outputs cannot both be right; None when they agree as two bfloat16 computations of one thing do."""
    error = float((ours.float() - theirs.float()).abs().max())
    bound = 0.05 * max(1.0, float(theirs.float().abs().max()))
    return None if error <= bound else f"differs from FlexAttention by {error:.3g}"


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _short(row: dict[str, Any]) -> str:
    words = []
    for name, cells in row["passes"].items():
        times = ", ".join(
            f"{one} {cells[one]['seconds'] * 1e3:.3f} ms"
            for one in ("ours", "flex", "flash window", "full")
            if "seconds" in cells.get(one, {})
        )
        words.append(f"{name}: {times}")
    return "; ".join(words)
