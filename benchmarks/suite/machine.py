"""What stands beside every figure: the machine, the versions, and what the machine can do at best."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import farlight
from farlight.kernels import cpu
from suite.timing import interleaved, matmul, matmul_flops, seconds_of

__all__ = ["ceilings", "copy_rate", "free_memory", "load", "machine"]


def machine() -> dict[str, Any]:
    """Processor, threads, memory and versions: what does not change from one run on a machine to the next."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_meminfo("MemTotal") / 2**30, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **_accelerator(),
        "instructions": f"torch {torch.backends.cpu.get_cpu_capability()}, farlight {_native()}",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "transformers": _version("transformers"),
        "farlight": farlight.__version__,
    }


def _accelerator() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "device_memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": _version("triton"),
    }


def ceilings(size: int = 2048, repeats: int = 7) -> dict[str, float]:
    """GFLOP/s of a square matrix product in float32 and bfloat16 and of float32 multiply-adds in registers, GB/s of reading and
    writing 256 MiB: on this machine, now.
    """
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        timed = _matmul_size(dtype, size)
        seconds = interleaved([matmul(dtype, timed)], repeats=repeats)["matmul"].seconds
        rates[f"matmul_{str(dtype).removeprefix('torch.')}_gflops"] = matmul_flops(timed) / seconds / 1e9
    if cpu.unavailable() is None:
        rates["fma_float32_gflops"] = max(cpu.fma_gflops(torch.get_num_threads()) for _ in range(repeats))
    return {**rates, "copy_gbs": copy_rate(repeats=repeats)}


def _matmul_size(dtype: torch.dtype, size: int, seconds: float = 1.0) -> int:
    """`size`, halved until a product takes about `seconds` or less: without bfloat16 instructions torch takes minutes."""
    small = min(size, 256)
    once = seconds_of(matmul(dtype, small).call, repeats=1)
    while size > small and once * (size / small) ** 3 > seconds:
        size //= 2
    return size


def copy_rate(device: str = "cpu", repeats: int = 7) -> float:
    """GB/s of reading and writing 256 MiB."""
    source = torch.zeros(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds_of(lambda: target.copy_(source), repeats=repeats) / 1e9


def load() -> float | None:
    """Processes that wanted a core during the last minute: above the number of cores, others were measured too."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def free_memory() -> int:
    """Bytes that can be had without swapping; a very large number where the system does not say."""
    return _meminfo("MemAvailable") or 2**62


def _meminfo(field: str) -> int:
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _native() -> str:
    return "has no native kernels" if cpu.unavailable() is not None else cpu.isa()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
