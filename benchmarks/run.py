"""The whole suite: `python benchmarks/run.py [--only SECTION …] [--quick] [--out RESULTS.json]`.

Each section runs in a process of its own, within its own time, and its rows are stored as they come. The sections and their
measurements are in `farlight.bench`; `report.py` turns the results into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from farlight.bench.fresh import FreshError, fresh_rows
from farlight.bench.machine import machine
from farlight.bench.sections import SECTIONS
from farlight.bench.settings import FULL, QUICK, TINY
from store import Results, default_path


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=_sections(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=list(SECTIONS), metavar="SECTION", help="this section; repeatable")
    parser.add_argument("--quick", action="store_true", help="smaller problems, some minutes")
    parser.add_argument("--tiny", action="store_true", help="only show that the code runs; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="where to store; default benchmarks/results/<machine>.json")
    chosen = parser.parse_args(arguments)
    settings = TINY if chosen.tiny else QUICK if chosen.quick else FULL
    here = machine()
    results = Results(chosen.out or default_path(here, settings.name), here, settings.to_dict())
    failed = False
    for name in chosen.only or SECTIONS:
        section = SECTIONS[name]
        print(f"{name}: {section.question} (at most about {section.seconds:.0f} s)", flush=True)
        results.begin(name, section.question, section.seconds)
        start, error = time.perf_counter(), None
        target, given = "farlight.bench.sections:run_section", {"name": name, "settings": settings.to_dict()}
        try:
            # A section minds its time itself; this is for one that hangs.
            for row in fresh_rows(target, given, limit=2 * section.seconds + 60):
                results.add(name, row)
                print(f"  {time.perf_counter() - start:6.1f} s  {_short(row)}", flush=True)
        except FreshError as caught:
            error, failed = str(caught), True
            print(f"  failed: {error}", flush=True)
        results.end(name, error)
    print(f"stored in {results.path}")
    return 1 if failed else 0


def _sections() -> str:
    return "sections:\n" + "\n".join(f"  {s.name:<10} {s.question} ({s.seconds:.0f} s)" for s in SECTIONS.values())


def _short(row: dict[str, Any]) -> str:
    """One line that tells a watcher where the run is."""
    if "about" in row:
        return ", ".join(f"{name} {value:.4g}" for name, value in row["about"].get("ceilings", {}).items()) or "done"
    words = [str(row[name]) for name in _TOLD if name in row]
    for name in ("skipped", "error"):
        if name in row:
            return " ".join(words) + f": {name}: {row[name]}"
    seconds = row.get("seconds")
    return " ".join(words) + (f": {seconds:.4g} s" if isinstance(seconds, float) else "")


_TOLD = ("measure", "model", "pattern", "contender", "backend", "tokens", "head_dim", "dtype", "pass")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
