"""Arrays and texts in a page: zlib-compressed and base64-encoded, which browsers decode without a library."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np

__all__ = ["pack", "pack_text", "unpack"]

# Lists up to this length stay plain JSON: smaller, and readable in the page's source.
_MAX_PLAIN = 48
_DTYPES: dict[str, np.dtype[Any]] = {"i4": np.dtype("<i4"), "u2": np.dtype("<u2"), "u1": np.dtype("u1"), "f4": np.dtype("<f4")}


def pack(values: Any, kind: str = "i4") -> list[float] | dict[str, Any]:
    """Numbers as a list up to `_MAX_PLAIN`, else `{"kind", "size", "data"}`; kind: i4 (int32), u2 (uint16), u1
    (uint8) or f4 (float32).

    >>> pack([1, 2, 3]), unpack(pack(np.arange(1000)))[-1].item()
    ([1, 2, 3], 999)
    """
    array = np.ascontiguousarray(np.asarray(values).reshape(-1).astype(_DTYPES[kind]))
    if array.size <= _MAX_PLAIN:
        plain: list[float] = array.tolist()
        return plain
    return {"kind": kind, "size": int(array.size), "data": _compress(array.tobytes())}


def unpack(packed: Any) -> np.ndarray[Any, Any]:
    """The inverse of `pack`; `assets/js/01-unpack.js` is the page's."""
    if isinstance(packed, list):
        return np.asarray(packed)
    values: np.ndarray[Any, Any] = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), _DTYPES[packed["kind"]])
    return values


def pack_text(text: str) -> dict[str, Any]:
    """A text as base64 of deflated UTF-8, which contains no character of markup."""
    return {"kind": "text", "size": len(text), "data": _compress(text.encode("utf-8", "surrogatepass"))}


def _compress(data: bytes) -> str:
    """base64 of zlib level 9."""
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")
