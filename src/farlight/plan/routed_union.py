"""Unions of a router's choice with a fixed pattern: the fixed part is planned on the host, the choice without its links.

Each link must count once. The fixed part is planned whole, once for all choices, and its links are removed from the choice on
the device: of a band the keys left and right of it remain, named tokens lose their label.

Supported fixed parts: windows without dilation (all contain the token itself, so that their union is one band) and named
tokens (`global_tokens`, `sees_all`, `seen_by_all`, given as positions), each alone or intersected with `causal()`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.patterns.expression import Atom, Pattern, Sizes
from farlight.patterns.named import global_tokens, seen_by_all, sees_all
from farlight.patterns.positional import causal, window
from farlight.plan.chosen_links import ChosenLinks, ExcludedLinks
from farlight.plan.clauses import Clause, clauses_of
from farlight.plan.routed import chosen_links, links_of_conjunction

__all__ = ["RoutedSplit", "RoutedUnion", "read_union", "split_routed"]


@dataclass(frozen=True)
class RoutedSplit:
    """A router's pattern as disjoint parts: `fixed`, planned on the host (None without one), and pieces on the device."""

    fixed: Pattern | None
    pieces: list[ChosenLinks]


def split_routed(pattern: Pattern, sizes: Sizes) -> RoutedSplit | None:
    """The parts of a pattern with a router's tables; None for a pattern that must be planned on the host.

    Raises PatternError when a table or a fixed part does not fit the sizes.
    """
    pieces = chosen_links(pattern, sizes)
    return _split_union(pattern, sizes) if pieces is None else RoutedSplit(None, pieces)


def _split_union(pattern: Pattern, sizes: Sizes) -> RoutedSplit | None:
    union = read_union(pattern, sizes)
    if union is None or union.fixed is None:
        return None
    pieces = links_of_conjunction(union.routed, sizes, union.excluded)
    return None if pieces is None else RoutedSplit(union.fixed, pieces)


@dataclass(frozen=True)
class RoutedUnion:
    """A union of one conjunction with a router's tables, `routed`, and a fixed pattern (None without one), whose links are
    `excluded` from the conjunction.
    """

    routed: Clause
    fixed: Pattern | None
    excluded: ExcludedLinks


def read_union(pattern: Pattern, sizes: Sizes) -> RoutedUnion | None:
    """The parts of such a union; None for any other pattern. Raises PatternError when the fixed part does not fit the sizes."""
    clauses = clauses_of(pattern)
    routed = [clause for clause in clauses if any(atom._tables for atom in clause)]
    fixed = [_fixed_clause(clause) for clause in clauses if not any(atom._tables for atom in clause)]
    if len(routed) != 1 or not sizes.n_q or not sizes.n_k:
        return None
    if not fixed:
        return RoutedUnion(routed[0], None, ExcludedLinks())
    parts = [part for part in fixed if part is not None]
    is_causal = any(isinstance(atom, causal) for atom in routed[0])
    # All links that a causal choice shares with a named token are causal ones; those of any other choice are not.
    if len(parts) < len(fixed) or any(part.causal and not is_causal for part in parts if not isinstance(part.atom, window)):
        return None
    bands = [part.band for part in parts if part.band is not None]
    band = (max(left for left, _ in bands), max(right for _, right in bands)) if bands else None
    patterns: list[Pattern] = [] if band is None else [window(*band)]
    patterns += [part.atom & causal() if part.causal else part.atom for part in parts if part.band is None]
    union = functools.reduce(operator.or_, patterns)
    union.check(sizes)
    device = pattern._tables[0].device
    rows = _named([part.atom for part in parts if isinstance(part.atom, global_tokens | sees_all)], sizes, device, queries=True)
    keys = _named([part.atom for part in parts if isinstance(part.atom, global_tokens | seen_by_all)], sizes, device)
    return RoutedUnion(routed[0], union, ExcludedLinks(band, rows, keys))


@dataclass(frozen=True)
class _FixedClause:
    """An atom of the fixed part, intersected with `causal()` if `causal`; band: (left, right) of a window, else None."""

    atom: Atom
    causal: bool
    band: tuple[int, int] | None


def _fixed_clause(clause: Clause) -> _FixedClause | None:
    """The clause as one supported atom, or None."""
    is_causal = any(isinstance(atom, causal) for atom in clause)
    atoms = [atom for atom in clause if not isinstance(atom, causal)]
    if len(atoms) != 1:
        return None
    atom = atoms[0]
    if isinstance(atom, window) and atom.dilation == 1:
        return _FixedClause(atom, is_causal, (atom.left, 0 if is_causal else atom.right))
    return _FixedClause(atom, is_causal, None) if isinstance(atom, global_tokens | sees_all | seen_by_all) else None


def _named(atoms: Sequence[Atom], sizes: Sizes, device: torch.device, *, queries: bool = False) -> Tensor | None:
    """`(n_k,)`, or for queries `(n_q,)`, bool mask of the tokens that the atoms name; None without any."""
    positions = {p if p >= 0 else p + sizes.n_k for atom in atoms for p in getattr(atom, "positions", None) or ()}
    first, count = (sizes.q_offset, sizes.n_q) if queries else (0, sizes.n_k)
    places = tuple(sorted(p - first for p in positions if p >= 0 and first <= p < first + count))
    return _mask(places, count, device) if places else None


@functools.lru_cache(maxsize=16)
def _mask(places: tuple[int, ...], n: int, device: torch.device) -> Tensor:
    """`(n,)` bool, True at the places; cached, so that it is uploaded once for all choices."""
    mask = torch.zeros(n, dtype=torch.bool, device="cpu")
    mask[list(places)] = True
    return mask.to(device)
