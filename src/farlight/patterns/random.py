"""Random primitives: `random_keys` and `random_blocks`.

Every draw is a pure function of (seed, head, absolute query position), by `hashing`. Any row can be computed alone, and every
device, rank and chunk draws the same keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.patterns.arguments import whole
from farlight.patterns.expression import Atom, ColumnChanges, Form, Sizes
from farlight.patterns.hashing import draw_below, hash_words
from farlight.patterns.spans import Spans
from farlight.patterns.tables import run_starts
from farlight.ragged import exclusive_cumsum

__all__ = ["random_blocks", "random_keys"]

# Up to _FEW_DRAWS draws per row are compared pairwise; more are marked in bool tables of at most _MOST_MARKS entries.
_FEW_DRAWS, _MOST_MARKS = 64, 1 << 24
# In sequences up to this length the draws of all queries are computed to find the queries that drew a key.
_LONGEST_INVERTED = 2**24


def draw_distinct(seed: int, head: Tensor, index: Tensor, count: int, population: Tensor) -> Tensor:
    """`count` distinct numbers below `population` for each (head, index): `(…, count)` int64, -1 = population exhausted.

    head, index, population: int64, broadcast. Floyd's algorithm: draw t picks a number below m = population - count + t + 1;
    if it was drawn before, m - 1, which cannot have been, since earlier draws were below m - 1. Bentley & Floyd 1987, "A
    sample of brilliance".
    """
    row = hash_words(seed & 0xFFFFFFFF, seed >> 32, head, index)
    row, population = torch.broadcast_tensors(row, population)
    if count <= _FEW_DRAWS or not row.numel():
        drawn = torch.full((*row.shape, count), -1, dtype=torch.int64, device=row.device)
        for t in range(count):
            bound = population - count + t + 1
            pick = draw_below(hash_words(row, t), bound.clamp(min=1))
            repeated = (drawn[..., :t] == pick[..., None]).any(-1)
            drawn[..., t] = torch.where(bound > 0, torch.where(repeated, bound - 1, pick), -1)
        return drawn
    # Many draws: a table of marks replaces the comparison with all earlier draws, in chunks of rows to bound its size.
    largest = int(population.max())
    chunk = max(1, _MOST_MARKS // max(1, largest))
    chunks = zip(row.reshape(-1).split(chunk), population.reshape(-1).split(chunk), strict=True)
    return torch.cat([_draw_marked(*columns, count, largest) for columns in chunks]).view(*row.shape, count)


def _draw_marked(row: Tensor, population: Tensor, count: int, largest: int) -> Tensor:
    """`draw_distinct` for row hashes `(n,)`: marks `(n, largest + 1)` of drawn numbers; an exhausted row marks the last one."""
    marks = torch.zeros(row.numel(), largest + 1, dtype=torch.bool, device=row.device)
    drawn = torch.full((count, row.numel()), -1, dtype=torch.int64, device=row.device)
    for t in range(count):
        bound = population - count + t + 1
        pick = draw_below(hash_words(row, t), bound.clamp(min=1))[:, None]
        pick = torch.where(marks.gather(1, pick).squeeze(1), bound - 1, pick.squeeze(1))
        valid = bound > 0
        marks.scatter_(1, torch.where(valid, pick, largest)[:, None], True)
        drawn[t] = torch.where(valid, pick, -1)
    return drawn.T.contiguous()


def invert_draws(drawn: Tensor, population: int) -> Tensor:
    """`(population, m)` int64: the rows of `drawn` `(n, count)` that contain each number, ascending; -1 pads."""
    row, _ = (drawn >= 0).nonzero(as_tuple=True)
    number, order = torch.sort(drawn[drawn >= 0], stable=True)
    counts = torch.bincount(number, minlength=population)
    column = torch.arange(number.numel(), device=drawn.device) - exclusive_cumsum(counts)[number]
    table = torch.full((population, int(counts.max()) if population else 0), -1, dtype=torch.int64, device=drawn.device)
    table[number, column] = row[order]
    return table


class _RandomDraws(Atom):
    """Base: `count` draws (the attribute `number`) per query or query block, from `seed`."""

    number: int
    seed: int
    causal: bool
    varies_over_heads = True

    def _set_options(self, count: int, seed: int, causal: bool) -> None:
        name = type(self).__name__
        self._set(
            number=whole(f"{name}: count", count, 0),
            seed=whole(f"{name}: seed", seed, 0, 2**64) % 2**64,
            causal=bool(causal),
            tables=(),
        )

    def _needs_length(self) -> str | None:
        if self.causal or not self.number:
            return None
        return f"{type(self).__name__} draws from the keys of the whole text, unless causal=True"

    def _entries_per_row(self, sizes: Sizes) -> int:
        return min(self.number, sizes.n_k)

    def _options_text(self) -> str:
        return (f", seed={self.seed}" if self.seed else "") + (", causal=True" if self.causal else "")


class random_keys(_RandomDraws):
    """`count` distinct random keys per query, drawn for (head, i) from all keys, or with causal=True from keys <= i.

    >>> import farlight as fl
    >>> fl.random_keys(3).dense(100).sum(-1).unique().tolist()
    [3]
    """

    def __init__(self, count: int, *, seed: int = 0, causal: bool = False) -> None:
        self._set_options(count, seed, causal)
        self._set(text=f"random_keys({self.number}{self._options_text()})")

    def _form(self, sizes: Sizes) -> Form:
        return "points"

    def _points(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Tensor:
        population = (i + 1).clamp(0, sizes.n_k) if self.causal else torch.full_like(i, sizes.n_k)
        return draw_distinct(self.seed, h, i, min(self.number, sizes.n_k), population)

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        h, i = torch.broadcast_tensors(h, i)
        drawn = self._points(sizes, b, h, i)
        out = torch.zeros((), dtype=torch.bool, device=i.device)
        for t in range(drawn.shape[-1]):
            out = out | (drawn[..., t] == j)
        return out

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        keys = self._points(sizes, b, h, i)
        return Spans.from_table(sizes.n_k, keys, keys + (keys >= 0))

    def _column_changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> ColumnChanges:
        if sizes.n_k > _LONGEST_INVERTED:
            return ColumnChanges(anywhere=True)
        i = torch.arange(sizes.n_k, device=j.device)
        query = invert_draws(self._points(sizes, i, h[:1], i), sizes.n_k)[j]
        return ColumnChanges(torch.cat((query, query + 1), 1))


class random_blocks(_RandomDraws):
    """`count` distinct random key blocks per query block, drawn for (head, i // block).

    With causal=True they are drawn from blocks 0 … i // block, and only keys <= i are allowed.
    Zaheer et al. 2020, "Big Bird", arXiv:2007.14062.

    >>> import farlight as fl
    >>> fl.random_blocks(2, block=4).dense(16).sum(-1).unique().tolist()
    [8]
    """

    block: int

    def __init__(self, count: int, *, block: int = 64, seed: int = 0, causal: bool = False) -> None:
        self._set_options(count, seed, causal)
        self._set(block=whole("random_blocks: block", block, 1))
        self._set(text=f"random_blocks({self.number}, block={self.block}{self._options_text()})")

    def _drawn_blocks(self, sizes: Sizes, h: Tensor, i: Tensor) -> Tensor:
        """`(…, m)` int64: the key blocks of the query at position i in head h; -1 pads."""
        num_blocks = -(-sizes.n_k // self.block)
        query_block = i // self.block
        population = (query_block + 1).clamp(0, num_blocks) if self.causal else torch.full_like(query_block, num_blocks)
        return draw_distinct(self.seed, h, query_block, min(self.number, num_blocks), population)

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        drawn = self._drawn_blocks(sizes, *torch.broadcast_tensors(h, i))
        key_block = j // self.block
        out = torch.zeros((), dtype=torch.bool, device=i.device)
        for t in range(drawn.shape[-1]):
            out = out | (drawn[..., t] == key_block)
        return out & (j <= i) if self.causal else out

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        # One draw per run of rows of one (head, query block).
        first = run_starts(i // self.block, h)
        drawn = self._drawn_blocks(sizes, h[first], i[first])[first.cumsum(0) - 1]
        lo = drawn * self.block
        hi = torch.where(drawn >= 0, lo + self.block, lo)
        if self.causal:
            hi = torch.minimum(hi, i[:, None] + 1)
        return Spans.from_table(sizes.n_k, lo, hi)

    def _column_changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> ColumnChanges:
        if sizes.n_k > _LONGEST_INVERTED:
            return ColumnChanges(anywhere=True)
        num_blocks = -(-sizes.n_k // self.block)
        first = torch.arange(num_blocks, device=j.device) * self.block
        query_block = invert_draws(self._drawn_blocks(sizes, h[:1], first), num_blocks)[j // self.block]
        return ColumnChanges(torch.cat((query_block * self.block, (query_block + 1) * self.block, j[:, None]), 1))

    def _rows_equal(self, sizes: Sizes, first: Tensor, last: Tensor) -> Tensor:
        return (first // self.block == last // self.block) & ((first == last) | (not self.causal))
