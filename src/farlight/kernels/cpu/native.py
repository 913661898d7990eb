"""The native module farlight._cpu: import, availability, choice of ISA, and the native copy of a plan."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

# torch first: its OpenMP runtime and ours have the same soname, and the loader maps the first copy for both.
import torch  # noqa: F401

from farlight.errors import PlanError, UnsupportedError
from farlight.plan.content import NATIVE_PLAN
from farlight.plan.tables import Plan

__all__ = ["available", "fma_gflops", "isa", "module", "native_plan", "unavailable", "use", "warn_if_missing"]


_native: Any = None
_missing: str | None = None

try:
    # Not `from farlight import _cpu`: without the module, that error text suspects a circular import.
    _native = importlib.import_module("farlight._cpu")
except ImportError as error:
    _missing = f"the native module farlight._cpu cannot be imported ({error}); install farlight where a C++ compiler is found"

# Overrides the ISA, for tests and comparisons; `farlight doctor` lists the names.
_isa_name = os.environ.get("FARLIGHT_CPU_ISA")
if _native is not None and _isa_name:
    try:
        _native.use(_isa_name)
    except ValueError as error:
        _native, _missing = None, f"FARLIGHT_CPU_ISA={_isa_name}: {error}"


def unavailable() -> str | None:
    """Why the native kernels cannot run in this process; None when they can."""
    return _missing


_warned = False


def warn_if_missing() -> None:
    """Warn, once per process, that attention on the CPU runs without the native kernels, and why."""
    global _warned
    if _missing is not None and not _warned:
        _warned = True
        warnings.warn(f"attention on the CPU runs in plain torch, several times slower: {_missing}.", stacklevel=2)


def module() -> Any:
    """The native module. Raises UnsupportedError where there is none."""
    if _native is None:
        raise UnsupportedError(f"backend 'cpu' cannot run: {_missing}.")
    return _native


def isa() -> str:
    """The active ISA: "amx", "avx512bf16", "avx512", "avx2" or "portable" (NEON on arm64, SSE2 on x86-64)."""
    name: str = module().isa()
    return name


def fma_gflops(threads: int) -> float:
    """GFLOP/s of register-only float32 multiply-adds on `threads` threads: the upper bound of vector products."""
    return float(module().fma_gflops(threads))


def available() -> list[str]:
    """The ISAs that are compiled in and supported by this CPU, fastest first."""
    names: list[str] = module().available()
    return names


def use(name: str) -> None:
    """Make an ISA the active one for all threads, for tests and benchmarks. Raises ValueError for an unavailable one."""
    module().use(name)


def native_plan(plan: Plan) -> Any:
    """The native copy of the plan's tables (`farlight._cpu.Plan`), built and validated on first use and cached with the plan.

    Raises PlanError when a table is malformed.
    """
    native = plan.derived.get(NATIVE_PLAN)
    if native is None:
        try:
            native = module().Plan(plan)
        except ValueError as error:
            raise PlanError(f"malformed plan: {error}.") from error
        plan.derived[NATIVE_PLAN] = native
    return native
