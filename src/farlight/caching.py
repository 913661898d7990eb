"""A least-recently-used cache bounded in bytes, for what is dear to make and may be made again; and where files are kept."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

__all__ = ["CacheInfo", "SizedCache", "cache_folder"]


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


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=_Sized)


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds and how it has served."""

    entries: int
    nbytes: int
    limit: int
    hits: int
    misses: int


class SizedCache(Generic[T]):
    """Keeps the values used last, as many as fit in `limit` bytes. A value larger than the limit is not kept."""

    def __init__(self, limit: int = 512 * 2**20) -> None:
        self._limit = limit
        self._values: OrderedDict[object, T] = OrderedDict()
        self._sizes: dict[object, int] = {}
        self._nbytes = self._hits = self._misses = 0
        self._lock = threading.Lock()

    def get(self, key: object, make: Callable[[], T]) -> T:
        """The value under `key`, made when it is not there. Two threads may make the same value; one is kept."""
        with self._lock:
            found = self._values.get(key)
            if found is not None:
                self._values.move_to_end(key)
                self._hits += 1
                return found
            self._misses += 1
        value = make()
        self.put(key, value)
        return value

    def put(self, key: object, value: T) -> None:
        size = value.nbytes
        with self._lock:
            self._drop(key)
            if size > self._limit:
                return
            self._values[key] = value
            self._sizes[key] = size
            self._nbytes += size
            self._shrink()

    def _drop(self, key: object) -> None:
        if self._values.pop(key, None) is not None:
            self._nbytes -= self._sizes.pop(key)

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

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
            self._sizes.clear()
            self._nbytes = 0

    def info(self) -> CacheInfo:
        with self._lock:
            return CacheInfo(len(self._values), self._nbytes, self._limit, self._hits, self._misses)
