"""The vectors of `farlight embed` as files: .npz, .npy, JSON lines, parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farlight.cli.outputs import check_place, writing
from farlight.errors import ArgumentError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from farlight.embedding.book import Library

__all__ = ["FORMATS", "PassageVector", "check_format", "library_rows", "save_vectors"]

FORMATS = (".npz", ".npy", ".jsonl", ".parquet")


@dataclass(frozen=True)
class PassageVector:
    """One passage: its document and chapter, its characters [start, stop), text, and unit vector."""

    document: str
    title: str
    start: int
    stop: int
    text: str
    vector: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Its fields, the vector as a list."""
        fields = {name: getattr(self, name) for name in ("document", "title", "start", "stop", "text")}
        return fields | {"vector": self.vector.tolist()}


def check_format(path: Path) -> None:
    """Raise for a suffix that is none of `FORMATS`, a place that cannot be written, and parquet without pyarrow."""
    if path.suffix not in FORMATS:
        raise ArgumentError(f"--save {str(path)!r}: vectors are written as {', '.join(FORMATS)}; let the name end so.")
    check_place("--save", path)
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise UnsupportedError(f"--save {str(path)!r} needs pyarrow ({error}); pip install 'farlight[parquet]'.") from error


def library_rows(library: Library) -> Iterator[PassageVector]:
    """The passages of a library in order."""
    for (number, passage), vector in zip(library.owners, library.passage_vectors, strict=True):
        part = library.parts[number]
        start, stop = part.span(passage)
        yield PassageVector(library.names[part.book], part.title, start, stop, library.texts[part.book][start:stop], vector)


def save_vectors(path: Path, library: Library) -> None:
    """Write a library: .npz, chapters and passages with their places; .npy, the `(passages, features)` matrix alone; .jsonl and
    .parquet, a row per passage with its document, place, text and vector."""
    import numpy as np

    with writing("--save", path):
        if path.suffix == ".npy":
            np.save(path, library.passage_vectors.numpy())
        elif path.suffix == ".npz":
            _save_npz(path, library)
        elif path.suffix == ".jsonl":
            with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
                for row in library_rows(library):
                    file.write(json.dumps(row.to_dict(), ensure_ascii=False) + "\n")
        else:
            import pyarrow
            import pyarrow.parquet

            table = pyarrow.Table.from_pylist([row.to_dict() for row in library_rows(library)])
            column = pyarrow.array(library.passage_vectors.tolist(), pyarrow.list_(pyarrow.float32()))
            table = table.set_column(table.schema.get_field_index("vector"), "vector", column)
            pyarrow.parquet.write_table(table, path)


def _save_npz(path: Path, library: Library) -> None:
    import numpy as np

    spans = [library.parts[part].span(passage) for part, passage in library.owners]
    np.savez(
        path,
        chapters=library.chapter_vectors.numpy(),
        titles=np.array([part.title for part in library.parts]),
        passages=library.passage_vectors.numpy(),
        passage_part=np.array([part for part, _ in library.owners]),
        passage_start=np.array([start for start, _ in spans]),
        passage_stop=np.array([stop for _, stop in spans]),
        books=np.array(library.names),
        part_book=np.array([part.book for part in library.parts]),
    )
