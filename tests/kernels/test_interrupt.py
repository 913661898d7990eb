"""Ctrl-C ends a long native call, and the next call is whole."""

from __future__ import annotations

import subprocess
import sys

import pytest

from farlight.kernels import cpu

PROGRAM = """
import os, signal, threading, time, torch, farlight as fl
from farlight import _cpu
torch.set_num_threads({threads})
q, k, v = (torch.randn(1, 1, 131_072, 64).expand(1, 4, -1, -1) for _ in range(3))
native, sent = _cpu.forward, []

def send():
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)

def forward(*given):
    threading.Timer(0.3, send).start()
    native(*given)

_cpu.forward = forward
try:
    fl.attention(q, k, v, fl.causal(), backend="cpu")
except KeyboardInterrupt:
    late = time.monotonic() - sent[0]
    _cpu.forward = native
    small = [x[:, :, :300] for x in (q, k, v)]
    out, true = (fl.attention(*small, fl.causal(), backend=backend) for backend in ("cpu", "reference"))
    print("obeyed at once" if late < 5 else f"after {{late}} s", float((out - true).abs().max()) < 1e-5, flush=True)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(cpu.unavailable() is not None, reason="the native kernels are not there")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_long_native_call_ends_on_a_signal(threads: int) -> None:
    """The call has 2^43 operations, half a minute's work and more; the signal comes in its first second."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(threads=threads)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.split("\n")[:2] == ["obeyed at once True", ""], done.stderr
