"""Patterns that name tokens: global tokens, which see all and are seen by all, and the two halves of that.

A position is absolute. Of queries it names the one that stands there, beyond the last key too; of keys those that exist. A
negative position counts from the last key. A position that is not in the text names nothing, so that one pattern serves
texts of every length.
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
from farlight.patterns.deferred import Unread, hidden
from farlight.patterns.expression import Atom, Changes, Form, Labels, Pattern, Sizes, equal_items
from farlight.patterns.spans import Spans

__all__ = ["global_tokens", "seen_by_all", "sees_all"]

# Runs of a stepped range that are spelled out at once, 16 bytes each.
_MOST_RUNS = 2**24


class _Named(Atom):
    """Tokens given as positions (negative: from the last key) or as a bool mask `(N,)` or `(B, N)`."""

    positions: Sequence[int] | None

    def __new__(cls, positions: Any = None) -> Any:
        return Unread(cls.__name__, positions) if hidden(positions) else super().__new__(cls)

    def __init__(self, positions: Iterable[int] | Tensor) -> None:
        name = type(self).__name__
        mask = read_mask(f"{name}: mask", positions)
        if mask is not None:
            self._take(mask)
            return
        read = read_positions(name, positions)
        self._set(positions=read, text=f"{name}({positions_text(read)})", tables=())

    def _take(self, mask: Tensor) -> None:
        self._set(positions=None, text=f"{type(self).__name__}($0)", tables=(mask,), varies_over_batch=mask.shape[0] > 1)

    @classmethod
    def _sharing(cls, named: _Named | Tensor) -> Self:
        """The tokens of another pattern, or of a mask `(B, N)` that nobody writes into: nothing is copied."""
        if not isinstance(named, Tensor) and named.positions is not None:
            return cls(named.positions)
        out: Self = cls.__new__(cls)
        out._take(named if isinstance(named, Tensor) else named._tables[0])
        return out

    def check(self, sizes: Sizes) -> None:
        if self.positions is not None:
            return
        name = type(self).__name__
        check_leading(f"{name}: mask", self._tables[0], sizes, heads=False)
        self._first(sizes)

    def _first(self, sizes: Sizes) -> int:
        """The position that the first entry of the mask is about."""
        found = self._tables[0].shape[1]
        if found != sizes.n_k:
            name = type(self).__name__
            raise PatternError(f"{name}: the mask has {found} tokens, but there are {sizes.n_k} keys; they must agree.")
        return 0

    def _edges(self, sizes: Sizes, device: torch.device) -> Tensor:
        """`lo, hi, lo, hi, …`: the runs of named positions, ascending (positions given as numbers only)."""
        assert self.positions is not None
        end = max(sizes.n_k, sizes.q_offset + sizes.n_q) if isinstance(self.positions, range) else None
        return torch.tensor(_runs(self.positions, sizes.n_k, end), device=device)

    def _is_named(self, sizes: Sizes, b: Tensor, position: Tensor) -> Tensor:
        """Elementwise: the position is named."""
        if isinstance(self.positions, range):
            shift = sizes.n_k if self.positions.start < 0 else 0
            start, stop = self.positions.start + shift, self.positions.stop + shift
            return (position >= start) & (position >= 0) & (position < stop) & ((position - start) % self.positions.step == 0)
        if isinstance(sizes.n_k, torch.SymInt) and self.positions is not None:
            named = torch.tensor(self.positions, dtype=torch.int64, device=position.device)
            named = torch.where(named < 0, named + sizes.n_k, named)
            return ((position[..., None] == named) & (named >= 0)).any(-1)
        if self.positions is not None:
            return torch.bucketize(position.contiguous(), self._edges(sizes, position.device), right=True) % 2 == 1
        mask = self._tables[0].to(position.device)
        at = position - self._first(sizes)
        inside = (at >= 0) & (at < mask.shape[1])
        return mask[b if self.varies_over_batch else torch.zeros_like(b), at.clamp(0, mask.shape[1] - 1)] & inside

    def _variation(self, sizes: Sizes) -> Tensor:
        return equal_items(self._tables[0]) if self.varies_over_batch else super()._variation(sizes)

    def _needs_length(self) -> str | None:
        name = type(self).__name__
        if self.positions is None:
            return f"{name} is given as a mask"
        if self.positions and self.positions[-1] < 0:  # negative ones come last
            return f"{name}({positions_text(self.positions)}) counts from the end of the text"
        return None

    def _turns(self, sizes: Sizes, device: torch.device) -> Tensor:
        """The positions at which being named begins or ends, in any batch item."""
        if self.positions is not None:
            return self._edges(sizes, device)
        mask = self._tables[0].to(device)
        return torch.nn.functional.pad(mask, (1, 1)).int().diff(dim=1).any(0).nonzero().squeeze(1) + self._first(sizes)


@functools.lru_cache(maxsize=64)
def _runs(positions: Sequence[int], n_k: int, end: int | None = None) -> NDArray[np.int64]:
    """`lo, hi, lo, hi, …` of the runs that the positions form over n_k keys, without those before position 0.

    A range of positions is cut at `end`, the end of the text, before it is spelled out; with a step of 1 it is one run.
    """
    if isinstance(positions, range):
        shift = n_k if positions.start < 0 else 0
        inside = (
            range(positions.start + shift, min(positions.stop + shift, end), positions.step) if end is not None else positions
        )
        inside = inside[max(0, -(inside.start // inside.step)) :]
        if inside.step == 1 or not inside:
            return np.array([inside.start, inside.stop] if inside else [], dtype=np.int64)
        if len(inside) > _MOST_RUNS:
            raise PatternError(f"{len(inside):,} separate positions of a range are too many; pass a bool mask of the text.")
        positions = inside
    at = np.array(positions, dtype=np.int64)
    at = np.unique(np.where(at < 0, at + n_k, at))
    at = at[at >= 0]
    first = np.diff(at, prepend=-2) > 1
    last = np.diff(at, append=2**62) > 1
    return np.stack((at[first], at[last] + 1), 1).reshape(-1)


class sees_all(_Named):
    """The named tokens see everything: i is one of `positions`.

    A mask has an entry for each query, or for each position of the text.

    >>> import farlight as fl
    >>> fl.sees_all([0]).dense(3).int()[0, 0].tolist()
    [[1, 1, 1], [0, 0, 0], [0, 0, 0]]
    """

    def _first(self, sizes: Sizes) -> int:
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

    def _changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> Changes:
        return Changes(self._turns(sizes, j.device).expand(j.numel(), -1))


class seen_by_all(_Named):
    """The named tokens are seen by everyone: j is one of `positions`.

    >>> import farlight as fl
    >>> fl.seen_by_all([0, -1]).dense(3).int()[0, 0].tolist()
    [[1, 0, 1], [1, 0, 1], [1, 0, 1]]
    """

    def _run(self, sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """First and last + 1 of the named keys of each batch item, when they are consecutive in each; else None."""
        if self.positions is None:
            found = self._kept("run", lambda: _one_run(self._tables[0]))
            return None if found is None else (found[0].to(device), found[1].to(device))
        lo, hi = self._key_runs(sizes, device)
        if lo.numel() > 1:
            return None
        return (lo, hi) if lo.numel() else (torch.zeros(1, dtype=torch.int64, device=device),) * 2

    def _key_runs(self, sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
        lo, hi = self._edges(sizes, device).view(-1, 2).unbind(1)
        return lo[lo < sizes.n_k], hi[lo < sizes.n_k]

    def _form(self, sizes: Sizes) -> Form:
        return "labels" if self._run(sizes, torch.device("cpu")) is None else "spans"

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self._is_named(sizes, b, j)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        run = self._run(sizes, i.device)
        item = b if self.varies_over_batch else torch.zeros_like(b)
        if run is not None:
            return Spans.thin(sizes.n_k, *(edge[item] + torch.zeros_like(i) for edge in run))
        if self.positions is None:
            return Spans.from_mask(self._tables[0].to(i.device)[item])
        lo, hi = self._key_runs(sizes, i.device)
        return Spans.from_table(sizes.n_k, lo.expand(i.numel(), -1), hi.expand(i.numel(), -1))

    def _rows_agree(self, sizes: Sizes, first: Tensor, last: Tensor) -> Tensor:
        return torch.ones_like(first, dtype=torch.bool)

    def _labels(self, sizes: Sizes, b: Tensor, h: Tensor) -> Labels:
        key = torch.where(self._is_named(sizes, b[:, None], torch.arange(sizes.n_k, device=b.device)[None, :]), 0, -1)
        return Labels(torch.zeros(b.numel(), sizes.n_q, dtype=torch.int64, device=b.device), key.expand(b.numel(), -1))

    def _changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> Changes:
        return Changes()


def _one_run(mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """First and last + 1 of the True entries of each row, when they are consecutive in each; else None."""
    if not mask.shape[1]:
        return (torch.zeros(mask.shape[0], dtype=torch.int64, device=mask.device),) * 2
    first, count = mask.int().argmax(1), mask.sum(1)
    last = mask.shape[1] - mask.flip(1).int().argmax(1)
    if bool(((last - first != count) & (count > 0)).any()):
        return None
    return first, torch.where(count > 0, last, first)


class global_tokens(_Named):
    """Lighthouses: the named tokens see everything and are seen by everyone: i or j is one of `positions`.

    `positions` are integers (negative: from the last key), or a bool mask `(N,)` or `(B, N)` over the keys. One that is not
    in the text names nothing. Beltagy et al. 2020, "Longformer", arXiv:2004.05150; Ainslie et al. 2020, "ETC",
    arXiv:2004.08483.

    >>> import farlight as fl
    >>> fl.global_tokens([0, 9]).dense(3).int()[0, 0].tolist()
    [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    """

    def _rewrite(self) -> Pattern:
        return self._kept("halves", lambda: sees_all._sharing(self) | seen_by_all._sharing(self))

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self._is_named(sizes, b, i) | self._is_named(sizes, b, j)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        return self._rewrite()._spans(sizes, b, h, i)

    def _changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> Changes:
        return Changes(self._turns(sizes, j.device).expand(j.numel(), -1))
