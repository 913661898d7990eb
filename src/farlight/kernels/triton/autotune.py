"""Which configuration a pass uses: the fastest of a short list on this device, timed once on real work and kept in a file.

The candidates are timed in turn, round after round, so that a device that warms up or slows down favours none. Only work that
is large enough to time decides; before that, and where nothing may be timed (Triton's interpreter, a graph being captured,
`FARLIGHT_CALIBRATE=0`), the first of the list is used. The file stands in the folder of `farlight.caching.cache_folder`.
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

__all__ = ["config_for", "expected", "fastest"]

# Pairs times head_dim below which a call is too short to be timed.
_WORTH_TIMING = 2**33
_ROUNDS = 5
_chosen: dict[tuple[str, torch.device, torch.dtype, int], Config] = {}


class Planned(Protocol):
    """What is asked of a plan here."""

    @property
    def visited(self) -> int: ...


def config_for(what: str, q: Tensor, plan: Planned, run: Callable[[Config], Any]) -> Config:
    """The configuration for a pass over these tensors; `run` computes the pass with a given one."""
    listed = _listed(what, q.shape[3], q.dtype, q.device)
    key = (what, q.device, q.dtype, padded(q.shape[3]))
    if len(listed) == 1:
        return listed[0]
    if key not in _chosen:
        found = _stored(q.device).get(_name(what, q.dtype, q.shape[3]))
        if found not in listed:
            if plan.visited * q.shape[3] < _WORTH_TIMING or not _may_time(q.device):
                return listed[0]
            found = fastest(listed, run)
            _store(q.device, _name(what, q.dtype, q.shape[3]), found)
        _chosen[key] = found
    return _chosen[key]


def expected(what: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The configuration that `config_for` will answer with, unless it has yet to time some."""
    listed = _listed(what, head_dim, dtype, device)
    if len(listed) == 1:
        return listed[0]
    found = _chosen.get((what, device, dtype, padded(head_dim))) or _stored(device).get(_name(what, dtype, head_dim))
    return found if found in listed else listed[0]


def _listed(what: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Config, ...]:
    if device.type == "cpu":
        # The interpreter's time goes by the number of blocks, not by their size.
        return candidates(what, head_dim, torch.bfloat16, hopper=False)[:1]
    return candidates(what, head_dim, dtype, hopper=is_hopper(device))


def fastest(listed: tuple[Config, ...], run: Callable[[Config], Any], clock: Callable[[], float] | None = None) -> Config:
    """The candidate of the least median time over interleaved rounds; one that the device refuses is left out."""
    clock = clock or _synchronised
    spent: dict[Config, list[float]] = {}
    refusals = []
    for config in listed:
        try:
            run(config)  # compiles
            spent[config] = []
        except Exception as error:  # out of registers or shared memory: Triton has many names for it
            refusals.append(error)
    if not spent:
        raise refusals[0]
    for _ in range(_ROUNDS):
        for config, seconds in spent.items():
            start = clock()
            run(config)
            seconds.append(clock() - start)
    return min(spent, key=lambda config: statistics.median(spent[config]))


def _synchronised() -> float:
    torch.accelerator.synchronize()
    return time.perf_counter()


def _may_time(device: torch.device) -> bool:
    if os.environ.get("FARLIGHT_CALIBRATE", "1") == "0":
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _name(what: str, dtype: torch.dtype, head_dim: int) -> str:
    return f"{what} {str(dtype).removeprefix('torch.')} {padded(head_dim)}"


@functools.cache
def _path(device: torch.device) -> Path:
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    parts = (name, torch.__version__, triton.__version__)
    return cache_folder() / f"triton-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.json"


def _stored(device: torch.device) -> dict[str, Config]:
    """What was timed before on this kind of device; empty when there is no file of that structure."""
    rows = read_measurements(_path(device), columns=4, number=int)
    return {name: Config(*row) for name, row in (rows or {}).items()}


def _store(device: torch.device, name: str, config: Config) -> None:
    """Keep a result; where no file can be written the next process times again."""
    path = _path(device)
    known = {**_stored(device), name: config}
    with contextlib.suppress(OSError):
        write_measurements(path, {key: (one.rows, one.keys, one.warps, one.stages) for key, one in known.items()})
