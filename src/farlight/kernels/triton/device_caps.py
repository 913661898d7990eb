"""Device capabilities: whether Triton can run for a device, how many processors it has, which generation it is of."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

__all__ = ["interpreted", "is_hopper", "missing", "not_installed", "num_processors", "unfit"]


def not_installed() -> str | None:
    """Why there is no Triton to import; None when there is one. Imports nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'farlight[triton]' (it comes with torch builds for GPUs)"
    return None


@functools.cache
def missing() -> str | None:
    """Why Triton cannot be imported; None when it can."""
    reason = not_installed()
    if reason is not None:
        return reason
    try:
        import triton.language  # noqa: F401
    except Exception as error:  # a broken installation can raise anything, and it becomes a reason
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter replaces the compiler: TRITON_INTERPRET must be set before triton is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@functools.cache
def unfit(device: torch.device) -> str | None:
    """Why kernels cannot run on this device; None when they can."""
    if device.type == "cpu":
        if interpreted():
            return None
        return (
            "the tensors are on the CPU, Triton compiles for GPUs (with TRITON_INTERPRET=1 in the environment its interpreter "
            "runs the kernels here, slowly, for tests)"
        )
    if device.type not in ("cuda", "xpu"):
        return f"the tensors are on {device.type}, these kernels run on CUDA, ROCm and XPU devices"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, 8.0 is needed"
    return None


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors (CUDA, ROCm) or subslices (XPU), over which work is balanced; 8 under the interpreter."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).gpu_subslice_count)
    return 8


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether this is an NVIDIA device of compute capability 9 or later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
