"""The `farlight` command. Each command is one file in this folder; nothing here is needed to use the library."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with 0, or with 2 and one message on stderr for a farlight error."""
    try:
        import rich  # noqa: F401
        import typer
    except ImportError as error:
        print(f"farlight: the command line needs typer and rich ({error}); pip install 'farlight[cli]'.", file=sys.stderr)
        raise SystemExit(2) from None

    # File names may contain bytes that the output encoding lacks; they are printed as escapes.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    from farlight.cli import audit, bench, doctor, embed, map
    from farlight.errors import FarlightError

    app = typer.Typer(
        name="farlight",
        help="Exact sparse attention for long texts, and a measure of what was lost by not looking.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def root() -> None:
        pass  # keeps `farlight audit` a subcommand even when it is the only one

    app.command("audit")(audit.audit_command)
    app.command("bench")(bench.bench_command)
    app.command("doctor")(doctor.doctor_command)
    app.command("embed")(embed.embed_command)
    app.command("map")(map.map_command)
    try:
        app(args=None if arguments is None else list(arguments), prog_name="farlight")
    except FarlightError as error:
        print(f"farlight: {error}", file=sys.stderr)
        raise SystemExit(2) from None
