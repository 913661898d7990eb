"""Patterns that name tokens: lighthouses that see or are seen by all, packed documents, padding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from farlight.errors import PatternError
from farlight.patterns.arguments import check_leading, listed, positions_text, read_positions, read_table, whole
from farlight.patterns.base import Atom, Changes, Form, Labels, Pattern, Sizes
from farlight.patterns.spans import Spans

__all__ = ["documents", "global_tokens", "padding", "seen_by_all", "sees_all"]


def _equal_items(table: Tensor) -> Tensor:
    """`(B, 1)`: equal numbers for batch items with equal rows of a `(B, …)` table, so that they share a plan's tables."""
    number: Tensor = torch.unique(table, dim=0, return_inverse=True)[1]
    return number.view(-1, 1)


class _Named(Atom):
    """Tokens given as positions (negative: from the end) or as a bool mask `(N,)` or `(B, N)`."""

    positions: tuple[int, ...] | None

    def __init__(self, positions: Iterable[int] | Tensor) -> None:
        name = type(self).__name__
        if isinstance(positions, (list, tuple)) and positions and all(isinstance(p, bool) for p in positions):
            positions = torch.tensor(positions)
        if isinstance(positions, Tensor) and positions.dtype == torch.bool:
            mask = read_table(f"{name}: mask", positions, 2, kind="bool")
            self._set(positions=None, text=f"{name}($0)", tables=(mask,), varies_over_batch=mask.shape[0] > 1)
            return
        if isinstance(positions, Tensor):
            positions = positions.tolist()
        read = read_positions(name, positions)
        self._set(positions=read, text=f"{name}({positions_text(read)})", tables=())

    def check(self, sizes: Sizes) -> None:
        name = type(self).__name__
        if self.positions is None:
            check_leading(f"{name}: mask", self.tables[0], sizes, heads=False)
            if self.tables[0].shape[1] != sizes.n_k:
                raise PatternError(
                    f"{name}: the mask has {self.tables[0].shape[1]} tokens, the text has {sizes.n_k}; they must agree."
                )
            return
        for position in self.positions:
            if not -sizes.n_k <= position < sizes.n_k:
                raise PatternError(
                    f"{name}: position {position} does not exist in a text of {sizes.n_k} tokens; "
                    f"use {-sizes.n_k} … {sizes.n_k - 1} (negative counts from the end)."
                )

    def _variation(self, sizes: Sizes) -> Tensor:
        return _equal_items(self.tables[0].cpu()) if self.varies_over_batch else super()._variation(sizes)

    def _listed(self, sizes: Sizes, device: torch.device) -> Tensor:
        """The named positions, sorted, without repetition (positions given as numbers only)."""
        assert self.positions is not None
        return torch.tensor(sorted({p % sizes.n_k for p in self.positions}), dtype=torch.int64, device=device)

    def _is_named(self, sizes: Sizes, b: Tensor, position: Tensor) -> Tensor:
        """Elementwise: the position is named (positions outside the text never are)."""
        inside = (position >= 0) & (position < sizes.n_k)
        if self.positions is None:
            table = self.tables[0].to(position.device)
            return table[b if self.varies_over_batch else torch.zeros_like(b), position.clamp(0, sizes.n_k - 1)] & inside
        named = self._listed(sizes, position.device)
        # No longer than the last of them: the text may be endless.
        last = max((p % sizes.n_k for p in self.positions), default=-1)
        member = torch.zeros(last + 2, dtype=torch.bool, device=position.device)
        member[named] = True
        return member[position.clamp(0, member.numel() - 1)] & inside

    def _needs_length(self) -> str | None:
        name = type(self).__name__
        if self.positions is None:
            return f"{name} is given as a mask"
        if any(p < 0 for p in self.positions):
            return f"{name}({positions_text(self.positions)}) counts from the end of the text"
        return None

    def _turns(self, sizes: Sizes, device: torch.device) -> Tensor:
        """The positions at which being named begins or ends, in any batch item."""
        if self.positions is None:
            mask = self.tables[0].to(device)
            return torch.nn.functional.pad(mask, (1, 1)).int().diff(dim=1).any(0).nonzero().squeeze(1)
        named = self._listed(sizes, device)
        return torch.cat((named, named + 1))

    def _run(self, sizes: Sizes) -> tuple[Tensor, Tensor] | None:
        """First and last + 1 of the named tokens for each batch item, when they are consecutive in each; else None."""
        if self.positions is None:
            mask = self.tables[0]
        else:
            mask = torch.zeros(1, sizes.n_k, dtype=torch.bool)
            mask[0, self._listed(sizes, mask.device)] = True
        first, count = mask.int().argmax(1), mask.sum(1)
        last = sizes.n_k - mask.flip(1).int().argmax(1)
        if bool(((last - first != count) & (count > 0)).any()):
            return None
        return first, torch.where(count > 0, last, first)


class sees_all(_Named):
    """The named tokens see everything: i is one of `positions`.

    >>> import farlight as fl
    >>> fl.sees_all([0]).dense(3).int()[0, 0].tolist()
    [[1, 1, 1], [0, 0, 0], [0, 0, 0]]
    """

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

    def _form(self, sizes: Sizes) -> Form:
        return "labels" if self._run(sizes) is None else "spans"

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self._is_named(sizes, b, j)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        run = self._run(sizes)
        if run is not None:
            item = b if self.varies_over_batch else torch.zeros_like(b)
            return Spans.thin(sizes.n_k, *(edge.to(i.device)[item] + torch.zeros_like(i) for edge in run))
        if self.positions is None:
            return Spans.from_mask(self.tables[0].to(i.device)[b if self.varies_over_batch else torch.zeros_like(b)])
        named = self._listed(sizes, i.device).expand(i.numel(), -1)
        return Spans.from_table(sizes.n_k, named, named + 1)

    def _rows_agree(self, sizes: Sizes, first: Tensor, last: Tensor) -> Tensor:
        return torch.ones_like(first, dtype=torch.bool)

    def _labels(self, sizes: Sizes, b: Tensor, h: Tensor) -> Labels:
        key = torch.where(self._is_named(sizes, b[:, None], torch.arange(sizes.n_k, device=b.device)[None, :]), 0, -1)
        return Labels(torch.zeros(b.numel(), sizes.n_q, dtype=torch.int64, device=b.device), key.expand(b.numel(), -1))

    def _changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> Changes:
        return Changes()


class global_tokens(_Named):
    """Lighthouses: the named tokens see everything and are seen by everyone: i or j is one of `positions`.

    `positions` are integers (negative: from the end), or a bool mask `(N,)` or `(B, N)`.
    Beltagy et al. 2020, "Longformer", arXiv:2004.05150; Ainslie et al. 2020, "ETC", arXiv:2004.08483.

    >>> import farlight as fl
    >>> fl.global_tokens([0]).dense(3).int()[0, 0].tolist()
    [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    """

    def _rewrite(self) -> Pattern:
        named: Any = self.positions if self.positions is not None else self.tables[0]
        return sees_all(named) | seen_by_all(named)

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self._is_named(sizes, b, i) | self._is_named(sizes, b, j)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        return self._rewrite()._spans(sizes, b, h, i)

    def _changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> Changes:
        return Changes(self._turns(sizes, j.device).expand(j.numel(), -1))


class documents(Atom):
    """Tokens see their own document only (packed sequences): i and j carry the same id, or lie in the same length.

    `ids` is `(N,)` or `(B, N)` integers, negative = in no document. `lengths` is a list of lengths that follow one another
    (or one such list for each batch item); tokens after the last length are in no document.

    >>> import farlight as fl
    >>> fl.documents(lengths=[1, 2]).dense(3).int()[0, 0].tolist()
    [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    """

    def __init__(self, ids: Any = None, *, lengths: Any = None) -> None:
        if (ids is None) == (lengths is None):
            raise PatternError("documents: give either ids (one for each token) or lengths=[…], not both and not neither.")
        if lengths is None:
            table = read_table("documents: ids", ids, 2, kind="int")
            self._set(lengths=None, text="documents($0)", tables=(table,), varies_over_batch=table.shape[0] > 1)
            return
        if isinstance(lengths, Tensor):
            lengths = lengths.tolist()
        lengths = listed("documents", lengths, "lengths")
        nested = any(isinstance(item, (list, tuple)) for item in lengths)
        items = [listed("documents", item, "lengths for each batch item") for item in (lengths if nested else [lengths])]
        read = tuple(tuple(whole("documents: length", n, 0) for n in item) for item in items)
        text = str([list(item) for item in read] if nested else list(read[0]))
        self._set(lengths=read, text=f"documents(lengths={text})", tables=(), varies_over_batch=len(read) > 1)

    lengths: tuple[tuple[int, ...], ...] | None

    def _made_for(self) -> tuple[int, int]:
        return (super()._made_for()[0] if self.lengths is None else len(self.lengths)), 1

    def check(self, sizes: Sizes) -> None:
        if self.lengths is None:
            check_leading("documents: ids", self.tables[0], sizes, heads=False)
            if self.tables[0].shape[1] != sizes.n_k:
                raise PatternError(f"documents: {self.tables[0].shape[1]} ids for {sizes.n_k} tokens; give one for each token.")
            return
        if len(self.lengths) not in (1, sizes.batch):
            raise PatternError(
                f"documents: {len(self.lengths)} lists of lengths for a batch of {sizes.batch}; give one, or one for each."
            )
        for item in self.lengths:
            if sum(item) > sizes.n_k:
                raise PatternError(
                    f"documents: the lengths add up to {sum(item)}, more than the {sizes.n_k} tokens of the text."
                )

    def _variation(self, sizes: Sizes) -> Tensor:
        return _equal_items(self._ids(sizes, torch.device("cpu"))) if self.varies_over_batch else super()._variation(sizes)

    def _ids(self, sizes: Sizes, device: torch.device) -> Tensor:
        """`(B or 1, n_k)` ids."""
        if self.lengths is None:
            return self.tables[0].to(device)
        ids = torch.full((len(self.lengths), sizes.n_k), -1, dtype=torch.int64, device=device)
        for item, row in zip(self.lengths, ids, strict=True):
            times = torch.tensor(item, dtype=torch.int64, device=device)
            row[: sum(item)] = torch.arange(len(item), device=device).repeat_interleave(times, output_size=sum(item))
        return ids

    def _form(self, sizes: Sizes) -> Form:
        if self.lengths is not None:
            return "spans"
        # An id that comes back after another one makes its document more than one interval.
        for row in self._ids(sizes, self.tables[0].device):
            runs = torch.unique_consecutive(row[row >= 0])
            if runs.numel() != torch.unique(runs).numel() or self._holes(row):
                return "labels"
        return "spans"

    @staticmethod
    def _holes(row: Tensor) -> bool:
        """Whether a document is interrupted by tokens that belong to none."""
        runs = torch.unique_consecutive(row)
        kept = runs[runs >= 0]
        return bool(kept.numel() != torch.unique(kept).numel())

    def _needs_length(self) -> str | None:
        return "documents is given as ids" if self.lengths is None else None

    def _changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> Changes:
        if self.lengths is None:
            ids = self._ids(sizes, j.device)
            turns = torch.nn.functional.pad(ids.diff(dim=1).ne(0).any(0), (1, 0)).nonzero().squeeze(1)
        else:
            turns = self._ends(j.device).flatten()
        return Changes(turns.expand(j.numel(), -1))

    def _ends(self, device: torch.device) -> Tensor:
        """`(B or 1, documents)`: where each document ends; short lists repeat their last end."""
        assert self.lengths is not None
        most = max((len(item) for item in self.lengths), default=0)
        rows = [[*item, *[0] * (most - len(item))] for item in self.lengths]
        return torch.tensor(rows, dtype=torch.int64, device=device).cumsum(1)

    def _id_at(self, sizes: Sizes, b: Tensor, position: Tensor, otherwise: int) -> Tensor:
        if self.lengths is not None:
            ends, far = self._ends(position.device), 2**42
            item = b if self.varies_over_batch else torch.zeros_like(b)
            # The first document that ends behind the position; the lists of the batch items stand far apart in one.
            listed_ends = (ends + torch.arange(ends.shape[0], device=ends.device)[:, None] * far).flatten()
            place = (item * far + position.clamp(-1, far - 1)).contiguous()
            found = torch.searchsorted(listed_ends, place, right=True) - item * ends.shape[1]
            return torch.where((position >= 0) & (found < ends.shape[1]), found, otherwise)
        ids = self._ids(sizes, position.device)
        inside = (position >= 0) & (position < sizes.n_k)
        if sizes.n_k == 0:
            return torch.full_like(position, otherwise)
        found = ids[b if self.varies_over_batch else torch.zeros_like(b), position.clamp(0, sizes.n_k - 1)]
        return torch.where(inside & (found >= 0), found, otherwise)

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self._id_at(sizes, b, i, -1) == self._id_at(sizes, b, j, -2)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        if self._form(sizes) == "labels":
            every = torch.arange(sizes.n_k, device=i.device)
            return Spans.from_mask(self._allows(sizes, b[:, None], h[:, None], i[:, None], every[None, :]))
        ids = self._ids(sizes, i.device)
        batch, n = ids.shape
        if n == 0:
            return Spans.nothing(i.numel(), 0, i.device)
        new = torch.ones_like(ids, dtype=torch.bool)
        new[:, 1:] = ids[:, 1:] != ids[:, :-1]
        where = torch.arange(n, device=i.device).expand(batch, -1)
        start = torch.where(new, where, 0).cummax(1).values
        ends = torch.ones_like(new)
        ends[:, :-1] = new[:, 1:]
        stop = torch.where(ends, where + 1, n + 1).flip(1).cummin(1).values.flip(1)
        item = b if self.varies_over_batch else torch.zeros_like(b)
        at = i.clamp(0, n - 1)
        real = (self._id_at(sizes, b, i, -1) >= 0).long()
        return Spans.thin(sizes.n_k, start[item, at] * real, stop[item, at] * real)

    def _labels(self, sizes: Sizes, b: Tensor, h: Tensor) -> Labels:
        query = (torch.arange(sizes.n_q, device=b.device) + sizes.q_offset)[None, :]
        key = torch.arange(sizes.n_k, device=b.device)[None, :]
        shape = (b.numel(), -1)
        return Labels(
            self._id_at(sizes, b[:, None], query, -1).expand(shape),
            self._id_at(sizes, b[:, None], key, -1).expand(shape),
        )


class padding(Atom):
    """Keys that are padding are seen by nobody: key j is real.

    `lengths` is one number of real tokens for each batch item (they stand first); a bool mask `(B, N)` or `(N,)`, True =
    real, says it for any layout. The queries of padding rows are not touched: intersect or drop them as you need.

    >>> import farlight as fl
    >>> fl.padding([2]).dense(3).int()[0, 0].tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 0]]
    """

    def __init__(self, lengths: Any) -> None:
        if isinstance(lengths, Tensor) and lengths.dtype == torch.bool:
            mask = read_table("padding: mask", lengths, 2, kind="bool")
            self._set(lengths=None, text="padding($0)", tables=(mask,), varies_over_batch=mask.shape[0] > 1)
            return
        if isinstance(lengths, Tensor):
            lengths = lengths.tolist()
        each = [lengths] if isinstance(lengths, int) else listed("padding", lengths, "lengths, one for each batch item")
        read = tuple(whole("padding: length", n, 0) for n in each)
        if not read:
            raise PatternError("padding: no length was given; give one for each batch item.")
        self._set(lengths=read, text=f"padding({list(read)})", tables=(), varies_over_batch=len(read) > 1)

    lengths: tuple[int, ...] | None

    def _made_for(self) -> tuple[int, int]:
        return (super()._made_for()[0] if self.lengths is None else len(self.lengths)), 1

    def check(self, sizes: Sizes) -> None:
        if self.lengths is None:
            check_leading("padding: mask", self.tables[0], sizes, heads=False)
            if self.tables[0].shape[1] != sizes.n_k:
                raise PatternError(
                    f"padding: the mask has {self.tables[0].shape[1]} keys, but there are {sizes.n_k}; they must agree."
                )
            return
        if len(self.lengths) not in (1, sizes.batch):
            raise PatternError(
                f"padding: {len(self.lengths)} lengths for a batch of {sizes.batch}; give one for each batch item."
            )
        if max(self.lengths) > sizes.n_k:
            raise PatternError(f"padding: a length of {max(self.lengths)} exceeds the {sizes.n_k} keys that there are.")

    def _variation(self, sizes: Sizes) -> Tensor:
        if self.lengths is None:
            return self._real()._variation(sizes)
        return _equal_items(torch.tensor(self.lengths, device="cpu"))

    def _real(self) -> seen_by_all:
        return seen_by_all(self.tables[0])

    def _rewrite(self) -> Pattern:
        return self if self.lengths is not None else self._real()

    def _length(self, b: Tensor) -> Tensor:
        assert self.lengths is not None
        lengths = torch.tensor(self.lengths, device=b.device)
        return lengths[b if self.varies_over_batch else torch.zeros_like(b)]

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < self._length(b) if self.lengths is not None else self._real()._allows(sizes, b, h, i, j)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        if self.lengths is None:
            return self._real()._spans(sizes, b, h, i)
        return Spans.thin(sizes.n_k, torch.zeros_like(i), self._length(b) + torch.zeros_like(i))

    def _needs_length(self) -> str | None:
        return "padding is given as a mask" if self.lengths is None else None

    def _changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> Changes:
        return Changes()

    def _rows_agree(self, sizes: Sizes, first: Tensor, last: Tensor) -> Tensor:
        return torch.ones_like(first, dtype=torch.bool)
