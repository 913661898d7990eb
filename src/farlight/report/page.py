"""One HTML file that holds everything it shows and asks no network for anything.

The parts (markup, style, scripts, words of both languages) are files of this package, put together here. What varies is one
block of JSON: every `<`, `>`, `&` and line separator in it is written as an escape, so that no text can end the block or
become markup; scripts set it as text only. The page's Content-Security-Policy allows these very scripts and this style, by
their hashes, and no request of any kind.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import farlight
from farlight.errors import ArgumentError

__all__ = ["LANGUAGES", "MOST_BYTES", "render", "strings", "write"]

LANGUAGES = ("en", "zh")
MOST_BYTES = 5_000_000


def strings() -> dict[str, dict[str, str]]:
    """Every word of the page by name, in each of `LANGUAGES`."""
    words: dict[str, dict[str, str]] = json.loads(_asset("strings.json"))
    return words


def render(data: dict[str, Any]) -> str:
    """The page for what `map_data` or `audit_data` gave. Raises ArgumentError where it would exceed `MOST_BYTES`."""
    script = "\n".join(_asset(f"js/{name}") for name in _scripts())
    style = _asset("report.css")
    policy = (
        f"default-src 'none'; script-src 'sha256-{_digest(script)}'; style-src 'sha256-{_digest(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": html.escape(policy, quote=True),
        "title": html.escape(f"farlight: {data['name']}"),
        "style": style,
        "script": script,
        "data": block({**data, "version": farlight.__version__}),
        "strings": block(strings()),
    }
    # One pass over the template, so that nothing within a part is ever taken for a mark.
    out = re.sub(r"<!--(\w+)-->", lambda mark: parts[mark[1]], _asset("report.html"))
    if len(out.encode()) > MOST_BYTES:
        raise ArgumentError(
            f"the page would have {len(out.encode()):,} bytes, more than the {MOST_BYTES:,} that open quickly everywhere; "
            "give fewer patterns, or patterns with smaller tables."
        )
    return out


def block(value: Any) -> str:
    r"""JSON that may stand inside a script element: no character in it means anything to HTML.

    >>> block({"text": "</script><img src=x>&"})
    '{"text":"\\u003c/script\\u003e\\u003cimg src=x\\u003e\\u0026"}'
    """
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write(page: str, path: Path) -> None:
    """Write a page. Raises ArgumentError where that is not possible."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"--html {str(path)!r} cannot be written: {error.strerror or error}.") from error


def _asset(name: str) -> str:
    return (resources.files("farlight.report") / "assets" / name).read_text(encoding="utf-8")


def _scripts() -> list[str]:
    folder = resources.files("farlight.report") / "assets" / "js"
    return sorted(file.name for file in folder.iterdir() if file.name.endswith(".js"))


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
