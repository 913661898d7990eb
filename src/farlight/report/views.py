"""The view of one pattern over one text in a page: rules by head, an optional density picture, reach, small-world metrics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from farlight.analysis.graph.capacity import Capacity
from farlight.analysis.graph.reachability import Reach, reach
from farlight.analysis.graph.small_world import SmallWorld
from farlight.analysis.plot import densities
from farlight.errors import ArgumentError, PatternError
from farlight.patterns.expression import Pattern
from farlight.report.formula import formula
from farlight.report.packing import pack

__all__ = ["curve", "view"]

# Up to this many tokens the page counts every pixel of the whole text at once, whatever the pattern.
_MAX_COUNTED = 1 << 13
_PICTURE_PIXELS = 1024
# Reach is exact up to this many tokens; beyond, it is estimated from a sample of targets.
_MAX_EXACT_REACH = 1 << 13
_SAMPLED_TARGETS = 512
# Tokens whose relays are counted for the capacity of a passage.
_READERS = 32


def view(
    pattern: Pattern,
    n: int,
    heads: Sequence[int],
    layers: int,
    *,
    known_reach: Reach | None = None,
    world: SmallWorld | None = None,
) -> dict[str, Any]:
    """The pattern over n tokens: {"n", "rules" by head, "picture" or None, "reach" by layer, "world" and "capacity"
    or None}.

    Reach and picture are of the first of `heads`; `known_reach` spares the search. Raises as `formula` does.
    """
    head = heads[0]
    rules = {str(number): formula(pattern, n, head=number) for number in (heads if pattern.varies_over_heads else heads[:1])}
    if len({json.dumps(rule) for rule in rules.values()}) == 1:
        rules = {"every": next(iter(rules.values()))}
    if known_reach is None:
        targets = None if n <= _MAX_EXACT_REACH else _SAMPLED_TARGETS
        known_reach = reach(pattern, n, layers, head=head, targets=targets, readers=_READERS if n <= _MAX_EXACT_REACH else 0)
    return {
        "n": n,
        "rules": rules,
        "picture": picture(pattern, n, head) if needs_picture(pattern, n) else None,
        "reach": _reach_values(known_reach),
        "world": None if world is None else world.to_dict(),
        "capacity": None if known_reach.capacity is None else _capacity_values(known_reach.capacity),
    }


def needs_picture(pattern: Pattern, n: int) -> bool:
    """Whether the page may need more than seconds to count the whole text: long lists of single keys, or several strides."""
    if n <= _MAX_COUNTED:
        return False
    combs = 0
    for atom in pattern.atoms():
        name = type(atom).__name__
        if name in ("clusters", "pairs", "documents", "chosen_keys", "global_tokens", "seen_by_all") and atom._tables:
            return True
        combs += name in ("strided", "landmarks") or getattr(atom, "dilation", 1) > 1
    return combs > 1


def picture(pattern: Pattern, n: int, head: int) -> dict[str, Any]:
    """Densities by pixel as the darkness that the page draws: uint8, 255 · share^¼, row by row."""
    share = densities(pattern, n, head=head, pixels=_PICTURE_PIXELS)
    # A pixel with any pair has at least darkness 1, so that it does not look empty.
    ink = np.where(share > 0, np.maximum(1, np.rint(255 * share**0.25)), 0)
    return {"pixels": share.shape[0], "ink": pack(ink, "u1")}


def _reach_values(result: Reach) -> dict[str, Any]:
    """Reach by layer, packed; columns of "share" in the order of the positions."""
    order = np.argsort(result.positions, kind="stable")
    return {
        "mean": list(result.mean),
        "margin": list(result.margin),
        "worst": list(result.worst),
        "exact": result.exact,
        "confidence": result.confidence,
        "positions": pack(result.positions[order]),
        "share": [pack(row[order], "f4") for row in result.share],
    }


def _capacity_values(result: Capacity) -> dict[str, Any]:
    """The loads of relays, without their list."""
    return {name: value for name, value in result.to_dict().items() if name != "busiest"}


def curve(pattern: Pattern, base: Pattern | None, longest: int, known: dict[int, float], heads: int) -> dict[str, Any]:
    """Links per head against the number of tokens, under the pattern and under `base` (None: full attention).

    Counted at powers of four up to `longest`, at most 65 536; `known`: links counted elsewhere, by length. A pattern with
    tables has points only at the lengths that they fit. Keys: "tokens", "links", "full".
    """
    lengths = [1 << k for k in range(6, 17, 2) if 1 << k <= longest]
    links = dict(known)
    for n in lengths:
        try:
            links.setdefault(n, pattern.count(n, heads=heads) / heads if pattern.varies_over_heads else pattern.count(n))
        except (PatternError, ArgumentError):
            continue  # a table for another length
    tokens = sorted(links)
    full = [n * n if base is None else _links(base, n) for n in tokens]
    return {"tokens": tokens, "links": [links[n] for n in tokens], "full": full}


def _links(base: Pattern, n: int) -> int | None:
    """`base.count(n)`, or None where it does not fit n tokens."""
    try:
        return base.count(n)
    except (PatternError, ArgumentError):
        return None
