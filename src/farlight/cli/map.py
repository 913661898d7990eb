"""`farlight map`: how far news travels along a pattern's links, in numbers, as one path, as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from farlight.errors import ArgumentError

__all__ = ["map_command"]


def map_command(
    pattern: Annotated[str, typer.Argument(help='A pattern, e.g. "window(256) | global_tokens([0])".')],
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Length of the text in tokens.")],
    layers: Annotated[int, typer.Option("--layers", help="Show what is heard of after each of so many layers.")] = 4,
    source: Annotated[int | None, typer.Option("--from", help="Show how news of this position …")] = None,
    target: Annotated[int | None, typer.Option("--to", help="… reaches this one. Negative: from the end.")] = None,
    head: Annotated[int, typer.Option("--head", help="Which head, for patterns that differ between heads.")] = 0,
    png: Annotated[Path | None, typer.Option("--png", help="Write a picture of the pattern, hops, reach and path.")] = None,
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
    links = parse(pattern)
    # A path is found in a moment and may be refused; so it comes first.
    way = None if source is None or target is None else graph.path(links, tokens, source, target, head=head)
    world = graph.smallworld(links, tokens, head=head)
    reach = graph.reach(links, tokens, layers, head=head)
    if png is not None:
        _draw(png, world, reach, way)
    if page is not None:
        from farlight import report

        report.write(report.render(report.map_data(links, tokens, world, reach, head=head)), page)
    if as_json:
        out: dict[str, Any] = {"smallworld": world.to_dict(), "reach": reach.to_dict()}
        if way is not None:
            out["path"] = way.to_dict()
        print(json.dumps(out, indent=2, allow_nan=False))
        return
    print(world)
    print()
    print(str(reach).partition("\n")[2])  # its first line repeats the pattern
    if way is not None:
        print(f"\n{way}")
    if png is not None:
        print(f"\npicture: {png}")
    if page is not None:
        print(f"\nreport: {page}")


def _draw(png: Path, world: Any, reach: Any, way: Any) -> None:
    from farlight.analysis import plot
    from farlight.cli.outputs import writing
    from farlight.errors import UnsupportedError

    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(f"--png needs matplotlib ({error}); pip install 'farlight[plot]'.") from error
    figure = Figure(figsize=(11, 6 if way is None else 8.5), layout="constrained")
    places: Any = [["links", "hops"], ["links", "reach"], *([["path", "path"]] if way is not None else [])]
    axes = figure.subplot_mosaic(places, height_ratios=[1, 1, *([0.8] if way is not None else [])])
    plot.plot_pattern(world.pattern, world.n, head=world.head, ax=axes["links"])
    plot.plot_hops(world, ax=axes["hops"])
    plot.plot_reach(reach, ax=axes["reach"])
    if way is not None:
        plot.plot_path(way, ax=axes["path"])
    with writing("--png", png):
        figure.savefig(png, dpi=150)
