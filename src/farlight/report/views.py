"""One pattern over one text as the page shows it: its rules, densities for views too large to count there, reach, hops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from farlight.analysis.graph.reachability import Reach, reach
from farlight.analysis.graph.small_world import SmallWorld
from farlight.analysis.plot import densities
from farlight.errors import ArgumentError, PatternError
from farlight.patterns.expression import Pattern
from farlight.report.formula import formula
from farlight.report.packing import pack

__all__ = ["curve", "view"]

# From here on a page counts the pixels of a whole text in seconds, not in a moment; long combinations may take longer.
_COUNTED_AT_ONCE = 1 << 13
_PYRAMID = 1024
_EXACT_REACH = 1 << 13
_TARGETS = 512


def view(
    pattern: Pattern, n: int, heads: Sequence[int], layers: int, *, found: Reach | None = None, world: SmallWorld | None = None
) -> dict[str, Any]:
    """The pattern over n tokens: rules by head, a picture of the whole, the share of the text heard of by layer.

    `found` is a reach that was worked out before. Raises as `formula` does.
    """
    head = heads[0]
    rules = {str(number): formula(pattern, n, head=number) for number in (heads if pattern.varies_over_heads else heads[:1])}
    if len({json.dumps(rule) for rule in rules.values()}) == 1:
        rules = {"every": next(iter(rules.values()))}
    if found is None:
        targets = None if n <= _EXACT_REACH else _TARGETS
        found = reach(pattern, n, layers, head=head, targets=targets, readers=0)
    return {
        "n": n,
        "rules": rules,
        "picture": picture(pattern, n, head) if needs_picture(pattern, n) else None,
        "reach": _reach(found),
        "world": None if world is None else world.to_dict(),
    }


def needs_picture(pattern: Pattern, n: int) -> bool:
    """Whether the page might not count a view of the whole text in a few seconds: where rows see many single keys."""
    if n <= _COUNTED_AT_ONCE:
        return False
    combs = 0
    for atom in pattern.atoms():
        name = type(atom).__name__
        if name in ("clusters", "pairs", "documents", "chosen_keys", "global_tokens", "seen_by_all") and atom._tables:
            return True
        combs += name in ("strided", "landmarks") or getattr(atom, "dilation", 1) > 1
    return combs > 1


def picture(pattern: Pattern, n: int, head: int) -> dict[str, Any]:
    """The share of allowed pairs by pixel, to the fourth root and in 255 steps: the darkness that the page draws."""
    share = densities(pattern, n, head=head, pixels=_PYRAMID)
    # A pixel that holds any pair must not look empty.
    ink = np.where(share > 0, np.maximum(1, np.rint(255 * share**0.25)), 0)
    return {"pixels": share.shape[0], "ink": pack(ink, "u1")}


def _reach(found: Reach) -> dict[str, Any]:
    order = np.argsort(found.positions, kind="stable")
    return {
        "mean": list(found.mean),
        "margin": list(found.margin),
        "worst": list(found.worst),
        "exact": found.exact,
        "confidence": found.confidence,
        "positions": pack(found.positions[order]),
        "share": [pack(row[order], "f4") for row in found.share],
    }


def curve(pattern: Pattern, own: Pattern | None, longest: int, known: dict[int, float], heads: int) -> dict[str, Any]:
    """Links against the number of tokens, beside those of `own` (None: full attention), per head.

    Counted at powers of four up to `longest` (65 536 at most); `known` adds lengths whose links were counted elsewhere. A
    pattern made for one length has only that one.
    """
    lengths = [1 << k for k in range(6, 17, 2) if 1 << k <= longest]
    links = dict(known)
    for n in lengths:
        try:
            links.setdefault(n, pattern.count(n, heads=heads) / heads if pattern.varies_over_heads else pattern.count(n))
        except (PatternError, ArgumentError):
            continue  # a table that needs another length
    tokens = sorted(links)
    full = [n * n if own is None else _links(own, n) for n in tokens]
    return {"tokens": tokens, "links": [links[n] for n in tokens], "full": full}


def _links(own: Pattern, n: int) -> int | None:
    try:
        return own.count(n)
    except (PatternError, ArgumentError):
        return None
