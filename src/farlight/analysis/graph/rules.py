"""The rules that allow a link, in words: the positive atoms of the pattern's expression that contain the pair.

- Union: the rules of the parts that contain the pair.
- Intersection: parts that only restrict (causal, padding, documents, full, complements) follow the rules of the others:
  "window within the past".
- Difference: the rules of its left side. Complement: its expression, as no atom contains the pair.
"""

from __future__ import annotations

from collections.abc import Callable

from farlight.patterns.algebra import Complement, Difference, HeadsOf, Intersection, PerHead, Union
from farlight.patterns.expression import Atom, Pattern
from farlight.patterns.grid import neighborhood
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
    neighborhood: "neighborhood",
    random_keys: "random key",
    random_blocks: "random block",
    blocks: "block",
    pairs: "listed pair",
    clusters: "cluster",
    chosen_keys: "chosen key",
    chosen_blocks: "chosen block",
}


def rules_of(pattern: Pattern, i: int, j: int, head: int, holds: Holds) -> tuple[str, ...]:
    """The distinct rules by which the pattern allows the query at i to see the key at j, for one head.

    `holds(part)` says whether a part of the pattern contains the pair; the pattern itself must.

    >>> import farlight as fl
    >>> p = fl.causal() & (fl.window(4) | fl.global_tokens([0]))
    >>> rules_of(p, 3, 0, 0, lambda part: part.allows(3, 0, 9)), rules_of(p, 8, 0, 0, lambda part: part.allows(8, 0, 9))
    (('window within the past', 'global token 0 within the past'), ('global token 0 within the past',))
    >>> rules_of(fl.causal() & p, 8, 0, 0, lambda part: part.allows(8, 0, 9))
    ('global token 0 within the past',)
    >>> p = fl.window(4) | fl.global_tokens([0]) | fl.random_keys(1)
    >>> rules_of(p, 8, 0, 0, lambda part: part.allows(8, 0, 9))
    ('global token 0', 'random key')
    """
    match pattern:
        case Union(parts=parts):
            rules = [rule for part in parts if holds(part) for rule in rules_of(part, i, j, head, holds)]
        case Intersection(parts=parts):
            rules = _intersection_rules([(part, rules_of(part, i, j, head, holds)) for part in parts])
        case Difference(parts=(left, _)):
            rules = list(rules_of(left, i, j, head, holds))
        case Complement(parts=(Complement(parts=(inner,)),)):
            rules = list(rules_of(inner, i, j, head, holds))
        case PerHead():
            rules = list(rules_of(pattern.parts[head], i, j, head, holds))
        case Atom():
            rules = [_atom_rule(pattern, i, j, holds)]
        case _:
            rules = [str(pattern)]
    return tuple(dict.fromkeys(rules))


def _intersection_rules(sides: list[tuple[Pattern, tuple[str, ...]]]) -> list[str]:
    """Rules of an intersection from (part, its rules): each combination of non-restricting rules, "within" the restricting."""
    limits = [rules for part, rules in sides if _restricts(part)]
    reaching = [rules for part, rules in sides if not _restricts(part)]
    limit_names = list(dict.fromkeys(rule for rules in limits for rule in rules if rule != _RESTRICT[full]))
    if not reaching:
        return [" and ".join(limit_names) or _RESTRICT[full]]
    combined = list(reaching[0])
    for rules in reaching[1:]:
        combined = [f"{a} and {b}" for a in combined for b in rules]
    within = f" within {' and '.join(limit_names)}" if limit_names else ""
    # An intersection inside another may have the same limits.
    return [rule if rule.endswith(within) else f"{rule}{within}" for rule in combined]


def _restricts(part: Pattern) -> bool:
    """Whether a part of an intersection is named as a limit: a complement, or made of restricting atoms only."""
    if isinstance(part, Complement):
        return True
    return all(type(atom) in _RESTRICT or isinstance(atom, HeadsOf) for atom in part.atoms())


def _atom_rule(atom: Atom, i: int, j: int, holds: Holds) -> str:
    """The name of one atom's rule."""
    if isinstance(atom, global_tokens | sees_all | seen_by_all):
        # Which end of the link is the global token: the key that all see, or the query that sees all.
        positions = atom.positions if atom.positions is not None else atom._tables[0]
        by_key = isinstance(atom, seen_by_all) or (isinstance(atom, global_tokens) and holds(seen_by_all(positions)))
        return f"global token {j if by_key else i}"
    return _REACH.get(type(atom)) or _RESTRICT.get(type(atom)) or repr(atom)
