"""Runs a function in several gloo processes of one machine, which find each other through a file."""

from __future__ import annotations

import datetime
import importlib
import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["in_ranks"]

# One server process imports torch and farlight; ranks are forks of it.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["farlight", "farlight.testing"])


def in_ranks(world: int, function: Callable[..., Any], *arguments: Any, seconds: float = 30.0) -> list[Any]:
    """`function(rank, world, *arguments)` of an importable module in `world` processes with a default gloo group: the results.

    Raises AssertionError with the tracebacks of all that raised.
    """
    name = function.__module__, function.__qualname__
    with tempfile.TemporaryDirectory() as folder:
        queue = _context.SimpleQueue()
        path = [entry for entry in sys.path if entry]
        processes = [
            _context.Process(target=_run, args=(rank, world, folder, path, name, arguments, seconds, queue))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        answers = dict(queue.get() for _ in processes)
        for process in processes:
            process.join()
    failures = [f"rank {rank}:\n{answer[1]}" for rank, answer in sorted(answers.items()) if not answer[0]]
    assert not failures, "\n".join(failures)
    return [answers[rank][1] for rank in range(world)]


def _run(
    rank: int, world: int, folder: str, path: list[str], name: tuple[str, str], arguments: Any, seconds: float, queue: Any
) -> None:
    sys.path[:0] = [entry for entry in path if entry not in sys.path]
    torch.set_num_threads(1)
    try:
        store = Path(folder, "store").as_uri()
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=seconds)
        )
        function = getattr(importlib.import_module(name[0]), name[1])
        queue.put((rank, (True, function(rank, world, *arguments))))
    except BaseException:
        queue.put((rank, (False, traceback.format_exc(limit=-12)[-6000:])))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
