"""`farlight map`: small-world metrics, reach, relay loads and a path of a pattern, as text, JSON, PNG or HTML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from farlight.cli.numbers import count, count_text
from farlight.cli.screen import screen_width, show
from farlight.cli.tables import Column, Table, as_text
from farlight.errors import ArgumentError

__all__ = ["EXAMPLES", "map_command"]

EXAMPLES = (
    "farlight map 'window(256) | global_tokens([0])' --tokens 100k",
    "farlight map 'bigbird(64, 3)' --tokens 4096 --from 5 --to -1",
    "farlight map 'window(256) | global_tokens([0])' --tokens 1M --html map.html",
    "farlight map 'window(256)' 'window(256) | global_tokens([0])' 'bigbird(64, 3)' --tokens 10k --html map.html",
)


# What several patterns are compared by; a row is (small-world metrics, reach).
COLUMNS = (
    Column("density", "density", lambda row: row[0].density, "{:.3%}".format, 90),
    Column("links", "links", lambda row: row[0].links, count_text, 60),
    Column("hops", "hops", lambda row: row[0].hops, "{:.2f}".format, 100),
    Column("diameter", "diameter", lambda row: row[0].diameter, "{:,}".format, 80),
    Column("clustering", "clustering", lambda row: row[0].clustering, "{:.3f}".format, 50),
    Column("bottleneck", "share one\nrelay", lambda row: row[1].capacity and row[1].capacity.bottleneck, "{:,.0f}".format, 70),
)


def map_command(
    pattern: Annotated[
        list[str], typer.Argument(help='A pattern, e.g. "window(256) | global_tokens([0])"; several stand side by side.')
    ],
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
    """Print hops, clustering, reach by layer and the load of relays of sparse patterns; several are compared in a table."""
    from farlight.analysis import graph
    from farlight.cli.outputs import check_place
    from farlight.patterns import parse

    if (source is None) != (target is None):
        raise ArgumentError("--from and --to belong together: give both positions, or neither.")
    for name, file in (("--png", png), ("--html", page)):
        if file is not None:
            check_place(name, file)
    if png is not None and len(pattern) > 1:
        raise ArgumentError(f"--png draws one pattern, and {len(pattern)} were given; --html shows several side by side.")
    parsed = [parse(text) for text in pattern]
    # Paths are quick and check the positions, so they precede the slow metrics.
    if source is None or target is None:
        chains: list[Any] = [None] * len(parsed)
    else:
        chains = [graph.path(each, tokens, source, target, head=head) for each in parsed]
    worlds = [graph.smallworld(each, tokens, head=head) for each in parsed]
    reaches = [graph.reach(each, tokens, layers, head=head) for each in parsed]
    if png is not None:
        _draw(png, worlds[0], reaches[0], chains[0])
    if page is not None:
        from farlight import report

        report.write(report.render(report.maps_data(parsed, tokens, worlds, reaches, head=head, chain=chains[0])), page)
    if as_json:
        objects = [_values(*each) for each in zip(worlds, reaches, chains, strict=True)]
        print(json.dumps(objects[0] if len(objects) == 1 else {"patterns": objects}, indent=2, allow_nan=False))
        return
    _print(worlds, reaches, chains)
    if png is not None:
        print(f"\npicture: {png}")
    if page is not None:
        print(f"\nreport: {page}")


def _values(world: Any, reach: Any, chain: Any) -> dict[str, Any]:
    """What --json prints of one pattern."""
    out = {"smallworld": world.to_dict(), "reach": reach.to_dict()}
    return out if chain is None else {**out, "path": chain.to_dict()}


def _print(worlds: list[Any], reaches: list[Any], chains: list[Any]) -> None:
    """Print the metrics of each pattern; of several, first a table that compares them."""
    width = screen_width()
    if len(worlds) > 1:
        rows = tuple(zip(worlds, reaches, strict=True))
        table = Table(f"{worlds[0].n:,} tokens", COLUMNS, tuple(str(world.pattern) for world in worlds), rows)
        print("\n".join(as_text([table], width)))
    for index, (world, reach, chain) in enumerate(zip(worlds, reaches, chains, strict=True)):
        if index or len(worlds) > 1:
            print()
        show(str(world), width)
        print()
        show(str(reach).partition("\n")[2], width)  # its first line repeats the pattern
        if chain is not None:
            show(f"\n{chain}", width)


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
