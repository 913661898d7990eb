"""The results of a run as one JSON file, rewritten after every row: a run that is killed keeps its rows."""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["Results", "compact", "default_path"]

Row = dict[str, Any]
FORMAT = 1


def default_path(machine: dict[str, Any], settings: str, on_gpu: bool = False) -> Path:
    """`benchmarks/results/amd-epyc-2-threads.json`, for a GPU `…/nvidia-h100.json`; other than full sizes in the name."""
    name = f"{machine['device']}" if on_gpu else f"{machine['processor']}-{machine['threads']}-threads"
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "machine"
    sizes = "" if settings == "full" else f"-{settings}"
    return Path(__file__).parents[1] / "results" / f"{words}{sizes}.json"


class Results:
    """Sections by name. Those measured before on the same machine with the same settings stay until measured again."""

    def __init__(self, path: Path, machine: dict[str, Any], settings: dict[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        machine, settings = json.loads(json.dumps([machine, settings]))  # tuples read back as lists: compare what is stored
        kept: dict[str, Any] = {}
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            if old.get("format") == FORMAT and old["machine"] == machine and old["settings"] == settings:
                kept = old["sections"]
            elif old.get("sections"):
                print(f"{path}: other machine, versions or settings; its sections are replaced.")
        self.data: dict[str, Any] = {
            "format": FORMAT,
            "machine": machine,
            "settings": settings,
            "written": "",
            "sections": kept,
        }

    def begin(self, name: str, question: str, seconds: float) -> None:
        self.data["sections"][name] = {"question": question, "box_seconds": seconds, "complete": False, "rows": []}
        self.write()

    def add(self, name: str, row: Row) -> None:
        section = self.data["sections"][name]
        if set(row) == {"about"}:
            section.update(row["about"])
        else:
            section["rows"].append(row)
        self.write()

    def end(self, name: str, error: str | None = None) -> None:
        section = self.data["sections"][name]
        section["complete"] = error is None
        if error is not None:
            section["error"] = error
        self.write()

    def write(self) -> None:
        self.data["written"] = datetime.now(UTC).isoformat(timespec="seconds")
        part = self.path.with_suffix(".part")
        part.write_text(compact(self.data), encoding="utf-8")
        os.replace(part, self.path)


def compact(data: dict[str, Any]) -> str:
    """The results as JSON with one line for each row. Raises ValueError for NaN, which JSON does not have."""
    rows: list[str] = []

    def mark(row: Row) -> str:
        rows.append(json.dumps(row, allow_nan=False))
        return f"@row {len(rows) - 1}@"

    sections = {name: {**section, "rows": [mark(row) for row in section["rows"]]} for name, section in data["sections"].items()}
    text = json.dumps({**data, "sections": sections}, indent=1, allow_nan=False)
    return re.sub(r'"@row (\d+)@"', lambda found: rows[int(found[1])], text) + "\n"
