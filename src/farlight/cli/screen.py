"""The width of the output, and text wrapped to it at spaces: a number is never broken."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap

__all__ = ["screen_width", "show", "wrapped"]


def screen_width(wide: bool = False) -> int | None:
    """Columns of the output: COLUMNS where it is set, else those of the terminal; None for a pipe, a file, and `wide`."""
    if wide:
        return None
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrapped(line: str, width: int | None) -> list[str]:
    """A line as lines of at most `width` characters, broken at spaces only.

    Later lines stand below the last column of the first, where columns are two or more spaces apart.

    >>> wrapped("links   51,433,694   194 times fewer than full attention", 40)
    ['links   51,433,694   194 times fewer', '                     than full attention']
    """
    if width is None or len(line) <= width:
        return [line]
    gaps = [gap.end() for gap in re.finditer(r" {2,}", line) if gap.end() <= width * 0.55]
    indent = gaps[-1] if gaps else 2
    head = line[:indent] if gaps else ""
    broken = textwrap.wrap(
        line[len(head) :],
        width=max(width, indent + 12),
        initial_indent=head,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [part.rstrip() for part in broken] or [line]


def show(text: str, width: int | None) -> None:
    """Print text, every line of it wrapped."""
    for line in text.split("\n"):
        print("\n".join(wrapped(line, width)))
