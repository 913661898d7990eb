"""The data of a report page, as plain values for JSON: a pattern by itself (`map_data`), or a model's audit (`audit_data`).

Numbers come from the library: links from `Pattern.count`, reach from `fl.reach`, retention from the audit. The page itself
computes matrix pixels, paths and the reach of one token, from the exact rules of `report/formula.py`. No HTML here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from farlight.analysis.audit import Audit, PatternAudit
from farlight.analysis.candidates_by_layer import Judged, Subject, subjects
from farlight.analysis.graph.paths import Path
from farlight.analysis.graph.reachability import Reach
from farlight.analysis.graph.small_world import SmallWorld, smallworld
from farlight.analysis.loss.top_losses import LostLink
from farlight.analysis.passages import Passages
from farlight.analysis.progress import Progress, SilentProgress
from farlight.patterns import full, parse
from farlight.patterns.expression import Pattern
from farlight.report.views import curve, view
from farlight.report.words import Words

__all__ = ["audit_data", "map_data", "maps_data", "steps"]

# Rules are carried for at most this many heads; the heat map has them all.
_MAX_HEADS = 64
# Small-world metrics of a passage are exact and quick up to this many tokens.
_MAX_WORLD = 1 << 12


def steps(patterns: Sequence[Judged | Subject]) -> list[str]:
    """The names of the steps that `audit_data` reports, in order."""
    return [f"reach: {subject.name}" for subject in subjects(patterns)]


def map_data(
    pattern: Pattern, n: int, world: SmallWorld, reach: Reach, *, head: int = 0, chain: Path | None = None
) -> dict[str, Any]:
    """The page of one pattern over n tokens without a text, from its `fl.smallworld` and `fl.reach`.

    chain: an `fl.path`; the page opens with its two ends, else with two tokens far apart.
    """
    return maps_data([pattern], n, [world], [reach], head=head, chain=chain)


def maps_data(
    patterns: Sequence[Pattern],
    n: int,
    worlds: Sequence[SmallWorld],
    reaches: Sequence[Reach],
    *,
    head: int = 0,
    chain: Path | None = None,
) -> dict[str, Any]:
    """The page of several patterns side by side over the same n tokens; arguments as in `map_data`, one for each."""
    rows = []
    for pattern, world, reach in zip(patterns, worlds, reaches, strict=True):
        views = {"text": view(pattern, n, [head], reach.layers, known_reach=reach, world=world)}
        rows.append({"text": str(pattern), "views": views, "cost": curve(pattern, None, n, {n: world.links}, 1)})
    return {
        "kind": "map",
        "name": ", ".join(str(pattern) for pattern in patterns),
        "layers": reaches[0].layers,
        "scopes": [{"id": "text", "n": n}],
        "patterns": rows,
        "ends": None if chain is None else {"source": chain.source, "target": chain.target},
    }


def audit_data(
    result: Audit,
    patterns: Sequence[Judged | Subject],
    passages: Passages,
    words: Words,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The page of an audit: per pattern its views of a passage and of the whole text, mass by head, and its top losses.

    patterns, passages: those of the audit. words: the whole text. progress: receives the steps of `steps(patterns)`. The
    weights of its words are added as `data["weights"] = report.weights(…)`.
    """
    progress = progress or SilentProgress()
    base = parse(result.own)
    heads = range(min(result.heads, _MAX_HEADS))
    scopes = [{"id": "passage", "n": passages.length}, {"id": "text", "n": passages.tokens}]
    rows = []
    for subject, audited in zip(subjects(patterns), result.patterns, strict=True):
        progress.step(f"reach: {subject.name}")
        row: dict[str, Any] = {"text": subject.name, "views": {}, "cost": None}
        if isinstance(subject.chosen, Pattern):
            row |= _pattern_views(subject.chosen, base, audited, passages, heads, result)
        rows.append(row | {"audit": _audit_values(audited), "lost": [_lost_link(link) for link in audited.lost]})
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
        "weights": None,
        "passages": {"starts": list(passages.starts), "length": passages.length, "of": passages.tokens},
    }


def _pattern_views(
    pattern: Pattern, base: Pattern, audited: PatternAudit, passages: Passages, heads: Sequence[int], result: Audit
) -> dict[str, Any]:
    """Views and cost curve, which only a single pattern for all layers and texts has."""
    allowed = pattern if base == full() else base & pattern
    world = smallworld(allowed, passages.length) if passages.length <= _MAX_WORLD else None
    views = {"passage": view(allowed, passages.length, heads, result.layers, world=world)}
    known: dict[int, float] = {}
    if audited.long_text.why_not is None:
        views["text"] = view(allowed, passages.tokens, heads, result.layers)
        known[audited.long_text.tokens] = audited.long_text.links / (result.layers * result.heads)
    cost = curve(allowed, None if base == full() else base, passages.tokens, known, result.heads)
    return {"views": views, "cost": cost}


def _lost_link(link: LostLink) -> dict[str, Any]:
    """A lost link without its words, which the page takes from the text."""
    fields = {name: getattr(link, name) for name in ("layer", "head", "query", "key", "heads")}
    return fields | {"passage": link.text, "share": link.probability}


def _audit_values(row: PatternAudit) -> dict[str, Any]:
    """The audit's numbers of one pattern, without its lost links."""
    return {**asdict(row), "lost": None, "of_best": row.of_best}
