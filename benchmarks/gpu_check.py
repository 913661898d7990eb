"""On a GPU: parity of the Triton backend over the shared cases, then its speed beside FlexAttention and full attention.

    scripts/gpu_check.sh [--seconds 450] [--out benchmarks/results] [--rehearse]

Writes `<device>.json` and `<device>.md` after every step, so that a run that is cut short keeps what it has. What was not run
is listed with the reason. Exits with 1 when a comparison failed, with 3 where there is no GPU. `--rehearse` goes through all
steps at toy sizes under Triton's interpreter: it proves the program, not the kernels' speed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import farlight
from gpu import graphs, parity, routers, speed, table

HERE = Path(__file__).parent
NO_GPU = """gpu_check: torch {torch} sees no GPU (torch.cuda.is_available() is False; built for CUDA {cuda}, ROCm {hip}).
Run this on a machine with an NVIDIA GPU of compute capability 8.0 or later, or an AMD GPU, and a torch built for it:
    pip install torch --index-url https://download.pytorch.org/whl/cu128
`--rehearse` goes through the steps on the CPU, at toy sizes, without any figure that means something."""


class Report:
    """What was found, written anew after every step."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
        self.path = folder / f"{name}.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.data: dict[str, Any] = {"format": 1, "machine": about, "parity": {}}
        self.data |= {name: [] for name in ("properties", "rows", "routers", "skipped")}

    def skip(self, what: str, why: str) -> None:
        print(f"  skipped {what}: {why}", flush=True)
        self.data["skipped"].append({"what": what, "why": why})
        self.write()

    def write(self) -> None:
        self.path.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        self.path.with_suffix(".md").write_text(table.markdown(self.data), encoding="utf-8")


def machine(rehearsal: bool) -> dict[str, Any]:
    import triton

    about: dict[str, Any] = {"device": "rehearsal", "rehearsal": rehearsal}
    if not rehearsal:
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    return about | {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": triton.__version__,
        "farlight": farlight.__version__,
        "commit": _commit(),
        "command": "scripts/gpu_check.sh " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--seconds", type=float, default=450.0, help="stop beginning new measurements after so long")
    words.add_argument("--out", type=Path, default=HERE / "results")
    words.add_argument("--rehearse", action="store_true")
    words.add_argument("--only", choices=["parity", "speed"], help="one half")
    options = words.parse_args()
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print(NO_GPU.format(torch=torch.__version__, cuda=torch.version.cuda, hip=torch.version.hip), file=sys.stderr)
        return 3
    began = time.monotonic()

    def left() -> float:
        return options.seconds - (time.monotonic() - began)

    report = Report(options.out, machine(options.rehearse))
    print(f"{report.data['machine']}", flush=True)
    failed = 0
    if options.only != "speed":
        # At most half of the time: cases that are not reached are listed as skipped.
        failed += parity.run(report, min(left(), options.seconds / 2), options.rehearse)
        failed += graphs.run(report, options.rehearse)
    if options.only != "parity":
        failed += routers.run(report, left, options.rehearse)
        failed += speed.run(report, left, options.rehearse)
    print(table.markdown(report.data))
    print(f"{report.path} and {report.path.with_suffix('.md').name} written after {time.monotonic() - began:.0f} s")
    print(f"{failed} comparisons FAILED" if failed else "every comparison that was made agrees")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
