"""`farlight bench`: attention under patterns and torch's full attention, timed alternately on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from farlight.errors import ArgumentError

__all__ = ["bench_command", "bench_row"]

_DTYPES = ("float32", "bfloat16", "float16")
_DEFAULT = "window(256) | global_tokens(range(64))"


def bench_command(
    pattern: Annotated[list[str] | None, typer.Argument(help=f'Patterns to time; default: "{_DEFAULT}".')] = None,
    tokens: Annotated[list[int] | None, typer.Option("--tokens", "-n", help="Repeatable; default: 4096, 16384.")] = None,
    heads: Annotated[int, typer.Option("--heads", help="Attention heads.")] = 12,
    head_dim: Annotated[int, typer.Option("--head-dim", help="Size of a head.")] = 64,
    dtype: Annotated[str, typer.Option("--dtype", help=", ".join(_DTYPES) + ".")] = "float32",
    backward: Annotated[bool, typer.Option("--backward", help="Time a forward and a backward pass.")] = False,
    backend: Annotated[str, typer.Option("--backend", help="As in farlight.attention.")] = "auto",
    seconds: Annotated[float, typer.Option("--seconds", help="Time to spend on each row, at least three calls.")] = 3.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Time attention under patterns beside torch's full attention (the full suite: benchmarks/run.py of a checkout)."""
    from farlight.cli.inputs import read_patterns

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
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{heads} heads of {head_dim}, {dtype}, {'forward and backward' if backward else 'forward'}")
    for column in ("pattern", "tokens", "links", "backend", "farlight", "full", "×"):
        table.add_column(column, justify="left" if column in ("pattern", "backend") else "right", overflow="fold")
    for row in rows:
        times = (f"{row[name] * 1e3:.4g} ms" for name in ("seconds", "full_seconds"))
        shown = [row["pattern"], f"{row['tokens']:,}", f"{row['density']:.2%}", row["backend"]]
        table.add_row(*shown, *times, f"{row['full_seconds'] / row['seconds']:.2f}")
    Console().print(table)
    print(", ".join(f"{name} {value}" for name, value in _machine().items()))


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
    sparse_seconds, full_seconds = paired_seconds(sparse, full, seconds)
    if backend == "auto":
        request = Request(pattern, Sizes.of(n, heads=heads), heads, head_dim, torch_dtype, q.device, backward)
        backend = registry.select(request).backend.name
    row = {"pattern": repr(pattern), "tokens": n, "density": pattern.density(n, heads=heads), "backend": backend}
    return row | {"causal": causal, "seconds": sparse_seconds, "full_seconds": full_seconds}


def _machine() -> dict[str, Any]:
    """Processor, threads and torch version, as `farlight doctor` reports them."""
    from farlight.cli.doctor import examine

    report = examine()
    versions, processor = report["versions"], report["processor"]
    return {"processor": processor["model"], "threads": processor["threads"], "torch": versions["torch"]}
