"""`farlight audit`: what each sparse pattern saves and loses when a model reads a text, as tables, JSON or HTML."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farlight.cli.outputs import check_place, writing
from farlight.cli.progress import progress_bar
from farlight.errors import ArgumentError

if TYPE_CHECKING:
    from rich.table import Table

    from farlight.analysis.audit import Audit
    from farlight.analysis.candidates_by_layer import Subject
    from farlight.analysis.fit.model_fit import ModelFit
    from farlight.analysis.passages import Passages
    from farlight.analysis.progress import Progress
    from farlight.patterns.expression import Pattern
    from farlight.routing import Router

__all__ = ["DEFAULT_PATTERNS", "audit_command"]

# The two global positions are the first and last token ([CLS] and [SEP], say).
DEFAULT_PATTERNS = (
    "window(8)",
    "window(8) | global_tokens([0, -1])",
    "window(8) | global_tokens([0, -1]) | random_keys(3)",
    "window(32)",
    "window(32) | global_tokens([0, -1])",
    "window(128) | global_tokens([0, -1])",
)

# Default limit: full attention over a passage takes time quadratic in its length.
_MAX_PASSAGE = 2048
_PASSAGES, _REPORT_PASSAGES = 8, 32


def audit_command(
    text: Annotated[Path | None, typer.Argument(help="A UTF-8 text file. Default: Python's reference manual.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="An encoder or causal LM: a folder or a Hugging Face name. Default: the packaged MiniLM."),
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            "--pattern",
            help='A pattern or router, e.g. "window(32) | global_tokens([0])" or "topblocks(share=0.1)". Repeat for several.',
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option("--keep", help="Fit: the fewest links, head by head, that keep this share of full attention, e.g. 0.95."),
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Fit: the most that this share of all links can keep, e.g. 0.1.")
    ] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            "--candidate",
            help="What a fit chooses from: window, dilated, strided, offsets, blocks, pairs, topblocks, or a pattern.",
        ),
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Write the fit as JSON, for fl.hf.sparsify.")] = None,
    passages: Annotated[
        str | None,
        typer.Option(
            "--passages",
            help='How many passages the model reads, from the start; "all" for the whole text. '
            f"Default: {_PASSAGES}; with --html {_REPORT_PASSAGES}, taken evenly from the whole text.",
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option("--length", help=f"Tokens in a passage. Default: what the model can read, at most {_MAX_PASSAGE}."),
    ] = None,
    backend: Annotated[str, typer.Option("--backend", help="Which backend computes sparse attention.")] = "auto",
    page: Annotated[Path | None, typer.Option("--html", help="Write a report to look into, as one HTML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Print what each sparse pattern saves and loses when a model reads a text."""
    from farlight.cli.inputs import load_model, read_judged, read_text
    from farlight.kernels import registry

    # Cheap checks come before the model is loaded.
    fitting = keep is not None or density is not None
    judged: list[Pattern | Router | Subject] = [*read_judged(pattern or (() if fitting else DEFAULT_PATTERNS))]
    if fitting:
        _check_fit(keep, density, candidate, save)
    elif candidate or save is not None:
        raise ArgumentError("--candidate and --save belong to a fit: add --keep 0.95 or --density 0.1.")
    registry.check_name(backend)
    count = _num_passages(passages, _PASSAGES if page is None else _REPORT_PASSAGES)
    if page is not None:
        check_place("--html", page)
    text_name, content = read_text(text)
    with progress_bar() as progress:
        progress.start(["loading the model"])
        progress.step("loading the model")
        loaded = load_model(model)
        if length is not None and length > loaded.longest:
            raise ArgumentError(
                f"--length {length}: {loaded.name} reads at most {loaded.longest} tokens at once; give that or less."
            )

        from farlight import report
        from farlight.analysis.audit import audit, steps
        from farlight.analysis.candidates_by_layer import Subject
        from farlight.analysis.passages import cut_passages

        size = length or min(loaded.longest, _MAX_PASSAGE)
        spread = page is not None and passages is None
        cut = cut_passages(content, loaded.tokenizer, size, count, spread=spread)
        fitted = None
        if fitting:
            # Twice as many passages: the first half is fitted to, the second half is audited.
            all_passages = cut_passages(content, loaded.tokenizer, size, None if count is None else 2 * count, spread=spread)
            fitted, cut = _fit(loaded.model, all_passages, keep, density, candidate, progress)
            judged = [*judged, Subject(_fit_name(keep, density), fitted.patterns)]
            if save is not None:
                with writing("--save", save):
                    fitted.save(save)
        progress.start(steps(cut, judged) + (report.steps(judged) if page is not None else []))
        result = audit(
            loaded.model,
            cut,
            judged,
            backend=backend,
            tokenizer=loaded.tokenizer,
            model_name=loaded.name,
            text_name=text_name,
            step=progress.step,
        )
        if page is not None:
            words = report.words_of(content, loaded.tokenizer)
            report.write(report.render(report.audit_data(result, judged, cut, words, progress=progress)), page)
    _print_result(result, fitted, _fit_name(keep, density) if fitting else "", page, save, as_json)


def _print_result(
    result: Audit, fitted: ModelFit | None, name: str, page: Path | None, save: Path | None, as_json: bool
) -> None:
    """Print an audit and the fit that it judged, as tables or as one JSON object."""
    if as_json:
        extra = {} if fitted is None else {"fit": fitted.to_dict()}
        print(json.dumps(result.to_dict() | extra, indent=2, allow_nan=False))
        return
    _show(result)
    if page is not None:
        print(f"\nreport: {page}")
    if fitted is not None:
        print(f"\nfitted ({name}): {fitted}" + (f"\nsaved: {save}" if save is not None else ""))


def _fit_name(keep: float | None, density: float | None) -> str:
    """The name of the fitted pattern in tables."""
    return f"fitted, keep {keep:g}" if keep is not None else f"fitted, density {density:g}"


def _check_fit(keep: float | None, density: float | None, candidates: list[str] | None, save: Path | None) -> None:
    """Raise for invalid fit options, before the model is loaded."""
    from farlight.analysis.fit.candidates import parse_candidates
    from farlight.analysis.fit.fit import read_target

    read_target(keep, density, False)
    parse_candidates(candidates, False)
    if save is not None:
        check_place("--save", save)


def _fit(
    model: Any,
    passages: Passages,
    keep: float | None,
    density: float | None,
    candidates: list[str] | None,
    progress: Progress,
) -> tuple[ModelFit, Passages]:
    """(fit to the first half of the passages, the second half). Raises ArgumentError for fewer than two passages."""
    from farlight.analysis.fit.model_profile import profile_model
    from farlight.analysis.fit.whole_model import fit_profile
    from farlight.analysis.loss.fidelity import BATCH_TOKENS

    if passages.count < 2:
        raise ArgumentError(
            f"the text makes {passages.count} passage of {passages.length} tokens; a fit needs one to fit to and "
            "another to be judged on. Give a longer text, or a smaller --length."
        )
    half = passages.count // 2
    batch = max(1, BATCH_TOKENS // passages.length)
    read_steps = [f"reading: {min(first + batch, half)} of {half} passages" for first in range(0, half, batch)]
    progress.start([*read_steps, "frontiers of all heads", "judged on what it was fitted to", "judged on other text"])
    profile = profile_model(model, passages.ids[:half], candidates, step=progress.step)
    fitted = fit_profile(profile, passages.ids[half:], keep=keep, density=density, step=progress.step)
    return fitted, replace(passages, ids=passages.ids[half:], starts=passages.starts[half:])


def _num_passages(passages: str | None, default: int) -> int | None:
    """The value of --passages; None means all. Raises ArgumentError unless it is "all" or a positive number."""
    if passages is None:
        return default
    if passages == "all":
        return None
    if not passages.isdecimal() or len(passages) > 18 or int(passages) < 1:
        raise ArgumentError(f'--passages {passages}: at least one passage is needed; give a number such as 8, or "all".')
    return int(passages)


def _show(result: Audit) -> None:
    """Print both tables, the top losses and a legend."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=132)  # a file or pipe has no width

    def print_plain(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    print_plain(
        f"{result.model}: {result.layers} layers, {result.heads} heads of {result.head_dim}"
        + (f" ({result.kv_heads} for keys)" if result.kv_heads != result.heads else "")
        + ("" if result.own == "full()" else f", its own mask {result.own}")
        + f" | {result.threads} threads | backend {result.backend}"
    )
    print_plain(f"{result.text}: {result.tokens:,} tokens, judged on {result.passages} passages of {result.passage_tokens}")
    console.print(_fidelity_table(result))
    console.print(_cost_table(result))
    for row in result.patterns:
        for link in row.lost[:3]:
            print_plain(f"lost by {row.pattern}: {link}")
    for row in result.patterns:
        if row.long_text.why_not:
            print_plain(f"{row.pattern}: not measured on the long text: {row.long_text.why_not}")
    print_plain(
        "mass: share of full attention kept, mean over layers, heads and rows; of best: of what the best links of "
        "that number keep.\n"
        "cosines: last hidden states, and their mean over a passage, sparse against full.\n"
        "speed-up: of one attention layer, batch of all passages; predicted for sparse attention, measured for the backend "
        "that ran.\n"
        "memory: peak beside q, k and v, output included.\n"
        f"Long text: links counted over all {result.tokens:,} tokens{_router_length(result)}; sparse time measured on one "
        f"layer of {_timed_tokens(result):,} tokens, times {result.layers}; full attention measured at "
        f"{result.full_measured_at:,} tokens, scaled by the square."
    )


def _timed_tokens(result: Audit) -> int:
    return result.patterns[0].long_text.timed_tokens


def _router_length(result: Audit) -> str:
    """A note of the length at which a router's links were counted, where that is not the whole text."""
    is_shorter = any(row.long_text.tokens < result.tokens for row in result.patterns)
    return f" (where content decides, over {_timed_tokens(result):,})" if is_shorter else ""


def _table(title: str, columns: tuple[str, ...]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold", no_wrap=index > 0)
    return table


def _fidelity_table(result: Audit) -> Table:
    from rich.text import Text

    columns = (
        *("pattern", "density", "links", "speed-up\npredicted", "\nmeasured", "\nbackend", "\nmemory"),
        *("\nmass", "worst\nhead", "of\nbest", "token\ncosine", "pooled\ncosine"),
    )
    table = _table(f"In passages of {result.passage_tokens} tokens", columns)
    for row in result.patterns:
        table.add_row(
            Text(row.pattern),
            f"{row.density:.1%}",
            _count(row.links),
            f"{row.predicted_speedup:.1f}x",
            f"{row.measured_speedup:.1f}x",
            row.backend,
            _bytes(row.peak_bytes),
            f"{row.mass:.3f}",
            f"{row.worst_head:.3f}",
            f"{row.of_best:.1%}",
            f"{row.token_cosine:.3f}",
            f"{row.pooled_cosine:.3f}",
        )
    return table


def _cost_table(result: Audit) -> Table:
    from rich.text import Text

    columns = ("pattern", "links", "of all links", "time, measured", "full, predicted", "speed-up", "backend", "memory")
    timed = "" if _timed_tokens(result) == result.tokens else f"; timed over {_timed_tokens(result):,}"
    table = _table(f"At the full length of {result.tokens:,} tokens{timed}", columns)
    for row in result.patterns:
        long = row.long_text
        if long.why_not:
            table.add_row(Text(row.pattern), *["-"] * 7)
            continue
        table.add_row(
            Text(row.pattern),
            _count(long.links),
            f"{long.links / max(1, long.full_links):.3%}",
            _seconds(long.seconds),
            _seconds(long.full_seconds),
            f"{long.speedup:.0f}x" if long.speedup >= 10 else f"{long.speedup:.1f}x",
            long.backend,
            _bytes(long.peak_bytes),
        )
    return table


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _seconds(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.2f} s"


def _bytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
