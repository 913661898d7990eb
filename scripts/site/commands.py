"""What each command prints for --help, appended to the pages about the command line."""

from __future__ import annotations

import os
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

COMMANDS = ("audit", "recall", "map", "bench", "embed", "doctor")


def write(pages: Path) -> None:
    """Append the help of every command to cli.md and cli.zh.md (its text is English)."""
    sections = "\n\n".join(f"## farlight {name}\n\n```text\n{help_of(name)}\n```" for name in COMMANDS)
    for name in ("cli.md", "cli.zh.md"):
        page = pages / name
        page.write_text(f"{page.read_text(encoding='utf-8').rstrip()}\n\n{sections}\n", encoding="utf-8")


def help_of(name: str) -> str:
    """The output of `farlight NAME --help` in 100 columns."""
    from farlight.cli import main

    os.environ["COLUMNS"] = "100"
    with redirect_stdout(StringIO()) as printed:
        try:
            main([name, "--help"])
        except SystemExit as end:
            if end.code:
                raise
    return printed.getvalue().strip()
