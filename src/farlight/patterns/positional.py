"""Positional primitives: the pair (i, j) alone decides, whatever the sequence length.

`full`, `causal`, `window`, `strided`, `blocked_window`, `landmarks`, `offsets`. Windows, `causal` and `blocked_window` are one
key interval per row, `offsets` a few; `strided` and `landmarks` are planned by labels (residues), so that after sorting
tokens by residue they are dense blocks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from farlight.errors import PatternError
from farlight.patterns.arguments import read_list, whole
from farlight.patterns.expression import Atom, ColumnChanges, Form, Labels, Pattern, Sizes
from farlight.patterns.spans import Spans

__all__ = ["blocked_window", "causal", "full", "landmarks", "offsets", "strided", "window"]


class _Positional(Atom):
    """Base: no table, defined for every sequence length."""

    def _needs_length(self) -> str | None:
        return None

    def _column_changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> ColumnChanges:
        return ColumnChanges()


class full(_Positional):
    """Every pair: dense attention.

    >>> import farlight as fl
    >>> fl.full().count(1000)
    1000000
    """

    def __init__(self) -> None:
        self._set(text="full()", tables=())

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.ones((), dtype=torch.bool, device=i.device)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        return Spans.everything(i.numel(), sizes.n_k, i.device)

    def _rows_equal(self, sizes: Sizes, first: Tensor, last: Tensor) -> Tensor:
        return torch.ones_like(first, dtype=torch.bool)


class causal(_Positional):
    """Causal attention: a token attends to itself and to earlier ones: j <= i.

    >>> import farlight as fl
    >>> fl.causal().dense(3).int()[0, 0].tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """

    def __init__(self) -> None:
        self._set(text="causal()", tables=())

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        return Spans.thin(sizes.n_k, torch.zeros_like(i), i + 1)

    def _column_changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> ColumnChanges:
        return ColumnChanges(j[:, None])


class window(_Positional):
    """Sliding window: -left·dilation <= j - i <= right·dilation, and dilation divides j - i.

    `left` and `right` are inclusive counts of neighbours: `window(4)` has 9 keys inside a sequence, fewer at its ends
    (clipped, never shifted). `right=None` means `left`. Beltagy et al. 2020, "Longformer", arXiv:2004.05150.

    >>> import farlight as fl
    >>> fl.window(1, 0).dense(4).int()[0, 0].tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    >>> fl.window(1, dilation=2).dense(5).int()[0, 0, 2].tolist()
    [1, 0, 1, 0, 1]
    """

    left: int
    right: int
    dilation: int

    def __init__(self, left: int, right: int | None = None, *, dilation: int = 1) -> None:
        left = whole("window: left", left, 0)
        right = left if right is None else whole("window: right", right, 0)
        dilation = whole("window: dilation", dilation, 1)
        options = (f", {right}" if right != left else "") + (f", dilation={dilation}" if dilation > 1 else "")
        self._set(left=left, right=right, dilation=dilation, text=f"window({left}{options})", tables=())

    def _rewrite(self) -> Pattern:
        if self.dilation == 1:
            return self
        return strided(self.dilation) & window(self.left * self.dilation, self.right * self.dilation)

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = j - i
        inside = (distance >= -self.left * self.dilation) & (distance <= self.right * self.dilation)
        return inside & (distance % self.dilation == 0) if self.dilation > 1 else inside

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        if self.dilation > 1:
            return self._rewrite()._spans(sizes, b, h, i)
        return Spans.thin(sizes.n_k, i - self.left, i + self.right + 1)

    def _column_changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> ColumnChanges:
        return ColumnChanges(torch.stack((j - self.right * self.dilation, j + self.left * self.dilation + 1), 1), self.dilation)


class strided(_Positional):
    """Strided attention: stride divides j - i.

    With `phase`, only positions p ≡ phase (mod stride) take part, as queries and as keys; `phase="head"` means phase =
    head mod stride, so that heads cover all residues (Ding et al. 2023, "LongNet", arXiv:2307.02486).

    >>> import farlight as fl
    >>> fl.strided(2).dense(4).int()[0, 0].tolist()
    [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    """

    stride: int
    phase: int | str | None

    def __init__(self, stride: int, *, phase: int | str | None = None) -> None:
        stride = whole("strided: stride", stride, 1)
        if phase is not None and phase != "head":
            phase = whole("strided: phase", phase, 0) % stride
        text = f"strided({stride}" + ("" if phase is None else f", phase={phase!r}") + ")"
        self._set(stride=stride, phase=phase, text=text, tables=(), varies_over_heads=phase == "head" and stride > 1)

    def _form(self, sizes: Sizes) -> Form:
        return "spans" if self.stride == 1 else "labels"

    def _variation(self, sizes: Sizes) -> Tensor:
        heads = torch.arange(sizes.heads if self.varies_over_heads else 1, device="cpu")
        return (heads % self.stride).view(1, -1)

    def _phase(self, h: Tensor) -> Tensor | int:
        return h % self.stride if self.phase == "head" else int(self.phase or 0)

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if self.phase is None:
            return (j - i) % self.stride == 0
        phase = self._phase(h)
        return (i % self.stride == phase) & (j % self.stride == phase)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        if self.stride == 1:
            return Spans.everything(i.numel(), sizes.n_k, i.device)
        residue = i % self.stride
        lo = residue[:, None] + self.stride * torch.arange(-(-sizes.n_k // self.stride), device=i.device)
        takes_part = torch.ones_like(i, dtype=torch.bool) if self.phase is None else residue == self._phase(h)
        return Spans.from_table(sizes.n_k, lo, lo + takes_part[:, None])

    def _labels(self, sizes: Sizes, b: Tensor, h: Tensor) -> Labels:
        query = (torch.arange(sizes.n_q, device=h.device) + sizes.q_offset).expand(h.numel(), -1) % self.stride
        key = torch.arange(sizes.n_k, device=h.device).expand(h.numel(), -1) % self.stride
        if self.phase is not None:
            phase = self._phase(h[:, None])
            query = torch.where(query == phase, 0, -1)
            key = torch.where(key == phase, 0, -1)
        return Labels(query, key)

    def _column_changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> ColumnChanges:
        return ColumnChanges(period=self.stride)


class blocked_window(_Positional):
    """Sliding window of whole blocks: -left <= j // block - i // block <= right.

    `blocked_window(0, block=n)` is attention within separate segments of n tokens; `blocked_window(1, block=64)` is BigBird's
    window of three blocks (Zaheer et al. 2020, arXiv:2007.14062).

    >>> import farlight as fl
    >>> fl.blocked_window(0, block=2).dense(4).int()[0, 0].tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """

    left: int
    right: int
    block: int

    def __init__(self, left: int, right: int | None = None, *, block: int = 64) -> None:
        left = whole("blocked_window: left", left, 0)
        right = left if right is None else whole("blocked_window: right", right, 0)
        block = whole("blocked_window: block", block, 1)
        text = f"blocked_window({left}" + (f", {right}" if right != left else "") + f", block={block})"
        self._set(left=left, right=right, block=block, text=text, tables=())

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = j // self.block - i // self.block
        return (distance >= -self.left) & (distance <= self.right)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        query_block = i // self.block
        return Spans.thin(sizes.n_k, (query_block - self.left) * self.block, (query_block + self.right + 1) * self.block)

    def _column_changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> ColumnChanges:
        key_block = j // self.block
        return ColumnChanges(torch.stack((key_block - self.right, key_block + self.left + 1), 1) * self.block)

    def _rows_equal(self, sizes: Sizes, first: Tensor, last: Tensor) -> Tensor:
        return first // self.block == last // self.block


class landmarks(_Positional):
    """Periodic global keys: the last `count` keys of every `every`: j mod every >= every - count.

    The summary columns of the "fixed" pattern of Child et al. 2019, "Sparse Transformers", arXiv:1904.10509.

    >>> import farlight as fl
    >>> fl.landmarks(3).dense(6).int()[0, 0, 0].tolist()
    [0, 0, 1, 0, 0, 1]
    """

    every: int
    last: int

    def __init__(self, every: int, count: int = 1) -> None:
        every = whole("landmarks: every", every, 1)
        count = whole("landmarks: count", count, 1)
        if count > every:
            raise PatternError(f"landmarks: count = {count} exceeds every = {every}; at most every token can be a landmark.")
        self._set(every=every, last=count, text=f"landmarks({every}" + (f", {count})" if count > 1 else ")"), tables=())

    def _form(self, sizes: Sizes) -> Form:
        return "labels"

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j % self.every >= self.every - self.last

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        first = min(self.every - self.last, sizes.n_k)
        start = torch.arange(first, sizes.n_k, self.every, device=i.device).expand(i.numel(), -1)
        return Spans.from_table(sizes.n_k, start, start + self.last)

    def _labels(self, sizes: Sizes, b: Tensor, h: Tensor) -> Labels:
        j = torch.arange(sizes.n_k, device=h.device)
        key = torch.where(j % self.every >= self.every - self.last, 0, -1)
        return Labels(torch.zeros(h.numel(), sizes.n_q, dtype=torch.int64, device=h.device), key.expand(h.numel(), -1))


class offsets(_Positional):
    """Fixed distances: j - i is one of `values` (negative = to the left).

    >>> import farlight as fl
    >>> fl.offsets([0, -1, -2, -4]).dense(6).int()[0, 0, 5].tolist()
    [0, 1, 0, 1, 1, 1]
    """

    values: tuple[int, ...]

    def __init__(self, values: Iterable[int]) -> None:
        distances = sorted({whole("offsets: value", v, -(2**40), 2**40) for v in read_list("offsets", values, "distances")})
        self._set(values=tuple(distances), text=f"offsets({distances})", tables=())

    def _entries_per_row(self, sizes: Sizes) -> int:
        return self._distance_runs().shape[1]

    def _distance_runs(self) -> Tensor:
        """`(2, runs)` int64: first and last + 1 of each run of consecutive distances."""
        values = torch.tensor(self.values, dtype=torch.int64)
        gap = values.diff() > 1
        first, last = torch.nn.functional.pad(gap, (1, 0), value=True), torch.nn.functional.pad(gap, (0, 1), value=True)
        return torch.stack((values[first], values[last] + 1)) if values.numel() else values.new_zeros(2, 0)

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.isin(j - i, torch.tensor(self.values, dtype=torch.int64, device=i.device))

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        # Distances beyond the sequence are cut off: fewer intervals, and no overflow.
        farthest = sizes.n_k + abs(sizes.q_offset) + sizes.n_q
        lo, hi = self._distance_runs().to(i.device).clamp(-farthest, farthest + 1)
        return Spans.from_table(sizes.n_k, i[:, None] + lo[lo < hi], i[:, None] + hi[lo < hi])

    def _column_changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> ColumnChanges:
        query = j[:, None] - torch.tensor(self.values, dtype=torch.int64, device=j.device)
        return ColumnChanges(torch.cat((query, query + 1), 1))
