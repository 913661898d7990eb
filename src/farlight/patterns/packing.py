"""Patterns of texts of unequal length in one tensor: documents packed into a row, and padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farlight.errors import PatternError
from farlight.patterns.arguments import check_leading, listed, numbers, read_mask, read_table, refuse_tracing, whole
from farlight.patterns.deferred import Unread, empty, hidden
from farlight.patterns.expression import Atom, Changes, Form, Labels, Pattern, Sizes, equal_items
from farlight.patterns.named import seen_by_all
from farlight.patterns.spans import Spans

__all__ = ["documents", "padding"]

# The runs of the batch items stand this far apart in one sorted list.
_FAR = 2**42


class documents(Atom):
    """Tokens see their own document only (packed sequences): i and j carry the same id, or lie in the same length.

    `ids` is `(N,)` or `(B, N)` integers, negative = in no document. `lengths` is a list of lengths that follow one another
    (or one such list for each batch item); tokens after the last length are in no document.

    >>> import farlight as fl
    >>> fl.documents(lengths=[1, 2]).dense(3).int()[0, 0].tolist()
    [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    """

    def __new__(cls, ids: Any = None, *, lengths: Any = None) -> Any:
        return Unread("documents", lengths) if ids is None and hidden(lengths) else super().__new__(cls)

    def __init__(self, ids: Any = None, *, lengths: Any = None) -> None:
        if (ids is None) == (lengths is None):
            raise PatternError("documents: give either ids (one for each token) or lengths=[…], not both and not neither.")
        if lengths is None:
            table = read_table("documents: ids", ids, 2, kind="int")
            self._set(lengths=None, text="documents($0)", tables=(table,), varies_over_batch=table.shape[0] > 1)
            return
        if isinstance(lengths, Tensor):
            if torch._C._get_tracing_state() is not None:
                refuse_tracing("documents")
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
            check_leading("documents: ids", self._tables[0], sizes, heads=False)
            if self._tables[0].shape[1] != sizes.n_k:
                raise PatternError(
                    f"documents: {self._tables[0].shape[1]} ids for {sizes.n_k} tokens; give one for each token."
                )
            return
        if len(self.lengths) not in (1, sizes.batch):
            raise PatternError(
                f"documents: {len(self.lengths)} lists of lengths for a batch of {sizes.batch}; give one, or one for each."
            )
        longest = self._kept("longest", lambda: max(map(sum, self.lengths or ()), default=0))
        if longest > sizes.n_k:
            raise PatternError(f"documents: the lengths add up to {longest}, more than the {sizes.n_k} tokens of the text.")

    def _variation(self, sizes: Sizes) -> Tensor:
        if not self.varies_over_batch:
            return super()._variation(sizes)
        if self.lengths is None:
            return equal_items(self._tables[0])
        number = {item: place for place, item in enumerate(dict.fromkeys(self.lengths))}
        return torch.tensor([[number[item]] for item in self.lengths], device="cpu")

    def _form(self, sizes: Sizes) -> Form:
        # An id that comes back after another one, or after none, makes its document more than one interval.
        if self.lengths is None and self._kept("returns", lambda: any(map(_returns, self._tables[0]))):
            return "labels"
        return "spans"

    def _needs_length(self) -> str | None:
        return "documents is given as ids" if self.lengths is None else None

    def _changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> Changes:
        turns = torch.unique(self._ends(j.device) % _FAR)
        return Changes(turns.expand(j.numel(), -1))

    def _ends(self, device: torch.device) -> Tensor:
        """Where the runs of one id, or the lengths, end: sorted, batch item b's from b · _FAR on."""
        return self._kept("ends", self._find_ends).to(device)

    def _find_ends(self) -> Tensor:
        if self.lengths is not None:
            rows = [torch.tensor(item, dtype=torch.int64, device="cpu").cumsum(0) for item in self.lengths]
            return torch.cat([row + number * _FAR for number, row in enumerate(rows)])
        ids = self._tables[0]
        is_last = torch.ones_like(ids, dtype=torch.bool)
        is_last[:, :-1] = ids[:, 1:] != ids[:, :-1]
        item, position = is_last.nonzero(as_tuple=True)
        return item * _FAR + position + 1

    def _run(self, b: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Number, first and last + 1 of the run that holds each position; last + 1 is 0 where there is none."""
        ends = self._ends(position.device)
        item = (b if self.varies_over_batch else torch.zeros_like(b)) * _FAR
        number = torch.bucketize((item + position.clamp(-1, _FAR - 1)).contiguous(), ends, right=True)
        edges = torch.nn.functional.pad(ends, (1, 1))
        lo, hi = (edges[number] - item).clamp(min=0), edges[number + 1] - item
        is_real = (position >= 0) & (hi > 0) & (hi < _FAR)
        return number, lo, torch.where(is_real, hi, 0)

    def _id_at(self, sizes: Sizes, b: Tensor, position: Tensor, otherwise: int) -> Tensor:
        if self.lengths is not None:
            number, _, stop = self._run(b, position)
            return torch.where(stop > 0, number, otherwise)
        ids = self._tables[0].to(position.device)
        if not ids.shape[1]:
            return torch.full_like(position, otherwise)
        found = ids[b if self.varies_over_batch else torch.zeros_like(b), position.clamp(0, ids.shape[1] - 1)]
        return torch.where((position >= 0) & (position < ids.shape[1]) & (found >= 0), found, otherwise)

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self._id_at(sizes, b, i, -1) == self._id_at(sizes, b, j, -2)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        if self._form(sizes) == "labels":
            every = torch.arange(sizes.n_k, device=i.device)
            return Spans.from_mask(self._allows(sizes, b[:, None], h[:, None], i[:, None], every[None, :]))
        _, start, stop = self._run(b, i)
        return Spans.thin(sizes.n_k, start, torch.where(self._id_at(sizes, b, i, -1) >= 0, stop, 0))

    def _labels(self, sizes: Sizes, b: Tensor, h: Tensor) -> Labels:
        query = (torch.arange(sizes.n_q, device=b.device) + sizes.q_offset)[None, :]
        key = torch.arange(sizes.n_k, device=b.device)[None, :]
        shape = (b.numel(), -1)
        return Labels(
            self._id_at(sizes, b[:, None], query, -1).expand(shape),
            self._id_at(sizes, b[:, None], key, -1).expand(shape),
        )


def _returns(ids: Tensor) -> bool:
    """Whether an id >= 0 comes back after another one."""
    runs = torch.unique_consecutive(ids)
    runs = runs[runs >= 0]
    return bool(runs.numel() != torch.unique(runs).numel())


class padding(Atom):
    """Keys that are padding are seen by nobody: key j is real.

    `lengths` is one number of real tokens for each batch item (they stand first); a bool mask `(B, N)` or `(N,)`, True =
    real, says it for any layout. The queries of padding rows are not touched: intersect or drop them as you need.

    >>> import farlight as fl
    >>> fl.padding([2]).dense(3).int()[0, 0].tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 0]]
    """

    def __new__(cls, lengths: Any = None) -> Any:
        return Unread("padding", lengths) if hidden(lengths) or empty(lengths) else super().__new__(cls)

    def __init__(self, lengths: Any) -> None:
        mask = read_mask("padding: mask", lengths)
        if mask is not None:
            self._set(lengths=None, text="padding($0)", tables=(mask,), varies_over_batch=mask.shape[0] > 1)
            return
        single = isinstance(lengths, int) or getattr(lengths, "ndim", 1) == 0
        each = [lengths] if single else numbers("padding", lengths, "lengths")
        read = tuple(whole("padding: length", n, 0) for n in each)
        if not read:
            raise PatternError("padding: no length was given; give one for each batch item.")
        self._set(lengths=read, text=f"padding({list(read)})", tables=(), varies_over_batch=len(read) > 1)

    lengths: tuple[int, ...] | None

    def _made_for(self) -> tuple[int, int]:
        return (super()._made_for()[0] if self.lengths is None else len(self.lengths)), 1

    def check(self, sizes: Sizes) -> None:
        if self.lengths is None:
            check_leading("padding: mask", self._tables[0], sizes, heads=False)
            if self._tables[0].shape[1] != sizes.n_k:
                raise PatternError(
                    f"padding: the mask has {self._tables[0].shape[1]} keys, but there are {sizes.n_k}; they must agree."
                )
            return
        if len(self.lengths) not in (1, sizes.batch):
            raise PatternError(
                f"padding: {len(self.lengths)} lengths for a batch of {sizes.batch}; give one for each batch item."
            )
        if max(self.lengths) > sizes.n_k:
            raise PatternError(f"padding: a length of {max(self.lengths)} exceeds the {sizes.n_k} keys that there are.")

    def _variation(self, sizes: Sizes) -> Tensor:
        if not self.varies_over_batch:
            return super()._variation(sizes)
        return equal_items(self._tables[0] if self.lengths is None else torch.tensor(self.lengths, device="cpu")[:, None])

    def _real(self) -> seen_by_all:
        return self._kept("real", lambda: seen_by_all._sharing(self._tables[0]))

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
