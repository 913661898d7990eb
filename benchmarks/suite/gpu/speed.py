"""Speed of the Triton kernels beside FlexAttention and full attention, interleaved on the same tensors, with the roofline.

For each problem: the plan and its upload, the first call (compiling, and timing candidates where none is on file), then forward
and forward + backward. FlexAttention's block mask is built and timed separately. Full attention is torch's own, without a mask.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import farlight as fl
from farlight.kernels import triton as backend
from farlight.patterns import Sizes
from farlight.plan import Plan, plan_for
from farlight.plan.cache import plans
from suite.gpu.problems import Problem, problems
from suite.settings import Box, Settings
from suite.timing import Contender, interleaved

__all__ = ["speed_rows"]

Row = dict[str, Any]
Attend = Callable[[], Tensor]
# tokens, heads, head_dim, which problems (by number)
SETTINGS = (
    (16_384, 16, 64, (0, 1, 2, 3, 4, 5)),
    (65_536, 16, 64, (0, 1, 2, 3, 5)),
    (1_048_576, 12, 64, (0,)),
    (16_384, 16, 128, (0, 1, 3)),
    (262_144, 12, 64, (0, 2)),
)
REHEARSAL_SETTINGS = ((160, 2, 16, (0, 1, 2, 3, 4, 5)),)
# Most tokens for which full attention is timed, and FlexAttention's mask built.
MAX_FULL, MAX_FLEX = 131_072, 262_144
ROW_SECONDS = 45.0


def speed_rows(settings: Settings, box: Box) -> Iterator[Row]:
    """First the measured ceilings; then a row for each problem: `passes` holds each contender's seconds and the roofline,
    `left_out` what was not timed and why, `wrong` how our output differs from FlexAttention's.
    """
    rehearsal = settings.rehearsal
    device = "cpu" if rehearsal else "cuda"
    rates = ceilings(device, rehearsal)
    yield {"about": {"rates": rates}}
    for n, heads, dim, numbers in REHEARSAL_SETTINGS if rehearsal else SETTINGS:
        for number in numbers:
            about = {"pattern": problems[number].__name__, "tokens": n, "heads": heads, "head_dim": dim}
            why = None if rehearsal else box.refusal(ROW_SECONDS)
            if why is not None:
                yield {**about, "skipped": why}
                continue
            try:
                yield _row(problems[number](n, heads, device), n, heads, dim, device, rates)
            except Exception as error:  # out of memory, or what a compiler raises: a row with its reason
                yield {**about, "wrong": f"{type(error).__name__}: {error}"[:400]}
            torch._dynamo.reset()
            if not rehearsal:
                torch.cuda.empty_cache()


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
        contenders.append(Contender(f"full {dim}", functools.partial(scaled_dot_product_attention, q, q, q)))
    timings = interleaved(contenders, repeats=5, budget=10)
    out["matmul_tflops"] = 2 * size**3 / timings["matmul"].seconds / 1e12
    out["copy_gbs"] = 2 * source.numel() / timings["copy"].seconds / 1e9
    for dim in (64, 128):
        out[f"full_attention_{dim}_tflops"] = 4 * dim * heads * n * n / timings[f"full {dim}"].seconds / 1e12
    return out


def _row(problem: Problem, n: int, heads: int, dim: int, device: str, rates: dict[str, float]) -> Row:
    rehearsal = device == "cpu"
    dtype = torch.float32 if rehearsal else torch.bfloat16
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    plans.clear()
    planning = _seconds(lambda: plan_for(problem.pattern, Sizes.of(n, heads=heads), backend.SHAPE))
    plan = plan_for(problem.pattern, Sizes.of(n, heads=heads), backend.SHAPE)

    def ours() -> Tensor:
        out = fl.attention(q, k, v, problem.pattern, backend="triton")
        assert isinstance(out, Tensor)
        return out

    row: Row = {
        "pattern": problem.name, "tokens": n, "heads": heads, "head_dim": dim, "dtype": str(dtype).removeprefix("torch."),
        "density": plan.pairs / (heads * n * n), "waste": plan.waste, "plan_seconds": planning, "plan_mib": plan.nbytes / 2**20,
        "first_call_seconds": _seconds(lambda: _synchronised(ours, rehearsal)), "left_out": [], "passes": {},
    }  # fmt: skip
    contenders = {"ours": ours, **_others(problem, q, k, v, row)}
    if "flex" in contenders:
        difference = _difference(ours(), contenders["flex"]())
        row |= {} if difference is None else {"wrong": difference}
    for name in ("forward", "forward + backward"):
        row["passes"][name] = _timed(name, contenders, (q, k, v), plan, rates, row["left_out"])
    if not rehearsal:
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return row


def _others(problem: Problem, q: Tensor, k: Tensor, v: Tensor, row: Row) -> dict[str, Attend]:
    """FlexAttention, FlashAttention's window and full attention, where each can be timed; else the reason in `left_out`."""
    contenders: dict[str, Attend] = {}
    n = q.shape[2]
    try:
        contenders["flex"] = _flex(problem, q, k, v, row)
    except Exception as error:  # whatever its compiler raises is why it is not in the table
        row["left_out"].append(f"FlexAttention: {type(error).__name__}: {error}"[:400])
    if problem.radius is not None:
        try:
            contenders["flash window"] = _flash_window(problem.radius, q, k, v)
        except ImportError as error:
            row["left_out"].append(f"FlashAttention's window: {error}; torch's own attention has no window")
    if n <= MAX_FULL:
        contenders["full"] = lambda: scaled_dot_product_attention(q, k, v)
    else:
        row["left_out"].append(f"full attention: quadratic; timed up to {MAX_FULL} tokens")
    return contenders


def _timed(
    name: str, contenders: dict[str, Attend], qkv: tuple[Tensor, ...], plan: Plan, rates: dict[str, float], left_out: list[str]
) -> Row:
    """Seconds of every contender in one pass, and ours against the roofline."""
    q = qkv[0]
    _, heads, n, dim = q.shape
    rehearsal, backward = q.device.type == "cpu", name != "forward"
    grad = torch.randn_like(q)

    def pass_of(call: Attend) -> Callable[[], Any]:
        def run() -> Any:
            if backward:
                return torch.autograd.grad(call(), qkv, grad)
            with torch.no_grad():
                return call()

        return run

    if not rehearsal:
        torch.cuda.reset_peak_memory_stats()
    sides = [Contender(contender, pass_of(call)) for contender, call in contenders.items()]
    timings = interleaved(sides, repeats=1 if rehearsal else 7, budget=8)
    cells: Row = {contender: timing.row() for contender, timing in timings.items()}
    left_out += [f"{contender}, {name}: {timing.error}"[:300] for contender, timing in timings.items() if timing.error]
    ours = timings["ours"]
    if ours.error is None:
        flops = (14 if backward else 4) * dim * plan.pairs
        moved = (12 if backward else 4) * heads * n * dim * q.element_size()
        least = max(flops / (rates["matmul_tflops"] * 1e12), moved / (rates["copy_gbs"] * 1e9))
        cells["useful_tflops"] = flops / ours.seconds / 1e12
        cells["visited_tflops"] = cells["useful_tflops"] * plan.waste
        cells["roofline_seconds"], cells["of_roofline"] = least, least / ours.seconds
        if not backward:
            full_rate = rates[f"full_attention_{64 if dim <= 64 else 128}_tflops"]
            cells["of_full_attention_rate"] = cells["visited_tflops"] / full_rate
    return cells


def _flex(problem: Problem, q: Tensor, k: Tensor, v: Tensor, row: Row) -> Attend:
    """The compiled call of FlexAttention; its mask and its first call are timed into the row."""
    heads, n = q.shape[1], q.shape[2]
    if q.device.type == "cpu":
        raise RuntimeError("a rehearsal compiles nothing")
    if n > MAX_FLEX:
        raise RuntimeError(f"its block mask evaluates all n² pairs; built up to {MAX_FLEX} tokens")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    masks: list[Any] = []

    def build() -> None:
        head_dimension = heads if problem.by_head else None
        masks.append(create_block_mask(problem.rule, None, head_dimension, n, n, device=q.device.type, _compile=True))
        torch.cuda.synchronize()

    row["flex_mask_first_seconds"] = _seconds(build)
    row["flex_mask_seconds"] = _seconds(build)
    compiled = torch.compile(flex_attention, dynamic=False)

    def call() -> Tensor:
        out = compiled(q, k, v, block_mask=masks[-1])
        assert isinstance(out, Tensor)
        return out

    row["flex_first_call_seconds"] = _seconds(lambda: _synchronised(call, False))
    row["flex_sparsity_percent"] = float(masks[-1].sparsity())
    return call


def _flash_window(radius: int, q: Tensor, k: Tensor, v: Tensor) -> Attend:
    """FlashAttention's own sliding window. Raises ImportError where that package is not installed."""
    from flash_attn import flash_attn_func

    def call() -> Tensor:
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), window_size=(radius, radius))
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return call


def _difference(ours: Tensor, theirs: Tensor) -> str | None:
    """How two outputs differ; None when they agree within the rounding of bfloat16."""
    error = float((ours.float() - theirs.float()).abs().max())
    bound = 0.05 * max(1.0, float(theirs.float().abs().max()))
    return None if error <= bound else f"differs from FlexAttention by {error:.3g}"


def _synchronised(call: Attend, on_cpu: bool) -> None:
    call()
    if not on_cpu:
        torch.cuda.synchronize()


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
