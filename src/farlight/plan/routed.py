"""A router's choice as rows and stretches of keys, in torch operations that never ask the device how large anything is.

A router reads queries and keys on the device, so its pattern is made there, anew in each step. Its tables need no general
planner: tokens that meet by label stand together once sorted, lists of blocks are stretches of keys already, lists of keys
are single links. Everything here has a shape that follows from the sizes alone; how much of it is real (`Routed.valid`,
empty stretches) is known to the device only, until whoever makes the kernel's tables reads all sizes at once.

Patterns that can be read so: one `clusters`, list of blocks or list of keys, with any number of `causal()` and, for labels and
keys, `padding(mask)`. `routed` answers None for every other one, which is planned on the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.patterns.algebra import Intersection
from farlight.patterns.arguments import query_base
from farlight.patterns.base import Atom, Pattern, Sizes
from farlight.patterns.content import check_indices, check_lists, chosen_blocks, chosen_keys, clusters
from farlight.patterns.positional import causal
from farlight.patterns.tokens import padding

__all__ = ["STEP", "Routed", "routed"]

# Rows of a group are looked at in steps of so many: groups of rows that a kernel computes are multiples of it.
STEP = 16
# Lists longer than this are not worth a pass over the output for each of their places.
_LONGEST_LIST = 48


@dataclass(frozen=True)
class Routed:
    """One order of rows and of keys, of V variants: the batch items and heads whose choices differ, `shape` = (B or 1, H or 1).

    Rows stand in *places*: sorted by label (`rows` `(V, n_q)`, those without a label last), or as they are (`rows` None).
    Keys stand in slots likewise. `row_count` and `key_count` `(V,)` say how many are real.

    A grid of I *items* begins groups of rows: item i starts at `place`, `within` rows after the first of a group of `length`
    rows that see the same stretches; `valid` = there is such a row. All `(V or 1, I)`. Its m stretches begin at slot `lo`
    `(V, I, m)` of the variant and end, for the row at a place, before `ends(places)[v, i]`, which only grows with the place
    (`causal`) or is the same in all of a group. Stretches are disjoint; an empty one ends where it begins.

    covers: every row is in some group.
    points: `(V, n_q, m)` single keys of each row, ascending, each once; -1 = none.
    worst: the indices of the choice that are still to be checked; None where there are none.
    """

    shape: tuple[int, int]
    rows: Tensor | None
    keys: Tensor | None
    row_count: Tensor
    key_count: Tensor
    place: Tensor
    within: Tensor
    length: Tensor
    valid: Tensor
    lo: Tensor
    ends: Callable[[Tensor], Tensor]
    causal: bool
    covers: bool
    points: Tensor | None = None
    worst: Worst | None = None

    @property
    def variants(self) -> int:
        return self.shape[0] * self.shape[1]


def routed(pattern: Pattern, sizes: Sizes) -> list[Routed] | None:
    """The pieces of a pattern that a router made, disjoint; None where it is not of the kind that is read here.

    Shapes are checked; indices are not, see `Routed.worst`.
    """
    if not sizes.n_q or not sizes.n_k:
        return None
    rules = _conjunction(pattern)
    masks = [rule.tables[0] for rule in rules if isinstance(rule, padding) and rule.tables]
    past = any(isinstance(rule, causal) for rule in rules)
    chosen = [rule for rule in rules if not isinstance(rule, causal) and not (isinstance(rule, padding) and rule.tables)]
    if len(chosen) != 1 or not chosen[0].tables:
        return None
    atom = chosen[0]
    if isinstance(atom, chosen_blocks | chosen_keys) and not atom.tables[0].numel():
        return None
    for rule in rules:
        if isinstance(rule, chosen_blocks | chosen_keys):
            check_lists(f"{type(rule).__name__}: indices", rule.tables[0], sizes, getattr(rule, "query_block", 1))
        else:
            rule.check(sizes)
    worst = _worst(atom, sizes)
    labels = _labels_of(atom, sizes)
    if labels is not None:
        return [dataclasses.replace(_by_label(one, masks, sizes, past), worst=worst) for one in labels]
    if isinstance(atom, chosen_keys):
        return [dataclasses.replace(_by_key(atom, masks, sizes, past), worst=worst)]
    if isinstance(atom, chosen_blocks) and atom.query_block >= STEP and not masks:
        return [dataclasses.replace(_by_block(atom, sizes, past), worst=worst)]
    return None


@dataclass(frozen=True)
class Worst:
    """The least and the largest index of a choice, on its device, and what they may be."""

    least: Tensor
    largest: Tensor
    what: str
    limit: int
    things: str

    def check(self, least: int, largest: int) -> None:
        """Raise PatternError when the numbers, read from the device, are out of range."""
        check_indices(self.what, least, largest, self.limit, self.things)


def _worst(atom: Atom, sizes: Sizes) -> Worst | None:
    if isinstance(atom, chosen_blocks):
        return Worst(*atom.tables[0].aminmax(), "chosen_blocks: indices", -(-sizes.n_k // atom.block), "key blocks")
    if isinstance(atom, chosen_keys):
        return Worst(*atom.tables[0].aminmax(), "chosen_keys: indices", sizes.n_k, "keys")
    return None


def _conjunction(pattern: Pattern) -> list[Atom]:
    """The atoms that must all hold; empty when the pattern is no such thing."""
    if isinstance(pattern, Intersection):
        parts = [_conjunction(part) for part in pattern.parts]
        return [atom for part in parts for atom in part] if all(parts) else []
    return [pattern] if isinstance(pattern, Atom) else []


# ---- tokens that meet by label -----------------------------------------------------------------------------------------
def _labels_of(atom: Atom, sizes: Sizes) -> list[clusters] | None:
    """Clusterings, no pair in two of them, whose union is the atom."""
    if isinstance(atom, clusters):
        return [atom]
    found = atom._clusterings()
    if found is None and isinstance(atom, chosen_blocks) and atom.query_block < STEP:
        table = atom.tables[0]
        if not 0 < table.shape[3] <= _LONGEST_LIST:
            return None
        # Each row has a list of its own: sorted by the block they look at, rows make dense tiles again.
        i = torch.arange(sizes.n_q, device=table.device) + sizes.q_offset
        row, inside = atom._row(sizes, i)
        each = torch.where(inside[:, None], table[:, :, row.clamp(0, table.shape[2] - 1)], -1)
        of_key = torch.div(torch.arange(sizes.n_k, device=table.device), atom.block, rounding_mode="floor")
        found = [(place, of_key) for place in _once(each).unbind(3)]
    return None if found is None else [clusters(*labels) for labels in found]


def _once(indices: Tensor) -> Tensor:
    """Each list in ascending order, -1 in place of what comes again."""
    ordered = indices.sort(-1).values
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return ordered.masked_fill(again, -1)


def _by_label(one: clusters, masks: list[Tensor], sizes: Sizes, past: bool) -> Routed:
    shape = tuple(max(t.shape[at] for t in (*one.tables, *(m[:, None] for m in masks))) for at in (0, 1))
    device = one.tables[0].device
    v = torch.arange(shape[0] * shape[1], device=device)
    item = torch.div(v, shape[1], rounding_mode="floor")
    labels = one._labels(sizes, item, v % shape[1])
    key = labels.key
    for mask in masks:
        key = torch.where(mask[item if mask.shape[0] > 1 else torch.zeros_like(item)], key, -1)
    # A shift by 2^63 leaves 0 for those without a label, behind all others.
    least = torch.iinfo(torch.int64).min
    q_label, rows = torch.sort(torch.where(labels.query >= 0, labels.query + least, 0), dim=1, stable=True)
    k_label, keys = torch.sort(torch.where(key >= 0, key + least, 0), dim=1, stable=True)
    valid = q_label < 0
    lo = torch.searchsorted(k_label, q_label)
    top = torch.searchsorted(k_label, q_label, right=True)
    lo, top = torch.where(valid, lo, 0), torch.where(valid, top, 0)
    if past:
        # Slots in order of (label, position): the label stands as the slot where it begins.
        wide = sizes.n_k + 1
        code = torch.searchsorted(k_label, k_label) * wide + keys
        seen = (rows + (sizes.q_offset + 1)).clamp(0, sizes.n_k)
        top = torch.minimum(torch.maximum(torch.searchsorted(code, lo * wide + seen), lo), top)
    place = torch.arange(sizes.n_q, device=device).expand(v.numel(), -1)
    start = torch.searchsorted(q_label, q_label)
    return Routed(
        shape=(shape[0], shape[1]),
        rows=rows,
        keys=keys,
        row_count=valid.sum(1),
        key_count=(k_label < 0).sum(1),
        place=place,
        within=place - start,
        length=torch.searchsorted(q_label, q_label, right=True) - start,
        valid=valid,
        lo=lo[:, :, None],
        ends=lambda places: top.gather(1, places.clamp(max=sizes.n_q - 1))[:, :, None],
        causal=past,
        covers=False,
    )


# ---- lists of blocks, lists of keys ------------------------------------------------------------------------------------
def _groups(first: Tensor, size: int, n_q: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(place, within, length, valid), each `(1, groups · steps)`: groups of `size` rows that begin at `first`, cut to the
    rows that there are.
    """
    start, stop = first.clamp(0, n_q), (first + size).clamp(0, n_q)
    within = torch.arange(0, min(size, n_q), STEP, device=first.device).expand(first.numel(), -1)
    length = (stop - start)[:, None].expand_as(within)
    place = start[:, None] + within
    return tuple(x.reshape(1, -1) for x in (place, within, length, within < length))  # type: ignore[return-value]


def _as_they_stand(
    table: Tensor,
    groups: tuple[Tensor, Tensor, Tensor, Tensor],
    sizes: Sizes,
    lo: Tensor,
    ends: Callable[[Tensor], Tensor],
    *,
    causal: bool,
    covers: bool,
    points: Tensor | None = None,
) -> Routed:
    """Rows and keys in the order of the text, all of them real; a variant for each leading index of the table."""
    shape = (table.shape[0], table.shape[1])
    row_count, key_count = (
        torch.full((shape[0] * shape[1],), n, dtype=torch.int64, device=table.device) for n in (sizes.n_q, sizes.n_k)
    )
    return Routed(shape, None, None, row_count, key_count, *groups, lo, ends, causal, covers, points)


def _by_block(atom: chosen_blocks, sizes: Sizes, past: bool) -> Routed:
    table, size, block = atom.tables[0], atom.query_block, atom.block
    base = query_base("chosen_blocks: indices", table.shape[2], sizes, size)
    first = torch.arange(table.shape[2], device=table.device) * size + (base - sizes.q_offset)
    groups = _groups(first, size, sizes.n_q)
    steps = groups[0].numel() // max(1, table.shape[2])
    # Neighbours in a list are one stretch: it begins where the block before is not listed.
    chosen = _once(table.flatten(0, 1))
    real = chosen >= 0
    before = torch.nn.functional.pad(torch.where(real, chosen, -2).cummax(-1).values[..., :-1], (1, 0), value=-2)
    run = (real & (chosen > before + 1)).cumsum(-1).sub(1).clamp(min=0)
    far = -(-sizes.n_k // block)
    lo = torch.full_like(chosen, far).scatter_reduce(-1, run, torch.where(real, chosen, far), "amin")
    hi = torch.zeros_like(chosen).scatter_reduce(-1, run, torch.where(real, chosen + 1, 0), "amax")
    lo = (torch.minimum(lo, hi) * block).clamp(max=sizes.n_k).repeat_interleave(steps, 1)
    top = (hi * block).clamp(max=sizes.n_k).repeat_interleave(steps, 1)

    def ends(places: Tensor) -> Tensor:
        if not past:
            return top
        return torch.minimum(top, (places + (sizes.q_offset + 1))[:, :, None])

    offset = base - sizes.q_offset
    covers = offset <= 0 and table.shape[2] * size + offset >= sizes.n_q
    return _as_they_stand(table, groups, sizes, lo, ends, causal=past, covers=covers)


def _by_key(atom: chosen_keys, masks: list[Tensor], sizes: Sizes, past: bool) -> Routed:
    table = atom.tables[0]
    i = torch.arange(sizes.n_q, device=table.device) + sizes.q_offset
    row, inside = atom._row(sizes, i)
    each = torch.where(inside[:, None], table[:, :, row.clamp(0, table.shape[2] - 1)], -1)
    if past:
        each = torch.where(each <= i[:, None], each, -1)
    for mask in masks:
        item = torch.arange(mask.shape[0], device=table.device).view(-1, 1, 1, 1)
        each = torch.where(mask[item, each.clamp(0, sizes.n_k - 1)], each, -1)
    points = _once(each)
    groups = _groups(torch.arange(0, sizes.n_q, 128, device=table.device), 128, sizes.n_q)
    none = torch.zeros(points.shape[0] * points.shape[1], groups[0].shape[1], 0, dtype=torch.int64, device=table.device)
    return _as_they_stand(
        points, groups, sizes, none, lambda places: none, causal=False, covers=True, points=points.flatten(0, 1)
    )
