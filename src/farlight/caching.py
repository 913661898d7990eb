"""A least-recently-used cache bounded in bytes, the return of freed memory to the system, and the folder of cache files."""

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
    """The folder for measurements of this machine: `$FARLIGHT_CACHE`, else `farlight` in `$XDG_CACHE_HOME` or `~/.cache`.

    For a user without a home directory (a container's numeric user), `farlight` in the folder for temporary files.
    """
    folder = os.environ.get("FARLIGHT_CACHE")
    if folder:
        return Path(folder)
    xdg = os.environ.get("XDG_CACHE_HOME")
    if xdg:
        return Path(xdg) / "farlight"
    try:
        return Path.home() / ".cache" / "farlight"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "farlight"


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`, or None with another C library."""
    try:
        function: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return function


def trim() -> None:
    """Return the C allocator's free memory to the system, where it offers that."""
    malloc_trim = _malloc_trim()
    if malloc_trim is not None:
        malloc_trim(0)


T = TypeVar("T")

# A trim takes about a millisecond, a plan at least as long to build.
_PUTS_PER_TRIM = 64


@dataclass(frozen=True)
class CacheInfo:
    """Entries, bytes and limit of a cache, and the lookups that hit and missed."""

    entries: int
    nbytes: int
    limit: int
    hits: int
    misses: int


def _nbytes(value: Any) -> int:
    nbytes: int = value.nbytes
    return nbytes


class SizedCache(Generic[T]):
    """A thread-safe LRU cache of at most `limit` bytes. A value larger than the limit is not kept.

    `weigh(value)` is its size in bytes when it is put; `charge` adds what it has come to hold since.

    >>> cache = SizedCache(10, weigh=len)
    >>> for word in ("one", "three", "seven"):
    ...     cache.put(word, word)
    >>> cache.find("one"), cache.find("seven"), cache.info()
    (None, 'seven', CacheInfo(entries=2, nbytes=10, limit=10, hits=1, misses=1))
    """

    def __init__(self, limit: int = 512 * 2**20, weigh: Callable[[T], int] = _nbytes) -> None:
        self._limit, self._weigh = limit, weigh
        self._freed = self._put = 0  # bytes evicted and values put since the last trim
        self._values: OrderedDict[object, T] = OrderedDict()
        self._sizes: dict[object, int] = {}
        self._nbytes = self._hits = self._misses = 0
        # Reentrant: what is evicted may be the last to hold something whose end discards another value.
        self._lock = threading.RLock()

    def get(self, key: object, make: Callable[[], T]) -> T:
        """The value under `key`, made on a miss. Two threads that miss together both make it; the last one is kept."""
        value = self.find(key)
        if value is None:
            value = make()
            self.put(key, value)
        return value

    def find(self, key: object) -> T | None:
        """The value under `key`, or None."""
        with self._lock:
            value = self._values.get(key)
            if value is None:
                self._misses += 1
            else:
                self._values.move_to_end(key)
                self._hits += 1
            return value

    def put(self, key: object, value: T) -> None:
        """Keep `value` under `key` as the most recently used, in place of any other."""
        size = self._weigh(value)
        with self._lock:
            self._evict(key)
            if size > self._limit:
                return
            self._values[key] = value
            self._sizes[key] = size
            self._nbytes += size
            self._put += 1
            self._evict_to_limit()
        self._trim_if_due()

    def charge(self, key: object, value: T, nbytes: int) -> None:
        """Add `nbytes`, positive or negative, to the size of `value`, if it is still kept under `key`."""
        with self._lock:
            if self._values.get(key) is not value:
                return
            self._sizes[key] += nbytes
            self._nbytes += nbytes
            if self._sizes[key] > self._limit:
                self._evict(key)
            self._evict_to_limit()
        self._trim_if_due()

    def discard(self, key: object) -> None:
        """Evict the value under `key`, if there is one; its memory is for the next value, and no reason to trim."""
        with self._lock:
            freed = self._freed
            self._evict(key)
            self._freed = freed

    def _evict(self, key: object) -> None:
        value = self._values.pop(key, None)  # held until the sizes are right again: its end may come back here
        if value is not None:
            size = self._sizes.pop(key)
            self._nbytes -= size
            self._freed += size

    def _evict_to_limit(self) -> None:
        while self._nbytes > self._limit:
            self._evict(next(iter(self._values)))

    def _trim_if_due(self) -> None:
        """Trim after every limit / 8 bytes evicted, and every 64 values put.

        Fragmentation keeps the allocator from returning the bytes by itself. Values that stay also break up the free memory of
        what came and went between them: without a trim, each new plan may cost the process one more output tensor.
        """
        with self._lock:
            if 8 * self._freed < self._limit and self._put < _PUTS_PER_TRIM:
                return
            self._freed = self._put = 0
        trim()

    @property
    def limit(self) -> int:
        """Bytes kept at most; lowering it evicts at once."""
        return self._limit

    @limit.setter
    def limit(self, nbytes: int) -> None:
        with self._lock:
            self._limit = nbytes
            self._evict_to_limit()
        self._trim_if_due()

    def clear(self) -> None:
        """Evict every value."""
        with self._lock:
            self._freed += self._nbytes
            self._values.clear()
            self._sizes.clear()
            self._nbytes = 0
        self._trim_if_due()

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
