"""Rows of measurements as a table for people, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from farlight.bench.machine import ceilings, machine

__all__ = ["show"]

# Kept in the JSON; in a table they are noise.
_HIDDEN = ("memory_method", "low", "high", "count", "pattern_repr", "misfits")


def show(title: str, rows: Sequence[dict[str, Any]], *, as_json: bool, matmul_size: int = 2048) -> None:
    """Print rows under a line that says where they were measured and what that machine does at best."""
    about = {**machine(), **{name: round(rate, 1) for name, rate in ceilings(matmul_size, repeats=3).items()}}
    if as_json:
        print(json.dumps({"title": title, "machine": about, "rows": list(rows)}, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=", ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items()))
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    for name in columns:
        text = any(isinstance(row.get(name), str) for row in flat)
        table.add_column(name.replace("_", " "), justify="left" if text else "right", overflow="fold")
    for row in flat:
        table.add_row(*(_text(row.get(name, "")) for name in columns))
    Console().print(table)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """One level of columns: what is nested by length becomes a column for each length."""
    out: dict[str, Any] = {}
    for name, value in row.items():
        if name in _HIDDEN:
            continue
        if not isinstance(value, dict):
            out[name] = value
        elif name == "times_dense":
            out.update({f"× at {key}": item for key, item in value.items()})
    # Only these: the seconds behind the ratios would not fit a screen.
    return out


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
