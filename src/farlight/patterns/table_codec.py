"""Tables of a pattern as text, base64 of zlib of the raw bytes; and the memory budget of untrusted text.

A packed table is `{"dtype": "bool" | "int64", "shape": […], "data": base64}`, in JSON as that object and in the notation as
`table("dtype", shape, "data")`. Every size is checked against the budget before memory is allocated: decompression stops one
byte after the size that dtype and shape announce.
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from typing import Any

import torch
from torch import Tensor

from farlight.errors import PatternError, show

__all__ = ["LIMIT", "MemoryBudget", "pack_table", "unpack_table", "widened"]

# Integers of the lists of a router's choice, which is kept for one call: fewer bits than int64, the dtype of all others.
_NARROW = (torch.int16, torch.int32)
LIMIT = 2**28  # bytes: the default budget
_MOST_DIMS = 8
_DTYPES = {"bool": torch.bool, "int64": torch.int64}


class MemoryBudget:
    """The bytes that one text may still take in memory; `left` is None for no limit. Raises PatternError for a bad limit."""

    def __init__(self, limit: int | None) -> None:
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
            raise PatternError(f"limit = {limit!r}: it is a number of bytes, a whole number >= 0, or None for no limit.")
        self.limit, self.left = limit, limit

    def charge(self, nbytes: int, what: str) -> None:
        """Subtract `nbytes`. Raises PatternError, naming `what`, where fewer are left."""
        if self.left is None or self.limit is None:
            return
        if nbytes > self.left:
            raise PatternError(
                f"this pattern needs more than {self.limit:,} bytes of memory ({what}); where it comes from a source that "
                "you trust pass limit=…, a larger number of bytes, or None."
            )
        self.left -= nbytes


def widened(table: Tensor) -> Tensor:
    """The table as everybody sees it, its integers in int64: lists of a router's choice are kept in 16 or 32 bits."""
    return table.long() if table.dtype in _NARROW else table


def pack_table(table: Tensor) -> dict[str, Any]:
    """A table of a pattern, bool or integers, as `{"dtype", "shape", "data"}`."""
    data = widened(table.detach()).cpu().contiguous()
    packed = base64.b64encode(zlib.compress(data.numpy().tobytes(), 6)).decode("ascii")
    return {"dtype": str(data.dtype).removeprefix("torch."), "shape": list(data.shape), "data": packed}


def unpack_table(dtype: Any, shape: Any, data: Any, budget: MemoryBudget) -> Tensor:
    """The tensor that `pack_table` packed. The arguments are untrusted: raises PatternError for anything else."""
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise PatternError(f"table: dtype {show(dtype)} is not one of {sorted(_DTYPES)}.")
    if not isinstance(shape, (list, tuple)) or not all(type(n) is int and n >= 0 for n in shape):
        raise PatternError(f"table: shape {show(shape)} is not a list of sizes.")
    if len(shape) > _MOST_DIMS or math.prod(max(n, 1) for n in shape) >= 2**60:
        raise PatternError(f"table: shape {show(shape)} is not that of a tensor.")
    if not isinstance(data, str):
        raise PatternError(f"table: data is {type(data).__name__}, not base64 text.")
    nbytes = math.prod(shape) * _DTYPES[dtype].itemsize
    budget.charge(nbytes, f"a table of {nbytes:,} bytes")
    try:
        raw = zlib.decompressobj().decompress(base64.b64decode(data, validate=True), nbytes + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise PatternError(f"table: the data cannot be read ({error}); it must be base64 of zlib.") from None
    if len(raw) != nbytes:
        raise PatternError(f"table: the data do not hold the {nbytes} bytes of {dtype} {show(tuple(shape))}.")
    if dtype == "bool" and raw.strip(b"\x00\x01"):
        raise PatternError("table: a bool table holds bytes other than 0 and 1.")
    if not nbytes:
        return torch.empty(shape, dtype=_DTYPES[dtype], device="cpu")
    return torch.frombuffer(bytearray(raw), dtype=_DTYPES[dtype]).reshape(tuple(shape)).clone()
