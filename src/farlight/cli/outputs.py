"""Output files of the commands: paths are checked before the work, write errors become farlight errors after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from farlight.cli.inputs import printable
from farlight.errors import ArgumentError, FarlightError

__all__ = ["check_place", "one_format", "writing"]


def one_format(options: dict[str, bool]) -> str:
    """The requested form of output, "" for none; `options`: name -> whether given. Raises ArgumentError for two."""
    asked = [name for name, is_given in options.items() if is_given]
    if len(asked) > 1:
        raise ArgumentError(f"{' and '.join(asked)}: one form of output at a time; give one of them.")
    return asked[0] if asked else ""


def check_place(option: str, path: Path) -> None:
    """Raise ArgumentError where the path is a directory or its parent is missing."""
    try:
        if path.is_dir():
            raise ArgumentError(f"{option} {printable(path)!r} is a directory; give the name of a file in it.")
        if not path.parent.is_dir():
            raise ArgumentError(f"{option} {printable(path)!r}: there is no folder {printable(path.parent)!r}.")
    except OSError as error:
        raise _write_error(option, path, error) from error


@contextlib.contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Turns an OSError, or a writer's ValueError for an unknown suffix, into an ArgumentError."""
    try:
        yield
    except FarlightError:
        raise
    except (OSError, ValueError) as error:
        raise _write_error(option, path, error) from error


def _write_error(option: str, path: Path, error: Exception) -> ArgumentError:
    return ArgumentError(f"{option} {printable(path)!r} cannot be written: {getattr(error, 'strerror', None) or error}.")
