"""What the CPU kernels were meant to reach, and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from reporting.wording import kind, measured, rows_of, table

__all__ = ["target_table", "targets"]


@dataclass(frozen=True)
class Target:
    """`found`: the measured values, each with the row's kind; all must be at least (or at most) `bound`."""

    text: str
    bound: float
    at_most: bool
    found: list[tuple[str, float]]

    @property
    def met(self) -> bool | None:
        if not self.found:
            return None
        return all(value <= self.bound if self.at_most else value >= self.bound for _, value in self.found)


def targets(results: dict[str, Any]) -> Iterator[Target]:
    def found(section: str, column: str, **where: Any) -> list[tuple[str, float]]:
        rows = measured(rows_of(results, section), **where)
        return [(kind(row), row[column]) for row in rows if row.get(column) is not None]

    def least(text: str, bound: float, values: list[tuple[str, float]]) -> Target:
        return Target(text, bound, False, values)

    def most(text: str, bound: float, values: list[tuple[str, float]]) -> Target:
        return Target(text, bound, True, values)

    for dtype, forward, both in (("float32", 1.0, 1.0), ("bfloat16", 0.75, 0.7)):
        for passes, bound in (("forward", forward), ("forward + backward", both)):
            values = found("headline", "of_matmul", contender="farlight cpu", dtype=dtype, **{"pass": passes})
            yield least(f"useful rate ÷ matmul, {dtype}, {passes}", bound, values)
    peak_rate = results["sections"].get("headline", {}).get("ceilings", {}).get("fma_float32_gflops")
    rates = found("headline", "useful_gflops", contender="farlight cpu", dtype="float32") if peak_rate else []
    yield least("useful rate ÷ FMA peak, float32", 0.7, [(name, rate / peak_rate) for name, rate in rates])
    for dim in (32, 128):
        yield least(f"rate at head_dim {dim} ÷ rate at 64", 0.85, found("dims", "rate_of_usual", head_dim=dim))
    for term, bound in (("alibi", 1.1), ("relative", 1.2), ("t5", 1.2), ("softcap", 1.25), ("sinks", 1.01)):
        yield most(f"{term}: time ÷ the plain call's", bound, found("scores", "times_plain", term=term))
    yield least("head_dim 192 / 128: rate per operation ÷ 128 / 128", 0.9, found("scores", "rate_of_equal"))
    yield least("FlexAttention with ALiBi: time ÷ farlight's", 2.5, found("scores", "slower_than_farlight"))
    for dtype, bound in (("float32", 3.0), ("bfloat16", 8.0)):
        yield least(f"times as fast as FlexAttention, {dtype}", bound, list(_flex(results, dtype)))
    yield least("times as fast as dense at 1,024 tokens", 1.0, found("length", "times_dense", tokens=1024))
    trained = found("length", "times_dense", tokens=262_144, **{"pass": "forward + backward"})
    yield least("times as fast as dense (predicted) at 262,144 tokens, with backward", 1.0, trained)
    random, dilated = "window(256) | random_keys(3)", "window(256, dilation=4)"
    yield most("window + 3 random keys: time ÷ window's", 1.25, found("patterns", "time_of_window", pattern=random))
    yield most("dilation 4: time ÷ undilated", 1.15, found("patterns", "time_of_window", pattern=dilated))
    yield least("clusters of 512: rate ÷ window's", 0.7, found("patterns", "rate_of_window", pattern="clusters of 512"))
    yield least("bigbird(64, 3): rate ÷ window's", 0.8, found("patterns", "rate_of_window", pattern="bigbird(64, 3)"))
    yield most("planning what content chose ÷ the attention it saves", 0.15, found("routing", "plan_of_saved"))
    for batch, caches in ((1, 1), (1, 24), (8, 1)):
        values = found("decode-windows", "of_copy", pattern="streaming(4, 1024)", batch=batch, caches=caches)
        of_caches = f"batch {batch}" + (f", {caches} caches in turn" if caches > 1 else "")
        yield most(f"streaming(4, 1024), {of_caches}: step ÷ a copy of its bytes", 1.15, values)
    for batch in (1, 8):
        values = found("decode-windows", "of_kept", pattern="streaming(4, 1024)", batch=batch)
        yield most(f"streaming(4, 1024), batch {batch}: step ÷ (cat and SDPA over the kept keys)", 0.8, values)
    for block, bounds in (("TopBlocks(16, 64)", (8.0, 40.0)), ("TopBlocks(32, 8)", (6.0, 30.0))):
        for tokens, bound in zip((16_384, 131_072), bounds, strict=True):
            values = found("decode-blocks", "times_all", pattern=block, tokens=tokens)
            yield least(f"{block} at {tokens:,} tokens: times as fast as SDPA over all keys", bound, values)
    for caches in (1, 24):
        values = found("decode-windows", "of_plain", caches=caches)
        yield most(f"dilated and per-head windows, {caches} caches in turn: step ÷ that of a plain window", 1.3, values)
    yield least("int8 cache: times as fast as bfloat16", 1.7, found("decode-stored", "times_bfloat16", dtype="bfloat16"))
    yield least("int8 cache: cosine of the output", 0.9995, found("decode-stored", "cosine", stored="int8"))
    longest = results["settings"]["long_tokens"][1]
    # Results of older runs tell of fresh memory only, and do not say so.
    kept = any("memory" in row for row in rows_of(results, "scaling"))
    long_text = {"measure": "long text", **({"memory": "kept"} if kept else {})}
    text = f"{longest:,} tokens: time ÷ linear" + (", memory kept" if kept else "")
    yield most(text, 1.2, found("scaling", "of_linear", **long_text))
    peak = found("scaling", "peak_of_inputs_and_output", **long_text)
    yield most(f"{longest:,} tokens: peak memory ÷ (q+k+v+out)", 1.15, peak)
    yield least("two threads against one, one head", 1.8, found("scaling", "speed_up", measure="threads", threads=2))
    calls = found("scaling", "over_sdpa_us", measure="call overhead", contender="farlight cpu")
    yield most("µs of a call on 128 tokens over SDPA's", 60.0, calls)


def _flex(results: dict[str, Any], dtype: str) -> Iterator[tuple[str, float]]:
    rows = measured(rows_of(results, "headline"), dtype=dtype, **{"pass": "forward"})
    mine, flex = measured(rows, contender="farlight cpu"), measured(rows, contender="FlexAttention, compiled")
    if mine and flex:
        yield kind(mine[0]), flex[0]["seconds"] / mine[0]["seconds"]


def target_table(results: dict[str, Any], all_targets: Callable[[dict[str, Any]], Iterator[Target]] = targets) -> str:
    answers = {True: "met", False: "**not met**", None: "not measured"}
    body = []
    for one in all_targets(results):
        values = ", ".join(f"{value:.3g} ({what})" if what else f"{value:.3g}" for what, value in one.found)
        body.append([one.text, f"{'≤' if one.at_most else '≥'} {one.bound:g}", values, answers[one.met]])
    return table(["aim", "bound", "measured", ""], body)
