"""A least-recently-used cache bounded in bytes, for what is dear to make and may be made again; and where files are kept."""

from __future__ import annotations

import ctypes
import functools
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

__all__ = ["CacheInfo", "SizedCache", "cache_folder", "trim"]


def cache_folder() -> Path:
    """The user's folder for what was measured on this machine: `FARLIGHT_CACHE`, else one in the usual place for caches.

    A user without a home directory (a container's numeric user) has one under the folder for temporary files.
    """
    own = os.environ.get("FARLIGHT_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    if shared:
        return Path(shared) / "farlight"
    try:
        return Path.home() / ".cache" / "farlight"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "farlight"


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """The C library's call that returns free memory to the system; None where there is none."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return found


def trim() -> None:
    """Return free memory of the C library's allocator to the system, where it can."""
    call = _malloc_trim()
    if call is not None:
        call(0)


T = TypeVar("T")


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds and how it has served."""

    entries: int
    nbytes: int
    limit: int
    hits: int
    misses: int


def _nbytes(value: Any) -> int:
    nbytes: int = value.nbytes
    return nbytes


class SizedCache(Generic[T]):
    """Keeps the values used last, as many as fit in `limit` bytes. A value larger than the limit is not kept.

    `weigh` says what a value takes with all that it holds; `charge` what it has come to hold since.
    """

    def __init__(self, limit: int = 512 * 2**20, weigh: Callable[[T], int] = _nbytes) -> None:
        self._limit, self._weigh = limit, weigh
        self._freed = 0
        self._values: OrderedDict[object, T] = OrderedDict()
        self._sizes: dict[object, int] = {}
        self._nbytes = self._hits = self._misses = 0
        self._lock = threading.Lock()

    def get(self, key: object, make: Callable[[], T]) -> T:
        """The value under `key`, made when it is not there. Two threads may make the same value; one is kept."""
        found = self.find(key)
        if found is None:
            found = make()
            self.put(key, found)
        return found

    def find(self, key: object) -> T | None:
        """The value under `key`, or None."""
        with self._lock:
            found = self._values.get(key)
            if found is None:
                self._misses += 1
            else:
                self._values.move_to_end(key)
                self._hits += 1
            return found

    def put(self, key: object, value: T) -> None:
        size = self._weigh(value)
        with self._lock:
            self._drop(key)
            if size > self._limit:
                return
            self._values[key] = value
            self._sizes[key] = size
            self._nbytes += size
            self._shrink()
        self._give_back()

    def charge(self, key: object, value: T, nbytes: int) -> None:
        """Count so many bytes more (or fewer) for a value, if it is the one that is kept under `key`."""
        with self._lock:
            if self._values.get(key) is not value:
                return
            self._sizes[key] += nbytes
            self._nbytes += nbytes
            if self._sizes[key] > self._limit:
                self._drop(key)
            self._shrink()
        self._give_back()

    def _drop(self, key: object) -> None:
        if self._values.pop(key, None) is not None:
            size = self._sizes.pop(key)
            self._nbytes -= size
            self._freed += size

    def _give_back(self) -> None:
        """Return what was freed to the system, now and then: the allocator keeps it where small blocks are left between."""
        with self._lock:
            if 8 * self._freed < self._limit:
                return
            self._freed = 0
        trim()

    def _shrink(self) -> None:
        while self._nbytes > self._limit:
            self._drop(next(iter(self._values)))

    @property
    def limit(self) -> int:
        return self._limit

    @limit.setter
    def limit(self, nbytes: int) -> None:
        with self._lock:
            self._limit = nbytes
            self._shrink()
        self._give_back()

    def clear(self) -> None:
        with self._lock:
            self._freed += self._nbytes
            self._values.clear()
            self._sizes.clear()
            self._nbytes = 0
        self._give_back()

    def info(self) -> CacheInfo:
        with self._lock:
            return CacheInfo(len(self._values), self._nbytes, self._limit, self._hits, self._misses)

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Within the block the cache starts empty; at its end the block's entries are dropped and the previous ones are back.

        For timing of uncached work. The whole process sees it: other threads miss until the block ends.
        """
        with self._lock:
            previous = self._values, self._sizes, self._nbytes
            self._values, self._sizes, self._nbytes = OrderedDict(), {}, 0
        try:
            yield
        finally:
            with self._lock:
                self._values, self._sizes, self._nbytes = previous
