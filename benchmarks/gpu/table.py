"""The page that is written from the results. Only figures that were measured stand in it."""

from __future__ import annotations

from typing import Any

__all__ = ["markdown"]


def markdown(data: dict[str, Any]) -> str:
    about = data["machine"]
    lines = [f"# Triton backend on {about['device']}", ""]
    if about.get("rehearsal"):
        lines += ["A rehearsal under Triton's interpreter on the CPU: the times mean nothing.", ""]
    lines += [", ".join(f"{name} {value}" for name, value in about.items() if name not in ("device", "rehearsal")), ""]
    lines += _parity(data.get("parity", {}), data.get("properties", []))
    if data.get("rates"):
        lines += ["Measured ceilings: " + ", ".join(f"{name} {value:.4g}" for name, value in data["rates"].items()) + ".", ""]
    for name in ("forward", "forward + backward"):
        lines += _table(data["rows"], name)
    lines += _preparations(data["rows"])
    lines += _routers(data["routers"])
    if data["skipped"]:
        lines += ["## Not run", "", *(f"- {one['what']}: {one['why']}" for one in data["skipped"]), ""]
    return "\n".join(lines)


def _parity(parity: dict[str, Any], properties: list[dict[str, Any]]) -> list[str]:
    if not parity and not properties:
        return []
    lines = ["## Right?", ""]
    for name, found in parity.items():
        if isinstance(found, dict):
            failed, missing = found["failed"], found["not run"]
            lines.append(f"- {name}: {found['agree']} of {found['cases']} cases agree, {failed} fail, {missing} not run")
    for line in parity.get("failures", []):
        lines.append(f"- FAILED: {line['case']}, {line['dtype']}: {line['error']}")
    lines += [f"- {one['property']}: {'' if one['holds'] else 'FAILED: '}{one['what']}" for one in properties]
    return [*lines, ""]


def _table(rows: list[dict[str, Any]], name: str) -> list[str]:
    rows = [row for row in rows if "seconds" in row["passes"].get(name, {}).get("ours", {})]
    if not rows:
        return []
    head = [
        "pattern", "tokens", "H", "D", "density", "waste", "ours ms", "flex ms", "× flex", "× flex with its mask",
        "flash window ms", "full ms", "× full", "useful TFLOP/s", "of the roofline", "visited, of full attention's rate",
    ]  # fmt: skip
    lines = [f"## {name}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = row["passes"][name]
        mine = cells["ours"]["seconds"]
        flex, flash, full = (cells.get(one, {}).get("seconds") for one in ("flex", "flash window", "full"))
        with_mask = None if flex is None else flex + row["flex_mask_seconds"]
        rate = cells.get("of_full_attention_rate")
        lines.append(
            f"| {row['pattern']} | {row['tokens']:,} | {row['heads']} | {row['head_dim']} | {row['density']:.2%} "
            f"| {row['waste']:.2f} | {mine * 1e3:.3f} | {_ms(flex)} | {_times(flex, mine)} | {_times(with_mask, mine)} "
            f"| {_ms(flash)} | {_ms(full)} | {_times(full, mine)} | {cells['useful_tflops']:.1f} | {cells['of_roofline']:.0%} "
            f"| {'' if rate is None else f'{rate:.0%}'} |"
        )
    return [*lines, ""]


def _preparations(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    head = [
        "pattern",
        "tokens",
        "plan s",
        "plan MiB",
        "first call s",
        "flex mask s, first",
        "again",
        "flex first call s",
        "peak MiB",
    ]
    lines = ["## Before the first answer", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        flex = (row.get(name) for name in ("flex_mask_first_seconds", "flex_mask_seconds", "flex_first_call_seconds"))
        peak = row.get("peak_mib")
        lines.append(
            f"| {row['pattern']} | {row['tokens']:,} | {row['plan_seconds']:.2f} | {row['plan_mib']:.1f} "
            f"| {row['first_call_seconds']:.2f} | {' | '.join('' if x is None else f'{x:.2f}' for x in flex)} "
            f"| {'' if peak is None else f'{peak:,.0f}'} |"
        )
    wrong = [f"- {row['pattern']}, {row['tokens']:,} tokens: {row['wrong']}" for row in rows if row["wrong"] is not None]
    return [*lines, "", *(["FAILED:", *wrong, ""] if wrong else [])]


def _routers(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    head = [
        "router", "tokens", "H", "D", "pass", "choose ms", "choose, plan and attend ms", "attend alone ms", "full ms", "× full",
        "waits",
    ]  # fmt: skip
    lines = ["## Routers", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        for name, cells in row["passes"].items():
            choose, step, attend, full = (cells[one].get("seconds") for one in ("choose", "step", "attend", "full"))
            waits = "" if row["waits"] is None else row["waits"]
            lines.append(
                f"| {row['router']} | {row['tokens']:,} | {row['heads']} | {row['head_dim']} | {name} | {_ms(choose)} "
                f"| {_ms(step)} | {_ms(attend)} | {_ms(full)} | {'' if step is None else _times(full, step)} | {waits} |"
            )
    return [*lines, ""]


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f}"


def _times(theirs: float | None, mine: float) -> str:
    return "" if theirs is None else f"{theirs / mine:.2f}"
