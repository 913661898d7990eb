"""Parity: every shared case on the device against the float64 formula, outputs, lse and gradients.

Cases are split over worker processes, because each case compiles its own kernels. A worker is this module run as a program: it
prints one JSON line for each case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

import farlight as fl
from farlight.testing import CASES, Answer, Case, assert_answer, inputs, solve
from suite.settings import Box, Settings

__all__ = ["parity_rows"]

SEED = 0x1234_5678_9ABC
DTYPES = ("float32", "bfloat16", "float16")
REHEARSAL_CASES = ("window and a lighthouse, n=33", "grouped heads", "dropout, clusters", "no key")


def comparisons(rehearsal: bool) -> list[tuple[str, Case]]:
    """(dtype, case), the most important dtype first."""
    cases = [of for of in CASES if not rehearsal or of.name in REHEARSAL_CASES]
    return [(dtype, of) for dtype in DTYPES for of in cases]


def compare(dtype_name: str, of: Case, device: str) -> None:
    """Output, lse and gradients (through the lse too) of one case; raises AssertionError where they are off."""
    dtype = getattr(torch, dtype_name)
    tensors = inputs(of, dtype, device, requires_grad=True)
    out, lse = fl.attention(
        tensors.q, tensors.k, tensors.v, of.pattern, scale=of.scale, q_offset=of.q_offset, dropout=of.dropout, seed=SEED,
        return_lse=True, backend="triton",
    )  # fmt: skip
    torch.autograd.backward((out, lse), (tensors.grad_out, tensors.grad_lse))
    gradients = (tensors.q.grad, tensors.k.grad, tensors.v.grad)
    on_cpu = [x.detach().cpu() for x in (out, lse, *gradients) if x is not None]
    truth = solve(of, inputs(of, dtype), dropout_seed=SEED, with_grad_lse=True)
    assert_answer(Answer(*on_cpu), truth, f"{of.name}, {dtype_name}")


def worker(number: int, workers: int, seconds: float, rehearsal: bool) -> None:
    """Compare every `workers`-th case from `number` on, within `seconds`; print a JSON line for each."""
    torch.set_num_threads(1)
    device = "cpu" if rehearsal else "cuda"
    began = time.monotonic()
    for dtype, of in comparisons(rehearsal)[number::workers]:
        if time.monotonic() - began > seconds:
            print(json.dumps({"dtype": dtype, "case": of.name, "result": "skipped"}), flush=True)
            continue
        try:
            compare(dtype, of, device)
            print(json.dumps({"dtype": dtype, "case": of.name, "result": "agrees"}), flush=True)
        except Exception as error:  # whatever a compiler or a driver raises is a result too
            message = f"{type(error).__name__}: {error}"[:600]
            print(json.dumps({"dtype": dtype, "case": of.name, "result": "failed", "error": message}), flush=True)


def parity_rows(settings: Settings, box: Box) -> Iterator[dict[str, Any]]:
    """A row for each comparison that failed (`wrong` says how), then one for each dtype: cases, and how many agree."""
    rehearsal, seconds = settings.rehearsal, box.left
    processes = 1 if rehearsal else max(1, min(12, (os.cpu_count() or 2) - 2))
    lines, crashed = _worker_results(processes, seconds, rehearsal)
    for line in lines:
        if line["result"] == "failed":
            yield {"check": "parity", "dtype": line["dtype"], "case": line["case"], "wrong": line["error"]}
    if crashed:
        yield {"check": "parity", "case": "worker processes", "wrong": f"{crashed} of {processes} died"}
    for dtype in DTYPES:
        count = sum(1 for name, _ in comparisons(rehearsal) if name == dtype)
        agree = sum(line["dtype"] == dtype and line["result"] == "agrees" for line in lines)
        failed = sum(line["dtype"] == dtype and line["result"] == "failed" for line in lines)
        row = {"check": "parity", "dtype": dtype, "cases": count, "agree": agree, "failed": failed}
        yield row | {"not_run": count - agree - failed}


def _worker_results(processes: int, seconds: float, rehearsal: bool) -> tuple[list[dict[str, Any]], int]:
    """The lines that all workers printed within the time, and how many workers crashed."""
    began, lines = time.monotonic(), list[dict[str, Any]]()
    workers = []
    for number in range(processes):
        command = [
            sys.executable,
            "-m",
            "suite.gpu.parity",
            str(number),
            str(processes),
            str(seconds * 0.9),
            str(int(rehearsal)),
        ]
        workers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))

    def read(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        lines.extend(json.loads(line) for line in process.stdout if line.startswith("{"))

    readers = [threading.Thread(target=read, args=(process,)) for process in workers]
    for reader in readers:
        reader.start()
    crashed = 0
    for process, reader in zip(workers, readers, strict=True):
        try:
            process.wait(max(1.0, seconds * 1.1 - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            process.kill()
        reader.join()
        crashed += process.returncode not in (0, -9)
    return lines, crashed


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4] == "1")
