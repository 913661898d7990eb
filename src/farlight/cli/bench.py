"""`farlight bench`: farlight measured on this machine, beside what else there is."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Any

import typer

from farlight.errors import ArgumentError

__all__ = ["bench_command"]


def bench_command(
    sections: Annotated[list[str] | None, typer.Argument(help="What to measure; default: headline. --list names all.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Length of the text. Default: 16384 (--quick: 4096).")] = None,
    heads: Annotated[int, typer.Option("--heads", help="Attention heads.")] = 12,
    head_dim: Annotated[int, typer.Option("--head-dim", help="Size of a head.")] = 64,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="float32, bfloat16 or float16; repeat for several.")
    ] = None,
    pattern: Annotated[str | None, typer.Option("--pattern", help='Default: "window(256) | global_tokens(range(64))".')] = None,
    repeats: Annotated[int | None, typer.Option("--repeats", help="How often each call is timed.")] = None,
    flex: Annotated[bool, typer.Option(help="Also compile and time FlexAttention (about a minute).")] = True,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory, each time in a process of its own.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller problems.")] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Only show that the code runs; the figures mean nothing.", hidden=True)
    ] = False,
    as_list: Annotated[bool, typer.Option("--list", help="Name the sections and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each section instead of tables.")] = False,
) -> None:
    """Time farlight on this machine beside dense attention, FlexAttention and Hugging Face's sparse models."""
    from farlight.bench.sections import SECTIONS
    from farlight.bench.settings import FULL, QUICK, TINY, Box
    from farlight.bench.show import show
    from farlight.cli.inputs import read_patterns

    if as_list:
        for section in SECTIONS.values():
            print(f"{section.name:<10} {section.question} (at most {section.seconds:.0f} s)")
        return
    wanted = sections or ["headline"]
    for name in wanted:
        if name not in SECTIONS:
            raise ArgumentError(f"section {name!r} is unknown; use one of {', '.join(SECTIONS)}.")
    if not tiny:
        changes: dict[str, Any] = {
            "tokens": tokens,
            "heads": heads,
            "head_dim": head_dim,
            "repeats": repeats,
            "flex": flex,
            "memory": memory,
        }
        changes |= {"dtypes": tuple(_dtype(name) for name in dtype)} if dtype else {}
        changes |= {"pattern": read_patterns([pattern])[0].to_json()} if pattern else {}
        for name, value in changes.items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ArgumentError(f"--{name.replace('_', '-')} {value}: it must be at least 1.")
        settings = dataclasses.replace(QUICK if quick else FULL, **{k: v for k, v in changes.items() if v is not None})
    else:
        settings = TINY
    for name in wanted:
        section, rows = SECTIONS[name], []
        for row in section.rows(settings, Box(section.seconds)):
            rows.append(row)
            if sys.stderr.isatty():
                print(f"\r{name}: {len(rows)} rows", end="", file=sys.stderr, flush=True)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        show(section.question, rows, as_json=as_json, matmul_size=settings.matmul_size)


def _dtype(name: str) -> str:
    if name not in ("float32", "bfloat16", "float16"):
        raise ArgumentError(f"--dtype {name!r} is unknown; use float32, bfloat16 or float16.")
    return name
