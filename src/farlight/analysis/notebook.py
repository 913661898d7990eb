"""What a notebook shows of a value (`_repr_html_`): a pattern's picture, the tables of worlds, audits, fits and retention.

Plain HTML with inline styles, which every notebook keeps, in the colours of the notebook's own theme.
"""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from farlight.errors import ArgumentError, PatternError

if TYPE_CHECKING:
    from farlight.analysis.audit import Audit
    from farlight.analysis.fit.fit import Fit
    from farlight.analysis.graph.links import Array
    from farlight.analysis.graph.reachability import Reach
    from farlight.analysis.graph.small_world import SmallWorld
    from farlight.analysis.loss.retention import Retention
    from farlight.patterns.expression import Pattern

__all__ = ["audit_html", "fit_html", "grid", "pattern_html", "reach_html", "retention_html", "world_html"]

_TOKENS = 256
_PIXELS = 256
_MAX_HEADS = 4
_MAX_ROWS = 24
_INK = (31, 78, 121)
_BOX = "font-family:system-ui,sans-serif;font-size:13px;line-height:1.45;max-width:60rem"
_CODE = "font-family:ui-monospace,monospace;overflow-wrap:anywhere"


def pattern_html(pattern: Pattern) -> str:
    """The expression of a pattern with its matrix: of 256 tokens, or of the number that its tables are made for.

    A pattern that differs between heads is drawn for its first four.
    """
    title = f'<code style="{_CODE}">{html.escape(_short(str(pattern), 400))}</code>'
    n = _drawn_tokens(pattern)
    if n is None:
        return f'<div style="{_BOX}">{title}</div>'
    heads = [head for head in range(_MAX_HEADS if pattern.varies_over_heads else 1) if _fits(pattern, n, head)]
    pictures = "".join(_figure(pattern, n, head, len(heads)) for head in heads)
    return f'<div style="{_BOX}">{title}<div style="display:flex;flex-wrap:wrap;gap:12px">{pictures}</div></div>'


def _drawn_tokens(pattern: Pattern) -> int | None:
    """256, else a number of tokens that a table of the pattern suggests; None where none of them fits."""
    sizes = dict.fromkeys([_TOKENS, *(int(size) for table in pattern._tables for size in reversed(table.shape))])
    blocks = [getattr(atom, "block", 1) for atom in pattern.atoms()]
    candidates = [*sizes, *(size * block for size in sizes for block in blocks if block > 1)]
    return next((n for n in candidates if 0 < n <= 1 << 16 and _fits(pattern, n, 0)), None)


def _fits(pattern: Pattern, n: int, head: int) -> bool:
    from farlight.analysis.graph.sizes import sizes_of

    try:
        pattern.check(sizes_of(pattern, n, 0, head))
    except (PatternError, ArgumentError):
        return False
    return True


def _figure(pattern: Pattern, n: int, head: int, heads: int) -> str:
    """The matrix of one head and its number of links, counted from the picture's exact shares."""
    from farlight.analysis.plot import densities

    share = densities(pattern, n, head=head, pixels=_PIXELS)
    links = share.mean() if n <= _PIXELS else None
    of = (
        f"{round(links * n * n):,} of {n * n:,} links ({links:.1%})"
        if links is not None
        else f"{share.mean():.2%} of all links"
    )
    name = f"head {head}: " if heads > 1 else ""
    caption = f"{name}{n:,} tokens, {of}"
    source = base64.b64encode(_png(share if n <= _PIXELS else share**0.25)).decode("ascii")
    image = (
        f'<img alt="matrix of the pattern: queries down, keys across" src="data:image/png;base64,{source}" '
        'style="width:192px;height:192px;image-rendering:pixelated;border:1px solid #8888;background:#fff">'
    )
    return f'<figure style="margin:6px 0">{image}<figcaption style="opacity:.75">{caption}</figcaption></figure>'


def _png(share: Array) -> bytes:
    """A PNG of shares between 0 (white) and 1 (ink), in 256 colours."""
    height, width = share.shape
    ramp = np.linspace(0, 1, 256)[:, None]
    palette = np.rint(255 * (1 - ramp) + np.array(_INK) * ramp).astype(np.uint8).tobytes()
    rows = np.zeros((height, width + 1), np.uint8)  # each row begins with the number of its filter, 0
    rows[:, 1:] = np.rint(255 * share)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"PLTE", palette) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def grid(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> str:
    """A table as HTML; cells are plain text. `head` may be empty.

    >>> grid("a", ["b"], [["<c>"]]).count("&lt;c&gt;")
    1
    """
    cell = "padding:2px 10px 2px 0;text-align:left;vertical-align:top;overflow-wrap:anywhere"
    header = "".join(f'<th style="{cell};opacity:.75">{html.escape(name)}</th>' for name in head)
    lines = "".join("<tr>" + "".join(f'<td style="{cell}">{html.escape(x)}</td>' for x in row) + "</tr>" for row in rows)
    caption = f'<div style="{_CODE};font-weight:600">{html.escape(title)}</div>'
    below = f'<div style="opacity:.75">{html.escape(note)}</div>' if note else ""
    heading = f"<thead><tr>{header}</tr></thead>" if head else ""
    table = f'<table style="border-collapse:collapse">{heading}<tbody>{lines}</tbody></table>'
    return f'<div style="{_BOX}">{caption}{table}{below}</div>'


def world_html(world: SmallWorld) -> str:
    """Metrics, values and what to compare them with."""
    title, *_ = str(world).split("\n")
    return grid(title, ["", "", "compare"], world.rows())


def reach_html(reach: Reach) -> str:
    """Mean and worst share heard of, layer by layer."""
    title, *_ = str(reach).split("\n")
    note = "" if reach.capacity is None else str(reach.capacity)
    return grid(title, ["layer", "mean heard of", "worst"], reach.rows(), note)


def audit_html(audit: Audit) -> str:
    """What each pattern of an audit keeps and costs; for a language model its loss."""
    head = ["pattern", "links", "attention kept", "of best", "worst head", "token cosine", "pooled cosine", "whole text"]
    rows = []
    for row in audit.patterns:
        long = row.long_text
        speed = "–" if long.why_not or not long.seconds else f"{long.speedup:.1f}× faster"
        shares = [f"{value:.1%}" for value in (row.density, row.mass, row.of_best, row.worst_head)]
        line = [row.pattern, *shares, f"{row.token_cosine:.4f}", f"{row.pooled_cosine:.4f}", speed]
        rows.append(line if row.language is None else [*line, f"{row.language.loss:.4f}"])
    if any(row.language is not None for row in audit.patterns):
        head.append("loss in nats")
        rows = [[*row, *["–"] * (len(head) - len(row))] for row in rows]
    note = f"{audit.passages} passages of {audit.passage_tokens} tokens, {audit.tokens:,} tokens in all"
    return grid(f"{audit.model} on {audit.text}" if audit.text else audit.model, head, rows, note)


def fit_html(fit: Fit) -> str:
    """The pattern of each head, its links and what it keeps; heads with the same pattern in one row."""
    rows = [[heads, text, f"{links:.1%}", f"{kept:.1%}"] for heads, text, links, kept in head_rows(fit)]
    note = f"… {len(rows) - _MAX_ROWS} more" if len(rows) > _MAX_ROWS else ""
    return grid(summary(fit), ["heads", "pattern", "links", "kept"], rows[:_MAX_ROWS], note)


def summary(fit: Fit) -> str:
    """One line: how many links of all keep how much."""
    return f"{fit.density:.1%} of all links keep {fit.mass:.1%} of full attention"


def head_rows(fit: Fit) -> Iterator[tuple[str, str, float, float]]:
    """(heads, pattern, mean share of links, mean share kept) of each distinct pattern of a fit, in order of the first head."""
    texts = [head if isinstance(head, str) else str(head) for head in fit.heads]
    for text in dict.fromkeys(texts):
        heads = [number for number, other in enumerate(texts) if other == text]
        links = (fit.links[heads] / fit.base_links[heads].clamp(min=1)).mean()
        yield _ranges(heads), text, float(links), float(fit.kept[heads].mean())


def retention_html(retention: Retention) -> str:
    """What each head keeps, mean over the texts."""
    mass, density, best = (x.double().mean(0) for x in (retention.mass, retention.density, retention.best))
    rows = [
        [str(head), f"{float(density[head]):.1%}", f"{float(mass[head]):.1%}", f"{float(best[head]):.1%}"]
        for head in range(mass.numel())
    ]
    note = f"… {len(rows) - _MAX_ROWS} more heads" if len(rows) > _MAX_ROWS else ""
    return grid(str(retention), ["head", "links", "attention kept", "best possible"], rows[:_MAX_ROWS], note)


def _ranges(numbers: Sequence[int]) -> str:
    """`0-2, 5` of [0, 1, 2, 5]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
