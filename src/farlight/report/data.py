"""What a page shows, as plain data: a pattern by itself (`map_data`), or a model's audit with its text (`audit_data`).

Nothing here knows HTML. Every number is the library's own: links from `Pattern.count`, reach from `fl.reach`, retention from
the audit; the page computes only what the reader asks of it, from rules that are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from farlight.analysis.audit import Audit, PatternAudit
from farlight.analysis.candidates_by_layer import Judged, Subject, subjects
from farlight.analysis.graph.reachability import Reach
from farlight.analysis.graph.small_world import SmallWorld
from farlight.analysis.loss.top_losses import LostLink
from farlight.analysis.passages import Passages
from farlight.patterns import full, parse
from farlight.patterns.expression import Pattern
from farlight.report.views import curve, view
from farlight.report.words import Words

__all__ = ["audit_data", "map_data", "steps"]

# Beyond so many heads a page shows the first ones only; the heat map has them all.
_MOST_HEADS = 64


def steps(patterns: Sequence[Judged | Subject]) -> list[str]:
    """What `audit_data` reports as progress, in order."""
    return [f"reach: {one.name}" for one in subjects(patterns)]


def map_data(pattern: Pattern, n: int, world: SmallWorld, found: Reach, *, head: int = 0) -> dict[str, Any]:
    """One pattern over n tokens without a text, from what `farlight map` has worked out."""
    own = None
    cost = curve(pattern, own, n, {n: world.links}, 1)
    row = {
        "text": repr(pattern),
        "views": {"text": view(pattern, n, [head], found.layers, found=found, world=world)},
        "cost": cost,
    }
    return {"kind": "map", "name": repr(pattern), "layers": found.layers, "scopes": [{"id": "text", "n": n}], "patterns": [row]}


def audit_data(
    result: Audit,
    patterns: Sequence[Judged | Subject],
    passages: Passages,
    words: Words,
    *,
    step: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """An audit: each pattern within a passage and within the whole text, what it kept by head, and what it lost in words."""
    own = parse(result.own)
    heads = range(min(result.heads, _MOST_HEADS))
    scopes = [{"id": "passage", "n": passages.length}, {"id": "text", "n": passages.tokens}]
    rows = []
    for one, judged in zip(subjects(patterns), result.patterns, strict=True):
        step(f"reach: {one.name}")
        row: dict[str, Any] = {"text": one.name, "views": {}, "cost": None}
        if isinstance(one.chosen, Pattern):
            row |= _looked_at(one.chosen, own, judged, passages, heads, result)
        rows.append(row | {"audit": _judged(judged), "lost": [_lost(link) for link in judged.lost]})
    return {
        "kind": "audit",
        "name": result.text,
        "model": {
            name: getattr(result, name)
            for name in ("model", "layers", "heads", "kv_heads", "head_dim", "own", "threads", "backend", "full_measured_at")
        },
        "layers": result.layers,
        "scopes": scopes,
        "patterns": rows,
        "words": words.to_page(),
        "passages": {"starts": list(passages.starts), "length": passages.length, "of": passages.tokens},
    }


def _looked_at(
    pattern: Pattern, own: Pattern, judged: PatternAudit, passages: Passages, heads: Sequence[int], result: Audit
) -> dict[str, Any]:
    """What only one pattern for all layers and texts has: a matrix, reach, links at any length."""
    both = pattern if own == full() else own & pattern
    views = {"passage": view(both, passages.length, heads, result.layers)}
    known: dict[int, float] = {}
    if judged.long_text.why_not is None:
        views["text"] = view(both, passages.tokens, heads, result.layers)
        known[passages.tokens] = judged.long_text.links / (result.layers * result.heads)
    cost = curve(both, None if own == full() else own, passages.tokens, known, result.heads)
    return {"views": views, "cost": cost}


def _lost(link: LostLink) -> dict[str, Any]:
    """Without its words, which the page takes from the text."""
    own = {name: getattr(link, name) for name in ("layer", "head", "query", "key", "heads")}
    return own | {"passage": link.text, "share": link.probability}


def _judged(row: PatternAudit) -> dict[str, Any]:
    return {**asdict(row), "lost": None, "of_best": row.of_best}
