"""`farlight bench`: attention under patterns and torch's full attention, timed alternately on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from farlight.cli.numbers import count, seconds_text
from farlight.cli.screen import screen_width, show
from farlight.cli.tables import Column, Table, as_text
from farlight.cli.tables import as_csv as table_csv
from farlight.cli.tables import as_markdown as table_markdown
from farlight.errors import ArgumentError

__all__ = ["EXAMPLES", "bench_command", "bench_row"]

EXAMPLES = (
    "farlight bench",
    "farlight bench 'streaming(4, 1024)' --tokens 4k --tokens 64k --dtype bfloat16",
    "farlight bench 'window(256)' --backward --markdown",
)

_DTYPES = ("float32", "bfloat16", "float16")
_DEFAULT = "window(256) | global_tokens(range(64))"


def bench_command(
    pattern: Annotated[list[str] | None, typer.Argument(help=f'Patterns to time; default: "{_DEFAULT}".')] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option("--tokens", "-n", parser=count, metavar="N", help="4096, 16k, …; repeatable; default: 4096, 16384."),
    ] = None,
    heads: Annotated[int, typer.Option("--heads", help="Attention heads.")] = 12,
    head_dim: Annotated[int, typer.Option("--head-dim", help="Size of a head.")] = 64,
    dtype: Annotated[str, typer.Option("--dtype", help=", ".join(_DTYPES) + ".")] = "float32",
    backward: Annotated[bool, typer.Option("--backward", help="Time a forward and a backward pass.")] = False,
    backend: Annotated[str, typer.Option("--backend", help="As in farlight.attention.")] = "auto",
    seconds: Annotated[float, typer.Option("--seconds", help="Time to spend on each row, at least three calls.")] = 3.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, every column, seconds unrounded.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
    wide: Annotated[bool, typer.Option("--wide", help="Every column, however wide the terminal is.")] = False,
) -> None:
    """Time attention under patterns beside torch's full attention (the full suite: benchmarks/run.py of a checkout)."""
    from farlight.cli.inputs import read_patterns
    from farlight.cli.outputs import one_format

    one_format({"--json": as_json, "--csv": as_csv, "--markdown": as_markdown})
    if dtype not in _DTYPES:
        raise ArgumentError(f"--dtype {dtype!r} is unknown; use one of {', '.join(_DTYPES)}.")
    lengths = tokens or [4096, 16_384]
    for name, values in (("--tokens", lengths), ("--heads", [heads]), ("--head-dim", [head_dim])):
        if min(values) < 1:
            raise ArgumentError(f"{name} {min(values)}: it must be at least 1.")
    patterns = read_patterns(pattern or [_DEFAULT])
    rows = [bench_row(p, n, heads, head_dim, dtype, backward, backend, seconds) for p in patterns for n in lengths]
    if as_json:
        print(json.dumps({"machine": _machine(), "rows": rows}, indent=1))
        return
    title = f"{heads} heads of {head_dim}, {dtype}, {'forward and backward' if backward else 'forward'}"
    table = Table(title, _COLUMNS, tuple(row["pattern"] for row in rows), tuple(rows))
    if as_csv:
        print(table_csv([table]), end="")
    elif as_markdown:
        print(table_markdown([table]), end="")
    else:
        width = screen_width(wide)
        print("\n".join(as_text([table], width)).lstrip("\n"))
        show(", ".join(f"{name} {value}" for name, value in _machine().items()), width)
        show("Medians of calls in turn; ±: half their interquartile range. full: torch's, causal where the pattern is.", width)


def _column(key: str, title: str, write: Callable[[Any], str] = str, priority: int = 0, left: bool = False) -> Column:
    return Column(key, title, lambda row: row[key], write, priority, left)


_COLUMNS = (
    _column("tokens", "tokens", "{:,}".format, 100),
    _column("density", "links", "{:.2%}".format, 50),
    _column("seconds", "farlight", seconds_text, 90),
    _column("spread", "±", lambda spread: seconds_text(spread), 30),
    _column("full_seconds", "full", seconds_text, 80),
    _column("full_spread", "±", lambda spread: seconds_text(spread), 20),
    _column("speedup", "speed-up", "{:.2f}x".format, 95),
    _column("backend", "backend", priority=10, left=True),
)


def bench_row(
    pattern: Any, n: int, heads: int, head_dim: int, dtype: str, backward: bool, backend: str, seconds: float
) -> dict[str, Any]:
    """One row of the table: median seconds of a call under `pattern` and of torch's `scaled_dot_product_attention`.

    Full attention runs with `is_causal` where the pattern is causal; the two alternate for `seconds`. `backward`: forward and
    backward pass.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    import farlight as fl
    from farlight.analysis.cost import paired_seconds
    from farlight.kernels import registry
    from farlight.kernels.backend import Request
    from farlight.patterns import Sizes
    from farlight.patterns.algebra import looks_back

    torch_dtype = getattr(torch, dtype)
    q, k, v = (torch.randn(1, heads, n, head_dim).to(torch_dtype).requires_grad_(backward) for _ in range(3))
    causal = looks_back(pattern)

    def timed_call(attend: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            with torch.set_grad_enabled(backward):
                out = attend()
            if backward:
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

        return run

    sparse = timed_call(lambda: fl.attention(q, k, v, pattern, backend=backend))
    full = timed_call(lambda: scaled_dot_product_attention(q, k, v, is_causal=causal))
    sparse_timing, full_timing = paired_seconds(sparse, full, seconds)
    if backend == "auto":
        request = Request(pattern, Sizes.of(n, heads=heads), heads, head_dim, head_dim, torch_dtype, q.device, backward)
        backend = registry.select(request).backend.name
    row = {"pattern": repr(pattern), "tokens": n, "density": pattern.density(n, heads=heads), "backend": backend}
    times = {"seconds": sparse_timing.seconds, "spread": sparse_timing.spread, "runs": sparse_timing.runs}
    times |= {"full_seconds": full_timing.seconds, "full_spread": full_timing.spread}
    return row | {"causal": causal, **times, "speedup": full_timing.seconds / sparse_timing.seconds}


def _machine() -> dict[str, Any]:
    """Processor, threads and torch version, as `farlight doctor` reports them."""
    from farlight.cli.doctor import examine

    report = examine()
    versions, processor = report["versions"], report["processor"]
    return {"processor": processor["model"], "threads": processor["threads"], "torch": versions["torch"]}
