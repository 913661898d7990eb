"""What was lost by not looking: the share of full attention that a pattern keeps, and the most that it could have kept.

A sparse pattern is a bet that the links it drops carry little. This module settles the bet on real queries and keys: it
forms the full attention probabilities tile by tile, adds up those on allowed pairs, and sorts all of them into a
histogram from which the best pattern of the same size follows. Memory is linear in the number of tokens; time is not,
since the full probabilities are what is being judged.

Nothing here runs sparse attention; this is the measure that sparse attention is held against.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from farlight.errors import ArgumentError
from farlight.patterns.base import Pattern, Sizes
from farlight.understanding.histogram import Histogram, HistogramBuilder

__all__ = ["Retention", "retention", "retentions"]

# Scores of one tile, in elements: 8 MiB in float32. Some eight tensors of that size live at once.
_TILE = 1 << 21


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
    """

    kept: Tensor
    links: Tensor
    base_links: Tensor
    best: Tensor
    best_slack: Tensor
    error: Tensor | None = None
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

    Raises:
        ArgumentError: shapes or dtypes that do not fit. PatternError: a pattern that does not fit the sizes.

    Time grows with n_q · n_k; memory with n_q + n_k.

    >>> import torch, farlight as fl
    >>> q = k = torch.zeros(1, 1, 8, 4)                  # nothing stands out: every key gets 1/8
    >>> found = fl.retention(q, k, fl.window(0))
    >>> found.mass.item(), found.best.item(), found.density.item()
    (0.125, 0.125, 0.125)
    """
    return retentions(q, k, [pattern], v, base=base, scale=scale, q_offset=q_offset)[0]


def retentions(
    q: Tensor,
    k: Tensor,
    patterns: Sequence[Pattern],
    v: Tensor | None = None,
    *,
    base: Pattern | None = None,
    scale: float | None = None,
    q_offset: int | None = None,
) -> list[Retention]:
    """`retention` for several patterns in one pass over the full probabilities."""
    _check(q, k, v, scale)
    with torch.no_grad():
        return _measure(q, k, patterns, v, base, scale, q_offset)


def _measure(
    q: Tensor,
    k: Tensor,
    patterns: Sequence[Pattern],
    v: Tensor | None,
    base: Pattern | None,
    scale: float | None,
    q_offset: int | None,
) -> list[Retention]:
    batch, heads, n_q, dim = q.shape
    n_k = k.shape[2]
    sizes = Sizes.of(n_q, n_k, batch=max(1, batch), heads=max(1, heads), q_offset=q_offset)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    factor = dim**-0.5 if scale is None else scale
    seen = [_Seen(pattern, q, wide, v is not None) for pattern in patterns]
    base_links = torch.zeros(batch, heads, dtype=torch.int64, device=q.device)
    builder = HistogramBuilder(batch, heads, q.device)
    full_norm = torch.zeros(batch, heads, dtype=torch.float64, device=q.device)

    for rows, items, group in _tiles(q, k):
        # (B', H', rows): the slices of this tile. Patterns and base answer for all heads; `_part` cuts out those here.
        here = slice(group.start * heads // k.shape[1], group.stop * heads // k.shape[1])
        scores = _scores(q[items, here, rows], k[items, group], factor, wide)
        if base is not None:
            allowed = _part(base.dense_rows(rows.start, rows.stop, sizes, device=q.device), items, here)
            scores = scores.masked_fill_(~allowed, -torch.inf)
            base_links[items, here] += allowed.sum((-1, -2))
        else:
            allowed = None
            base_links[items, here] += (rows.stop - rows.start) * n_k
        full = _softmax(scores)
        builder.add(full, items, here)
        values = None if v is None else v[items, group].to(wide)
        out = None if values is None else _mix(full, values)
        if out is not None:
            full_norm[items, here] += out.double().square().sum((-1, -2))
        for part in seen:
            mask = _part(part.pattern.dense_rows(rows.start, rows.stop, sizes, device=q.device), items, here)
            mask = mask if allowed is None else mask & allowed
            part.add(full, scores, mask, values, out, rows, items, here)
    histogram = builder.finish(n_q, base_links)
    return [part.finish(base_links, histogram, full_norm) for part in seen]


class _Seen:
    """The sums of one pattern while the tiles pass by."""

    def __init__(self, pattern: Pattern, q: Tensor, wide: torch.dtype, with_output: bool) -> None:
        batch, heads, n_q, _ = q.shape
        self.pattern = pattern
        self.kept = torch.zeros(batch, heads, n_q, dtype=wide, device=q.device)
        self.links = torch.zeros(batch, heads, dtype=torch.int64, device=q.device)
        self.wrong = torch.zeros(batch, heads, dtype=torch.float64, device=q.device) if with_output else None

    def add(
        self,
        full: Tensor,
        scores: Tensor,
        mask: Tensor,
        values: Tensor | None,
        out: Tensor | None,
        rows: slice,
        items: slice,
        here: slice,
    ) -> None:
        self.kept[items, here, rows] = (full * mask).sum(-1)
        self.links[items, here] += mask.sum((-1, -2))
        if self.wrong is not None and values is not None and out is not None:
            # A fresh softmax: dividing by `kept` would lose all digits where a row keeps next to nothing.
            sparse = _mix(_softmax(scores.masked_fill(~mask, -torch.inf)), values)
            self.wrong[items, here] += (sparse - out).double().square().sum((-1, -2))

    def finish(self, base_links: Tensor, histogram: Histogram, full_norm: Tensor) -> Retention:
        best, slack = histogram.best(self.links)
        error = None
        if self.wrong is not None:
            # Nothing wrong is no error, also where the full output is zero.
            error = torch.where(self.wrong == 0, 0.0, (self.wrong / full_norm).sqrt()).to(self.kept.dtype)
        return Retention(self.kept, self.links, base_links, best, slack, error, _histogram=histogram)


def _tiles(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """(rows, batch items, key heads) such that a tile's scores stay within the budget.

    All heads go together while at least 32 rows fit, since a pattern shared by the heads is then evaluated once; a long
    text is taken one key head at a time.
    """
    batch, heads, n_q, _ = q.shape
    kv_heads, n_k = k.shape[1], max(1, k.shape[2])
    together = batch * heads * n_k * min(32, n_q) <= _TILE
    per_row = n_k * (batch * heads if together else heads // max(1, kv_heads))
    step = max(1, _TILE // max(1, per_row))
    for start in range(0, n_q, step):
        rows = slice(start, min(n_q, start + step))
        if together:
            if batch and heads:
                yield rows, slice(0, batch), slice(0, kv_heads)
            continue
        for item in range(batch):
            for group in range(kv_heads):
                yield rows, slice(item, item + 1), slice(group, group + 1)


def _part(mask: Tensor, items: slice, heads: slice) -> Tensor:
    """The part of a `(B or 1, H or 1, rows, n_k)` mask that belongs to these batch items and heads; 1 stays 1."""
    mask = mask[items] if mask.shape[0] > 1 else mask
    return mask[:, heads] if mask.shape[1] > 1 else mask


def _scores(q: Tensor, k: Tensor, factor: float, wide: torch.dtype) -> Tensor:
    """`(B, H, rows, n_k)`: factor · q·kᵀ; query heads that share a key head are stacked: k is never repeated."""
    batch, heads, rows, dim = q.shape
    stacked = (q.to(wide) * factor).reshape(batch, k.shape[1], heads // k.shape[1] * rows, dim)
    return (stacked @ k.to(wide).transpose(-1, -2)).view(batch, heads, rows, -1)


def _softmax(scores: Tensor) -> Tensor:
    """softmax over keys, in which a row that sees nothing is all zeros."""
    top = (
        scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
        if scores.shape[-1]
        else scores.sum(-1, keepdim=True)
    )
    weight = torch.exp(scores - top)
    return weight.div_(weight.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny))


def _mix(probability: Tensor, values: Tensor) -> Tensor:
    """probability · v with shared value heads, `(B, H, rows, D_v)`."""
    batch, heads, rows, keys = probability.shape
    stacked = probability.reshape(batch, values.shape[1], heads // values.shape[1] * rows, keys)
    return (stacked @ values).view(batch, heads, rows, -1)


def _check(q: Tensor, k: Tensor, v: Tensor | None, scale: float | None) -> None:
    """Raise ArgumentError when these tensors cannot be one attention problem."""
    tensors = [("q", q), ("k", k)] + ([] if v is None else [("v", v)])
    for name, tensor in tensors:
        if tensor.dim() != 4:
            raise ArgumentError(
                f"{name} has shape {tuple(tensor.shape)}: four dimensions (batch, heads, tokens, head_dim) are "
                f"needed; add the missing ones with {name}.unsqueeze(0)."
            )
        if not tensor.dtype.is_floating_point:
            raise ArgumentError(f"{name} has dtype {tensor.dtype}: a floating dtype is needed; pass {name}.float().")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ArgumentError(
                f"{name} is {tensor.dtype} on {tensor.device}, but q is {q.dtype} on {q.device}; pass {name}.to(q) so "
                "that they agree."
            )
        if tensor.shape[0] != q.shape[0]:
            raise ArgumentError(f"{name} has batch {tensor.shape[0]}, but q has {q.shape[0]}; they must agree.")
    if k.shape[3] != q.shape[3]:
        raise ArgumentError(f"k has head_dim {k.shape[3]}, but q has {q.shape[3]}; they must agree.")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ArgumentError(f"q has {q.shape[1]} heads and k has {k.shape[1]}; q's must be a multiple of k's.")
    if v is not None and v.shape[1:3] != k.shape[1:3]:
        raise ArgumentError(f"v has (heads, tokens) = {tuple(v.shape[1:3])}, but k has {tuple(k.shape[1:3])}; they must agree.")
    if scale is not None and scale != scale:
        raise ArgumentError("scale = nan: the factor on the scores must be a number; pass None for head_dim ** -0.5.")
