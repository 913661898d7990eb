"""A router's choice as rows and stretches of keys, in torch operations that never ask the device how large anything is.

A router reads queries and keys on the device, so its pattern is made there, anew in each step. Its tables need no general
planner: tokens that meet by label stand together once sorted, lists of blocks are stretches of keys already, lists of keys
are single links. Everything here has a shape that follows from the sizes alone; how much of it is real (`Routed.valid`,
empty stretches) is known to the device only, until whoever makes the kernel's tables reads all sizes at once.

Patterns that can be read so: one `clusters`, list of blocks or list of keys, with any number of `causal()` and, for labels and
keys, `padding(mask)`. `routed` answers None for every other one, which is planned on the host or, where it is a union with a
fixed pattern, read by `routed_union`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.patterns.algebra import Intersection
from farlight.patterns.arguments import query_base
from farlight.patterns.expression import Atom, Pattern, Sizes
from farlight.patterns.packing import padding
from farlight.patterns.positional import causal
from farlight.patterns.tables import check_indices, check_lists, chosen_blocks, chosen_keys, clusters

__all__ = ["STEP", "Routed", "Taken", "conjoined", "routed"]

# Rows of a group are looked at in steps of so many: groups of rows that a kernel computes are multiples of it.
STEP = 16
# Lists longer than this are not worth a pass over the output for each of their places.
_LONGEST_LIST = 48


@dataclass(frozen=True)
class Routed:
    """One order of rows and of keys, of V variants: the batch items and heads whose choices differ, `shape` = (B or 1, H or 1).

    Rows stand in *places*: sorted by label (`rows` `(V, n_q)`, those without a label last), or from last to first, or as
    they are (`rows` None). Keys stand in slots likewise. `row_count` and `key_count` `(V,)` say how many are real.

    A grid of I *items* begins groups of rows: item i starts at `place`, `within` rows after the first of a group of `length`
    rows that see the same stretches; `valid` = there is such a row. All `(V or 1, I)`. Its m stretches begin at slot `lo`
    `(V, I, m)` of the variant and end, for the row at a place, before `ends(places)[v, i]`, which only grows with the place
    (`causal`) or is the same in all of a group. Stretches are disjoint; an empty one ends where it begins.

    covers: every row is in some group.
    ahead: rows and keys are not sorted, and the row at place p sees what is before slot p + `ahead`; None where it is not so.
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
    ahead: int | None = None
    points: Tensor | None = None
    worst: Worst | None = None

    @property
    def variants(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Taken:
    """Links that another pattern has already, which are left out: a band, and all those of named tokens.

    band: the row at position i has the keys from `i - band[0]` to `i + band[1]`, itself among them; None = none.
    rows, keys: `(n_q,)` and `(n_k,)` bool, the named tokens as queries and as keys; None = none.
    """

    band: tuple[int, int] | None = None
    rows: Tensor | None = None
    keys: Tensor | None = None


@dataclass(frozen=True)
class _Side:
    """The keys at least `lag` before a row's position (None: wherever they stand); `mirrored`: at least `lag` behind it.

    Read from the last token to the first, behind is before: a mirrored side is made as the other one is, of mirrored tables.
    """

    mirrored: bool
    lag: int | None

    def reach(self, sizes: Sizes) -> int | None:
        """The row at place p, of rows as they stand on this side, sees the keys before slot p + reach."""
        if self.lag is None:
            return None
        return (sizes.n_k - sizes.n_q - sizes.q_offset if self.mirrored else sizes.q_offset) + 1 - self.lag


def routed(pattern: Pattern, sizes: Sizes) -> list[Routed] | None:
    """The pieces of a pattern that a router made, disjoint; None where it is not of the kind that is read here.

    Shapes are checked; indices are not, see `Routed.worst`.
    """
    return conjoined(_conjunction(pattern), sizes, Taken())


def conjoined(rules: Sequence[Atom], sizes: Sizes, taken: Taken) -> list[Routed] | None:
    """`routed` of the pattern in which all of these hold, without the links that are taken."""
    if not sizes.n_q or not sizes.n_k:
        return None
    masks = [rule._tables[0] for rule in rules if isinstance(rule, padding) and rule._tables]
    past = any(isinstance(rule, causal) for rule in rules)
    chosen = [rule for rule in rules if not isinstance(rule, causal) and not (isinstance(rule, padding) and rule._tables)]
    if len(chosen) != 1 or not chosen[0]._tables:
        return None
    atom = chosen[0]
    if isinstance(atom, chosen_blocks | chosen_keys) and not atom._tables[0].numel():
        return None
    for rule in rules:
        if isinstance(rule, chosen_blocks | chosen_keys):
            check_lists(f"{type(rule).__name__}: indices", rule._tables[0], sizes, getattr(rule, "query_block", 1))
        else:
            rule.check(sizes)
    labels = _labels_of(atom, sizes)
    sides = _sides(sizes, past, taken)
    if labels is not None:
        found = [piece for query, key in labels for piece in _by_label(query, key, masks, sizes, taken, sides)]
    elif isinstance(atom, chosen_keys):
        found = [_by_key(atom, masks, sizes, past, taken)]
    elif (
        isinstance(atom, chosen_blocks) and atom.query_block >= STEP and not masks and taken.rows is None and taken.keys is None
    ):
        found = [_by_block(atom, sizes, side) for side in sides]
    else:
        return None
    worst = _worst(atom, sizes)
    return [dataclasses.replace(piece, worst=worst) for piece in found]


def _sides(sizes: Sizes, past: bool, taken: Taken) -> list[_Side]:
    """What a band leaves of the keys, at least one side; all of them, or the past, where there is no band."""
    if taken.band is None:
        return [_Side(False, 0 if past else None)]
    left, right = taken.band
    before, behind = _Side(False, left + 1), _Side(True, right + 1)
    found = [before] if sizes.q_offset + sizes.n_q - 1 > left else []
    found += [behind] if not past and sizes.q_offset + right + 1 < sizes.n_k else []
    return found or [before]


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
        return Worst(*atom._tables[0].aminmax(), "chosen_blocks: indices", -(-sizes.n_k // atom.block), "key blocks")
    if isinstance(atom, chosen_keys):
        return Worst(*atom._tables[0].aminmax(), "chosen_keys: indices", sizes.n_k, "keys")
    return None


def _conjunction(pattern: Pattern) -> list[Atom]:
    """The atoms that must all hold; empty when the pattern is no such thing."""
    if isinstance(pattern, Intersection):
        parts = [_conjunction(part) for part in pattern.parts]
        return [atom for part in parts for atom in part] if all(parts) else []
    return [pattern] if isinstance(pattern, Atom) else []


# ---- tokens that meet by label -----------------------------------------------------------------------------------------
def _labels_of(atom: Atom, sizes: Sizes) -> list[tuple[Tensor, Tensor]] | None:
    """Labels of the queries `(B or 1, H or 1, n_q)` and of the keys, -1 = none, of clusterings whose union is the atom, no pair
    being in two of them.
    """
    if isinstance(atom, clusters):
        return [_labels(atom, sizes)]
    found = atom._clusterings()
    if found is not None:
        return [_labels(clusters(*labels), sizes) for labels in found]
    if not isinstance(atom, chosen_blocks) or atom.query_block >= STEP:
        return None
    table = atom._tables[0]
    if not 0 < table.shape[3] <= _LONGEST_LIST:
        return None
    # Each row has a list of its own: sorted by the block they look at, rows make dense tiles again.
    i = torch.arange(sizes.n_q, device=table.device) + sizes.q_offset
    row, inside = atom._query_row(sizes, i)
    each = torch.where(inside[:, None], table[:, :, row.clamp(0, table.shape[2] - 1)], -1)
    of_key = torch.div(torch.arange(sizes.n_k, device=table.device), atom.block, rounding_mode="floor")
    return [(place, of_key[None, None]) for place in _once(each).unbind(3)]


def _labels(one: clusters, sizes: Sizes) -> tuple[Tensor, Tensor]:
    def lanes(table: Tensor) -> tuple[Tensor, Tensor]:
        b, h = (torch.arange(n, device=table.device) for n in table.shape[:2])
        return b[:, None, None], h[None, :, None]

    i, j = (torch.arange(n, device=one._tables[0].device) for n in (sizes.n_q, sizes.n_k))
    query = one._query_label(sizes, *lanes(one._tables[0]), i + sizes.q_offset)
    return query, one._key_label(*lanes(one._tables[-1]), j).clamp(min=-1)


def _once(indices: Tensor) -> Tensor:
    """Each list in ascending order, -1 in place of what comes again."""
    ordered = indices.sort(-1).values
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return ordered.masked_fill(again, -1)


def _by_label(query: Tensor, key: Tensor, masks: list[Tensor], sizes: Sizes, taken: Taken, sides: list[_Side]) -> list[Routed]:
    for mask in masks:
        key = torch.where(mask[:, None], key, -1)
    if taken.rows is not None:
        query = query.masked_fill(taken.rows, -1)
    if taken.keys is not None:
        key = key.masked_fill(taken.keys, -1)
    batch, heads = torch.broadcast_shapes(query.shape[:2], key.shape[:2])
    query, key = (labels.expand(batch, heads, -1).flatten(0, 1) for labels in (query, key))
    return [_sorted((batch, heads), query, key, sizes, side) for side in sides]


def _sorted(shape: tuple[int, int], query: Tensor, key: Tensor, sizes: Sizes, side: _Side) -> Routed:
    """Rows and keys that meet by label, `(V, n_q)` and `(V, n_k)`, -1 = none: sorted by label, then by position from
    the side's beginning.
    """
    if side.mirrored:
        query, key = query.flip(1), key.flip(1)
    # A shift by 2^63 leaves 0 for those without a label, behind all others.
    least = torch.iinfo(torch.int64).min
    q_label, rows = torch.sort(torch.where(query >= 0, query + least, 0), dim=1, stable=True)
    k_label, keys = torch.sort(torch.where(key >= 0, key + least, 0), dim=1, stable=True)
    valid = q_label < 0
    lo = torch.searchsorted(k_label, q_label)
    top = torch.searchsorted(k_label, q_label, right=True)
    lo, top = torch.where(valid, lo, 0), torch.where(valid, top, 0)
    reach = side.reach(sizes)
    if reach is not None:
        # Slots in order of (label, position): the label stands as the slot where it begins.
        wide = sizes.n_k + 1
        code = torch.searchsorted(k_label, k_label) * wide + keys
        seen = (rows + reach).clamp(0, sizes.n_k)
        top = torch.minimum(torch.maximum(torch.searchsorted(code, lo * wide + seen), lo), top)
    place = torch.arange(sizes.n_q, device=query.device).expand(query.shape[0], -1)
    start = torch.searchsorted(q_label, q_label)
    return Routed(
        shape=shape,
        rows=sizes.n_q - 1 - rows if side.mirrored else rows,
        keys=sizes.n_k - 1 - keys if side.mirrored else keys,
        row_count=valid.sum(1),
        key_count=(k_label < 0).sum(1),
        place=place,
        within=place - start,
        length=torch.searchsorted(q_label, q_label, right=True) - start,
        valid=valid,
        lo=lo[:, :, None],
        ends=lambda places: top.gather(1, places.clamp(max=sizes.n_q - 1))[:, :, None],
        causal=reach is not None,
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
    covers: bool,
    ahead: int | None = None,
    mirrored: bool = False,
    points: Tensor | None = None,
) -> Routed:
    """Rows and keys in the order of the text, or from its end, all of them real; a variant for each leading index."""
    shape = (table.shape[0], table.shape[1])
    many = shape[0] * shape[1]
    row_count, key_count = (torch.full((many,), n, dtype=torch.int64, device=table.device) for n in (sizes.n_q, sizes.n_k))
    rows = keys = None
    if mirrored:
        rows, keys = (torch.arange(n, device=table.device).flip(0).expand(many, -1) for n in (sizes.n_q, sizes.n_k))
    return Routed(shape, rows, keys, row_count, key_count, *groups, lo, ends, ahead is not None, covers, ahead, points)


def _by_block(atom: chosen_blocks, sizes: Sizes, side: _Side) -> Routed:
    table, size, block = atom._tables[0], atom.query_block, atom.block
    base = query_base("chosen_blocks: indices", table.shape[2], sizes, size)
    first = torch.arange(table.shape[2], device=table.device) * size + (base - sizes.q_offset)
    groups = _groups(sizes.n_q - size - first if side.mirrored else first, size, sizes.n_q)
    steps = groups[0].numel() // max(1, table.shape[2])
    # Neighbours in a list are one stretch: it begins where the block before is not listed.
    chosen = _once(table.flatten(0, 1))
    real = chosen >= 0
    before = torch.nn.functional.pad(torch.where(real, chosen, -2).cummax(-1).values[..., :-1], (1, 0), value=-2)
    run = (real & (chosen > before + 1)).cumsum(-1).sub(1).clamp(min=0)
    far = -(-sizes.n_k // block)
    lo = torch.full_like(chosen, far).scatter_reduce(-1, run, torch.where(real, chosen, far), "amin")
    hi = torch.zeros_like(chosen).scatter_reduce(-1, run, torch.where(real, chosen + 1, 0), "amax")
    lo, top = ((edge * block).clamp(max=sizes.n_k).repeat_interleave(steps, 1) for edge in (torch.minimum(lo, hi), hi))
    if side.mirrored:
        lo, top = sizes.n_k - top, sizes.n_k - lo
    reach = side.reach(sizes)

    def ends(places: Tensor) -> Tensor:
        return top if reach is None else torch.minimum(top, (places + reach)[:, :, None])

    offset = base - sizes.q_offset
    covers = not side.mirrored and offset <= 0 and table.shape[2] * size + offset >= sizes.n_q
    return _as_they_stand(table, groups, sizes, lo, ends, covers=covers, ahead=reach, mirrored=side.mirrored)


def _by_key(atom: chosen_keys, masks: list[Tensor], sizes: Sizes, past: bool, taken: Taken) -> Routed:
    table = atom._tables[0]
    i = torch.arange(sizes.n_q, device=table.device) + sizes.q_offset
    row, inside = atom._query_row(sizes, i)
    each = torch.where(inside[:, None], table[:, :, row.clamp(0, table.shape[2] - 1)], -1)
    if past:
        each = torch.where(each <= i[:, None], each, -1)
    for mask in masks:
        item = torch.arange(mask.shape[0], device=table.device).view(-1, 1, 1, 1)
        each = torch.where(mask[item, each.clamp(0, sizes.n_k - 1)], each, -1)
    if taken.band is not None:
        step = each - i[:, None]
        each = each.masked_fill((step >= -taken.band[0]) & (step <= taken.band[1]), -1)
    if taken.rows is not None:
        each = each.masked_fill(taken.rows[:, None], -1)
    if taken.keys is not None:
        each = each.masked_fill(taken.keys[each.clamp(0, sizes.n_k - 1)], -1)
    points = _once(each)
    groups = _groups(torch.arange(0, sizes.n_q, 128, device=table.device), 128, sizes.n_q)
    none = torch.zeros(points.shape[0] * points.shape[1], groups[0].shape[1], 0, dtype=torch.int64, device=table.device)
    return _as_they_stand(points, groups, sizes, none, lambda places: none, covers=True, points=points.flatten(0, 1))
