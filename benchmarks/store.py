"""The results of a run as one JSON file, written anew after every row: a run that is killed keeps what it has."""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["Results", "default_path"]

Row = dict[str, Any]
FORMAT = 1


def default_path(machine: dict[str, Any], settings: str) -> Path:
    """`results/amd-epyc-2-threads.json` beside this file; anything but the full sizes is named as such."""
    words = re.sub(r"[^a-z0-9]+", "-", str(machine["processor"]).lower()).strip("-") or "machine"
    kind = "" if settings == "full" else f"-{settings}"
    return Path(__file__).parent / "results" / f"{words}-{machine['threads']}-threads{kind}.json"


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
        # NaN is no JSON: a row that has one is a mistake, and must not be stored.
        part.write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(part, self.path)
