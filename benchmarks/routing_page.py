"""The measured tables of docs/routing.md from results files: `python benchmarks/routing_page.py [RESULTS.json …]`.

Measured by `python benchmarks/run.py --only SECTION` for the sections `content-…`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reporting.tables import CONTENT_SECTIONS, TABLES

__all__ = ["main", "page"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = [ROOT / "benchmarks" / "results" / f"amd-epyc-{which}2-threads.json" for which in ("", "avx2-")]
BEGIN, END = "<!-- content: written by benchmarks/routing_page.py -->", "<!-- content: end -->"


def page(text: str, machines: Sequence[dict[str, Any]]) -> str:
    """The text with the tables between its two marks replaced by those of the results of each machine."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    parts = []
    for results in machines:
        about = results["machine"]
        parts.append(f"{about['processor']} ({about['instructions']}), {about['threads']} threads, torch {about['torch']}:")
        for name in (*CONTENT_SECTIONS, "content-memory"):
            made = TABLES[name](results).strip()
            if made:
                parts += [f"`--only {name}`", made]
    return before + BEGIN + "\n\n" + "\n\n".join(parts) + "\n\n" + END + after


def main(arguments: list[str]) -> int:
    """Rewrite docs/routing.md."""
    machines = [json.loads(path.read_text(encoding="utf-8")) for path in map(Path, arguments or RESULTS)]
    docs = ROOT / "docs" / "routing.md"
    docs.write_text(page(docs.read_text(encoding="utf-8"), machines), encoding="utf-8")
    print(f"wrote {docs.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
