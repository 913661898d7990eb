"""Memory that is freed and wanted again: whether it comes back from the process or from the system.

Glibc gives large pieces back to the system at once, and gets new ones, each page cleared by the system, and where the machine
is a virtual one by its host too. Programs that train or serve often keep them (jemalloc, tcmalloc, glibc set as here).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

__all__ = ["kept_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # numbers of malloc.h
_USUAL = ((_MMAP_MAX, 65_536), (_MMAP_THRESHOLD, 128 * 1024), (_TRIM_THRESHOLD, 128 * 1024))


@contextlib.contextmanager
def kept_memory() -> Iterator[bool]:
    """Let the process keep what it frees; False where the C library cannot be told to.

    Afterwards all that is free goes back to the system.
    """
    option = _mallopt()
    if option is None:
        yield False
        return
    option(_MMAP_MAX, 0)  # large pieces come from the heap, too
    option(_TRIM_THRESHOLD, -1)  # which never shrinks
    try:
        yield True
    finally:
        for name, value in _USUAL:
            option(name, value)
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt() -> Callable[[int, int], int] | None:
    try:
        library = ctypes.CDLL(None)
        return library.mallopt if library.malloc_trim else None
    except (OSError, AttributeError, TypeError):  # another C library, or Windows
        return None
