"""Tables for a terminal of any width, CSV and Markdown. A number is never cut: columns are dropped instead, and named below.

A `Column` says how a value is read off a row, written, and how long it stays. Where a table is wider than the screen, first the
rows are called by number and their names listed above it, then columns of the lowest priority are dropped.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table as RichTable

__all__ = ["Column", "Table", "as_csv", "as_markdown", "as_text"]

# Names are wrapped to no fewer characters than this beside their numbers.
_NARROWEST_NAME = 26


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    key: its name in CSV. title: its head, of one or more lines. value: what it reads off a row, None where there is nothing.
    write: the value as text. priority: columns of lower priority are dropped first. left: text, set to the left.
    """

    key: str
    title: str
    value: Callable[[Any], Any]
    write: Callable[[Any], str] = str
    priority: int = 0
    left: bool = False

    def text(self, row: Any) -> str:
        """The cell of a row; "-" where it has no value."""
        value = self.value(row)
        return "-" if value is None else self.write(value)

    @property
    def heading(self) -> str:
        """The title on one line."""
        return " ".join(self.title.split())


@dataclass(frozen=True)
class Table:
    """Rows with a name each. prefix: put before the keys of its columns in CSV. A row of equal names has one number."""

    title: str
    columns: tuple[Column, ...]
    names: tuple[str, ...]
    rows: tuple[Any, ...]
    prefix: str = ""
    head: str = "pattern"

    def without_empty(self) -> Table:
        """The table without the columns that have no value in any row."""
        kept = tuple(column for column in self.columns if any(column.value(row) is not None for row in self.rows))
        return replace(self, columns=kept)


def as_text(tables: Sequence[Table], width: int | None) -> list[str]:
    """The tables as lines of at most `width` characters (None: as wide as they are), after a list of names where they need it.

    Lines are longer only where a number and a single column of highest priority already are.
    """
    tables = [table.without_empty() for table in tables]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(n for table in tables for n in table.names), 1)}
    numbered = width is not None and any(_width(_drawn(table, table.columns, numbers, False)) > width for table in tables)
    lines: list[str] = []
    if numbered:
        from farlight.cli.screen import wrapped

        lines += [f"{tables[0].head}s:"]
        for name, number in numbers.items():
            lines += wrapped(f"{number:>3}  {name}", width)
    for table in tables:
        columns, dropped = list(table.columns), list[Column]()
        while width is not None and len(columns) > 1 and _width(_drawn(table, columns, numbers, numbered)) > width:
            # Of equal priorities the one furthest to the right goes first.
            least = min(reversed(columns), key=lambda column: column.priority)
            columns.remove(least)
            dropped.append(least)
        lines += ["", *_lines(_drawn(table, columns, numbers, numbered), width)]
        if dropped:
            from farlight.cli.screen import wrapped

            names = ", ".join(column.heading for column in table.columns if column in dropped)
            lines += wrapped(f"not shown at {width} columns: {names}; --wide shows them.", width)
    return lines


def as_csv(tables: Sequence[Table]) -> str:
    """One row per name with the columns of all tables (which have the same rows), numbers unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([tables[0].head, *(table.prefix + column.key for table in tables for column in table.columns)])
    for index, name in enumerate(tables[0].names):
        values = [column.value(table.rows[index]) for table in tables for column in table.columns]
        writer.writerow([name, *("" if value is None else value for value in values)])
    return out.getvalue()


def as_markdown(tables: Sequence[Table]) -> str:
    """The tables in Markdown, every column, names whole."""
    parts = []
    for table in map(Table.without_empty, tables):
        heads = [table.head, *(column.heading for column in table.columns)]
        rules = [":--", *(":--" if column.left else "--:" for column in table.columns)]
        rows = [
            [f"`{name}`", *(column.text(row) for column in table.columns)]
            for name, row in zip(table.names, table.rows, strict=True)
        ]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (heads, rules, *rows)]
        parts.append("\n".join([f"**{table.title}**", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _drawn(table: Table, columns: Sequence[Column], numbers: dict[str, int], numbered: bool) -> RichTable:
    """The table of these columns for rich; `numbered`: rows are called by number alone."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(title=Text(table.title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    names = [_name(name, numbers, numbered) for name in table.names]
    longest = max(map(len, names), default=0)
    head = "#" if numbered else table.head
    narrowest = longest if numbered else min(longest, _NARROWEST_NAME)
    drawn.add_column(head, overflow="fold", min_width=max(narrowest, len(head)))
    for column in columns:
        drawn.add_column(Text(column.title), justify="left" if column.left else "right", no_wrap=True)
    for name, row in zip(names, table.rows, strict=True):
        drawn.add_row(Text(name), *(Text(column.text(row)) for column in columns))
    return drawn


def _name(name: str, numbers: dict[str, int], numbered: bool) -> str:
    if numbered:
        return str(numbers[name])
    return f"{numbers[name]} {name}" if len(numbers) > 1 else name


def _console(width: int) -> Any:
    from rich.console import Console

    return Console(file=io.StringIO(), width=width, color_system=None, highlight=False)


def _width(drawn: RichTable) -> int:
    """The fewest characters in which no column of numbers is cut."""
    from rich.measure import Measurement

    console = _console(10_000)
    return int(Measurement.get(console, console.options, drawn).minimum)


def _lines(drawn: RichTable, width: int | None) -> list[str]:
    """The drawn table as lines without trailing spaces."""
    from rich.measure import Measurement

    console = _console(10_000)
    measured = Measurement.get(console, console.options, drawn)
    console = _console(measured.maximum if width is None else max(measured.minimum, min(measured.maximum, width)))
    console.print(drawn)
    return [line.rstrip() for line in console.file.getvalue().rstrip().split("\n")]
