"""One Markdown table for each section that runs on a GPU."""

from __future__ import annotations

from typing import Any

from reporting.wording import Row, code, percent, rows_of, share, table, times

__all__ = ["GPU_TABLES"]

_PASSES = ("forward", "forward + backward")


def parity(results: dict[str, Any]) -> str:
    rows = [row for row in rows_of(results, "gpu-parity") if "cases" in row]
    body = [[row["dtype"], *(str(row[name]) for name in ("cases", "agree", "failed", "not_run"))] for row in rows]
    return table(["dtype", "cases", "agree", "fail", "not run"], body) + _wrong(rows_of(results, "gpu-parity"))


def properties(results: dict[str, Any]) -> str:
    rows = rows_of(results, "gpu-properties")
    return table(["property", "found"], [[row["check"], row["found"]] for row in rows if "found" in row]) + _wrong(rows)


def routers(results: dict[str, Any]) -> str:
    head = ["router", "tokens", "H", "D", "pass", "choose", "choose, plan, attend", "attend alone", "full", "× full", "waits"]
    rows, body = rows_of(results, "gpu-routers"), []
    for row in rows:
        for name, cells in row.get("passes", {}).items():
            choose, step, attend, full = (cells[contender].get("seconds") for contender in ("choose", "step", "attend", "full"))
            waits = "" if row["waits"] is None else str(row["waits"])
            shown = [code(row["router"]), f"{row['tokens']:,}", str(row["heads"]), str(row["head_dim"]), name]
            body.append([*shown, *map(_ms, (choose, step, attend, full)), times(_ratio(full, step)), waits])
    return table(head, body) + _wrong(rows)


def speed(results: dict[str, Any]) -> str:
    rows = [row for row in rows_of(results, "gpu-speed") if "passes" in row]
    rates = results["sections"].get("gpu-speed", {}).get("rates", {})
    parts = ["Measured ceilings: " + ", ".join(f"{name} {value:.4g}" for name, value in rates.items()) + ".\n"] if rates else []
    for name in _PASSES:
        parts += [f"**{name}**\n", _pass(name, rows)]
    parts += ["**Before the first answer**\n", _preparations(rows), _wrong(rows_of(results, "gpu-speed"))]
    left_out = [f"- {row['pattern']}, {row['tokens']:,} tokens: {why}" for row in rows for why in row["left_out"]]
    return "\n".join([*parts, *(["Not timed:\n", *left_out] if left_out else [])])


def _pass(name: str, rows: list[Row]) -> str:
    head = ["pattern", "tokens", "H", "D", "density", "waste", "ours", "flex", "× flex", "× flex with its mask"]
    head += ["flash window", "full", "× full", "useful TFLOP/s", "of the roofline", "visited, of full attention's rate"]
    body = []
    for row in rows:
        cells = row["passes"].get(name, {})
        ours = cells.get("ours", {}).get("seconds")
        if ours is None:
            continue
        flex, flash, full = (cells.get(contender, {}).get("seconds") for contender in ("flex", "flash window", "full"))
        with_mask = None if flex is None else flex + row["flex_mask_seconds"]
        shown = [code(row["pattern"]), f"{row['tokens']:,}", str(row["heads"]), str(row["head_dim"]), percent(row["density"])]
        shown += [share(row["waste"]), _ms(ours), _ms(flex), times(_ratio(flex, ours)), times(_ratio(with_mask, ours))]
        shown += [_ms(flash), _ms(full), times(_ratio(full, ours)), f"{cells['useful_tflops']:.1f}"]
        body.append([*shown, percent(cells["of_roofline"]), percent(cells.get("of_full_attention_rate"))])
    return table(head, body)


def _preparations(rows: list[Row]) -> str:
    head = ["pattern", "tokens", "plan s", "plan MiB", "first call s", "flex mask s, first", "again", "flex first call s"]
    body = []
    for row in rows:
        flex = (row.get(name) for name in ("flex_mask_first_seconds", "flex_mask_seconds", "flex_first_call_seconds"))
        shown = [code(row["pattern"]), f"{row['tokens']:,}", f"{row['plan_seconds']:.2f}", f"{row['plan_mib']:.1f}"]
        shown += [f"{row['first_call_seconds']:.2f}", *(share(value) for value in flex)]
        body.append([*shown, f"{row['peak_mib']:,.0f}" if "peak_mib" in row else ""])
    return table([*head, "peak MiB"], body)


def _wrong(rows: list[Row]) -> str:
    names = ("check", "case", "dtype", "router", "pattern", "tokens")
    lines = [f"- {' '.join(str(row[n]) for n in names if n in row)}: {row['wrong']}" for row in rows if "wrong" in row]
    return "\n".join(["\n**FAILED**\n", *lines, ""]) if lines else ""


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f} ms"


def _ratio(theirs: float | None, ours: float | None) -> float | None:
    return None if theirs is None or ours is None else theirs / ours


GPU_TABLES = {"gpu-parity": parity, "gpu-properties": properties, "gpu-routers": routers, "gpu-speed": speed}
