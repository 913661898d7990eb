"""`farlight map`: small-world metrics, reach, relay loads and a path of a pattern, as text, JSON, PNG or HTML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from farlight.cli.numbers import count
from farlight.cli.screen import screen_width, show
from farlight.errors import ArgumentError

__all__ = ["EXAMPLES", "map_command"]

EXAMPLES = (
    "farlight map 'window(256) | global_tokens([0])' --tokens 100k",
    "farlight map 'bigbird(64, 3)' --tokens 4096 --from 5 --to -1",
    "farlight map 'window(256) | global_tokens([0])' --tokens 1M --html map.html",
)


def map_command(
    pattern: Annotated[str, typer.Argument(help='A pattern, e.g. "window(256) | global_tokens([0])".')],
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", parser=count, metavar="N", help="Length of the text in tokens: 4096, 10k, 1M.")
    ],
    layers: Annotated[int, typer.Option("--layers", help="Depth of the reach table.")] = 4,
    source: Annotated[int | None, typer.Option("--from", help="Show how news of this position …")] = None,
    target: Annotated[int | None, typer.Option("--to", help="… reaches this one. Negative: from the end.")] = None,
    head: Annotated[int, typer.Option("--head", help="Which head, for patterns that differ between heads.")] = 0,
    png: Annotated[Path | None, typer.Option("--png", help="Write a plot of the pattern, hops, reach and path.")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write a report to look into, as one HTML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Print hops, clustering, reach by layer and the load of relays of a sparse pattern."""
    from farlight.analysis import graph
    from farlight.cli.outputs import check_place
    from farlight.patterns import parse

    if (source is None) != (target is None):
        raise ArgumentError("--from and --to belong together: give both positions, or neither.")
    for name, file in (("--png", png), ("--html", page)):
        if file is not None:
            check_place(name, file)
    parsed = parse(pattern)
    # The path is quick and checks the positions, so it precedes the slow metrics.
    chain = None if source is None or target is None else graph.path(parsed, tokens, source, target, head=head)
    world = graph.smallworld(parsed, tokens, head=head)
    reach = graph.reach(parsed, tokens, layers, head=head)
    if png is not None:
        _draw(png, world, reach, chain)
    if page is not None:
        from farlight import report

        report.write(report.render(report.map_data(parsed, tokens, world, reach, head=head, chain=chain)), page)
    if as_json:
        out: dict[str, Any] = {"smallworld": world.to_dict(), "reach": reach.to_dict()}
        if chain is not None:
            out["path"] = chain.to_dict()
        print(json.dumps(out, indent=2, allow_nan=False))
        return
    width = screen_width()
    show(str(world), width)
    print()
    show(str(reach).partition("\n")[2], width)  # its first line repeats the pattern
    if chain is not None:
        show(f"\n{chain}", width)
    if png is not None:
        print(f"\npicture: {png}")
    if page is not None:
        print(f"\nreport: {page}")


def _draw(png: Path, world: Any, reach: Any, chain: Any) -> None:
    """Write the plots of a pattern as one PNG (or another format that matplotlib knows by suffix)."""
    from farlight.analysis import plot
    from farlight.cli.outputs import writing
    from farlight.errors import UnsupportedError

    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(f"--png needs matplotlib ({error}); pip install 'farlight[plot]'.") from error
    figure = Figure(figsize=(11, 6 if chain is None else 8.5), layout="constrained")
    mosaic: Any = [["links", "hops"], ["links", "reach"], *([["path", "path"]] if chain is not None else [])]
    axes = figure.subplot_mosaic(mosaic, height_ratios=[1, 1, *([0.8] if chain is not None else [])])
    plot.plot_pattern(world.pattern, world.n, head=world.head, ax=axes["links"])
    plot.plot_hops(world, ax=axes["hops"])
    plot.plot_reach(reach, ax=axes["reach"])
    if chain is not None:
        plot.plot_path(chain, ax=axes["path"])
    with writing("--png", png):
        figure.savefig(png, dpi=150)
