"""Runs functions in gloo processes of one machine, which find each other through a file.

The processes of a size are started once and serve every later call, in one process group: a call costs what its function costs.
"""

from __future__ import annotations

import atexit
import datetime
import importlib
import multiprocessing
import multiprocessing.connection
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["in_ranks"]

# One server process imports torch, farlight and what a first backward pass and max-flow import; ranks are forks of it.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["farlight.testing", "farlight.distributed", "torch.fx.experimental.symbolic_shapes", "scipy.sparse.csgraph"]
)


class _Ranks:
    """`world` processes of one gloo group that wait for functions to call."""

    def __init__(self, world: int, seconds: float) -> None:
        self.folder = tempfile.TemporaryDirectory()
        store = Path(self.folder.name, "store").as_uri()
        self.pipes, self.processes = [], []
        for rank in range(world):
            here, there = _context.Pipe()
            process = _context.Process(target=_serve, args=(rank, world, store, seconds, there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def call(self, *task: Any) -> list[tuple[bool, Any]]:
        """(whether it returned, the result or the traceback) of every rank."""
        for pipe in self.pipes:
            pipe.send(task)
        return [self._answer(rank) for rank in range(len(self.pipes))]

    def _answer(self, rank: int) -> tuple[bool, Any]:
        try:
            answer: tuple[bool, Any] = self.pipes[rank].recv()
        except EOFError:
            self.processes[rank].join()
            return False, f"the process ended with exit code {self.processes[rank].exitcode}"
        return answer

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            process.kill()
        self.folder.cleanup()


_started: dict[tuple[int, float], _Ranks] = {}


def in_ranks(world: int, function: Callable[..., Any], *arguments: Any, seconds: float = 30.0) -> list[Any]:
    """`function(rank, world, *arguments)` of an importable module in `world` processes with a default gloo group: the results.

    Raises AssertionError with the tracebacks of all that raised; the processes are then ended, since their collectives may no
    longer match. seconds: the time-out of the group.
    """
    if (world, seconds) not in _started:
        _started[world, seconds] = _Ranks(world, seconds)
    path = [entry for entry in sys.path if entry]
    answers = _started[world, seconds].call(path, function.__module__, function.__qualname__, arguments)
    failures = [f"rank {rank}:\n{text}" for rank, (returned, text) in enumerate(answers) if not returned]
    if failures:
        _started.pop((world, seconds)).close()
    assert not failures, "\n".join(failures)
    return [result for _, result in answers]


@atexit.register
def _close_all() -> None:
    while _started:
        _started.popitem()[1].close()


def _serve(rank: int, world: int, store: str, seconds: float, pipe: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    while True:
        try:
            path, module, name, arguments = pipe.recv()
        except EOFError:
            break
        sys.path[:0] = [entry for entry in path if entry not in sys.path]
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(rank, world, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc(limit=-12)[-6000:]))
    dist.destroy_process_group()
