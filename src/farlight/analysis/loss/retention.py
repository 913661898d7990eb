"""What was lost by not looking: the share of full attention that a pattern keeps, and the most that it could have kept.

A sparse pattern is a bet that the links it drops carry little. This module settles the bet on real queries and keys: it
forms the full attention probabilities tile by tile, adds up those on allowed pairs, and sorts all of them into a
histogram from which the best pattern of the same size follows. Memory is linear in the number of tokens; time is not,
since the full probabilities are what is being judged.

Nothing here runs sparse attention; this is the measure that sparse attention is held against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from farlight.analysis.loss.histogram import Histogram, HistogramBuilder
from farlight.analysis.loss.probabilities import Tile, check_problem, mix, sizes_of, softmax, tiles, wide_type
from farlight.analysis.loss.top_losses import Lost, LostBuilder
from farlight.errors import ArgumentError, show
from farlight.patterns.expression import Pattern

__all__ = ["Retention", "retention", "retentions"]


@dataclass(frozen=True)
class Retention:
    """What a pattern keeps of full attention. Returned by `farlight.retention`.

    Attributes:
        kept: `(B, H, n_q)`, the share of each row's full probability that lies on allowed pairs.
        links: `(B, H)` int64, the number of allowed pairs.
        base_links: `(B, H)` int64, the number of pairs that full attention looks at.
        best: `(B, H)` float64, the mean share that the best pattern with as many links keeps in that head; never above
            the truth, and below it by at most `best_slack`.
        best_slack: `(B, H)` float64, the bound on the error of `best`.
        error: `(B, H)` relative L2 error of the head's output, ‖sparse - full‖ / ‖full‖; None when v was not given.
        lost: the heaviest links outside the pattern, when asked for.
    """

    kept: Tensor
    links: Tensor
    base_links: Tensor
    best: Tensor
    best_slack: Tensor
    error: Tensor | None = None
    lost: Lost | None = None
    _histogram: Histogram = field(repr=False, kw_only=True)

    @property
    def mass(self) -> Tensor:
        """`(B, H)`: the mean of `kept` over the rows (0 for no rows)."""
        return self.kept.sum(-1) / max(1, self.kept.shape[-1])

    @property
    def density(self) -> Tensor:
        """`(B, H)` float64: allowed pairs as a share of the pairs that full attention looks at (0 for none)."""
        return self.links / self.base_links.clamp(min=1).double()

    def at(self, density: float) -> Tensor:
        """`(B, H)` float64: the mean share that the best pattern of this density would keep in each head.

        Not above the truth; below it by no more than the part of one histogram bin (see `best_slack`).
        """
        if not 0.0 <= density <= 1.0:
            raise ArgumentError(f"density = {density}: a share of all links lies between 0 and 1; pass e.g. 0.1.")
        return self._histogram.best((self.base_links * density).round().long())[0]

    def frontier(self) -> tuple[Tensor, Tensor]:
        """(density, share), both `(B, H, K)` float64: the most that each density can keep, from nothing to everything.

        >>> import torch, farlight as fl
        >>> q = k = torch.eye(4).view(1, 1, 4, 4) * 20
        >>> density, share = fl.retention(q, k, fl.window(0)).frontier()
        >>> bool((share.diff() >= 0).all()), round(share[0, 0, -1].item(), 4)
        (True, 1.0)
        """
        links, share = self._histogram.curve()
        return links / self.base_links.clamp(min=1).unsqueeze(-1).double(), share


def retention(
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    v: Tensor | None = None,
    *,
    base: Pattern | None = None,
    scale: float | None = None,
    q_offset: int | None = None,
    lost: int = 0,
) -> Retention:
    """The share of full attention probability that `pattern` keeps, per head and row, against the best it could keep.

    With p = softmax(scale · q·kᵀ) over the pairs of `base`, `kept[b, h, i]` is the sum of p over the keys that both
    `base` and `pattern` allow to row i. `best` is what the pairs of largest p, as many as the pattern has in that head,
    would keep. A row to which no key is allowed keeps 0.

    Args:
        q: `(B, H, n_q, D)`, any floating dtype; float64 gives float64 results, all others float32.
        k: `(B, H_kv, n_k, D)`, H a multiple of H_kv.
        pattern: the links to judge.
        v: `(B, H_kv, n_k, D_v)`; when given, the error of the output is measured too.
        base: what full attention looks at; None means every pair. For a causal language model pass `causal()`.
        scale: factor on the scores; None means D^-0.5.
        q_offset: position of the first query; None means n_k - n_q.
        lost: how many of the heaviest links outside the pattern to list, over all heads and rows.

    Raises:
        ArgumentError: shapes or dtypes that do not fit. PatternError: a pattern that does not fit the sizes.

    Time grows with n_q · n_k; memory with n_q + n_k.

    >>> import torch, farlight as fl
    >>> q = k = torch.zeros(1, 1, 8, 4)                  # nothing stands out: every key gets 1/8
    >>> found = fl.retention(q, k, fl.window(0))
    >>> found.mass.item(), found.best.item(), found.density.item()
    (0.125, 0.125, 0.125)
    """
    return retentions(q, k, [pattern], v, base=base, scale=scale, q_offset=q_offset, lost=lost)[0]


def retentions(
    q: Tensor,
    k: Tensor,
    patterns: Sequence[Pattern],
    v: Tensor | None = None,
    *,
    base: Pattern | None = None,
    scale: float | None = None,
    q_offset: int | None = None,
    lost: int = 0,
    by_head: bool = False,
) -> list[Retention]:
    """`retention` for several patterns in one pass over the full probabilities; `by_head` lists `lost` links of each head."""
    check_problem(q, k, v, scale)
    if isinstance(lost, bool) or not isinstance(lost, int) or lost < 0:
        raise ArgumentError(f"lost = {show(lost)}: the number of lost links to list is a whole number >= 0; the default is 0.")
    with torch.no_grad():
        return _measure(q, k, patterns, v, base, scale, q_offset, lost, by_head)


def _measure(
    q: Tensor,
    k: Tensor,
    patterns: Sequence[Pattern],
    v: Tensor | None,
    base: Pattern | None,
    scale: float | None,
    q_offset: int | None,
    lost: int,
    by_head: bool,
) -> list[Retention]:
    batch, heads, n_q, _ = q.shape
    sizes = sizes_of(q, k, q_offset)
    seen = [_Seen(pattern, q, v is not None, lost, by_head) for pattern in patterns]
    base_links = torch.zeros(batch, heads, dtype=torch.int64, device=q.device)
    builder = HistogramBuilder(batch, heads, q.device)
    full_norm = torch.zeros(batch, heads, dtype=torch.float64, device=q.device)

    for tile in tiles(q, k, base, scale, sizes):
        every = (tile.rows.stop - tile.rows.start) * k.shape[2]
        base_links[tile.items, tile.heads] += every if tile.allowed is None else tile.allowed.sum((-1, -2))
        builder.add(tile.full, tile.items, tile.heads)
        values = None if v is None else v[tile.items, tile.group].to(tile.full.dtype)
        out = None if values is None else mix(tile.full, values)
        if out is not None:
            full_norm[tile.items, tile.heads] += out.double().square().sum((-1, -2))
        for part in seen:
            few = None if v is not None or lost else tile.kept(part.pattern, base, sizes)
            if few is not None:
                part.kept[tile.items, tile.heads, tile.rows] = few[0]
                part.links[tile.items, tile.heads] += few[1]
            else:
                part.add(tile, tile.seen(part.pattern, sizes), values, out, sizes.q_offset)
    histogram = builder.finish(n_q, base_links)
    return [part.finish(base_links, histogram, full_norm) for part in seen]


class _Seen:
    """The sums of one pattern while the tiles pass by."""

    def __init__(self, pattern: Pattern, q: Tensor, with_output: bool, lost: int, by_head: bool) -> None:
        batch, heads, n_q, _ = q.shape
        wide = wide_type(q)
        self.pattern = pattern
        self.kept = torch.zeros(batch, heads, n_q, dtype=wide, device=q.device)
        self.links = torch.zeros(batch, heads, dtype=torch.int64, device=q.device)
        self.wrong = torch.zeros(batch, heads, dtype=torch.float64, device=q.device) if with_output else None
        self.lost = LostBuilder(lost, wide, q.device, heads if by_head else None) if lost else None

    def add(self, tile: Tile, mask: Tensor, values: Tensor | None, out: Tensor | None, q_offset: int) -> None:
        items, here = tile.items, tile.heads
        self.kept[items, here, tile.rows] = (tile.full * mask).sum(-1)
        self.links[items, here] += mask.sum((-1, -2))
        if self.wrong is not None and values is not None and out is not None:
            # A fresh softmax: dividing by `kept` would lose all digits where a row keeps next to nothing.
            sparse = mix(softmax(tile.scores.masked_fill(~mask, -torch.inf)), values)
            self.wrong[items, here] += (sparse - out).double().square().sum((-1, -2))
        if self.lost is not None:
            self.lost.add(tile, mask, q_offset)

    def finish(self, base_links: Tensor, histogram: Histogram, full_norm: Tensor) -> Retention:
        best, slack = histogram.best(self.links)
        error = None
        if self.wrong is not None:
            # Nothing wrong is no error, also where the full output is zero.
            error = torch.where(self.wrong == 0, 0.0, (self.wrong / full_norm).sqrt()).to(self.kept.dtype)
        lost = None if self.lost is None else self.lost.finish()
        return Retention(self.kept, self.links, base_links, best, slack, error, lost, _histogram=histogram)
