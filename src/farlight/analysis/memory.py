"""How much memory a piece of work needed at its peak, as the operating system saw it.

torch does not count what it allocates on the CPU, and Python's tracemalloc does not see torch. What remains is the
resident memory of the process. On Linux the kernel keeps its high-water mark and lets a process reset it, so the peak
is exact however short it was; elsewhere a thread looks every few milliseconds and may miss a spike. The result says
which.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Peak", "peak_memory"]

Method = Literal["VmHWM", "sampled", "ru_maxrss", "unknown"]


@dataclass
class Peak:
    """Growth of resident memory inside a `peak_memory` block, in bytes; final when the block has ended.

    `method` tells how it was found: "VmHWM" (the kernel's own mark, exact to a page), "sampled" (looked at every 2 ms),
    "ru_maxrss" (only what exceeds the largest size the process ever had: too low after a larger peak) or "unknown".
    """

    bytes: int = 0
    method: Method = "unknown"


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure how far resident memory rises above its level at the start of the block.

    Memory that was freed earlier is given back to the system first, so that using it again counts as growth.

    >>> import torch
    >>> from farlight.analysis.memory import peak_memory
    >>> with peak_memory() as peak:
    ...     x = torch.ones(16 * 2**20)
    >>> peak.method == "unknown" or peak.bytes >= 50 * 2**20
    True
    """
    peak = Peak()
    _give_back()
    start = _status("VmRSS")
    if start is not None and _reset_mark():
        yield peak
        peak.bytes, peak.method = max(0, (_status("VmHWM") or 0) - start), "VmHWM"
    elif start is not None:
        yield from _sampled(peak, start)
    else:
        before = _max_rss()
        yield peak
        after = _max_rss()
        if before is not None and after is not None:
            peak.bytes, peak.method = after - before, "ru_maxrss"


def _sampled(peak: Peak, start: int) -> Iterator[Peak]:
    done = threading.Event()
    peak.method = "sampled"

    def look() -> None:
        peak.bytes = max(peak.bytes, (_status("VmRSS") or 0) - start)

    def watch() -> None:
        while not done.wait(0.002):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
        look()
    finally:
        done.set()
        thread.join()


def _status(field: str) -> int | None:
    """A field of /proc/self/status in bytes, or None where there is none."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _reset_mark() -> bool:
    """Set the kernel's high-water mark to the present size; False where that is not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    high, now = _status("VmHWM"), _status("VmRSS")
    # Some sandboxes accept the write and do nothing.
    return high is not None and now is not None and high - now < 8 * 2**20


def _give_back() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _max_rss() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
