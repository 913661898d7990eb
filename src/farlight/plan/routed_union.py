"""Unions of a router's choice with a fixed pattern: the fixed part for the host's planner, the choice without its links.

A link counts once. So the fixed part is planned as it is, once for all choices, and what it has is left out of the choice, on
the device and by arithmetic: of a band the keys before and behind it are kept, named tokens lose their label.

Fixed parts that are read here: windows without dilation (all begin at the token itself, so that several are one band) and
named tokens (`global_tokens`, `sees_all`, `seen_by_all`, given as positions), each alone or with `causal()`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.patterns.algebra import Intersection, Union
from farlight.patterns.expression import Atom, Pattern, Sizes
from farlight.patterns.named import global_tokens, seen_by_all, sees_all
from farlight.patterns.positional import causal, window
from farlight.plan.routed import Routed, Taken, conjoined, routed

__all__ = ["Chosen", "chosen"]

# Terms of an expression beyond which it is left to the host's planner, which simplifies.
_MOST_TERMS = 16
_Term = tuple[Atom, ...]


@dataclass(frozen=True)
class Chosen:
    """A pattern that a router made: `fixed`, which is planned on the host (None = no such part), and disjoint pieces."""

    fixed: Pattern | None
    pieces: list[Routed]


def chosen(pattern: Pattern, sizes: Sizes) -> Chosen | None:
    """How a pattern with a router's tables is planned where they lie; None where it is planned on the host."""
    pieces = routed(pattern, sizes)
    return _united(pattern, sizes) if pieces is None else Chosen(None, pieces)


def _united(pattern: Pattern, sizes: Sizes) -> Chosen | None:
    terms = _terms(pattern)
    made = [term for term in terms if any(atom._tables for atom in term)]
    fixed = [_fixed(term) for term in terms if not any(atom._tables for atom in term)]
    if len(made) != 1 or not fixed or not sizes.n_q or not sizes.n_k:
        return None
    found = [one for one in fixed if one is not None]
    past = any(isinstance(atom, causal) for atom in made[0])
    # The past of a named token is all that a choice of the past may share with it; of another choice it is only a part.
    if len(found) < len(fixed) or any(one.past and not past for one in found if not isinstance(one.atom, window)):
        return None
    bands = [one.band for one in found if one.band is not None]
    band = (max(left for left, _ in bands), max(right for _, right in bands)) if bands else None
    parts: list[Pattern] = [] if band is None else [window(*band)]
    parts += [one.atom & causal() if one.past else one.atom for one in found if one.band is None]
    whole = functools.reduce(operator.or_, parts)
    whole.check(sizes)
    device = pattern._tables[0].device
    rows = _named([one.atom for one in found if isinstance(one.atom, global_tokens | sees_all)], sizes, device, queries=True)
    keys = _named([one.atom for one in found if isinstance(one.atom, global_tokens | seen_by_all)], sizes, device)
    pieces = conjoined(made[0], sizes, Taken(band, rows, keys))
    return None if pieces is None else Chosen(whole, pieces)


def _terms(pattern: Pattern) -> list[_Term]:
    """Atoms that must all hold, in each of several terms of which one must; none where the pattern is not written so."""
    if isinstance(pattern, Atom):
        return [(pattern,)]
    if not isinstance(pattern, Union | Intersection):
        return []
    parts = [_terms(part) for part in pattern.parts]
    if not all(parts):
        return []
    if isinstance(pattern, Union):
        found = [term for part in parts for term in part]
    else:
        found = [()]
        for part in parts:
            if len(found) * len(part) > _MOST_TERMS:
                return []
            found = [(*term, *more) for term in found for more in part]
    return found if len(found) <= _MOST_TERMS else []


@dataclass(frozen=True)
class _Fixed:
    """One term of the fixed part: its pattern without `causal()`, `past` = with it; the band that it is, if it is one."""

    atom: Atom
    past: bool
    band: tuple[int, int] | None


def _fixed(term: _Term) -> _Fixed | None:
    past = any(isinstance(atom, causal) for atom in term)
    rest = [atom for atom in term if not isinstance(atom, causal)]
    if len(rest) != 1:
        return None
    atom = rest[0]
    if isinstance(atom, window) and atom.dilation == 1:
        return _Fixed(atom, past, (atom.left, 0 if past else atom.right))
    return _Fixed(atom, past, None) if isinstance(atom, global_tokens | sees_all | seen_by_all) else None


def _named(atoms: Sequence[Atom], sizes: Sizes, device: torch.device, *, queries: bool = False) -> Tensor | None:
    """`(n_k,)`, or of queries `(n_q,)`, bool: those that any of these names; None where there are none."""
    named = {p if p >= 0 else p + sizes.n_k for atom in atoms for p in getattr(atom, "positions", None) or ()}
    first, count = (sizes.q_offset, sizes.n_q) if queries else (0, sizes.n_k)
    there = tuple(sorted(p - first for p in named if p >= 0 and first <= p < first + count))
    return _mask(there, count, device) if there else None


@functools.lru_cache(maxsize=16)
def _mask(places: tuple[int, ...], n: int, device: torch.device) -> Tensor:
    """`(n,)` bool, True at the places: uploaded once for all choices."""
    mask = torch.zeros(n, dtype=torch.bool, device="cpu")
    mask[list(places)] = True
    return mask.to(device)
