"""Bytes per rank of one attention over 8 … 1024 ranks, beside all-gather, ring and Ulysses: a table, and
docs/img/communication.svg.

python scripts/communication_by_ranks.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import farlight as fl
from farlight.distributed import Layout

N, HEADS, DIM, BYTES = 2**20, 12, 64, 2
PATTERN = fl.presets.longformer(512, range(64))
RANKS = [8, 16, 32, 64, 128, 256, 512, 1024]
IMAGE = Path(__file__).parents[1] / "docs" / "img" / "communication.svg"


def others(world: int) -> tuple[float, float, float]:
    """Bytes that a rank receives in a forward pass of all-gather, ring attention (keys and values of all others) and Ulysses
    (q, k, v and out change from tokens to heads; needs as many heads as ranks: NaN beyond).
    """
    token = HEADS * DIM * BYTES
    everything = 2 * N * token * (world - 1) / world
    ulysses = 4 * N // world * token * (world - 1) / world if world <= HEADS else np.nan
    return everything, everything, ulysses


def main() -> None:
    print("| ranks | farlight, a rank between | largest sent | largest received | owner of the global tokens, sent / received "
          "| all-gather, ring | Ulysses |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    series: dict[str, list[float]] = {"all-gather, ring": [], "Ulysses": [], "farlight, largest": [], "farlight, median": []}
    for world in RANKS:
        found = Layout.even(N, world).communication(PATTERN, heads=HEADS, head_dim=DIM)
        gathered, _, ulysses = others(world)
        median, sent, received = (float(x) for x in (np.median(found.received), found.sent.max(), found.received.max()))
        columns = (gathered, ulysses, max(sent, received), median)
        for name, value in zip(series, columns, strict=True):
            series[name].append(value)
        shown = f"{ulysses / 1e6:.0f} MB" if np.isfinite(ulysses) else "more ranks than heads"
        print(
            f"| {world} | {median / 1e6:.2f} MB | {sent / 1e6:.2f} MB | {received / 1e6:.2f} MB | {found.sent[0] / 1e6:.2f} / "
            f"{found.received[0] / 1e6:.2f} MB | {gathered / 1e6:,.0f} MB | {shown} |"
        )
    if "--plot" in sys.argv:
        draw(series)


def draw(series: dict[str, list[float]]) -> None:
    """Both axes logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
    for name, values in series.items():
        axes.loglog(RANKS, [value / 1e6 for value in values], marker="o", markersize=3, label=name)
    axes.set(xlabel="ranks", ylabel="MB a rank, one forward pass", xticks=RANKS, xticklabels=RANKS)
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(IMAGE, metadata={"Date": None})


if __name__ == "__main__":
    main()
