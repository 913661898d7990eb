"""Peak resident memory (RSS) of a block of code.

torch does not count its CPU allocations and tracemalloc does not see them, so RSS is what can be measured. On Linux the
kernel's high-water mark VmHWM is reset at the start of the block: the peak is exact, however short. Elsewhere a thread
samples VmRSS every 2 ms and may miss a spike, or `ru_maxrss` is compared. `Peak.method` names the method.
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

    method: "VmHWM" (kernel high-water mark, exact to a page), "sampled" (VmRSS every 2 ms), "ru_maxrss" (growth of the
    process's lifetime maximum: too low after an earlier, larger peak) or "unknown" (bytes is 0).
    """

    bytes: int = 0
    method: Method = "unknown"


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the growth of resident memory above its level at the start of the block.

    Freed memory is returned to the system first, so that its reuse counts as growth.

    >>> import torch
    >>> from farlight.analysis.memory import peak_memory
    >>> with peak_memory() as peak:
    ...     x = torch.ones(16 * 2**20)
    >>> peak.method == "unknown" or peak.bytes >= 50 * 2**20
    True
    """
    peak = Peak()
    _return_free_memory()
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
    """VmRSS sampled by a thread; `start`: bytes at the start of the block."""
    done = threading.Event()
    peak.method = "sampled"

    def sample() -> None:
        peak.bytes = max(peak.bytes, (_status("VmRSS") or 0) - start)

    def watch() -> None:
        while not done.wait(0.002):
            sample()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
        sample()
    finally:
        done.set()
        thread.join()


def _status(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None off Linux or without the field."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _reset_mark() -> bool:
    """Reset the kernel's high-water mark to the current RSS; False where that has no effect."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    high, current = _status("VmHWM"), _status("VmRSS")
    # Some sandboxes accept the write and do nothing.
    return high is not None and current is not None and high - current < 8 * 2**20


def _return_free_memory() -> None:
    """Collect recent garbage and trim the C allocator's heap.

    Objects that have survived several collections are part of the level at the start; to search them all takes a second in a
    process with large libraries.
    """
    gc.collect(1)
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _max_rss() -> int | None:
    """Largest RSS of the process so far in bytes; None on Windows."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
