"""Arrays and texts inside a page: compressed, in base64, which every browser can read back without a library."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np

__all__ = ["pack", "pack_text", "unpack"]

# Shorter lists are spelled out: they are smaller that way, and can be read in the page's source.
_SPELLED_OUT = 48
_KINDS: dict[str, np.dtype[Any]] = {"i4": np.dtype("<i4"), "u1": np.dtype("u1"), "f4": np.dtype("<f4")}


def pack(values: Any, kind: str = "i4") -> list[float] | dict[str, Any]:
    """Numbers as a plain list when few, else as `{"kind", "size", "data"}`; kinds are i4, u1 and f4.

    >>> pack([1, 2, 3]), unpack(pack(np.arange(1000)))[-1].item()
    ([1, 2, 3], 999)
    """
    array = np.ascontiguousarray(np.asarray(values).reshape(-1).astype(_KINDS[kind]))
    if array.size <= _SPELLED_OUT:
        plain: list[float] = array.tolist()
        return plain
    return {"kind": kind, "size": int(array.size), "data": _squeeze(array.tobytes())}


def unpack(packed: Any) -> np.ndarray[Any, Any]:
    """What `pack` took; the page does the same in JavaScript."""
    if isinstance(packed, list):
        return np.asarray(packed)
    values: np.ndarray[Any, Any] = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), _KINDS[packed["kind"]])
    return values


def pack_text(text: str) -> dict[str, Any]:
    """A text as base64 of deflated UTF-8: no character of it can be taken for markup."""
    return {"kind": "text", "size": len(text), "data": _squeeze(text.encode("utf-8", "surrogatepass"))}


def _squeeze(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")
