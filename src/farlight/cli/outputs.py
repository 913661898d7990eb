"""Where the commands write files: checked before the long work, and a message where the file cannot be written after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from farlight.cli.inputs import printable
from farlight.errors import ArgumentError, FarlightError

__all__ = ["check_place", "writing"]


def check_place(option: str, path: Path) -> None:
    """Raise ArgumentError where no file can be written at this path: its folder is missing, or it is a folder itself."""
    try:
        if path.is_dir():
            raise ArgumentError(f"{option} {printable(path)!r} is a directory; give the name of a file in it.")
        if not path.parent.is_dir():
            raise ArgumentError(f"{option} {printable(path)!r}: there is no folder {printable(path.parent)!r}.")
    except OSError as error:
        raise _cannot(option, path, error) from error


@contextlib.contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Raises ArgumentError in place of an OSError, or of the ValueError of a writer that does not know the suffix."""
    try:
        yield
    except FarlightError:
        raise
    except (OSError, ValueError) as error:
        raise _cannot(option, path, error) from error


def _cannot(option: str, path: Path, error: Exception) -> ArgumentError:
    return ArgumentError(f"{option} {printable(path)!r} cannot be written: {getattr(error, 'strerror', None) or error}.")
