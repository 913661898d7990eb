"""Inputs of the commands (text, patterns, routers), with a farlight error for each unusable one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from farlight.errors import ArgumentError

if TYPE_CHECKING:
    from farlight.analysis.candidates_by_layer import Subject
    from farlight.patterns.expression import Pattern
    from farlight.routing.base import Router

__all__ = ["printable", "read_judged", "read_patterns", "read_subjects", "read_text"]

_MAX_TEXT_BYTES = 2**30


def read_text(path: Path | None) -> tuple[str, str]:
    """(name, text) of a UTF-8 text file; None: Python's reference manual.

    Raises ArgumentError for a file that is unreadable, empty, too large or not UTF-8 text.
    """
    if path is None:
        return "Python language reference (pydoc_data.topics)", _manual()
    name = printable(path)
    try:
        if path.is_dir():
            raise ArgumentError(f"text {name!r} is a directory; give one text file, e.g. {printable(path / 'book.txt')!r}.")
        with path.open("rb") as file:
            data = file.read(_MAX_TEXT_BYTES + 1)
    except FileNotFoundError:
        raise ArgumentError(f"text {name!r}: no such file. Give the path of a text file.") from None
    except (OSError, ValueError) as error:  # a path with a zero byte is a ValueError
        why = getattr(error, "strerror", None) or error
        raise ArgumentError(f"text {name!r} cannot be read: {why}. Give a file you may read.") from error
    if len(data) > _MAX_TEXT_BYTES:
        raise ArgumentError(f"text {name!r} has more than {_MAX_TEXT_BYTES:,} bytes; give a part of it.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"text {name!r} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}. Give a plain text "
            "file; convert another encoding with: iconv -t utf-8."
        ) from None
    if "\0" in text:
        raise ArgumentError(
            f"text {name!r} holds a zero byte at {text.index(chr(0))}, so it is not plain text; give a text file."
        )
    if not text.strip():
        raise ArgumentError(f"text {name!r} is empty; give a file with at least a paragraph.")
    return name, text


def printable(path: Path) -> str:
    r"""The path as Unicode text; bytes that are not UTF-8 become escapes.

    >>> printable(Path("notes"))
    'notes'
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _manual() -> str:
    """The topics of Python's `help()` in alphabetical order, separated by empty lines."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ArgumentError(f"this Python comes without its manual ({error}); give the path of a text file.") from error
    return "\n\n".join(topics[name] for name in sorted(topics))


def read_patterns(expressions: Sequence[str]) -> list[Pattern]:
    """The patterns of these expressions. Raises PatternError."""
    from farlight.patterns import parse

    return [parse(expression) for expression in expressions]


def read_judged(expressions: Sequence[str]) -> list[Pattern | Router]:
    """The patterns and routers of these expressions. Raises PatternError."""
    from farlight.patterns import parse
    from farlight.routing.notation import is_router, read_router

    return [read_router(text) if is_router(text) else parse(text) for text in expressions]


def read_subjects(expressions: Sequence[str]) -> list[Pattern | Router | Subject]:
    """As `read_judged`; what ends in .json is a file of `fl.fit` or `write_layers`, with a pattern or router for each layer.

    Raises PatternError, also for a file of another format, and ArgumentError for one that cannot be read.
    """
    from farlight.analysis.candidates_by_layer import Subject
    from farlight.hf.fit_file import read_layers

    subjects: list[Pattern | Router | Subject] = []
    for text in expressions:
        if not text.endswith(".json"):
            subjects += read_judged([text])
            continue
        path = Path(text)
        try:
            subjects.append(Subject(printable(Path(path.name)), read_layers(path)))
        except OSError as error:
            raise ArgumentError(
                f"--pattern {printable(path)!r} cannot be read: {error.strerror}. Give a file that a fit wrote."
            ) from None
    return subjects
