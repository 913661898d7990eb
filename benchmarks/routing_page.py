"""The measured tables of docs/routing.md from a results file: `python benchmarks/routing_page.py [RESULTS.json]`.

Measured by `python benchmarks/run.py --only SECTION` for the sections `content-…`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from reporting.tables import CONTENT_SECTIONS, TABLES

__all__ = ["main", "page"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2-threads.json"
BEGIN, END = "<!-- content: written by benchmarks/routing_page.py -->", "<!-- content: end -->"


def page(text: str, results: dict[str, Any]) -> str:
    """The text with the tables between its two marks replaced by those of the results."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    machine = results["machine"]
    parts = [f"{machine['processor']} ({machine['instructions']}), {machine['threads']} threads, torch {machine['torch']}:"]
    for name in (*CONTENT_SECTIONS, "content-memory"):
        made = TABLES[name](results).strip()
        if made:
            parts += [f"`--only {name}`", made]
    return before + BEGIN + "\n\n" + "\n\n".join(parts) + "\n\n" + END + after


def main(arguments: list[str]) -> int:
    """Rewrite docs/routing.md."""
    results = json.loads((Path(arguments[0]) if arguments else RESULTS).read_text(encoding="utf-8"))
    docs = ROOT / "docs" / "routing.md"
    docs.write_text(page(docs.read_text(encoding="utf-8"), results), encoding="utf-8")
    print(f"wrote {docs.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
