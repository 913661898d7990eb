"""The JSON file of a model's per-layer patterns and routers.

    {"format": "farlight.fit", "version": 1, "model": {…},
     "layers": [{"pattern": "<Pattern.to_json() text>"}, {"router": "<expression of read_router>"}, null, …]}

The index in `layers` is the layer's number; null leaves the layer's own attention. `model` is free-form metadata. Patterns and
routers are parsed, never evaluated.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from farlight.errors import ArgumentError, PatternError
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router
from farlight.routing.notation import read_router

__all__ = ["read_layers", "write_layers"]

FORMAT = "farlight.fit"
VERSION = 1


def read_layers(source: str | os.PathLike[str]) -> dict[int, Pattern | Router]:
    """The pattern or router of each layer that a file of `write_layers` or `fl.fit` names, by layer number.

    `source` is a path, or the JSON text itself (a string that begins with a brace). Raises PatternError when the text is
    not of this format, OSError when the file cannot be read.

    >>> import farlight as fl
    >>> from farlight.hf.fit_file import read_layers, write_layers
    >>> read_layers(write_layers({0: fl.window(64), 2: "topblocks(8) | window(16)"}))[0]
    window(64)
    """
    if isinstance(source, str) and source.lstrip().startswith("{"):
        where, text = "the text", source
    else:
        where, text = str(source), _text(source)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PatternError(f"{where} is not JSON ({error}); pass a file that fl.fit or write_layers wrote.") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        file_format = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise PatternError(
            f"{where} is of format {_short(file_format)}, not {FORMAT!r}; pass a file that fl.fit or write_layers wrote."
        )
    if document.get("version") != VERSION:
        raise PatternError(
            f"{where} is of version {_short(document.get('version'))}; this farlight reads version {VERSION}. "
            "Write the file again, or use the farlight that wrote it."
        )
    entries = document.get("layers")
    if not isinstance(entries, list):
        raise PatternError(f"{where}: 'layers' is {type(entries).__name__}; it must be a list with one entry for each layer.")
    return {number: _read(entry, f"{where}: layer {number}") for number, entry in enumerate(entries) if entry is not None}


def _text(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text("utf-8")
    except ValueError as error:  # not UTF-8, or a path with a zero byte
        raise PatternError(f"{path!r} cannot be read ({error}); pass a file that fl.fit or write_layers wrote.") from None


def _read(entry: Any, where: str) -> Pattern | Router:
    """The pattern or router of one layer's entry. Raises PatternError."""
    match entry:
        case {"pattern": str(text), **others} if "router" not in others:
            parse: Any = Pattern.from_json
        case {"router": str(text), **others} if "pattern" not in others:
            parse = read_router
        case _:
            raise PatternError(f'{where} is {_short(entry)}; it must be {{"pattern": text}}, {{"router": text}} or null.')
    try:
        pattern: Pattern | Router = parse(text)
    except PatternError as error:
        raise PatternError(f"{where}: {error}") from None
    return pattern


def write_layers(
    layers: Mapping[int, Pattern | Router | str | None],
    path: str | os.PathLike[str] | None = None,
    *,
    model: Mapping[str, Any] | None = None,
) -> str:
    """Write a pattern or router for each layer as JSON, to be read by `read_layers`. Returns the text.

    A router is given by its expression, such as `"topblocks(8) | window(16)"`, or is one that `read_router` made, which
    stores it: a router built by hand may hold learned weights, which the file cannot. `model` is stored as it is.
    Raises ArgumentError for anything else.
    """
    entries: list[dict[str, str] | None] = [None] * (max((_number(n) for n in layers), default=-1) + 1)
    for number, pattern in layers.items():
        entries[number] = _entry(number, pattern)
    document = {"format": FORMAT, "version": VERSION, "model": dict(model or {}), "layers": entries}
    try:
        text = json.dumps(document, indent=1)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"write_layers: model cannot be written as JSON ({error}); give names, numbers and lists."
        ) from None
    if path is not None:
        Path(path).write_text(text + "\n", "utf-8")
    return text


def _number(number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ArgumentError(f"write_layers: {number!r} is not the number of a layer; layers are counted from 0.")
    return number


def _entry(number: int, pattern: Pattern | Router | str | None) -> dict[str, str] | None:
    if pattern is None:
        return None
    if isinstance(pattern, Pattern):
        return {"pattern": pattern.to_json()}
    expression = pattern if isinstance(pattern, str) else getattr(pattern, "expression", None)
    if not isinstance(expression, str):
        raise ArgumentError(
            f"write_layers: layer {number} has a {type(pattern).__name__}, which does not say how it was written; give a "
            "pattern, or the router's expression, such as 'topblocks(8) | window(16)'."
        )
    read_router(expression)  # raises where the file could not be read back
    return {"router": expression}


def _short(entry: Any) -> str:
    """A value abbreviated for an error message."""
    return reprlib.repr(entry)
