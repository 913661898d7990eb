"""Assembly of the report page: one self-contained HTML file that makes no network request.

Markup, style, scripts and the strings of both languages are assets of this package, joined here. The data is one block of
JSON in which every `<`, `>`, `&` and non-ASCII character is escaped, so that no text can end the block or become markup;
scripts insert it as text nodes only. The Content-Security-Policy allows this script and this style by their SHA-256, and no
request of any kind.
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
MOST_BYTES = 6_000_000


def strings() -> dict[str, dict[str, str]]:
    """The page's strings by language and name."""
    texts: dict[str, dict[str, str]] = json.loads(_asset("strings.json"))
    return texts


def render(data: dict[str, Any]) -> str:
    """The HTML of the data of `map_data`, `maps_data` or `audit_data`. Raises ArgumentError above `MOST_BYTES`."""
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
    # One pass over the template: placeholders inside the parts are not replaced.
    out = re.sub(r"<!--(\w+)-->", lambda match: parts[match[1]], _asset("report.html"))
    if len(out.encode()) > MOST_BYTES:
        raise ArgumentError(
            f"the page would have {len(out.encode()):,} bytes, more than the {MOST_BYTES:,} that open quickly everywhere; "
            "give fewer patterns, patterns with smaller tables, or fewer --head."
        )
    return out


def block(value: Any) -> str:
    r"""JSON that is safe inside a script element: it contains no character of HTML syntax.

    >>> block({"text": "</script><img src=x>&"})
    '{"text":"\\u003c/script\\u003e\\u003cimg src=x\\u003e\\u0026"}'
    """
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write(page: str, path: Path) -> None:
    """Write a page to a file. Raises ArgumentError where the file cannot be written."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"--html {str(path)!r} cannot be written: {error.strerror or error}.") from error


def _asset(name: str) -> str:
    """The text of a file in `assets/`."""
    return (resources.files("farlight.report") / "assets" / name).read_text(encoding="utf-8")


def _scripts() -> list[str]:
    """Script names in order of execution: their numbers."""
    folder = resources.files("farlight.report") / "assets" / "js"
    return sorted(file.name for file in folder.iterdir() if file.name.endswith(".js"))


def _digest(text: str) -> str:
    """base64 of SHA-256, as Content-Security-Policy expects it."""
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
