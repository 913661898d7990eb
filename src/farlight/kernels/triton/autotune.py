"""Autotuning: the fastest of a pass's candidate configurations on this device, timed once on real work and kept in a file.

The first call that is large enough times the candidates interleaved, five rounds, so that a device that warms up or throttles
favours none. Smaller calls, and calls where timing is not possible (Triton's interpreter, CUDA graph capture,
`FARLIGHT_CALIBRATE=0`), use the first candidate. The file lies in `farlight.caching.cache_folder`, one for each device name and
release of torch and Triton; its keys are "pass dtype head_dim", head_dim padded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from farlight.caching import cache_folder
from farlight.kernels.triton.configs import Config, candidates, padded
from farlight.kernels.triton.device_caps import is_hopper
from farlight.measurements import read_measurements, write_measurements

__all__ = ["config_for", "expected_config", "fastest"]

# Visited pairs times head_dim below which a call is too short to be timed.
_MIN_TIMED_WORK = 2**33
_ROUNDS = 5
_chosen: dict[tuple[str, torch.device, torch.dtype, int], Config] = {}


class HasVisited(Protocol):
    """A plan, of which the number of visited pairs is read."""

    @property
    def visited(self) -> int: ...


def config_for(pass_name: str, q: Tensor, plan: HasVisited, run: Callable[[Config], Any]) -> Config:
    """The configuration for a pass over these tensors; `run` computes the pass with a given one."""
    configs = _candidates(pass_name, q.shape[3], q.dtype, q.device)
    key = (pass_name, q.device, q.dtype, padded(q.shape[3]))
    if len(configs) == 1:
        return configs[0]
    if key not in _chosen:
        config = _stored(q.device).get(_name(pass_name, q.dtype, q.shape[3]))
        if config not in configs:
            if plan.visited * q.shape[3] < _MIN_TIMED_WORK or not _can_time(q.device):
                return configs[0]
            config = fastest(configs, run)
            _store(q.device, _name(pass_name, q.dtype, q.shape[3]), config)
        _chosen[key] = config
    return _chosen[key]


def expected_config(pass_name: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The configuration that `config_for` will return unless it times candidates first."""
    configs = _candidates(pass_name, head_dim, dtype, device)
    if len(configs) == 1:
        return configs[0]
    key = (pass_name, device, dtype, padded(head_dim))
    config = _chosen.get(key) or _stored(device).get(_name(pass_name, dtype, head_dim))
    return config if config in configs else configs[0]


def _candidates(pass_name: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Config, ...]:
    if device.type == "cpu":
        # The interpreter's time grows with the number of blocks, not with their size: large blocks whatever the dtype.
        return candidates(pass_name, head_dim, torch.bfloat16, hopper=False)[:1]
    return candidates(pass_name, head_dim, dtype, hopper=is_hopper(device))


def fastest(configs: tuple[Config, ...], run: Callable[[Config], Any], clock: Callable[[], float] | None = None) -> Config:
    """The candidate of least median time over interleaved rounds, without those that the device cannot run.

    Raises the first candidate's error where it can run none. `clock`: seconds, after the device has finished.
    """
    clock = clock or _synchronised
    timings: dict[Config, list[float]] = {}
    errors = []
    for config in configs:
        try:
            run(config)  # compiles
            timings[config] = []
        except Exception as error:  # out of registers or shared memory: Triton raises several classes
            errors.append(error)
    if not timings:
        raise errors[0]
    for _ in range(_ROUNDS):
        for config, seconds in timings.items():
            start = clock()
            run(config)
            seconds.append(clock() - start)
    return min(timings, key=lambda config: statistics.median(timings[config]))


def _synchronised() -> float:
    torch.accelerator.synchronize()
    return time.perf_counter()


def _can_time(device: torch.device) -> bool:
    if os.environ.get("FARLIGHT_CALIBRATE", "1") == "0":
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _name(pass_name: str, dtype: torch.dtype, head_dim: int) -> str:
    return f"{pass_name} {str(dtype).removeprefix('torch.')} {padded(head_dim)}"


@functools.cache
def _path(device: torch.device) -> Path:
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    parts = (name, torch.__version__, triton.__version__)
    return cache_folder() / f"triton-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.json"


def _stored(device: torch.device) -> dict[str, Config]:
    """Configurations timed earlier on this device model; empty when there is no file of that structure."""
    rows = read_measurements(_path(device), columns=4, number=int)
    return {name: Config(*row) for name, row in (rows or {}).items()}


def _store(device: torch.device, name: str, config: Config) -> None:
    """Add a result to the file; where it cannot be written the next process times again."""
    path = _path(device)
    configs = {**_stored(device), name: config}
    with contextlib.suppress(OSError):
        write_measurements(path, {key: (c.rows, c.keys, c.warps, c.stages) for key, c in configs.items()})
