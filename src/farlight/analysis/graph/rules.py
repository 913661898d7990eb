"""By which rule a link is allowed, in words: the positive atoms of the expression that hold for it.

A union names the parts that allow the link. An intersection needs all its parts: those that only restrict (the past,
padding, documents, everything) are said after the one that reaches out, "window within the past". A difference names what
it takes from. A complement allows by absence and is named by its expression.
"""

from __future__ import annotations

from collections.abc import Callable

from farlight.patterns.algebra import Complement, Difference, HeadsOf, Intersection, PerHead, Union
from farlight.patterns.expression import Atom, Pattern
from farlight.patterns.named import global_tokens, seen_by_all, sees_all
from farlight.patterns.packing import documents, padding
from farlight.patterns.positional import blocked_window, causal, full, landmarks, offsets, strided, window
from farlight.patterns.random import random_blocks, random_keys
from farlight.patterns.tables import blocks, chosen_blocks, chosen_keys, clusters, pairs

__all__ = ["rules_of"]

Holds = Callable[[Pattern], bool]

_RESTRICT: dict[type[Pattern], str] = {
    causal: "the past",
    padding: "the real tokens",
    documents: "one document",
    full: "everything",
}
_REACH: dict[type[Pattern], str] = {
    window: "window",
    blocked_window: "window of blocks",
    strided: "stride",
    landmarks: "landmark",
    offsets: "offset",
    random_keys: "random key",
    random_blocks: "random block",
    blocks: "block",
    pairs: "listed pair",
    clusters: "cluster",
    chosen_keys: "chosen key",
    chosen_blocks: "chosen block",
}


def rules_of(pattern: Pattern, i: int, j: int, head: int, holds: Holds) -> tuple[str, ...]:
    """The rules that allow the query at i to see the key at j, which the pattern must allow; `holds(part)` says whether a
    part of the pattern allows it.

    >>> import farlight as fl
    >>> p = fl.causal() & (fl.window(4) | fl.global_tokens([0]))
    >>> rules_of(p, 3, 0, 0, lambda part: part.allows(3, 0, 9)), rules_of(p, 8, 0, 0, lambda part: part.allows(8, 0, 9))
    (('window within the past', 'global token 0 within the past'), ('global token 0 within the past',))
    """
    match pattern:
        case Union(parts=(left, right)):
            found = [rule for part in (left, right) if holds(part) for rule in rules_of(part, i, j, head, holds)]
        case Intersection(parts=parts):
            found = _both([(part, rules_of(part, i, j, head, holds)) for part in parts])
        case Difference(parts=(left, _)):
            found = list(rules_of(left, i, j, head, holds))
        case Complement(parts=(Complement(parts=(inner,)),)):
            found = list(rules_of(inner, i, j, head, holds))
        case PerHead():
            found = list(rules_of(pattern.parts[head], i, j, head, holds))
        case Atom():
            found = [_named(pattern, i, j, holds)]
        case _:
            found = [repr(pattern)]
    return tuple(dict.fromkeys(found))


def _both(sides: list[tuple[Pattern, tuple[str, ...]]]) -> list[str]:
    """Rules of an intersection: each that reaches out, followed by what it lies within."""
    limits = [rules for part, rules in sides if _restricts(part)]
    reaching = [rules for part, rules in sides if not _restricts(part)]
    said = [rule for rules in limits for rule in rules if rule != _RESTRICT[full]]
    if not reaching:
        return [" and ".join(said) or _RESTRICT[full]]
    out = list(reaching[0])
    for rules in reaching[1:]:
        out = [f"{a} and {b}" for a in out for b in rules]
    return [f"{rule} within {' and '.join(said)}" if said else rule for rule in out]


def _restricts(part: Pattern) -> bool:
    """Whether a part of an intersection only says where not to look."""
    if isinstance(part, Complement):
        return True
    return all(type(atom) in _RESTRICT or isinstance(atom, HeadsOf) for atom in part.atoms())


def _named(atom: Atom, i: int, j: int, holds: Holds) -> str:
    if isinstance(atom, global_tokens | sees_all | seen_by_all):
        # Which end of the link is the lighthouse: the key that all see, or the query that sees all.
        named = atom.positions if atom.positions is not None else atom._tables[0]
        by_key = isinstance(atom, seen_by_all) or (isinstance(atom, global_tokens) and holds(seen_by_all(named)))
        return f"global token {j if by_key else i}"
    kind = type(atom)
    return _REACH.get(kind) or _RESTRICT.get(kind) or repr(atom)
