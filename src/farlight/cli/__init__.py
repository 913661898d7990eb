"""The `farlight` command. Each command is one file in this folder; nothing here is needed to use the library."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["main"]

_OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with 0, or with 2 and one message on stderr for a farlight error."""
    try:
        import typer  # noqa: F401

        if importlib.util.find_spec("rich") is None:
            raise ModuleNotFoundError("No module named 'rich'")
    except ImportError as error:
        print(f"farlight: the command line needs typer and rich ({error}); pip install 'farlight[cli]'.", file=sys.stderr)
        raise SystemExit(2) from None

    # File names may contain bytes that the output encoding lacks; they are printed as escapes.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    from farlight.errors import FarlightError

    if arguments is None and len(sys.argv) == 1:
        arguments = ["--help"]  # on standard output, and no error
    try:
        try:
            _app()(args=None if arguments is None else list(arguments), prog_name="farlight")
        finally:
            sys.stdout.flush()
    except FarlightError as error:
        print(f"farlight: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # `farlight … | head` has read enough
        _abandon_output()
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno not in _OUTPUT_ERRORS or error.filename is not None:
            raise
        _abandon_output()
        print(f"farlight: the output cannot be written: {error.strerror}.", file=sys.stderr)
        raise SystemExit(2) from None


def _app() -> Any:
    """The typer application. Making it, and printing its help, loads neither torch nor the library."""
    import typer

    from farlight.cli import audit, bench, doctor, embed, map, recall

    settings = {"help_option_names": ["-h", "--help"]}
    app = typer.Typer(
        name="farlight",
        help="Exact sparse attention for long texts, and a measure of what was lost by not looking.",
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # help and usage errors as plain text: importing rich takes longer than all the rest
        context_settings=settings,
    )

    @app.callback()
    def root(
        version: bool = typer.Option(False, "--version", "-V", help="Print the version.", callback=_version, is_eager=True),
    ) -> None:
        pass  # keeps `farlight audit` a subcommand even when it is the only one

    # The line of the list of commands; a docstring's first sentence would be cut at 80 columns.
    for name, command, examples, line in (
        ("audit", audit.audit_command, audit.EXAMPLES, "What sparse patterns save and lose on a text."),
        ("bench", bench.bench_command, bench.EXAMPLES, "Time patterns beside torch's full attention."),
        ("doctor", doctor.doctor_command, doctor.EXAMPLES, "Which backends run here, and why others cannot."),
        ("embed", embed.embed_command, embed.EXAMPLES, "Find the passages that answer a query."),
        ("map", map.map_command, map.EXAMPLES, "How far information travels under a pattern."),
        ("recall", recall.recall_command, recall.EXAMPLES, "Whether a model still answers from far back."),
    ):
        epilog = "Examples:\n\n\b\n" + "\n".join(examples)  # \b: lines stay as they are
        app.command(name, epilog=epilog, short_help=line, context_settings=settings)(_with_library(command))
    return app


def _version(wanted: bool) -> None:
    if wanted:
        import typer

        from farlight._version import __version__

        print(f"farlight {__version__}")
        raise typer.Exit


def _with_library(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which first loads the whole library where `farlight_command` has deferred it."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        from farlight import attention  # noqa: F401

        command(*args, **options)

    return run


def _abandon_output() -> None:
    """Send what is still buffered nowhere, so that Python does not fail again when it closes the output."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
