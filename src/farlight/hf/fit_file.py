"""A pattern or router for each layer of a model, as a JSON file.

    {"format": "farlight.fit", "version": 1, "model": {…},
     "layers": [{"pattern": "<Pattern.to_json() text>"}, {"router": "<expression of read_router>"}, null, …]}

The place in `layers` is the layer's number; null leaves a layer as the model has it. What `model` says is for people.
Reading evaluates nothing: patterns and routers have readers of their own.
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
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PatternError(f"{where} is not JSON ({error}); pass a file that fl.fit or write_layers wrote.") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        kind = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise PatternError(
            f"{where} is of format {_short(kind)}, not {FORMAT!r}; pass a file that fl.fit or write_layers wrote."
        )
    if found.get("version") != VERSION:
        raise PatternError(
            f"{where} is of version {_short(found.get('version'))}; this farlight reads version {VERSION}. "
            "Write the file anew, or use the farlight that wrote it."
        )
    entries = found.get("layers")
    if not isinstance(entries, list):
        raise PatternError(f"{where}: 'layers' is {type(entries).__name__}; it must be a list with one entry for each layer.")
    return {number: _read(entry, f"{where}: layer {number}") for number, entry in enumerate(entries) if entry is not None}


def _text(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text("utf-8")
    except ValueError as error:  # not UTF-8, or a path with a zero byte
        raise PatternError(f"{path!r} cannot be read ({error}); pass a file that fl.fit or write_layers wrote.") from None


def _read(entry: Any, where: str) -> Pattern | Router:
    """One layer's entry."""
    match entry:
        case {"pattern": str(text), **others} if "router" not in others:
            read: Any = Pattern.from_json
        case {"router": str(text), **others} if "pattern" not in others:
            read = read_router
        case _:
            raise PatternError(f'{where} is {_short(entry)}; it must be {{"pattern": text}}, {{"router": text}} or null.')
    try:
        chosen: Pattern | Router = read(text)
    except PatternError as error:
        raise PatternError(f"{where}: {error}") from None
    return chosen


def write_layers(
    layers: Mapping[int, Pattern | Router | str | None],
    path: str | os.PathLike[str] | None = None,
    *,
    model: Mapping[str, Any] | None = None,
) -> str:
    """Write a pattern or router for each layer as JSON; `read_layers` gives them back. Returns the text.

    A router is given by its expression, such as `"topblocks(8) | window(16)"`, or is one that `read_router` made, which
    remembers it: a router built by hand may hold learned weights, which have no place here. `model` is kept as it is.
    Raises ArgumentError for anything else.
    """
    entries: list[dict[str, str] | None] = [None] * (max((_number(n) for n in layers), default=-1) + 1)
    for number, chosen in layers.items():
        entries[number] = _entry(number, chosen)
    found = {"format": FORMAT, "version": VERSION, "model": dict(model or {}), "layers": entries}
    try:
        text = json.dumps(found, indent=1)
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


def _entry(number: int, chosen: Pattern | Router | str | None) -> dict[str, str] | None:
    if chosen is None:
        return None
    if isinstance(chosen, Pattern):
        return {"pattern": chosen.to_json()}
    expression = chosen if isinstance(chosen, str) else getattr(chosen, "expression", None)
    if not isinstance(expression, str):
        raise ArgumentError(
            f"write_layers: layer {number} has a {type(chosen).__name__}, which does not say how it was written; give a "
            "pattern, or the router's expression, such as 'topblocks(8) | window(16)'."
        )
    read_router(expression)  # so that what cannot be read is not written
    return {"router": expression}


def _short(entry: Any) -> str:
    """Part of a value of any depth and length, for a message."""
    return reprlib.repr(entry)
