"""Results as pages: `python benchmarks/report.py [RESULTS.json] [--out docs/benchmarks.md] [--images docs/img]`.

Nothing on a page is typed by hand: figures, wins, losses and what could not be measured all come from a results file. Without
one named, every machine in benchmarks/results gets its page: the one measured last `--out`, each other a page beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from reporting.tables import TABLES
from reporting.targets import target_table
from reporting.verdicts import losses, missing, wins
from reporting.wording import seconds, table

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", help="default: all in benchmarks/results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "img")
    chosen = parser.parse_args(arguments)
    found = _read([chosen.results] if chosen.results else sorted((ROOT / "benchmarks" / "results").glob("*.json")))
    if not found:
        print("benchmarks/results is empty; measure first: python benchmarks/run.py", file=sys.stderr)
        return 2
    first, *others = found
    outs = {first: chosen.out} | {path: chosen.out.with_name(f"{chosen.out.stem}-{path.stem}.md") for path in others}
    for path, out in outs.items():
        elsewhere = {_machine(found[other]): outs[other].name for other in found if other != path}
        _write(found[path], _shown(path), out, chosen.images if path == first else chosen.images / path.stem, elsewhere)
    return 0


def _read(paths: list[Path]) -> dict[Path, dict[str, Any]]:
    """The results by their files, those measured last first."""
    found = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    return dict(sorted(found.items(), key=lambda item: _last_start(item[1]), reverse=True))


def _last_start(results: dict[str, Any]) -> str:
    return max((section.get("started", "") for section in results.get("sections", {}).values()), default="")


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    return f"{machine['processor']} ({machine['instructions']}), {machine['threads']} threads"


def _write(results: dict[str, Any], source: str, out: Path, folder: Path, elsewhere: dict[str, str]) -> None:
    try:
        from reporting.plots import draw_all

        images = draw_all(results, folder)
    except ImportError as error:
        print(f"no plots: {error}; pip install matplotlib", file=sys.stderr)
        images = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    links = {name: os.path.relpath(image, out.parent).replace(os.sep, "/") for name, image in images.items()}
    out.write_text(page(results, source, links, elsewhere), encoding="utf-8")
    print(f"wrote {out}" + "".join(f", {image}" for image in images.values()))


def _shown(path: Path) -> str:
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def page(results: dict[str, Any], source: str, images: dict[str, str], elsewhere: dict[str, str]) -> str:
    """The whole page as Markdown; `elsewhere`: the pages of other machines."""
    s, machine = results["settings"], results["machine"]
    on_cpu = not results["sections"] or any(not name.startswith("gpu-") for name in results["sections"])
    parts = [
        "# Benchmarks" if on_cpu else f"# Benchmarks on {machine['device']}",
        f"Written by `python benchmarks/report.py` from [{source}](../{source}); no figure on this page is typed by hand. "
        "Measured by `python benchmarks/run.py` (`make bench`); `--only SECTION` repeats one section.",
    ]
    if s["name"] != "full":
        parts.append(f"**This was a run at the {s['name']} sizes.**")
    if on_cpu:
        parts.append(_METHOD.format(heads=s["heads"], head_dim=s["head_dim"]))
    if elsewhere:
        parts.append("The same on other machines: " + "; ".join(f"[{name}]({link})" for name, link in elsewhere.items()) + ".")
    parts += ["## Machine", table(["", ""], ([name.replace("_", " "), str(value)] for name, value in machine.items()))]
    if on_cpu:
        parts += ["Each section measured the machine's ceilings, in its own process:", _ceilings(results)]
        if s["name"] == "full":
            parts += ["## Aims", target_table(results)]
        for title, found in (("Where it wins", wins(results)), ("Where it loses", losses(results))):
            parts += [f"## {title}", "\n".join(f"- {line}" for line in found) or "Nothing was measured."]
    for name, make in TABLES.items():
        section = results["sections"].get(name)
        if section is None:
            continue
        made = make(results)
        parts.append(f"## {section['question']}")
        if name in images:
            parts.append(f"![{section['question']}]({images[name]})")
        parts.append(made.strip() or "Nothing was measured.")
    parts += ["## Not measured", "\n".join(f"- {_line(text)}" for text in missing(results)) or "Nothing is missing."]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _line(text: str) -> str:
    return " ".join(text.split())


def _ceilings(results: dict[str, Any]) -> str:
    body = []
    for name, section in results["sections"].items():
        peak = section.get("ceilings", {})
        load = f"{section.get('load', '')} → {section.get('load_at_end', '')}"
        cells = [name, section.get("started", ""), seconds(section.get("seconds")), load, section.get("memory", "fresh")]
        cells += [f"{peak[column]:.0f}" if column in peak else "" for column in _PEAKS]
        body.append(cells)
    return table(["section", "started (UTC)", "took", "load", "memory", *_PEAKS.values()], body)


_METHOD = (
    "Unless said otherwise: window 256 + 64 global tokens (`window(256) | global_tokens(range(64))`), batch 1, {heads} heads, "
    "head_dim {head_dim}. Times are medians with their range. The two sides of a ratio were timed in turn, A B A B …, in one "
    "process, each after an untimed call if that takes less than four seconds. A *useful pair* is an allowed (query, key) "
    "pair; it costs 4·D operations forward and 14·D forward + backward; what a contender computes besides does not count. "
    "*Against X* = how many times as fast as X. Memory is *fresh* where freed memory goes back to the system, as glibc has it; "
    "*kept* where it stays with the process (`mallopt`), in sections that compare kernels: for all contenders alike."
)
_PEAKS = {
    "fma_float32_gflops": "FMA f32, GFLOP/s",
    "matmul_float32_gflops": "matmul f32, GFLOP/s",
    "matmul_bfloat16_gflops": "matmul bf16, GFLOP/s",
    "copy_gbs": "copy, GB/s",
}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
