"""Random links. Every draw is a pure function of (seed, head, absolute query position), so any part of the whole can be
computed alone: on another device or rank, in another chunk, or one row of a million.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.patterns.arguments import whole
from farlight.patterns.expression import Atom, Changes, Form, Sizes
from farlight.patterns.hashing import draw_below, hash_words
from farlight.patterns.spans import Spans

__all__ = ["random_blocks", "random_keys"]

# Draws that are told apart by comparing them, and (row, number) marks that are kept at once where there are more.
_FEW_DRAWS, _MOST_MARKS = 64, 1 << 24
# The longest text of which all draws are made to learn who draws a key.
_LONGEST_DRAWN = 2**24


def draw_distinct(seed: int, head: Tensor, at: Tensor, count: int, population: Tensor) -> Tensor:
    """`count` distinct numbers below `population` for each (head, at), by Floyd's algorithm: `(…, count)`, -1 = no more.

    Draw t takes a number below m = population - count + t + 1; where it was taken before, m - 1, which cannot have been.
    Bentley & Floyd 1987, "A sample of brilliance".
    """
    row = hash_words(seed & 0xFFFFFFFF, seed >> 32, head, at)
    row, population = torch.broadcast_tensors(row, population)
    if count <= _FEW_DRAWS or not row.numel():
        drawn = torch.full((*row.shape, count), -1, dtype=torch.int64, device=row.device)
        for t in range(count):
            bound = population - count + t + 1
            pick = draw_below(hash_words(row, t), bound.clamp(min=1))
            taken = (drawn[..., :t] == pick[..., None]).any(-1)
            drawn[..., t] = torch.where(bound > 0, torch.where(taken, bound - 1, pick), -1)
        return drawn
    # One mark for each (row, number) in place of a look through all earlier draws: some rows at a time.
    largest = int(population.max())
    step = max(1, _MOST_MARKS // max(1, largest))
    some = zip(row.reshape(-1).split(step), population.reshape(-1).split(step), strict=True)
    return torch.cat([_draw_marked(*one, count, largest) for one in some]).view(*row.shape, count)


def _draw_marked(row: Tensor, population: Tensor, count: int, largest: int) -> Tensor:
    """`draw_distinct` for rows `(n,)` by marks `(n, largest + 1)`; a row that may not draw marks the last number."""
    marks = torch.zeros(row.numel(), largest + 1, dtype=torch.bool, device=row.device)
    drawn = torch.full((count, row.numel()), -1, dtype=torch.int64, device=row.device)
    for t in range(count):
        bound = population - count + t + 1
        pick = draw_below(hash_words(row, t), bound.clamp(min=1))[:, None]
        pick = torch.where(marks.gather(1, pick).squeeze(1), bound - 1, pick.squeeze(1))
        real = bound > 0
        marks.scatter_(1, torch.where(real, pick, largest)[:, None], True)
        drawn[t] = torch.where(real, pick, -1)
    return drawn.T.contiguous()


def drawn_by(drawn: Tensor, population: int) -> Tensor:
    """Who drew each number, from what each drew `(n, count)`: `(population, most)`, -1 pads."""
    who, _ = (drawn >= 0).nonzero(as_tuple=True)
    number, order = torch.sort(drawn[drawn >= 0], stable=True)
    times = torch.bincount(number, minlength=population)
    place = torch.arange(number.numel(), device=drawn.device) - (times.cumsum(0) - times)[number]
    table = torch.full((population, int(times.max()) if population else 0), -1, dtype=torch.int64, device=drawn.device)
    table[number, place] = who[order]
    return table


class _Random(Atom):
    number: int
    seed: int
    causal: bool
    varies_over_heads = True

    def _read(self, count: int, seed: int, causal: bool) -> None:
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

    def _width(self, sizes: Sizes) -> int:
        return min(self.number, sizes.n_k)

    def _options(self) -> str:
        return (f", seed={self.seed}" if self.seed else "") + (", causal=True" if self.causal else "")


class random_keys(_Random):
    """A token sees `count` distinct keys drawn for (head, i): from all keys, or with causal=True from those <= i.

    >>> import farlight as fl
    >>> fl.random_keys(3).dense(100).sum(-1).unique().tolist()
    [3]
    """

    def __init__(self, count: int, *, seed: int = 0, causal: bool = False) -> None:
        self._read(count, seed, causal)
        self._set(text=f"random_keys({self.number}{self._options()})")

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

    def _changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> Changes:
        if sizes.n_k > _LONGEST_DRAWN:
            return Changes(every=True)
        i = torch.arange(sizes.n_k, device=j.device)
        seen = drawn_by(self._points(sizes, i, h[:1], i), sizes.n_k)[j]
        return Changes(torch.cat((seen, seen + 1), 1))


class random_blocks(_Random):
    """The tokens of a block of queries see `count` distinct blocks of keys, drawn for (head, i // block).

    With causal=True the blocks are drawn from those up to the query's own, and of that one only keys <= i are seen.
    Zaheer et al. 2020, "Big Bird", arXiv:2007.14062.

    >>> import farlight as fl
    >>> fl.random_blocks(2, block=4).dense(16).sum(-1).unique().tolist()
    [8]
    """

    def __init__(self, count: int, *, block: int = 64, seed: int = 0, causal: bool = False) -> None:
        self._read(count, seed, causal)
        self._set(block=whole("random_blocks: block", block, 1))
        self._set(text=f"random_blocks({self.number}, block={self.block}{self._options()})")

    block: int

    def _drawn(self, sizes: Sizes, h: Tensor, i: Tensor) -> Tensor:
        blocks = -(-sizes.n_k // self.block)
        own = torch.div(i, self.block, rounding_mode="floor")
        population = (own + 1).clamp(0, blocks) if self.causal else torch.full_like(own, blocks)
        return draw_distinct(self.seed, h, own, min(self.number, blocks), population)

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        drawn = self._drawn(sizes, *torch.broadcast_tensors(h, i))
        key_block = torch.div(j, self.block, rounding_mode="floor")
        out = torch.zeros((), dtype=torch.bool, device=i.device)
        for t in range(drawn.shape[-1]):
            out = out | (drawn[..., t] == key_block)
        return out & (j <= i) if self.causal else out

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        # Rows of one block share their draw: draw once for each run of equal (head, block).
        own = torch.div(i, self.block, rounding_mode="floor")
        new = torch.ones_like(i, dtype=torch.bool)
        new[1:] = (own[1:] != own[:-1]) | (h[1:] != h[:-1])
        drawn = self._drawn(sizes, h[new], i[new])[new.long().cumsum(0) - 1]
        lo = drawn * self.block
        hi = torch.where(drawn >= 0, lo + self.block, lo)
        if self.causal:
            hi = torch.minimum(hi, i[:, None] + 1)
        return Spans.from_table(sizes.n_k, lo, hi)

    def _changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> Changes:
        if sizes.n_k > _LONGEST_DRAWN:
            return Changes(every=True)
        blocks = -(-sizes.n_k // self.block)
        first = torch.arange(blocks, device=j.device) * self.block
        seen = drawn_by(self._drawn(sizes, h[:1], first), blocks)[torch.div(j, self.block, rounding_mode="floor")]
        return Changes(torch.cat((seen * self.block, (seen + 1) * self.block, j[:, None]), 1))

    def _rows_agree(self, sizes: Sizes, first: Tensor, last: Tensor) -> Tensor:
        same = torch.div(first, self.block, rounding_mode="floor") == torch.div(last, self.block, rounding_mode="floor")
        return same & ((first == last) | (not self.causal))
