"""Primitives of sequences of unequal length in one tensor: `documents` (packed sequences) and `padding`.

Both take lengths (kept as Python integers) or a table (ids, a mask); a tensor of lengths that cannot be read yet becomes a
`DeferredPattern`.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from farlight.errors import PatternError, refuse_tracing, show
from farlight.patterns.arguments import check_leading, read_integers, read_list, read_mask, read_table, whole
from farlight.patterns.deferred import DeferredPattern, has_no_items, is_unreadable
from farlight.patterns.expression import Atom, ColumnChanges, Form, Labels, Pattern, Sizes, equal_items
from farlight.patterns.named import seen_by_all
from farlight.patterns.positional import causal
from farlight.patterns.spans import Spans

__all__ = ["documents", "padding", "prefix_lm"]

# The document ends of all batch items share one sorted list; those of item b are offset by b · _ITEM_STRIDE.
_ITEM_STRIDE = 2**42


class documents(Atom):
    """Packed sequences: tokens attend within their document: i and j have the same id, or lie in the same length.

    `ids` is `(N,)` or `(B, N)` integers, negative = in no document. `lengths` is a list of consecutive document lengths (or
    one such list for each batch item); tokens behind the last document are in none. `cu_seqlens` is their cumulative sum
    from 0, as FlashAttention's varlen functions take it.

    >>> import farlight as fl
    >>> fl.documents(lengths=[1, 2]).dense(3).int()[0, 0].tolist()
    [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    """

    lengths: tuple[tuple[int, ...], ...] | None

    def __new__(cls, ids: Any = None, *, lengths: Any = None, cu_seqlens: Any = None) -> Any:
        if ids is None and lengths is None and is_unreadable(cu_seqlens):
            lengths = cu_seqlens.diff()
        return DeferredPattern("documents", lengths) if ids is None and is_unreadable(lengths) else super().__new__(cls)

    def __init__(self, ids: Any = None, *, lengths: Any = None, cu_seqlens: Any = None) -> None:
        if sum(given is not None for given in (ids, lengths, cu_seqlens)) != 1:
            raise PatternError("documents: give one of ids (one for each token), lengths=[…] and cu_seqlens=[0, …].")
        if cu_seqlens is not None:
            if isinstance(cu_seqlens, Tensor):
                refuse_tracing("documents")
            lengths = lengths_of_cumulative("documents: cu_seqlens", cu_seqlens)
        if lengths is None:
            table = read_table("documents: ids", ids, 2, dtype=torch.int64)
            self._set(lengths=None, text="documents($0)", tables=(table,), varies_over_batch=table.shape[0] > 1)
            return
        if isinstance(lengths, Tensor):
            refuse_tracing("documents")
            lengths = lengths.tolist()
        lengths = read_list("documents", lengths, "lengths")
        nested = any(isinstance(item, (list, tuple)) for item in lengths)
        items = [read_list("documents", item, "lengths for each batch item") for item in (lengths if nested else [lengths])]
        per_item = tuple(tuple(whole("documents: length", n, 0) for n in item) for item in items)
        text = str([list(item) for item in per_item] if nested else list(per_item[0]))
        self._set(lengths=per_item, text=f"documents(lengths={text})", tables=(), varies_over_batch=len(per_item) > 1)

    def _batch_and_heads(self) -> tuple[int, int]:
        return (super()._batch_and_heads()[0] if self.lengths is None else len(self.lengths)), 1

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
        longest = self._cached("longest", lambda: max(map(sum, self.lengths or ()), default=0))
        if longest > sizes.n_k:
            raise PatternError(f"documents: the lengths add up to {longest}, more than the {sizes.n_k} tokens of the text.")

    def _variation(self, sizes: Sizes) -> Tensor:
        if not self.varies_over_batch:
            return super()._variation(sizes)
        if self.lengths is None:
            return equal_items(self._tables[0])
        variant = {item: number for number, item in enumerate(dict.fromkeys(self.lengths))}
        return torch.tensor([[variant[item]] for item in self.lengths], device="cpu")

    def _form(self, sizes: Sizes) -> Form:
        # A document is one interval unless its id recurs after another one.
        if self.lengths is None and self._cached("recurs", lambda: any(map(_recurs, self._tables[0]))):
            return "labels"
        return "spans"

    def _needs_length(self) -> str | None:
        return "documents is given as ids" if self.lengths is None else None

    def _column_changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> ColumnChanges:
        ends = torch.unique(self._ends(j.device) % _ITEM_STRIDE)
        return ColumnChanges(ends.expand(j.numel(), -1))

    def _ends(self, device: torch.device) -> Tensor:
        """`(m,)` int64, sorted: the end of each run of one id, or of each length, plus b · _ITEM_STRIDE for item b."""
        return self._cached("ends", self._compute_ends).to(device)

    def _compute_ends(self) -> Tensor:
        if self.lengths is not None:
            ends = [torch.tensor(item, dtype=torch.int64, device="cpu").cumsum(0) for item in self.lengths]
            return torch.cat([item_ends + number * _ITEM_STRIDE for number, item_ends in enumerate(ends)])
        ids = self._tables[0]
        is_last = torch.ones_like(ids, dtype=torch.bool)
        is_last[:, :-1] = ids[:, 1:] != ids[:, :-1]
        item, position = is_last.nonzero(as_tuple=True)
        return item * _ITEM_STRIDE + position + 1

    def _run_at(self, b: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(number, first, stop) of the run that contains each position; stop = 0 where none does."""
        ends = self._ends(position.device)
        item = (b if self.varies_over_batch else torch.zeros_like(b)) * _ITEM_STRIDE
        number = torch.bucketize((item + position.clamp(-1, _ITEM_STRIDE - 1)).contiguous(), ends, right=True)
        edges = torch.nn.functional.pad(ends, (1, 1))
        lo, hi = (edges[number] - item).clamp(min=0), edges[number + 1] - item
        exists = (position >= 0) & (hi > 0) & (hi < _ITEM_STRIDE)
        return number, lo, torch.where(exists, hi, 0)

    def _id_at(self, sizes: Sizes, b: Tensor, position: Tensor, otherwise: int) -> Tensor:
        """Elementwise: the document id (or number) at each position; `otherwise` where there is no document."""
        if self.lengths is not None:
            number, _, stop = self._run_at(b, position)
            return torch.where(stop > 0, number, otherwise)
        ids = self._tables[0].to(position.device)
        if not ids.shape[1]:
            return torch.full_like(position, otherwise)
        value = ids[b if self.varies_over_batch else torch.zeros_like(b), position.clamp(0, ids.shape[1] - 1)]
        return torch.where((position >= 0) & (position < ids.shape[1]) & (value >= 0), value, otherwise)

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self._id_at(sizes, b, i, -1) == self._id_at(sizes, b, j, -2)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        if self._form(sizes) == "labels":
            j = torch.arange(sizes.n_k, device=i.device)
            return Spans.from_mask(self._allows(sizes, b[:, None], h[:, None], i[:, None], j[None, :]))
        _, start, stop = self._run_at(b, i)
        return Spans.thin(sizes.n_k, start, torch.where(self._id_at(sizes, b, i, -1) >= 0, stop, 0))

    def _labels(self, sizes: Sizes, b: Tensor, h: Tensor) -> Labels:
        query = (torch.arange(sizes.n_q, device=b.device) + sizes.q_offset)[None, :]
        key = torch.arange(sizes.n_k, device=b.device)[None, :]
        shape = (b.numel(), -1)
        return Labels(
            self._id_at(sizes, b[:, None], query, -1).expand(shape),
            self._id_at(sizes, b[:, None], key, -1).expand(shape),
        )


def lengths_of_cumulative(what: str, ends: Any, total: int | None = None) -> list[int]:
    """Document lengths from cumulative ones, which rise from 0 to `total` (None: to any). Raises PatternError."""
    if isinstance(ends, Tensor):
        ends = ends.tolist()
    ends = [whole(what, n, 0) for n in read_list(what, ends, "cumulative lengths")]
    if not ends or ends[0] or any(a > b for a, b in itertools.pairwise(ends)) or total not in (None, ends[-1]):
        order = "and never fall" if total is None else f"never fall and end with {total}, the number of tokens"
        raise PatternError(f"{what} = {show(ends)} must begin with 0{'' if total is None else ','} {order}.")
    return [b - a for a, b in itertools.pairwise(ends)]


def _recurs(ids: Tensor) -> bool:
    """Whether some id >= 0 of `(N,)` recurs after another id: its document is more than one run."""
    runs = torch.unique_consecutive(ids)
    runs = runs[runs >= 0]
    return bool(runs.numel() != torch.unique(runs).numel())


class padding(Atom):
    """No query attends to padding keys: key j is real.

    `lengths` is the number of real tokens of each batch item, which come first; or a bool mask `(B, N)` or `(N,)`, True =
    real, for any layout. Rows of padding queries are not restricted: intersect with another pattern or drop them.

    >>> import farlight as fl
    >>> fl.padding([2]).dense(3).int()[0, 0].tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 0]]
    """

    lengths: tuple[int, ...] | None

    def __new__(cls, lengths: Any = None) -> Any:
        return DeferredPattern("padding", lengths) if is_unreadable(lengths) or has_no_items(lengths) else super().__new__(cls)

    def __init__(self, lengths: Any) -> None:
        mask = read_mask("padding: mask", lengths)
        if mask is not None:
            self._set(lengths=None, text="padding($0)", tables=(mask,), varies_over_batch=mask.shape[0] > 1)
            return
        is_scalar = isinstance(lengths, int) or getattr(lengths, "ndim", 1) == 0
        items = [lengths] if is_scalar else read_integers("padding", lengths, "lengths")
        per_item = tuple(whole("padding: length", n, 0) for n in items)
        if not per_item:
            raise PatternError("padding: no length was given; give one for each batch item.")
        self._set(lengths=per_item, text=f"padding({list(per_item)})", tables=(), varies_over_batch=len(per_item) > 1)

    def _batch_and_heads(self) -> tuple[int, int]:
        return (super()._batch_and_heads()[0] if self.lengths is None else len(self.lengths)), 1

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
        """The real keys of the mask."""
        return self._cached("real", lambda: seen_by_all._sharing(self._tables[0]))

    def _rewrite(self) -> Pattern:
        return self if self.lengths is not None else self._real()

    def _length(self, b: Tensor) -> Tensor:
        """The length of each batch item b."""
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

    def _column_changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> ColumnChanges:
        return ColumnChanges()

    def _rows_equal(self, sizes: Sizes, first: Tensor, last: Tensor) -> Tensor:
        return torch.ones_like(first, dtype=torch.bool)


def prefix_lm(lengths: Any) -> Pattern:
    """Prefix language model: every token sees the prefix and the past: j < lengths[b] or j <= i.

    `causal() | padding(lengths)`; `lengths` as in `padding`: one number, or one for each batch item (or a bool mask, True =
    in the prefix). Raffel et al. 2020, "Exploring the Limits of Transfer Learning", arXiv:1910.10683.

    >>> import farlight as fl
    >>> fl.prefix_lm([2]).dense(4).int()[0, 0].tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    """
    return causal() | padding(lengths)
