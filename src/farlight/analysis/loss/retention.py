"""Retention: the share of full attention probability that a pattern keeps, and the most that a pattern of its size could keep.

For every tile of full attention probabilities (`probabilities.tiles`): the probabilities on allowed pairs are summed per row,
all of them are added to a histogram per head, and the tile is dropped. The histogram gives `best`, the sum of the L largest
probabilities, L being the pattern's number of links. Memory is O(n_q + n_k); time is that of full attention, O(n_q · n_k). No
sparse attention kernel runs here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from farlight.analysis.loss.histogram import Histogram, HistogramBuilder
from farlight.analysis.loss.probabilities import (
    Tile,
    accumulation_dtype,
    check_problem,
    lowered_terms,
    sizes_of,
    softmax,
    tiles,
    weighted_values,
)
from farlight.analysis.loss.row_measures import RowMeasures, measure_rows
from farlight.analysis.loss.top_losses import LostLinkCollector, LostLinks
from farlight.errors import ArgumentError, show
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern, Sizes
from farlight.score.lowered import ScoreTerms
from farlight.score.terms import Score

__all__ = ["Retention", "retention", "retentions"]


@dataclass(frozen=True, repr=False)
class Retention:
    """Attention probability kept by a pattern. Returned by `farlight.retention`.

    Attributes:
        kept: `(B, H, n_q)`, each row's sum of full attention probability over allowed pairs, and of its sink, which every
            pattern keeps; float32, or float64 for float64 q.
        links: `(B, H)` int64, the number of allowed pairs.
        base_links: `(B, H)` int64, the number of pairs of full attention.
        best: `(B, H)` float64, a lower bound of the mean share kept by the best pattern with as many links in that head.
        best_slack: `(B, H)` float64; the true value lies in [best, best + best_slack].
        error: `(B, H)` relative L2 error of the head's output, ‖sparse - full‖ / ‖full‖; None without v.
        lost_output: `(B, H)` float64, ‖Σ_lost p·v‖ / ‖Σ p·v‖ over all rows: the part of the full output that came over links
            outside the pattern. Unlike a share of attention it does not count a key whose value is near zero. None without v.
        mass_without_sink: `(B, H)` float64, the share of probability kept among the keys from `sinks` on (1 where these have
            none): a first key, or a sink, that takes most of the attention says little about the others. `fl.retention` always
            measures it; elsewhere it may be None.
        lost: the heaviest links outside the pattern; None without `lost=`.
    """

    kept: Tensor
    links: Tensor
    base_links: Tensor
    best: Tensor
    best_slack: Tensor
    error: Tensor | None = None
    lost: LostLinks | None = None
    lost_output: Tensor | None = None
    mass_without_sink: Tensor | None = None
    _histogram: Histogram = field(repr=False, kw_only=True)

    def __repr__(self) -> str:
        """One line, means over texts and heads.

        >>> import torch, farlight as fl
        >>> fl.retention(*torch.zeros(2, 1, 3, 8, 4), fl.window(0))
        <Retention: 12.5% of all links keep 12.5% of full attention, at best 12.5%; 1 text, 3 heads, 8 rows>
        """
        texts, heads, rows = self.kept.shape
        shares = [float(share.double().mean()) if share.numel() else 0.0 for share in (self.density, self.mass, self.best)]
        return (
            f"<Retention: {shares[0]:.1%} of all links keep {shares[1]:.1%} of full attention, at best {shares[2]:.1%}; "
            f"{texts} text{'s' * (texts != 1)}, {heads} head{'s' * (heads != 1)}, {rows:,} rows>"
        )

    def _repr_html_(self) -> str:
        from farlight.analysis.notebook import retention_html

        return retention_html(self)

    @property
    def mass(self) -> Tensor:
        """`(B, H)`: the mean of `kept` over the rows (0 for no rows)."""
        return self.kept.sum(-1) / max(1, self.kept.shape[-1])

    @property
    def density(self) -> Tensor:
        """`(B, H)` float64: links / base_links (0 where full attention has no pairs)."""
        return self.links / self.base_links.clamp(min=1).double()

    def at(self, density: float) -> Tensor:
        """`(B, H)` float64: a lower bound of the mean share that the best pattern of this density keeps in each head.

        Raises ArgumentError unless 0 <= density <= 1.
        """
        if not 0.0 <= density <= 1.0:
            raise ArgumentError(f"density = {density}: a share of all links lies between 0 and 1; pass e.g. 0.1.")
        return self._histogram.best((self.base_links * density).round().long())[0]

    def frontier(self) -> tuple[Tensor, Tensor]:
        """(density, share), both `(B, H, K)` float64: the mean share that the best pattern of each density keeps.

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
    score: Score | None = None,
    sinks: int | Tensor = 1,
) -> Retention:
    """The share of full attention probability that `pattern` keeps, per head and row, against the best of its size.

    With p = softmax(S) over the pairs of `base`, S = softcap(scale · q·kᵀ) + biases, `kept[b, h, i]` is the sum of p over the
    keys that `base` and `pattern` both allow to row i, 0 for none. `best` is the mean share kept by the pairs of largest p, as
    many as the pattern has in that head. A sink is one more key, which `base` and every pattern allow.

    Args:
        q: `(B, H, n_q, D)`, any floating dtype; float64 gives float64 results, all others float32.
        k: `(B, H_kv, n_k, D)`, H a multiple of H_kv.
        pattern: the pattern to measure.
        v: `(B, H_kv, n_k, D_v)`; with it, the error of the output is measured too.
        base: the pairs of full attention; None means every pair. For a causal language model pass `causal()`.
        scale: factor on the scores; None means D^-0.5.
        q_offset: position of the first query; None means n_k - n_q.
        lost: number of the heaviest links outside the pattern to list, over all heads and rows.
        score: terms on the scores, as in `fl.attention`.
        sinks: a tensor `(H,)`: sinks, as in `fl.attention`. A number: that of first keys that `mass_without_sink` leaves out.

    Raises:
        ArgumentError: shapes, dtypes or terms that do not fit. PatternError: a pattern that does not fit the sizes.

    Time is O(n_q · n_k), memory O(n_q + n_k).

    >>> import torch, farlight as fl
    >>> q = k = torch.zeros(1, 1, 8, 4)                  # equal scores: every key has probability 1/8
    >>> result = fl.retention(q, k, fl.window(0))
    >>> result.mass.item(), result.best.item(), result.density.item()
    (0.125, 0.125, 0.125)
    """
    return retentions(q, k, [pattern], v, base=base, scale=scale, q_offset=q_offset, lost=lost, score=score, sinks=sinks)[0]


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
    score: Score | None = None,
    sinks: int | Tensor | None = 1,
    without_sink: bool = True,
) -> list[Retention]:
    """`retention` of several patterns in one pass over the full probabilities.

    `by_head`: list `lost` links of each head rather than of all heads together. `without_sink=False`: leave
    `mass_without_sink` out, which is then None.
    """
    check_problem(q, k, v, scale)
    if isinstance(lost, bool) or not isinstance(lost, int) or lost < 0:
        raise ArgumentError(f"lost = {show(lost)}: the number of lost links to list is a whole number >= 0; the default is 0.")
    logits = sinks if isinstance(sinks, Tensor) else None
    first_keys = whole("sinks", 1 if sinks is None or logits is not None else sinks, 0) if without_sink else None
    terms = lowered_terms(score, logits, q, k, q_offset)
    with torch.no_grad():
        return _measure(q, k, patterns, v, base, scale, q_offset, lost, by_head, first_keys, terms)


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
    first_keys: int | None,
    terms: ScoreTerms | None,
) -> list[Retention]:
    sizes = sizes_of(q, k, q_offset)
    full = _FullSums(q, first_keys)
    sums = [_PatternSums(pattern, q, v is not None, lost, by_head) for pattern in patterns]
    for tile in tiles(q, k, base, scale, sizes, terms):
        values = None if v is None else v[tile.items, tile.kv_heads, : tile.probability.shape[3]].to(tile.probability.dtype)
        out = None if values is None else weighted_values(tile.probability, values)
        full.add(tile, k.shape[2], out)
        masked = list[tuple[_PatternSums, Tensor]]()
        for pattern_sums in sums:
            # The output error and the lost links need the mask; the kept share alone may not.
            gathered = None if v is not None or lost else tile.gather_kept(pattern_sums.pattern, base, sizes)
            if gathered is not None:
                pattern_sums.add_gathered(tile, gathered, sizes, first_keys)
            else:
                masked.append((pattern_sums, tile.mask(pattern_sums.pattern, sizes)))
        measures = measure_rows(tile.probability, [mask for _, mask in masked], first_keys, with_lost=lost > 0)
        for (pattern_sums, mask), measured in zip(masked, measures, strict=True):
            pattern_sums.add(tile, mask, measured, sizes.q_offset)
            if values is not None and out is not None:
                pattern_sums.add_output(tile, mask, values, out)
    histogram = full.builder.finish(sizes.n_q, full.links, full.of_sinks)
    return [pattern_sums.finish(full, histogram) for pattern_sums in sums]


class _FullSums:
    """Running sums of full attention over tiles: links, histogram, squared output, shares of sinks and of later keys."""

    def __init__(self, q: Tensor, first_keys: int | None) -> None:
        batch, heads = q.shape[:2]
        self.first_keys = first_keys
        self.links = torch.zeros(batch, heads, dtype=torch.int64, device=q.device)
        self.squared_norm = torch.zeros(batch, heads, dtype=torch.float64, device=q.device)
        self.beyond = torch.zeros_like(self.squared_norm)  # probability of the keys beyond the first
        self.of_sinks = torch.zeros_like(self.squared_norm)
        self.builder = HistogramBuilder(batch, heads, q.device)

    def add(self, tile: Tile, n_k: int, out: Tensor | None) -> None:
        """Add a tile; `out`: its output, None where it is not measured."""
        items, heads = tile.items, tile.heads
        tile_pairs = (tile.rows.stop - tile.rows.start) * n_k
        self.links[items, heads] += tile_pairs if tile.allowed is None else tile.allowed.sum((-1, -2))
        self.builder.add(tile.probability, items, heads)
        if self.first_keys is not None:
            self.beyond[items, heads] += tile.probability[..., self.first_keys :].sum((-1, -2), dtype=torch.float64)
        if tile.sink is not None:
            self.of_sinks[items, heads] += tile.sink.sum(-1, dtype=torch.float64)
        if out is not None:
            self.squared_norm[items, heads] += out.double().square().sum((-1, -2))


class _PatternSums:
    """Running sums of one pattern over tiles: kept share, links, squared output error, heaviest lost links."""

    def __init__(self, pattern: Pattern, q: Tensor, with_output: bool, lost: int, by_head: bool) -> None:
        batch, heads, n_q, _ = q.shape
        dtype = accumulation_dtype(q)
        self.pattern = pattern
        self.kept = torch.zeros(batch, heads, n_q, dtype=dtype, device=q.device)
        self.links = torch.zeros(batch, heads, dtype=torch.int64, device=q.device)
        self.beyond = torch.zeros(batch, heads, dtype=torch.float64, device=q.device)  # kept, of the keys beyond the first
        self.squared_error = torch.zeros_like(self.beyond) if with_output else None
        self.squared_loss = torch.zeros_like(self.beyond) if with_output else None
        self.lost = LostLinkCollector(lost, dtype, q.device, heads if by_head else None) if lost else None

    def add(self, tile: Tile, mask: Tensor, measured: RowMeasures, q_offset: int) -> None:
        """Add the measures of a tile under `mask` (pattern & base)."""
        items, heads = tile.items, tile.heads
        self.kept[items, heads, tile.rows] = measured.kept if tile.sink is None else measured.kept + tile.sink
        self.links[items, heads] += measured.links.sum(-1)
        if measured.beyond is not None:
            self.beyond[items, heads] += measured.beyond.sum(-1)
        if self.lost is not None and measured.lost is not None:
            self.lost.add(tile, mask, measured.lost, q_offset)

    def add_output(self, tile: Tile, mask: Tensor, values: Tensor, out: Tensor) -> None:
        """Add the output error of a tile under `mask`: `values` of its keys, and the full attention output `out`."""
        assert self.squared_loss is not None
        assert self.squared_error is not None
        lost = out - weighted_values(tile.probability * mask, values)
        self.squared_loss[tile.items, tile.heads] += lost.double().square().sum((-1, -2))
        # softmax over the masked scores: rescaling `probability` by 1 / kept loses all digits where kept is near 0.
        sparse = weighted_values(softmax(tile.scores.masked_fill(~mask, -torch.inf), tile.sinks)[0], values)
        self.squared_error[tile.items, tile.heads] += (sparse - out).double().square().sum((-1, -2))

    def add_gathered(self, tile: Tile, gathered: tuple[Tensor, Tensor], sizes: Sizes, first_keys: int | None) -> None:
        """Add a tile whose kept shares and links were gathered (`Tile.gather_kept`)."""
        kept, links = gathered
        self.kept[tile.items, tile.heads, tile.rows] = kept if tile.sink is None else kept + tile.sink
        self.links[tile.items, tile.heads] += links
        if first_keys is not None:
            first = tile.first_keys_kept(self.pattern, sizes, first_keys)
            self.beyond[tile.items, tile.heads] += (kept - first).clamp(min=0).sum(-1, dtype=torch.float64)

    def finish(self, full: _FullSums, histogram: Histogram) -> Retention:
        best, slack = histogram.best(self.links)
        error = lost_output = others = None
        if self.squared_error is not None:
            # Equal outputs have error 0, also where the full output is zero (0 / 0).
            error = torch.where(self.squared_error == 0, 0.0, (self.squared_error / full.squared_norm).sqrt())
            error = error.to(self.kept.dtype)
        if self.squared_loss is not None:
            lost_output = torch.where(self.squared_loss == 0, 0.0, (self.squared_loss / full.squared_norm).sqrt())
        lost = None if self.lost is None else self.lost.finish()
        if full.first_keys is not None:
            others = torch.where(full.beyond > 0, self.beyond / full.beyond, 1.0)
        return Retention(self.kept, self.links, full.links, best, slack, error, lost, lost_output, others, _histogram=histogram)
