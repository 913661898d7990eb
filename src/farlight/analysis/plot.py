"""Plots of patterns, distances, reach, paths, heads and frontiers; matplotlib is imported by the first one drawn.

A plot of a long text is exact: each pixel is the share of its pairs that are allowed, counted from the runs of keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from farlight.analysis.graph.links import Array, Links, RunTable
from farlight.errors import ArgumentError, UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from farlight.analysis.fit.fit import Fit
    from farlight.analysis.graph.paths import Path
    from farlight.analysis.graph.reachability import Reach
    from farlight.analysis.graph.small_world import SmallWorld
    from farlight.analysis.loss.retention import Retention
    from farlight.patterns.expression import Pattern

__all__ = ["densities", "plot_frontier", "plot_heads", "plot_hops", "plot_path", "plot_pattern", "plot_reach"]

_INK = "#1f4e79"
_ACCENT = "#c8501e"


def densities(pattern: Pattern, n: int, *, batch: int = 0, head: int = 0, pixels: int = 512) -> Array:
    """`(p, p)` float64 with p = min(n, pixels): the share of allowed pairs in each pixel of the n x n square.

    Pixel r covers the positions ⌊r n / p⌋ … ⌊(r + 1) n / p⌋ - 1, queries down and keys across. Time is linear in the
    pattern's runs, plus p · n under a permutation of the keys (strides, clusters); never n². Raises ArgumentError for
    `pixels` < 1.

    >>> import farlight as fl
    >>> densities(fl.causal(), 8, pixels=2).tolist()
    [[0.625, 0.0], [1.0, 0.625]]
    """
    if pixels < 1:
        raise ArgumentError(f"pixels = {pixels}: a picture needs at least one; the default is 512.")
    links = Links.of(pattern, n, batch, head)
    size = min(links.n, pixels)
    edge = np.arange(size + 1) * links.n // size
    pixel = np.repeat(np.arange(size), np.diff(edge))
    counts = np.zeros((size, size))
    for order in links.orders:
        counts += _natural_counts(order, edge, pixel) if order.slots is None else _permuted_counts(order, edge, pixel)
    share: Array = counts / np.outer(np.diff(edge), np.diff(edge))
    return share


def _natural_counts(order: RunTable, edge: Array, pixel: Array) -> Array:
    """`(p, p)` pairs by pixel, keys in natural order.

    A run [lo, hi) has (x - lo)⁺ - (x - hi)⁺ keys before x. Summed over the runs of a pixel row, that needs only the number
    and the sum of the end points up to each pixel edge x: two histograms and a cumulative sum.
    """
    size = edge.size - 1
    pixel_row = pixel[order.row]
    before = np.zeros((size, size + 1))
    for end, sign in ((order.lo, 1), (order.hi, -1)):
        # An end point counts at every edge that is not before it.
        pixel_column = np.append(pixel, size - 1)[end] + 1
        cell = pixel_row * (size + 1) + pixel_column
        number = np.bincount(cell, minlength=before.size).reshape(before.shape).cumsum(1)
        total = np.bincount(cell, weights=end.astype(np.float64), minlength=before.size).reshape(before.shape).cumsum(1)
        before += sign * (number * edge - total)
    return np.diff(before, axis=1)


def _permuted_counts(order: RunTable, edge: Array, pixel: Array) -> Array:
    """`(p, p)` pairs by pixel under a permutation of the keys: per pixel row, the number of rows that see each slot."""
    size = edge.size - 1
    out = np.zeros((size, size))
    pixel_column = pixel[order.slots]
    for r in range(size):
        first, last = order.first[edge[r]], order.first[edge[r + 1]]
        step = np.bincount(order.lo[first:last], minlength=order.size + 1)
        step = step - np.bincount(order.hi[first:last], minlength=order.size + 1)
        out[r] = np.bincount(pixel_column, weights=np.cumsum(step)[: order.size], minlength=size)
    return out


def plot_pattern(pattern: Pattern, n: int, *, batch: int = 0, head: int = 0, ax: Axes | None = None, pixels: int = 512) -> Axes:
    """Draw the pattern over n tokens: query down, key across, dark where many pairs are allowed.

    Up to `pixels` tokens each pair is one cell. Beyond, a pixel covers many pairs and its darkness is the fourth root of
    their share, which keeps a single global token or random key visible beside a full window.
    """
    share = densities(pattern, n, batch=batch, head=head, pixels=pixels)
    ax = _axes(ax, (5.2, 5.0))
    ax.imshow(
        share if n <= pixels else share**0.25,
        cmap="Blues",
        vmin=0,
        vmax=1,
        extent=(-0.5, n - 0.5, n - 0.5, -0.5),
        interpolation="nearest",
    )
    ax.set_title(_shorten(pattern, 64), fontsize=9)
    ax.set_xlabel(f"key ({n:,} tokens, {share.mean():.3g} of all pairs)" if n > 1 else "key")
    ax.set_ylabel("query")
    return ax


def plot_hops(world: SmallWorld, *, ax: Axes | None = None) -> Axes:
    """Draw the share of all ordered pairs within h hops against h; vertical lines: mean of a random graph and of a lattice."""
    ax = _axes(ax, (5.6, 3.6))
    within = np.concatenate(([0.0], np.cumsum(world.histogram))) * (1 - world.unreachable)
    hops = np.arange(within.size)
    marker = "o" if within.size <= 40 else None
    ax.plot(hops, within, color=_INK, marker=marker, drawstyle="default", label="pairs within h hops")
    for mean, name, style in ((world.random_hops, "random graph", ":"), (world.lattice_hops, "ring lattice", "--")):
        if np.isfinite(mean):
            ax.axvline(mean, color=_ACCENT, linestyle=style, linewidth=1, label=f"{name}, mean {mean:,.1f}")
    max_hops = max(within.size - 1, 2)
    if max(max_hops, world.lattice_hops if np.isfinite(world.lattice_hops) else 0) > 50:
        ax.set_xscale("symlog", linthresh=1)
    ax.set_xlim(left=0)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("hops (layers)")
    ax.set_ylabel("share of ordered pairs")
    ax.set_title(f"{_shorten(world.pattern)} over {world.n:,} tokens", fontsize=9)
    ax.legend(fontsize=8, frameon=False)
    return ax


def plot_reach(reach: Reach, *, ax: Axes | None = None) -> Axes:
    """Draw the share of the text reached after each layer: mean, worst token, and the band of all tokens searched."""
    from matplotlib.ticker import MaxNLocator

    ax = _axes(ax, (5.6, 3.6))
    layers = np.arange(reach.layers + 1)
    ax.fill_between(layers, reach.share.min(1), reach.share.max(1), color=_INK, alpha=0.15, linewidth=0, label="all tokens")
    ax.plot(layers, reach.mean, color=_INK, marker="o" if reach.layers <= 40 else None, label="mean")
    ax.plot(layers, reach.worst, color=_ACCENT, linestyle="--", label="worst token")
    if reach.layers:
        ax.set_xlim(0, reach.layers)
    ax.set_ylim(0, 1.02)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer")
    ax.set_ylabel("share of the text heard of")
    ax.set_title(f"{_shorten(reach.pattern)} over {reach.n:,} tokens", fontsize=9)
    ax.legend(fontsize=8, frameon=False)
    return ax


def plot_path(path: Path, *, ax: Axes | None = None) -> Axes:
    """Draw the hops as arcs over the text; up to eight are labelled with their rule."""
    from matplotlib.patches import Arc

    ax = _axes(ax, (7.0, 2.8))
    ax.axhline(0, color="#888888", linewidth=1)
    height = 0.0
    for hop in path.hops:
        left, right = sorted((hop.speaker, hop.listener))
        arc_height = 0.25 + 0.75 * (right - left) / path.n
        height = max(height, arc_height)
        centre, width = (left + right) / 2, right - left
        ax.add_patch(Arc((centre, 0), width, 2 * arc_height, theta1=0, theta2=180, color=_ACCENT, linewidth=1.5))
        if len(path.hops) <= 8:
            ax.text(centre, arc_height + 0.02, hop.rules[0], ha="center", va="bottom", fontsize=8)
    labelled: list[int] = []
    # The ends come first; a relay whose label would overlap another one gets none.
    for position in sorted(path.positions or (path.source, path.target), key=lambda p: p not in (path.source, path.target)):
        end = position in (path.source, path.target)
        ax.plot(position, 0, "o", color=_INK if end else _ACCENT, markersize=6 if end else 4, zorder=3 if end else 2)
        overlaps = any(abs(position - other) < 0.05 * path.n for other in labelled)
        if (end or len(path.hops) <= 8) and not overlaps:
            labelled.append(position)
            ax.text(position, -0.06, f"{position:,}", ha="center", va="top", fontsize=8)
    ax.set_xlim(-0.03 * path.n, 1.03 * path.n)
    ax.set_ylim(-0.25, max(height, 0.3) + 0.2)
    ax.set_yticks([])
    for side in ("left", "right", "top", "bottom"):
        ax.spines[side].set_visible(False)
    layers = f"{path.layers} layers" if path.layers != 1 else "1 layer"
    ax.set_title(
        f"{path.target:,} hears of {path.source:,} after {layers}"
        if path
        else f"{path.target:,} never hears of {path.source:,}",
        fontsize=9,
    )
    ax.set_xlabel("position in the text")
    return ax


def plot_heads(values: Tensor, *, label: str = "mass", ax: Axes | None = None, percent: bool = True) -> Axes:
    """Draw a `(layers, heads)` tensor, such as the attention mass that each head keeps, as a heat map."""
    if values.dim() != 2 or not values.numel():
        raise ArgumentError(f"values have shape {tuple(values.shape)}; (layers, heads) are needed.")
    layers, heads = values.shape
    ax = _axes(ax, (1.2 + 0.42 * heads, 1.2 + 0.42 * layers))
    table = values.double().numpy()
    max_value = 1.0 if label == "mass" else max(float(table.max()), 1e-9)
    ax.imshow(table, cmap="Blues", vmin=0, vmax=max_value, aspect="auto")
    if heads <= 16 and layers <= 16:
        for layer in range(layers):
            for head in range(heads):
                value = table[layer, head]
                text = f"{100 * value:.0f}" if percent else f"{value:.2g}"
                color = "white" if value > 0.6 * max_value else "black"
                ax.text(head, layer, text, ha="center", va="center", fontsize=7, color=color)
    ax.set_xticks(range(heads))
    ax.set_yticks(range(layers))
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
    ax.set_title(label + (", %" if percent else ""), fontsize=9)
    return ax


def plot_frontier(retention: Retention, fitted: Fit | None = None, *, ax: Axes | None = None) -> Axes:
    """Draw attention mass against density: the frontier of each head and their mean, the measured pattern, and a fit.

    Frontiers are of the first batch item; a cross is the pattern in one head, a circle the fit in one head.
    """
    ax = _axes(ax, (5.6, 4.0))
    density, share = (x[0].double().numpy() for x in retention.frontier())
    grid = np.linspace(0, 1, 201)
    curves = np.stack([np.interp(grid, d, s) for d, s in zip(density, share, strict=True)])
    for curve in curves:
        ax.plot(grid, curve, color=_INK, alpha=0.25, linewidth=0.8)
    ax.plot(grid, curves.mean(0), color=_INK, label="best links, mean over heads")
    ax.plot(retention.density[0].numpy(), retention.mass[0].double().numpy(), "x", color=_ACCENT, label="the pattern, by head")
    if fitted is not None:
        fit_density = (fitted.links / fitted.base_links.clamp(min=1)).numpy()
        ax.plot(fit_density, fitted.kept.numpy(), "o", color=_ACCENT, fillstyle="none", label="the fit, by head")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("density")
    ax.set_ylabel("share of full attention kept")
    ax.legend(fontsize=8, frameon=False, loc="lower right")
    return ax


def _shorten(pattern: Pattern, limit: int = 56) -> str:
    """The pattern's expression, cut to fit a title."""
    text = str(pattern)
    return text if len(text) <= limit else text[: limit - 3] + "…"


def _axes(ax: Axes | None, size: tuple[float, float]) -> Any:
    """`ax`, or the axes of a new figure of this size in inches. UnsupportedError without matplotlib."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UnsupportedError(f"a picture needs matplotlib ({error}); pip install 'farlight[plot]'.") from error
    return plt.subplots(figsize=size, layout="constrained")[1]
