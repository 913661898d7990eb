"""The native module: why it is missing, which instruction set it uses, and plans in its own form."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

# torch first: its OpenMP runtime and ours carry one name, and the loader maps the copy that comes first for both.
import torch  # noqa: F401

from farlight.errors import PlanError, UnsupportedError
from farlight.plan.tables import Plan

__all__ = ["available", "fma_gflops", "handle", "isa", "module", "unavailable", "use", "warn_if_missing"]


_native: Any = None
_missing: str | None = None

try:
    # Not `from farlight import`: where there is none, Python would suspect a circular import.
    _native = importlib.import_module("farlight._cpu")
except ImportError as error:
    _missing = f"the native module farlight._cpu cannot be imported ({error}); install farlight where a C++ compiler is found"

# For tests and for comparing: the name of an instruction set, as `farlight doctor` lists them.
_wanted = os.environ.get("FARLIGHT_CPU_ISA")
if _native is not None and _wanted:
    try:
        _native.use(_wanted)
    except ValueError as error:
        _native, _missing = None, f"FARLIGHT_CPU_ISA={_wanted}: {error}"


def unavailable() -> str | None:
    """Why the native kernels cannot run here; None when they can."""
    return _missing


_told = False


def warn_if_missing() -> None:
    """Say once in a process that attention on the CPU runs without the native kernels, and why."""
    global _told
    if _missing is not None and not _told:
        _told = True
        warnings.warn(f"attention on the CPU runs in plain torch, several times slower: {_missing}.", stacklevel=2)


def module() -> Any:
    """The native module. Raises UnsupportedError where there is none."""
    if _native is None:
        raise UnsupportedError(f"backend 'cpu' cannot run: {_missing}.")
    return _native


def isa() -> str:
    """The instruction set in use: "amx", "avx512bf16", "avx512", "avx2" or "portable" (which is NEON on arm64)."""
    name: str = module().isa()
    return name


def fma_gflops(threads: int) -> float:
    """GFLOP/s of float32 multiply-adds in registers, on so many threads at once: what no product of vectors exceeds."""
    return float(module().fma_gflops(threads))


def available() -> list[str]:
    """The instruction sets that were compiled in and that this machine has, best first."""
    names: list[str] = module().available()
    return names


def use(name: str) -> None:
    """Use this instruction set from now on, in all threads. For tests and benchmarks."""
    module().use(name)


_HANDLE = "native copy"


def handle(plan: Plan) -> Any:
    """The plan's tables as the kernels read them, copied and checked when the plan is first met; kept with the plan.

    Raises PlanError when a table is malformed.
    """
    found = plan.derived.get(_HANDLE)
    if found is None:
        try:
            found = module().Plan(plan)
        except ValueError as error:
            raise PlanError(f"malformed plan: {error}.") from error
        plan.derived[_HANDLE] = found
    return found
