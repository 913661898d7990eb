"""Reading the small JSON files of measurements that farlight keeps between processes: rates of backends, chosen configurations.

A file is one JSON object: a row of numbers under each name. Any process may have written it, cut it short or changed it, so its
structure is checked before a value of it is used. A file of any other structure counts as missing: the caller measures again.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["read_measurements", "write_measurements"]

_MOST_BYTES = 2**20
# No measurement lies outside: GFLOP per second, seconds, rows of a block.
_LEAST, _MOST = 1e-12, 1e15


def read_measurements(path: Path, columns: int, number: type = float) -> dict[str, tuple[Any, ...]] | None:
    """The rows of the file: `columns` positive numbers under each name. None where there is no file of this structure.

    `number`: int, or float, which a JSON integer also serves as.
    """
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError):  # a path with a zero byte is a ValueError
        return None
    if len(raw) > _MOST_BYTES:
        return None
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or not all(_is_row(row, columns, number) for row in data.values()):
        return None
    return {name: tuple(number(value) for value in row) for name, row in data.items()}


def write_measurements(path: Path, rows: Mapping[str, Sequence[float]]) -> None:
    """Replace the file by these rows. Another process reads the old file or the whole new one; no temporary file stays behind.

    Raises OSError where the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}-", suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(rows, file)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _is_row(row: object, columns: int, number: type) -> bool:
    kinds = (int,) if number is int else (int, float)
    return isinstance(row, list) and len(row) == columns and all(type(x) in kinds and _LEAST <= x <= _MOST for x in row)
