"""A measurement in a process of its own: no memory, thread pool or compiled code left over from the one before.

    python -m suite.fresh suite.memory:extra_memory '{"contender": "farlight torch", …}'

calls that generator and prints each row as one marked line of JSON; `fresh_rows` starts it and yields the rows as they come.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["FreshError", "fresh_rows"]

Row = dict[str, Any]
# Other output of the child (compilers, warnings) may share its stdout; rows are told apart by this character.
_MARK = "\x1e"


class FreshError(RuntimeError):
    """The process ended badly; the rows that it gave before are good."""


def fresh_rows(target: str, arguments: dict[str, Any], *, limit: float = 600.0) -> Iterator[Row]:
    """The rows of `module:generator(**arguments)`, computed in a new process that is stopped after `limit` seconds.

    Raises FreshError when the process fails or is stopped.
    """
    command = [sys.executable, "-m", "suite.fresh", target, json.dumps(arguments)]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8", env=environment)
        stopped = threading.Event()

        def stop() -> None:
            stopped.set()
            process.kill()

        timer = threading.Timer(limit, stop)
        timer.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith(_MARK):
                    yield json.loads(line[1:])
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
        if stopped.is_set():
            raise FreshError(f"{target} was stopped after {limit:.0f} s")
        if code:
            errors.seek(0)
            last = next((line for line in reversed(errors.read().splitlines()) if line.strip()), "no message")
            how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
            raise FreshError(f"{target}: {how}: {last.strip()}")


def _main(target: str, arguments: str) -> None:
    module, _, name = target.partition(":")
    if not module.startswith("suite."):
        raise SystemExit(f"target = {target!r}: only measurements of this suite can be run.")
    for row in getattr(importlib.import_module(module), name)(**json.loads(arguments)):
        print(_MARK + json.dumps(row), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
