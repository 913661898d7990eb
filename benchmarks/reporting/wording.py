"""How figures are spelt, and how rows are found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def rows_of(results: dict[str, Any], section: str) -> list[Row]:
    rows: list[Row] = results["sections"].get(section, {}).get("rows", [])
    return rows


def measured(rows: Iterable[Row], **where: Any) -> list[Row]:
    """Rows that hold figures, and agree in these columns."""
    good = (row for row in rows if "skipped" not in row and "error" not in row)
    return [row for row in good if all(row.get(name) == value for name, value in where.items())]


def distinct(rows: Iterable[Row], *names: str) -> list[tuple[Any, ...]]:
    """The combinations of these columns, in the order in which they come up."""
    return list(dict.fromkeys(tuple(row.get(name) for name in names) for row in rows))


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    if value < 0.1:
        return f"{value * 1e3:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"


def spread(row: Row) -> str:
    """Median and range."""
    if "seconds" not in row:
        return ""
    if row.get("repeats", 1) < 2:
        return f"{seconds(row['seconds'])} (once)"
    return f"{seconds(row['seconds'])} ({seconds(row['low'])} – {seconds(row['high'])})"


def times(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} ×" if value < 10 else f"{value:,.0f} ×"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value * 100:.3g} %"


def rate(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def kind(row: Row) -> str:
    """`f32 forward` and the like."""
    return " ".join(part for part in (DTYPES.get(row.get("dtype", ""), row.get("dtype", "")), row.get("pass", "")) if part)


def code(text: str) -> str:
    return f"`{text}`"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table; empty when there are no rows."""
    lines = [[str(cell).replace("|", "\\|") for cell in line] for line in body]
    if not lines:
        return ""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (list(head), rule, *lines)) + "\n"
