"""Full attention probabilities, tile by tile: the input of every measure of loss.

Retention, top losses and the profiles for fitting all need softmax(S) of S = softcap(scale · q·kᵀ) + biases, which costs
n_q · n_k products. `tiles` forms them once and yields `Tile`s of at most `_TILE_SCORES` elements; each consumer accumulates
what it needs and drops the tile, so memory is O(n_q + n_k). Under a causal base a tile ends at the last key that its rows may
see: half the products. Scores and probabilities are float32, or float64 for float64 inputs. A sink takes its share of every
row: the probabilities of a row's keys and that share sum to 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from farlight.analysis.loss.tile_masks import TileFrame, tile_mask
from farlight.errors import ArgumentError
from farlight.patterns.algebra import looks_back
from farlight.patterns.expression import Pattern, Sizes
from farlight.patterns.positional import causal
from farlight.ragged import expand_counts
from farlight.score.lowered import ScoreTerms, lower
from farlight.score.terms import Score

__all__ = [
    "Tile",
    "accumulation_dtype",
    "check_problem",
    "lowered_terms",
    "score_keys",
    "sizes_of",
    "softmax",
    "tiles",
    "weighted_values",
]

# Scores of one tile, in elements: 4 MiB in float32. About eight tensors of that size are alive at once.
_TILE_SCORES = 1 << 20
# Below one pair in this many, a pattern's pairs are gathered from the tile; above, the tile is masked.
_GATHER_RATIO = 8


@dataclass(frozen=True)
class Tile:
    """Query rows `rows` of batch items `items` and query heads `heads`, which share the key heads `kv_heads`.

    `scores` and `probability` are `(B', H', rows, keys)`: S with -inf where `base` does not allow, and its softmax; keys = n_k,
    or fewer where `base` allows no row of the tile a later key. `allowed` is the mask of `base`, `(B' or 1, H' or 1, rows,
    keys)` bool; None when `base` allows every pair. `sinks` `(H',)`: the sinks' scores, and `sink` `(B', H', rows)` their share
    of each row; None without. `shared`: masks that all tiles of these rows have in common (`TileFrame`).
    """

    rows: slice
    items: slice
    heads: slice
    kv_heads: slice
    scores: Tensor
    probability: Tensor
    allowed: Tensor | None
    sinks: Tensor | None = None
    sink: Tensor | None = None
    shared: dict[Pattern, Tensor] = field(default_factory=dict)

    def mask(self, pattern: Pattern, sizes: Sizes) -> Tensor:
        """The mask of `pattern` & `base` in this tile, `(B' or 1, H' or 1, rows, keys)` bool."""
        mask = tile_mask(pattern, self._frame(sizes, self.probability.shape[3], self.shared))
        return mask if self.allowed is None else mask & self.allowed

    def first_keys_kept(self, pattern: Pattern, sizes: Sizes, count: int) -> Tensor:
        """`(B', H', rows)`: probability kept on the first `count` keys."""
        probability = self.probability[..., :count]
        return (probability * tile_mask(pattern, self._frame(sizes, probability.shape[3], {}))).sum(-1)

    def _frame(self, sizes: Sizes, keys: int, shared: dict[Pattern, Tensor]) -> TileFrame:
        return TileFrame(self.rows, self.items, self.heads, keys, sizes, self.probability.device, shared)

    def gather_kept(self, pattern: Pattern, base: Pattern | None, sizes: Sizes) -> tuple[Tensor, Tensor] | None:
        """(kept probability per row `(B', H', rows)`, number of pairs `(1, 1)`) of `pattern` & `base`, without a dense mask.

        The pattern's spans are expanded to (row, key) pairs, whose probabilities are gathered and summed by row. None where
        that does not pay or cannot be done: more than one pair in `_GATHER_RATIO`, a pattern that differs between batch items
        or heads, or an atom without cheap spans.
        """
        both = pattern if base is None else base & pattern
        if both.varies_over_batch or both.varies_over_heads or not all(a._spans_are_cheap(sizes) for a in both.atoms()):
            return None
        both.check(sizes)
        device, n_k = self.probability.device, self.probability.shape[3]
        position = torch.arange(self.rows.start, self.rows.stop, device=device) + sizes.q_offset
        zeros = torch.zeros_like(position)
        span_row, lo, hi = both._spans(sizes, zeros, zeros, position).listed()
        num_pairs = int((hi - lo).sum())
        if num_pairs * _GATHER_RATIO > position.numel() * n_k:
            return None
        span, step = expand_counts(hi - lo, num_pairs)
        row, key = span_row[span], lo[span] + step
        gathered = self.probability.flatten(2)[..., row * n_k + key]
        kept = torch.zeros(self.probability.shape[:3], dtype=torch.float64, device=device).index_add_(2, row, gathered.double())
        return kept.to(self.probability.dtype), torch.full((1, 1), num_pairs, device=device)


def accumulation_dtype(q: Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def sizes_of(q: Tensor, k: Tensor, q_offset: int | None) -> Sizes:
    """`Sizes` of q `(B, H, n_q, D)` and k `(B, H_kv, n_k, D)`; empty batch and head dimensions count as 1."""
    return Sizes.of(q.shape[2], k.shape[2], batch=max(1, q.shape[0]), heads=max(1, q.shape[1]), q_offset=q_offset)


def lowered_terms(score: Score | None, sinks: Tensor | None, q: Tensor, k: Tensor, q_offset: int | None) -> ScoreTerms | None:
    """The terms of one attention problem; None without any. Raises ArgumentError for those that do not fit it."""
    with torch.no_grad():
        return lower(score, sinks, sizes_of(q, k, q_offset), q.device, q.dtype)


def tiles(
    q: Tensor, k: Tensor, base: Pattern | None, scale: float | None, sizes: Sizes, terms: ScoreTerms | None = None
) -> Iterator[Tile]:
    """Tiles that cover every row of every head exactly once. `base`: the pairs of full attention; None = all pairs."""
    is_causal = base is not None and looks_back(base)
    shared_rows, shared = slice(0, 0), dict[Pattern, Tensor]()
    for rows, items, kv_heads in _tile_slices(q, k):
        if rows != shared_rows:
            shared_rows, shared = rows, {}
        heads = slice(kv_heads.start * q.shape[1] // k.shape[1], kv_heads.stop * q.shape[1] // k.shape[1])
        num_keys = min(k.shape[2], max(0, rows.stop + sizes.q_offset)) if is_causal else k.shape[2]
        scores = _scores(q[items, heads, rows], k[items, kv_heads, :num_keys], scale, accumulation_dtype(q))
        sinks = None
        if terms is not None:
            keys = torch.arange(num_keys, device=q.device)
            scores = terms.under(scores, items, heads, rows, keys, sizes.q_offset)
            sinks = None if terms.sinks is None else terms.sinks[heads]
        allowed = None
        if base is not None:
            allowed = tile_mask(base, TileFrame(rows, items, heads, num_keys, sizes, q.device, shared))
            # causal(): every row of the tile may see the keys up to the first row.
            first = min(num_keys, max(0, rows.start + sizes.q_offset + 1)) if base == causal() else 0
            scores[..., first:].masked_fill_(~allowed[..., first:], -torch.inf)
        probability, sink = softmax(scores, sinks)
        yield Tile(rows, items, heads, kv_heads, scores, probability, allowed, sinks, sink, shared)


def score_keys(
    q: Tensor, k: Tensor, head: int, keys: Tensor, scale: float | None, q_offset: int, terms: ScoreTerms | None
) -> Tensor:
    """`(B, n_q, keys)` float64: S of one query head at the listed keys."""
    heads, kv_head = slice(head, head + 1), head * k.shape[1] // q.shape[1]
    scores = _scores(q[:, heads], k[:, kv_head : kv_head + 1, keys], scale, torch.float64)
    if terms is not None:
        scores = terms.under(scores, slice(None), heads, slice(0, q.shape[2]), keys, q_offset)
    return scores[:, 0]


def _tile_slices(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """(rows, batch items, key heads) of each tile.

    A tile holds all batch items and heads while at least 32 rows (or all rows) fit `_TILE_SCORES`: a pattern shared by the
    heads is then evaluated once per row. For longer texts a tile holds one batch item and one key head.
    """
    batch, heads, n_q, _ = q.shape
    kv_heads, n_k = k.shape[1], max(1, k.shape[2])
    all_heads = batch * heads * n_k * min(32, n_q) <= _TILE_SCORES
    scores_per_row = n_k * (batch * heads if all_heads else heads // max(1, kv_heads))
    step = max(1, _TILE_SCORES // max(1, scores_per_row))
    for start in range(0, n_q, step):
        rows = slice(start, min(n_q, start + step))
        if all_heads:
            if batch and heads:
                yield rows, slice(0, batch), slice(0, kv_heads)
            continue
        for item in range(batch):
            for kv_head in range(kv_heads):
                yield rows, slice(item, item + 1), slice(kv_head, kv_head + 1)


def _scores(q: Tensor, k: Tensor, scale: float | None, dtype: torch.dtype) -> Tensor:
    """`(B, H, rows, n_k)`: scale · q·kᵀ. Query heads of one key head are stacked along rows, so k is never repeated."""
    batch, heads, rows, dim = q.shape
    factor = dim**-0.5 if scale is None else scale
    stacked = (q.to(dtype) * factor).reshape(batch, k.shape[1], heads // k.shape[1] * rows, dim)
    return (stacked @ k.to(dtype).transpose(-1, -2)).view(batch, heads, rows, -1)


def softmax(scores: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(softmax over the last dimension, the share of the sinks `(H,)`, None without) of scores `(B, H, rows, keys)`.

    A row without finite scores gives zeros, and its sink 1.
    """
    top = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    if sinks is None:
        weight, is_empty = torch.softmax(scores, -1), top == -torch.inf
        return weight.masked_fill_(is_empty, 0.0) if bool(is_empty.any()) else weight, None
    of_rows = sinks.view(-1, 1, 1)
    top = torch.maximum(top.clamp(min=torch.finfo(scores.dtype).min), of_rows)
    weight, of_sink = torch.exp(scores - top), torch.exp(of_rows - top)
    total = weight.sum(-1, keepdim=True) + of_sink
    return weight / total, (of_sink / total).squeeze(-1)


def weighted_values(probability: Tensor, values: Tensor) -> Tensor:
    """probability `(B, H, rows, n_k)` · v `(B, H_kv, n_k, D_v)`: `(B, H, rows, D_v)`; v is never repeated."""
    batch, heads, rows, keys = probability.shape
    stacked = probability.reshape(batch, values.shape[1], heads // values.shape[1] * rows, keys)
    return (stacked @ values).view(batch, heads, rows, -1)


def check_problem(q: Tensor, k: Tensor, v: Tensor | None, scale: float | None) -> None:
    """Raise ArgumentError unless q, k and v (shapes, dtypes, devices) and `scale` form one attention problem."""
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
