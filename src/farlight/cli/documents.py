"""The documents of `farlight embed`: files, folders, globs, JSON lines, parquet and standard input, read one by one."""

from __future__ import annotations

import glob
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farlight.cli.inputs import printable, read_text
from farlight.errors import ArgumentError, FarlightError, UnsupportedError

__all__ = ["SUFFIXES", "Document", "find_files", "read_documents"]

# What is read in a folder.
SUFFIXES = (".txt", ".text", ".md", ".rst", ".jsonl", ".ndjson", ".parquet")
_LINES, _STDIN = (".jsonl", ".ndjson"), "-"
_NAME_FIELDS = ("id", "name", "title", "path", "url")


@dataclass(frozen=True)
class Document:
    """A text with a name, or the error that reading it met."""

    name: str
    text: str = ""
    error: FarlightError | None = None


def find_files(places: Sequence[Path]) -> list[Path]:
    """The files of these places, each once: a file, a folder with all below it, a glob such as `notes/**/*.md`, or `-`.

    Raises ArgumentError for a folder or a glob that holds no text.
    """
    files: dict[str, Path] = {}
    for place in places:
        for path in _files_of(place):
            files.setdefault(str(path.resolve()) if str(path) != _STDIN else _STDIN, path)
    return list(files.values())


def _files_of(place: Path) -> list[Path]:
    name = str(place)
    try:
        if name == _STDIN or place.is_file():
            return [place]
        if place.is_dir():
            paths = sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not paths:
                raise ArgumentError(
                    f"folder {printable(place)!r} holds no text ({', '.join(SUFFIXES)}); name files, or a glob such as "
                    f"{printable(place / '*')!r}."
                )
            return paths
        if any(mark in name for mark in "*?["):
            paths = [Path(found) for found in sorted(glob.glob(name, recursive=True)) if Path(found).is_file()]
            if not paths:
                raise ArgumentError(f"no file fits {printable(place)!r}.")
            return paths
    except OSError:
        pass  # a name that is too long, say: reading it says what is wrong
    return [place]


def read_documents(
    paths: Sequence[Path], field: str = "text", is_claimed: Callable[[int], bool] | None = None
) -> Iterator[Document]:
    """The documents of these files in order; one that cannot be read carries its error.

    field: the key of the text in JSON lines, the column in parquet. is_claimed: for each document's number, counted from 0,
    whether it is wanted; None: all are. A text file that is not wanted is not read.
    """
    number = 0
    for path in paths:
        for document in _file_of_many(path, field) if _holds_many(path) else [None]:
            if is_claimed is None or is_claimed(number):
                yield _text_file(path) if document is None else document
            number += 1


def _holds_many(path: Path) -> bool:
    return str(path) == _STDIN or path.suffix.lower() in (*_LINES, ".parquet")


def _text_file(path: Path) -> Document:
    try:
        return Document(*read_text(path))
    except FarlightError as error:
        return Document(printable(path), error=error)


def _file_of_many(path: Path, field: str) -> Iterator[Document]:
    try:
        if str(path) == _STDIN:
            yield from _standard_input(field)
        elif path.suffix.lower() in _LINES:
            name, text = read_text(path)
            yield from _lines(name, text, field)
        else:
            yield from _parquet(path, field)
    except FarlightError as error:
        yield Document(printable(path), error=error)


def _standard_input(field: str) -> Iterator[Document]:
    """Standard input: JSON lines where its first line is a JSON object, else one text."""
    data = sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"standard input is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}.") from None
    if not text.strip():
        raise ArgumentError("standard input is empty.")
    first = text.lstrip().split("\n", 1)[0]
    try:
        is_lines = isinstance(json.loads(first), dict)
    except ValueError:
        is_lines = False
    if is_lines:
        yield from _lines("standard input", text, field)
    else:
        yield Document("standard input", text)


def _lines(name: str, text: str, field: str) -> Iterator[Document]:
    """One document per line; it is named by its `id`, `name`, `title`, `path` or `url`, else by its line."""
    used: set[str] = set()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Document(place, error=ArgumentError(f"{place} is not JSON ({error})."))
            continue
        yield _document(place, record, field, used)


def _document(place: str, record: Any, field: str, used: set[str]) -> Document:
    """used: names of the file's documents. A name that stands there gets the line too: which document is which is then the
    same for every process that reads the file, whatever share of it is its own.
    """
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        found = ", ".join(map(str, list(record)[:8])) if isinstance(record, dict) else type(record).__name__
        why = f"{place} has no text in {field!r} (it has: {found}); name the field with --field."
        return Document(place, error=ArgumentError(why))
    label = next((str(record[key]) for key in _NAME_FIELDS if record.get(key) not in (None, "") and key != field), None)
    file, _, line = place.rpartition(":")
    name = place if label is None else f"{file}:{label}"
    while name in used:
        name += f" ({line})"
    used.add(name)
    return Document(name, text)


def _parquet(path: Path, field: str) -> Iterator[Document]:
    """One document per row."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UnsupportedError(
            f"{printable(path)!r}: reading parquet needs pyarrow ({error}); pip install 'farlight[parquet]'."
        ) from error
    try:
        file = parquet.ParquetFile(path)
        used: set[str] = set()
        columns = [name for name in (field, *_NAME_FIELDS) if name in file.schema_arrow.names]
        number = 0
        for batch in file.iter_batches(256, columns=columns):
            for record in batch.to_pylist():
                number += 1
                yield _document(f"{printable(path)}:{number}", record, field, used)
    except OSError as error:
        raise ArgumentError(f"{printable(path)!r} cannot be read as parquet: {error}.") from error
