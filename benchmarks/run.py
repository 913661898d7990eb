"""The whole suite: `python benchmarks/run.py [--device cpu|cuda] [--only SECTION …] [--quick] [--out RESULTS.json]`.

Each section runs in a process of its own, within its own time, and its rows are stored as they come. The sections and their
measurements are in `suite/`; `report.py` turns the results into pages. Exits with 1 when a section failed or a comparison was
wrong, with 3 where the device is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from suite.fresh import FreshError, fresh_rows
from suite.machine import machine
from suite.sections import SECTIONS, sections_of
from suite.settings import FULL, QUICK, TINY
from suite.store import Results, default_path

NO_GPU = """torch {torch} sees no GPU (torch.cuda.is_available() is False; built for CUDA {cuda}, ROCm {hip}).
Run this on a machine with an NVIDIA GPU of compute capability 8.0 or later, or an AMD GPU, and a torch built for it:
    pip install torch --index-url https://download.pytorch.org/whl/cu128
`--tiny` goes through the steps on the CPU under Triton's interpreter, without any figure that means something."""


def main(arguments: list[str]) -> int:
    """Measure the chosen sections and store their rows; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=_sections(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose sections; default cpu")
    parser.add_argument("--only", action="append", choices=list(SECTIONS), metavar="SECTION", help="this section; repeatable")
    parser.add_argument("--quick", action="store_true", help="smaller problems, some minutes (CPU)")
    parser.add_argument("--tiny", action="store_true", help="only show that the code runs; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="where to store; default benchmarks/results/<machine>.json")
    options = parser.parse_args(arguments)
    settings = TINY if options.tiny else QUICK if options.quick else FULL
    names = options.only or list(sections_of(options.device))
    on_gpu = any(SECTIONS[name].device == "cuda" for name in names)
    if on_gpu and settings.rehearsal:
        os.environ["TRITON_INTERPRET"] = "1"
    elif on_gpu and not torch.cuda.is_available():
        print(NO_GPU.format(torch=torch.__version__, cuda=torch.version.cuda, hip=torch.version.hip), file=sys.stderr)
        return 3
    about = machine()
    results = Results(options.out or default_path(about, settings.name, on_gpu), about, settings.to_dict())
    failed = False
    for name in names:
        failed |= _measure(results, name, settings.to_dict())
    print(f"stored in {results.path}")
    return 1 if failed else 0


def _measure(results: Results, name: str, settings: dict[str, Any]) -> bool:
    """Run one section in a process of its own; True where it failed or a comparison was wrong."""
    section, failed, error = SECTIONS[name], False, None
    print(f"{name}: {section.question} (at most about {section.seconds:.0f} s)", flush=True)
    results.begin(name, section.question, section.seconds)
    start = time.perf_counter()
    try:
        # A section keeps to its time by itself; the limit is for one that hangs.
        for row in fresh_rows(
            "suite.sections:run_section", {"name": name, "settings": settings}, limit=2 * section.seconds + 60
        ):
            results.add(name, row)
            failed |= "wrong" in row
            print(f"  {time.perf_counter() - start:6.1f} s  {_short(row)}", flush=True)
    except FreshError as caught:
        error, failed = str(caught), True
        print(f"  failed: {error}", flush=True)
    results.end(name, error)
    return failed


def _sections() -> str:
    return "sections:\n" + "\n".join(f"  {s.name:<14} {s.question} ({s.seconds:.0f} s)" for s in SECTIONS.values())


def _short(row: dict[str, Any]) -> str:
    """One line that tells a watcher where the run is."""
    if "about" in row:
        rates = {**row["about"].get("ceilings", {}), **row["about"].get("rates", {})}
        return ", ".join(f"{name} {value:.4g}" for name, value in rates.items()) or "done"
    words = [str(row[name]) for name in _SHOWN if name in row]
    for name in ("skipped", "error", "wrong", "found"):
        if name in row:
            return " ".join(words) + f": {name}: {row[name]}"
    if "cases" in row:
        return " ".join(words) + f": {row['agree']} of {row['cases']} agree"
    seconds = row.get("seconds")
    return " ".join(words) + (f": {seconds:.4g} s" if isinstance(seconds, float) else "")


_SHOWN = (
    "check",
    "case",
    "measure",
    "model",
    "router",
    "pattern",
    "contender",
    "backend",
    "tokens",
    "head_dim",
    "dtype",
    "pass",
)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
