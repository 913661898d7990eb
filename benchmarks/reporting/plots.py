"""Small pictures of the tables, as SVG that stays the same where the figures do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reporting.wording import DTYPES, distinct, measured, rows_of

__all__ = ["draw_all"]

# Okabe & Ito's colours, told apart by everyone.
_OURS, _OTHER, _THIRD = "#0072B2", "#D55E00", "#999999"


def draw_all(results: dict[str, Any], folder: Path) -> dict[str, Path]:
    """The plots for which there are figures, by section."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "farlight", "svg.fonttype": "none", "font.size": 8, "axes.grid": True})
    matplotlib.rcParams.update({"grid.alpha": 0.3, "axes.axisbelow": True})
    from matplotlib import pyplot

    plots: dict[str, Callable[[Any, dict[str, Any]], Any]] = {"headline": _headline, "length": _length, "patterns": _patterns}
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for name, draw in plots.items():
        figure = draw(pyplot, results)
        if figure is None:
            continue
        path = folder / f"bench-{name}.svg"
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        pyplot.close(figure)
        made[name] = path
    return made


def _headline(pyplot: Any, results: dict[str, Any]) -> Any:
    rows = measured(rows_of(results, "headline"))
    kinds = distinct(rows, "dtype", "pass")
    if not kinds:
        return None
    lines = (len(kinds) + 1) // 2
    figure, axes = pyplot.subplots(lines, 2, figsize=(7.0, 1.8 * lines), squeeze=False)
    for axis in axes.flat[len(kinds) :]:
        axis.axis("off")
    for axis, (dtype, passes) in zip(axes.flat, kinds, strict=False):
        group = [row for row in measured(rows, dtype=dtype, **{"pass": passes}) if "useful_gflops" in row]
        names = [row["contender"].replace(", compiled", "") for row in group]
        colours = [_OURS if name.startswith("farlight") else _OTHER for name in names]
        axis.barh(names[::-1], [row["useful_gflops"] for row in group][::-1], color=colours[::-1])
        for row in measured(rows, dtype=dtype, contender="matmul", **{"pass": passes}):
            axis.axvline(row["gflops"], color=_THIRD, linestyle="--", label="matmul")
            axis.legend(fontsize=6)
        axis.set_title(f"{DTYPES.get(dtype, dtype)} {passes}")
        axis.set_xlabel("useful GFLOP/s")
    return figure


def _length(pyplot: Any, results: dict[str, Any]) -> Any:
    rows = measured(rows_of(results, "length"))
    kinds = distinct(rows, "dtype", "pass")
    if not kinds:
        return None
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(2.6 * len(kinds), 2.4), squeeze=False, sharey=True)
    for axis, (dtype, passes) in zip(axes[0], kinds, strict=True):
        group = measured(rows, dtype=dtype, **{"pass": passes})
        axis.loglog(
            [row["tokens"] for row in group], [row["seconds"] for row in group], "o-", ms=3, color=_OURS, label="farlight"
        )
        full = [row for row in group if "dense_seconds" in row]
        real = [row for row in full if not row["dense_predicted"]]
        ahead = real[-1:] + [row for row in full if row["dense_predicted"]]
        axis.loglog(
            [r["tokens"] for r in real], [r["dense_seconds"] for r in real], "s-", ms=3, color=_OTHER, label="dense SDPA"
        )
        axis.loglog(
            [r["tokens"] for r in ahead], [r["dense_seconds"] for r in ahead], ":", color=_OTHER, label="predicted by n²"
        )
        axis.set_title(f"{DTYPES.get(dtype, dtype)} {passes}")
        axis.set_xlabel("tokens")
        axis.minorticks_off()
    axes[0][0].set_ylabel("seconds")
    axes[0][0].legend(fontsize=6)
    return figure


def _patterns(pyplot: Any, results: dict[str, Any]) -> Any:
    rows = [row for row in measured(rows_of(results, "patterns"), **{"pass": "forward"}) if "rate_of_window" in row]
    names = [name for (name,) in distinct(rows, "pattern")][::-1]
    dtypes = [dtype for (dtype,) in distinct(rows, "dtype")]
    if not names:
        return None
    figure, axis = pyplot.subplots(figsize=(6.0, 0.6 + 0.22 * len(names)))
    height = 0.8 / len(dtypes)
    for at, dtype in enumerate(dtypes):
        found = {row["pattern"]: row["rate_of_window"] for row in measured(rows, dtype=dtype)}
        places = [place + (at - (len(dtypes) - 1) / 2) * height for place in range(len(names))]
        axis.barh(
            places,
            [found.get(name, 0.0) for name in names],
            height,
            color=(_OURS, _OTHER, _THIRD)[at % 3],
            label=DTYPES.get(dtype, dtype),
        )
    axis.set_yticks(range(len(names)), names)
    axis.axvline(1.0, color=_THIRD, linestyle="--")
    axis.set_xlabel("useful rate ÷ the plain window's, forward")
    axis.legend(fontsize=6)
    return figure
