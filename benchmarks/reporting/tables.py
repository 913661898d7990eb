"""One Markdown table for each section of the suite."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from reporting.gpu import GPU_TABLES
from reporting.wording import Row, code, distinct, kind, measured, percent, rate, rows_of, seconds, share, spread, table, times

__all__ = ["CONTENT_SECTIONS", "DECODE_SECTIONS", "TABLES"]


def headline(results: dict[str, Any]) -> str:
    rows = measured(rows_of(results, "headline"))
    head = ["contender", "time (range)", "useful GFLOP/s", "÷ matmul", "against dense", "extra memory", "in the first call"]
    parts = []
    for dtype, passes in distinct(rows, "dtype", "pass"):
        body = []
        for row in measured(rows, dtype=dtype, **{"pass": passes}):
            useful = row.get("useful_gflops", row.get("gflops"))
            cells = [row["contender"], spread(row), rate(useful), share(row.get("of_matmul")), times(row.get("times_dense"))]
            body.append([*cells, percent(row.get("extra_memory")), percent(row.get("extra_memory_first"))])
        parts.append(f"**{dtype}, {passes}**, {rows[0]['tokens']:,} tokens\n\n" + table(head, body))
    for row in rows:
        if "mask_seconds" in row:
            parts.append(
                f"{row['contender']}, {kind(row)}: building its mask took {seconds(row['mask_seconds'])} and its first call, "
                f"which compiles, {seconds(row['first_seconds'])}; neither is part of the time above.\n"
            )
    parts.append(
        "Extra memory is the peak beyond inputs and results (out; with backward also dq, dk, dv), as a share of q + k + v + "
        "out, measured in a fresh process; the first call also plans, or builds a mask and compiles.\n"
    )
    return "\n".join(parts) if rows else ""


def length(results: dict[str, Any]) -> str:
    rows = measured(rows_of(results, "length"))
    head = ["tokens", "farlight (range)", "dense SDPA", "against dense", "useful GFLOP/s", "÷ matmul"]
    parts = []
    for dtype, passes in distinct(rows, "dtype", "pass"):
        body = []
        for row in measured(rows, dtype=dtype, **{"pass": passes}):
            full = seconds(row.get("dense_seconds"))
            full = f"≈ {full} (predicted)" if row.get("dense_predicted") else full
            cells = [f"{row['tokens']:,}", spread(row), full, times(row.get("times_dense"))]
            body.append([*cells, rate(row.get("useful_gflops")), share(row.get("of_matmul"))])
        ratios = {
            r["tokens"]: r["times_dense"] for r in rows if (r["dtype"], r["pass"]) == (dtype, passes) and "times_dense" in r
        }
        parts.append(f"**{dtype}, {passes}**: {break_even(ratios)}\n\n" + table(head, body))
    if any(row.get("dense_predicted") for row in rows):
        base = max(row["dense_from"] for row in rows if row.get("dense_predicted"))
        parts.append(f"Predicted: the dense time at the longest measured length (up to {base:,} tokens) times n².\n")
    return "\n".join(parts)


def break_even(ratios: dict[int, float]) -> str:
    """From which length on dense attention is beaten, read between the measured ones."""
    last = max((n for n, ratio in ratios.items() if ratio < 1), default=None)
    later = [n for n in sorted(ratios) if last is None or n > last]
    if not later:
        return "dense attention is not beaten at any measured length."
    if last is None:
        return f"dense attention is beaten at every measured length, from {later[0]:,} tokens on."
    low, high = math.log(ratios[last]), math.log(ratios[later[0]])
    at = last * (later[0] / last) ** (-low / (high - low))
    return f"dense attention is beaten from about {at:,.0f} tokens on ({last:,} loses, {later[0]:,} wins)."


def patterns(results: dict[str, Any]) -> str:
    rows = measured(rows_of(results, "patterns"))
    kinds = distinct(rows, "dtype", "pass")
    head = ["pattern", "density", "waste", "planning"]
    head += [f"{kind({'dtype': dtype, 'pass': passes})}: GFLOP/s (÷ window's, time ÷ window's)" for dtype, passes in kinds]
    body = []
    for (name,) in distinct(rows, "pattern"):
        mine = measured(rows, pattern=name)
        cells = [code(name), percent(mine[0]["density"]), share(mine[0]["waste"]), seconds(mine[0]["plan_seconds"])]
        for dtype, passes in kinds:
            found = measured(mine, dtype=dtype, **{"pass": passes})
            cells.append(_against_window(found[0]) if found else "")
        body.append(cells)
    return table(head, body)


def _against_window(row: Row) -> str:
    if "useful_gflops" not in row:
        return ""
    return f"{rate(row['useful_gflops'])} ({share(row['rate_of_window'])}, {share(row['time_of_window'])})"


def routing(results: dict[str, Any]) -> str:
    rows = measured(rows_of(results, "routing"))
    head = ["router", "", "density", "choosing", "planning", "attending", "together", "dense SDPA", "against dense"]
    body = []
    for row in rows:
        cells = [code(row["pattern"]), kind(row), percent(row["density"]), seconds(row["route_seconds"])]
        cells += [seconds(row["plan_seconds"]), seconds(row["attend_seconds"]), seconds(row["seconds"])]
        body.append([*cells, seconds(row["dense_seconds"]), times(row["times_dense"])])
    note = (
        "Every head chooses for itself, from random vectors: the hardest case for planning. Planning is the first attention "
        "under a new choice less a later one under the same.\n"
    )
    return (
        table(
            [*head, "planning ÷ what it saves"],
            [[*cells, percent(row.get("plan_of_saved"))] for cells, row in zip(body, rows, strict=True)],
        )
        + "\n"
        + note
        if rows
        else ""
    )


def content(results: dict[str, Any], section: str) -> str:
    rows = measured(rows_of(results, section))
    head = ["tokens", "router", "links of the causal ones", "choosing", "planning", "attending", "together", "of attending"]
    body = []
    for row in rows:
        cells = [f"{row['tokens']:,}", code(row["pattern"]), percent(row["density"])]
        cells += [seconds(row[f"{part}_seconds"]) for part in ("choose", "plan", "attend")]
        cells += [seconds(row["seconds"]), times(row["of_attending"]), seconds(row["full_seconds"]), times(row["times_full"])]
        body.append([*cells, seconds(row["sdpa_seconds"])])
    return table([*head, "full causal", "times as fast", "causal SDPA"], body) if rows else ""


def content_memory(results: dict[str, Any]) -> str:
    rows = measured(rows_of(results, "content-memory"))
    body = [[code(row["pattern"]), f"{row['tokens']:,}", row["dtype"], percent(row["extra_memory"])] for row in rows]
    return table(["router", "tokens", "dtype", "peak beyond q + k + v + out, in % of these"], body) if rows else ""


CONTENT_SECTIONS = tuple(
    f"content-{name}"
    for dtype in ("float32", "bfloat16")
    for name in (dtype, f"{dtype}-backward-short", f"{dtype}-backward", f"long-{dtype}", f"longest-{dtype}")
)


def dims(results: dict[str, Any]) -> str:
    rows = measured(rows_of(results, "dims"))
    kinds = distinct(rows, "dtype", "pass")
    usual = results["settings"]["head_dim"]
    head = [
        "head_dim",
        *(f"{kind({'dtype': dtype, 'pass': passes})}: GFLOP/s (÷ D={usual}, ÷ matmul)" for dtype, passes in kinds),
    ]
    body = []
    for (dim,) in sorted(distinct(rows, "head_dim")):
        cells = [str(dim)]
        for dtype, passes in kinds:
            found = measured(rows, head_dim=dim, dtype=dtype, **{"pass": passes})
            row = found[0] if found else {}
            shown = "useful_gflops" in row
            cells.append(
                f"{rate(row['useful_gflops'])} ({share(row['rate_of_usual'])}, {share(row['of_matmul'])})" if shown else ""
            )
        body.append(cells)
    return table(head, body)


def models(results: dict[str, Any]) -> str:
    head = [
        "model",
        "tokens",
        "whole module",
        "its projections",
        "its attention",
        "farlight (range)",
        "against it",
        "against dense",
    ]
    body = []
    for row in measured(rows_of(results, "models"), measure="layer"):
        cells = [row["model"], f"{row['tokens']:,}", seconds(row["module_seconds"]), seconds(row["projection_seconds"])]
        cells += [seconds(row["theirs_seconds"]), spread(row), times(row["times_theirs"]), times(row["times_dense"])]
        body.append(cells)
    whole = ["whole model", "tokens", "Hugging Face's", "with farlight (range)", "against it", "peak memory", "with farlight"]
    rows = []
    for row in measured(rows_of(results, "models"), measure="whole model"):
        cells = [f"{row['model']}, {row['layers']} layers", f"{row['tokens']:,}", seconds(row["theirs_seconds"]), spread(row)]
        memory = [f"{row[column] / 2**20:,.0f} MiB" for column in ("theirs_peak_bytes", "peak_bytes")]
        rows.append([*cells, times(row["times_theirs"]), *memory])
    return "\n".join((table(head, body), table(whole, rows)))


def scaling(results: dict[str, Any]) -> str:
    rows = measured(rows_of(results, "scaling"))
    parts = []
    threads = measured(rows, measure="threads")
    body = [
        [kind(row), f"{row['tokens']:,}", seconds(row["one_thread_seconds"]), spread(row), times(row["speed_up"])]
        for row in threads
        if "speed_up" in row
    ]
    count = threads[0]["threads"] if threads else 0
    parts.append(table(["one head", "tokens", "1 thread", f"{count} threads (range)", "speed-up"], body))
    calls = [row for row in measured(rows, measure="call overhead") if "us" in row]
    body = [
        [
            row["contender"],
            str(row["heads"]),
            kind(row),
            f"{row['us']:.0f} µs",
            f"{row['sdpa_us']:.0f} µs",
            f"{row['over_sdpa_us']:+.0f} µs",
        ]
        for row in calls
    ]
    short = calls[0]["tokens"] if calls else 0
    parts.append(table([f"call on {short} tokens", "heads", "dtype", "farlight", "dense SDPA", "difference"], body))
    body = []
    for row in measured(rows, measure="long text"):
        cells = [f"{row['tokens']:,}", kind(row), row.get("memory", "fresh"), spread(row), rate(row.get("useful_gflops"))]
        cells += [share(row.get("of_linear")), share(row["peak_of_inputs_and_output"])]
        body.append([*cells, share(row["peak_first_call"]), f"{row['gib']:.1f} GiB"])
    head = ["long text", "", "memory", "time (range)", "useful GFLOP/s", "time ÷ linear"]
    head += ["peak ÷ (q+k+v+out)", "first call", "q+k+v+out"]
    parts.append(table(head, body))
    return "\n".join(part for part in parts if part)


def breakeven(results: dict[str, Any]) -> str:
    rows = measured(rows_of(results, "breakeven"))
    parts = []
    for dtype, passes, backend in sorted(distinct(rows, "dtype", "pass", "backend"), reverse=True):
        mine = measured(rows, dtype=dtype, backend=backend)
        lengths = sorted({int(n) for row in mine for n in row["times_dense"]})
        head = ["pattern", "wins from", *(f"{n:,}" for n in lengths)]
        body = [
            [
                code(row["pattern"]) + (" (causal)" if row["against"].endswith("causal") else ""),
                "-" if row["breakeven"] is None else f"{row['breakeven']:,}",
                *(times(row["times_dense"].get(str(n))) for n in lengths),
            ]
            for row in mine
        ]
        parts.append(f"**{dtype}, {passes}, backend {backend}**\n\n" + table(head, body))
    if parts:
        parts.append(
            "Causal patterns are compared with causal dense attention, which does half the work. Lengths after two clear wins "
            "(1.5 ×) were not measured, nor those too short for the pattern.\n"
        )
    return "\n".join(parts)


def planning(results: dict[str, Any]) -> str:
    head = ["tokens", "seconds", "µs per token", "plan MiB", "peak MiB", "pairs", "counting alone", "waste"]
    body = []
    for row in measured(rows_of(results, "planning")):
        cells = [f"{row['tokens']:,}", seconds(row["seconds"]), f"{row['us_per_token']:.2f}", f"{row['plan_mib']:.1f}"]
        body.append([*cells, f"{row['peak_mib']:.1f}", f"{row['pairs']:,}", seconds(row["count_seconds"]), share(row["waste"])])
    return table(head, body)


def waste(results: dict[str, Any]) -> str:
    body = [
        [code(row["pattern"]), f"{row['tokens']:,}", percent(row["density"]), share(row["waste"]), str(row["pieces"])]
        for row in measured(rows_of(results, "waste"))
    ]
    return table(["pattern", "tokens", "density", "visited ÷ wanted", "pieces"], body)


DECODE_SECTIONS = ("decode-windows", "decode-blocks", "decode-stored")


def decode(results: dict[str, Any], section: str) -> str:
    rows = measured(rows_of(results, section))
    head = [
        "cache",
        "dtype",
        "stored",
        "batch",
        "caches in turn",
        "tokens",
        "keys kept",
        "cache MiB",
        "MB read",
        "step",
        "copy of as many bytes",
    ]
    head += ["step ÷ copy", "cat and SDPA, kept keys", "step ÷ that", "SDPA, all keys", "times as fast", "÷ plain window"]
    body = []
    for row in rows:
        cells = [code(row["pattern"]), row["dtype"], row["stored"], str(row["batch"])]
        cells += [
            str(row.get("caches", 1)),
            f"{row['tokens']:,}",
            f"{row['kept']:,}",
            f"{row['cache_mib']:.1f}",
            f"{row['read_bytes'] / 1e6:.2f}",
        ]
        cells += [seconds(row["step_seconds"]), seconds(row["copy_seconds"]), f"{row['of_copy']:.2f}"]
        cells += [seconds(row.get("kept_seconds")), share(row.get("of_kept")), seconds(row.get("all_seconds"))]
        cells += [times(row.get("times_all")), share(row.get("of_plain"))]
        cosine = f"{row['cosine']:.5f}" if "cosine" in row else ""
        body.append([*cells, times(row.get("times_bfloat16")), cosine])
    head += ["times as fast as bfloat16", "cosine"]
    filled = [i for i in range(len(head)) if any(cells[i] for cells in body)]
    return table([head[i] for i in filled], [[cells[i] for i in filled] for cells in body])


def scores(results: dict[str, Any]) -> str:
    body = []
    for row in measured(rows_of(results, "scores")):
        times_plain, of_equal, slower = (row.get(name) for name in ("times_plain", "rate_of_equal", "slower_than_farlight"))
        beside = f"{times_plain:.2f} × the plain call" if times_plain else ""
        beside = f"{of_equal:.2f} of the rate per operation of equal widths" if of_equal else beside
        beside = f"{slower:.2f} × farlight's alibi" if slower else beside
        body.append([code(row["term"]), kind(row), spread(row), beside])
    return table(["term", "", "time (range)", "against"], body)


def llama(results: dict[str, Any]) -> str:
    body = [
        [code(row["pattern"]), f"{row['tokens']:,}", row["pass"], spread(row), times(row["times_dense"])]
        for row in measured(rows_of(results, "llama"))
    ]
    return table(["attention", "tokens", "pass", "time (range)", "against SDPA"], body)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "headline": headline,
    "length": length,
    "patterns": patterns,
    "routing": routing,
    **{name: functools.partial(content, section=name) for name in CONTENT_SECTIONS},
    "content-memory": content_memory,
    "dims": dims,
    "scores": scores,
    "models": models,
    "scaling": scaling,
    **{name: functools.partial(decode, section=name) for name in DECODE_SECTIONS},
    "llama": llama,
    "breakeven": breakeven,
    "planning": planning,
    "waste": waste,
    **GPU_TABLES,
}
