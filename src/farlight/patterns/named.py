"""Primitives of named tokens: `global_tokens` and its halves, `sees_all` (rows) and `seen_by_all` (columns).

Positions are absolute. As a query, position p names the query at p, also beyond the last key; as a key, key p if it exists.
A negative position counts from the last key. A position outside the sequence names nothing, so one pattern serves sequences
of every length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farlight.errors import PatternError
from farlight.patterns.arguments import check_leading, positions_text, query_base, read_mask, read_positions
from farlight.patterns.deferred import DeferredPattern, is_unreadable
from farlight.patterns.expression import Atom, ColumnChanges, Form, Labels, Pattern, Sizes, equal_items
from farlight.patterns.spans import Spans

__all__ = ["global_tokens", "seen_by_all", "sees_all"]


# Separate positions of a stepped range that are expanded at once, 16 bytes each.
_MOST_RUNS = 2**24


class _NamedTokens(Atom):
    """Base: tokens given as positions (kept as sorted integers) or as a bool mask `(N,)` or `(B, N)` (kept as a table)."""

    positions: Sequence[int] | None

    def __new__(cls, positions: Any = None) -> Any:
        return DeferredPattern(cls.__name__, positions) if is_unreadable(positions) else super().__new__(cls)

    def __init__(self, positions: Iterable[int] | Tensor) -> None:
        name = type(self).__name__
        mask = read_mask(f"{name}: mask", positions)
        if mask is not None:
            self._set_mask(mask)
            return
        distinct = read_positions(name, positions)
        self._set(positions=distinct, text=f"{name}({positions_text(distinct)})", tables=())

    def _set_mask(self, mask: Tensor) -> None:
        self._set(positions=None, text=f"{type(self).__name__}($0)", tables=(mask,), varies_over_batch=mask.shape[0] > 1)

    @classmethod
    def _sharing(cls, tokens: _NamedTokens | Tensor) -> Self:
        """This primitive for the tokens of another one, or of a mask `(B, N)`: shares the table, which nobody writes into."""
        if not isinstance(tokens, Tensor) and tokens.positions is not None:
            return cls(tokens.positions)
        out: Self = cls.__new__(cls)
        out._set_mask(tokens if isinstance(tokens, Tensor) else tokens._tables[0])
        return out

    def check(self, sizes: Sizes) -> None:
        if self.positions is not None:
            return
        name = type(self).__name__
        check_leading(f"{name}: mask", self._tables[0], sizes, heads=False)
        self._mask_base(sizes)

    def _mask_base(self, sizes: Sizes) -> int:
        """The position of the mask's entry 0. Raises PatternError where the mask does not fit the sequence."""
        length = self._tables[0].shape[1]
        if length != sizes.n_k:
            name = type(self).__name__
            raise PatternError(f"{name}: the mask has {length} tokens, but there are {sizes.n_k} keys; they must agree.")
        return 0

    def _edges(self, sizes: Sizes, device: torch.device) -> Tensor:
        """`lo, hi, lo, hi, …`: the ascending runs of consecutive named positions; only for tokens given as positions."""
        assert self.positions is not None
        end = max(sizes.n_k, sizes.q_offset + sizes.n_q) if isinstance(self.positions, range) else None
        return torch.from_numpy(_position_runs(self.positions, sizes.n_k, end)).to(device, copy=True)

    def _is_named(self, sizes: Sizes, b: Tensor, position: Tensor) -> Tensor:
        """Elementwise: whether the position is named; int64 in, bool out, broadcast with the batch item b."""
        if isinstance(self.positions, range):
            shift = sizes.n_k if self.positions.start < 0 else 0
            start, stop = self.positions.start + shift, self.positions.stop + shift
            return (position >= start) & (position >= 0) & (position < stop) & ((position - start) % self.positions.step == 0)
        if isinstance(sizes.n_k, torch.SymInt) and self.positions is not None:
            named = torch.tensor(self.positions, dtype=torch.int64, device=position.device)
            named = torch.where(named < 0, named + sizes.n_k, named)
            return ((position[..., None] == named) & (named >= 0)).any(-1)
        if self.positions is not None:
            # Behind an odd number of run edges = inside a run.
            return torch.bucketize(position.contiguous(), self._edges(sizes, position.device), right=True) % 2 == 1
        mask = self._tables[0].to(position.device)
        index = position - self._mask_base(sizes)
        inside = (index >= 0) & (index < mask.shape[1])
        return mask[b if self.varies_over_batch else torch.zeros_like(b), index.clamp(0, mask.shape[1] - 1)] & inside

    def _variation(self, sizes: Sizes) -> Tensor:
        return equal_items(self._tables[0]) if self.varies_over_batch else super()._variation(sizes)

    def _needs_length(self) -> str | None:
        name = type(self).__name__
        if self.positions is None:
            return f"{name} is given as a mask"
        if self.positions and self.positions[-1] < 0:  # negative ones come last
            return f"{name}({positions_text(self.positions)}) counts from the end of the text"
        return None

    def _run_edges(self, sizes: Sizes, device: torch.device) -> Tensor:
        """The positions at which a run of named tokens begins or ends, in any batch item."""
        if self.positions is not None:
            return self._edges(sizes, device)
        mask = self._tables[0].to(device)
        return torch.nn.functional.pad(mask, (1, 1)).int().diff(dim=1).any(0).nonzero().squeeze(1) + self._mask_base(sizes)


@functools.lru_cache(maxsize=64)
def _position_runs(positions: Sequence[int], n_k: int, end: int | None = None) -> NDArray[np.int64]:
    """`lo, hi, lo, hi, …`: the runs of consecutive positions, negative ones counted from n_k; none before position 0.

    A range is cut at `end`, the end of the sequence, before it is expanded; with step 1 it is one run.
    """
    if isinstance(positions, range):
        shift = n_k if positions.start < 0 else 0
        stop = positions.stop + shift
        inside = positions if end is None else range(positions.start + shift, min(stop, end), positions.step)
        inside = inside[max(0, -(inside.start // inside.step)) :]
        if inside.step == 1 or not inside:
            return np.array([inside.start, inside.stop] if inside else [], dtype=np.int64)
        if len(inside) > _MOST_RUNS:
            raise PatternError(f"{len(inside):,} separate positions of a range are too many; pass a bool mask of the text.")
        positions = inside
    position = np.array(positions, dtype=np.int64)
    position = np.unique(np.where(position < 0, position + n_k, position))
    position = position[position >= 0]
    first = np.diff(position, prepend=-2) > 1
    last = np.diff(position, append=2**62) > 1
    return np.stack((position[first], position[last] + 1), 1).reshape(-1)


class sees_all(_NamedTokens):
    """The named queries attend to all keys: i is one of `positions`.

    A mask has one entry per query, or one per position of the sequence.

    >>> import farlight as fl
    >>> fl.sees_all([0]).dense(3).int()[0, 0].tolist()
    [[1, 1, 1], [0, 0, 0], [0, 0, 0]]
    """

    def _mask_base(self, sizes: Sizes) -> int:
        return query_base("sees_all: mask", self._tables[0].shape[1], sizes)

    def _form(self, sizes: Sizes) -> Form:
        return "labels"

    def _spans_are_cheap(self, sizes: Sizes) -> bool:
        return True

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self._is_named(sizes, b, i)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        return Spans.thin(sizes.n_k, torch.zeros_like(i), self._is_named(sizes, b, i) * sizes.n_k)

    def _labels(self, sizes: Sizes, b: Tensor, h: Tensor) -> Labels:
        position = torch.arange(sizes.n_q, device=b.device) + sizes.q_offset
        query = torch.where(self._is_named(sizes, b[:, None], position[None, :]), 0, -1)
        return Labels(query.expand(b.numel(), -1), torch.zeros(b.numel(), sizes.n_k, dtype=torch.int64, device=b.device))

    def _column_changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> ColumnChanges:
        return ColumnChanges(self._run_edges(sizes, j.device).expand(j.numel(), -1))


class seen_by_all(_NamedTokens):
    """All queries attend to the named keys: j is one of `positions`.

    >>> import farlight as fl
    >>> fl.seen_by_all([0, -1]).dense(3).int()[0, 0].tolist()
    [[1, 0, 1], [1, 0, 1], [1, 0, 1]]
    """

    def _single_run(self, sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """(lo, hi) `(B|1,)` of the named keys where they are consecutive in every batch item; else None."""
        if self.positions is None:
            run = self._cached("run", lambda: _single_runs(self._tables[0]))
            return None if run is None else (run[0].to(device), run[1].to(device))
        lo, hi = self._key_runs(sizes, device)
        if lo.numel() > 1:
            return None
        return (lo, hi) if lo.numel() else (torch.zeros(1, dtype=torch.int64, device=device),) * 2

    def _key_runs(self, sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
        """(lo, hi) of the runs of named positions that begin at a key."""
        lo, hi = self._edges(sizes, device).view(-1, 2).unbind(1)
        return lo[lo < sizes.n_k], hi[lo < sizes.n_k]

    def _form(self, sizes: Sizes) -> Form:
        return "labels" if self._single_run(sizes, torch.device("cpu")) is None else "spans"

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self._is_named(sizes, b, j)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        run = self._single_run(sizes, i.device)
        item = b if self.varies_over_batch else torch.zeros_like(b)
        if run is not None:
            return Spans.thin(sizes.n_k, *(edge[item] + torch.zeros_like(i) for edge in run))
        if self.positions is None:
            return Spans.from_mask(self._tables[0].to(i.device)[item])
        lo, hi = self._key_runs(sizes, i.device)
        return Spans.from_table(sizes.n_k, lo.expand(i.numel(), -1), hi.expand(i.numel(), -1))

    def _rows_equal(self, sizes: Sizes, first: Tensor, last: Tensor) -> Tensor:
        return torch.ones_like(first, dtype=torch.bool)

    def _labels(self, sizes: Sizes, b: Tensor, h: Tensor) -> Labels:
        key = torch.where(self._is_named(sizes, b[:, None], torch.arange(sizes.n_k, device=b.device)[None, :]), 0, -1)
        return Labels(torch.zeros(b.numel(), sizes.n_q, dtype=torch.int64, device=b.device), key.expand(b.numel(), -1))

    def _column_changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> ColumnChanges:
        return ColumnChanges()


def _single_runs(mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """(lo, hi) `(B,)` of the True entries of each row of a `(B, N)` mask where they are consecutive in every row; else None."""
    if not mask.shape[1]:
        return (torch.zeros(mask.shape[0], dtype=torch.int64, device=mask.device),) * 2
    first, count = mask.int().argmax(1), mask.sum(1)
    last = mask.shape[1] - mask.flip(1).int().argmax(1)
    if bool(((last - first != count) & (count > 0)).any()):
        return None
    return first, torch.where(count > 0, last, first)


class global_tokens(_NamedTokens):
    """Global tokens ("lighthouses"): they attend to all keys and all queries attend to them: i or j is one of `positions`.

    `positions` are integers (negative: from the last key), or a bool mask `(N,)` or `(B, N)` over the keys. A position
    outside the sequence names nothing. Beltagy et al. 2020, "Longformer", arXiv:2004.05150; Ainslie et al. 2020, "ETC",
    arXiv:2004.08483.

    >>> import farlight as fl
    >>> fl.global_tokens([0, 9]).dense(3).int()[0, 0].tolist()
    [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    """

    def _rewrite(self) -> Pattern:
        return self._cached("halves", lambda: sees_all._sharing(self) | seen_by_all._sharing(self))

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self._is_named(sizes, b, i) | self._is_named(sizes, b, j)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        return self._rewrite()._spans(sizes, b, h, i)

    def _column_changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> ColumnChanges:
        return ColumnChanges(self._run_edges(sizes, j.device).expand(j.numel(), -1))
