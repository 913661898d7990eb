"""`farlight audit`: what each sparse pattern saves and loses when a model reads a text, as tables, JSON or HTML."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farlight.cli import audit_tables
from farlight.cli.audit_page import check_heads, read_heads, write_page
from farlight.cli.numbers import count
from farlight.cli.outputs import check_place, one_format, writing
from farlight.cli.progress import progress_bar
from farlight.cli.screen import screen_width, show
from farlight.errors import ArgumentError

if TYPE_CHECKING:
    from farlight.analysis.audit import Audit
    from farlight.analysis.candidates_by_layer import Subject
    from farlight.analysis.fit.model_fit import ModelFit
    from farlight.analysis.passages import Passages
    from farlight.analysis.progress import Progress
    from farlight.hf.loading import LoadedModel
    from farlight.patterns.expression import Pattern
    from farlight.routing import Router

__all__ = ["CAUSAL_PATTERNS", "DEFAULT_PATTERNS", "EXAMPLES", "audit_command"]

EXAMPLES = (
    "farlight audit",
    "farlight audit book.txt --pattern 'window(32)' --pattern 'window(32) | global_tokens([0, -1])'",
    "farlight audit book.txt --model path/to/model --html report.html",
    "farlight audit book.txt --density 0.1 --save fit.json",
    "farlight audit book.txt --csv > audit.csv",
)

# The two global positions are the first and last token ([CLS] and [SEP], say).
DEFAULT_PATTERNS = (
    "window(8)",
    "window(8) | global_tokens([0, -1])",
    "window(8) | global_tokens([0, -1]) | random_keys(3)",
    "window(32)",
    "window(32) | global_tokens([0, -1])",
    "window(128) | global_tokens([0, -1])",
)

# What a causal model is asked by default: attention sinks with a window; beside them every 16th token, or the blocks that
# content chooses. A last token that sees all sees no more than any other there.
CAUSAL_PATTERNS = (
    "streaming(4, 16)",
    "streaming(4, 64)",
    "streaming(4, 256)",
    "streaming(4, 64) | landmarks(16)",
    "streaming(4, 64) | topblocks(share=0.1, block=16, causal=True)",
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
            metavar="PATTERN",
            help='A pattern or router, e.g. "window(32) | global_tokens([0])" or "topblocks(share=0.1)", or the file of a fit, '
            "fit.json. Repeat for several.",
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option("--keep", help="Fit: the fewest links, head by head, that keep this share of full attention, e.g. 0.95."),
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Fit: the most that this share of all links can keep, e.g. 0.1.")
    ] = None,
    time: Annotated[
        float | None,
        typer.Option(
            "--time",
            help="Fit of a causal language model: the least loss for this share of full attention's seconds, as timed here.",
        ),
    ] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            "--candidate",
            metavar="KIND",
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
        typer.Option(
            "--length",
            parser=count,
            metavar="TOKENS",
            help=f"Tokens in a passage. Default: what the model can read, at most {_MAX_PASSAGE}.",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride", parser=count, metavar="TOKENS", help="Tokens from one passage's start to the next. Default: a passage."
        ),
    ] = None,
    backend: Annotated[str, typer.Option("--backend", help="Which backend computes sparse attention.")] = "auto",
    page: Annotated[Path | None, typer.Option("--html", help="Write a report to look into, as one HTML file.")] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(
            "--head",
            metavar="LAYER:HEAD",
            help="A head whose attention weights the report shows, e.g. 5:2. Repeat for several. Default: some of each layer.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one CSV row per pattern, every column.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables in Markdown.")] = False,
    wide: Annotated[bool, typer.Option("--wide", help="Every column, however wide the terminal is.")] = False,
) -> None:
    """Print what each sparse pattern saves and loses when a model reads a text.

    Where a terminal is narrow, patterns are numbered and columns dropped: backend, memory, predicted speed-up, spread and
    so on; --wide keeps them.
    """
    from farlight.cli.inputs import read_subjects, read_text
    from farlight.hf.loading import load_model
    from farlight.kernels import registry

    # Cheap checks come before the model is loaded.
    form = one_format({"--json": as_json, "--csv": as_csv, "--markdown": as_markdown})
    fitting = any(target is not None for target in (keep, density, time))
    judged: list[Pattern | Router | Subject] = [*read_subjects(pattern or ())]
    if fitting:
        _check_fit(keep, density, time, candidate, save)
    elif candidate or save is not None:
        raise ArgumentError("--candidate and --save belong to a fit: add --keep 0.95, --density 0.1 or --time 0.5.")
    registry.check_name(backend)
    heads = read_heads(head, page)
    num_passages = _num_passages(passages, _PASSAGES if page is None else _REPORT_PASSAGES)
    if page is not None:
        check_place("--html", page)
    text_name, content = read_text(text)
    with progress_bar() as progress:
        progress.start(["loading the model"])
        progress.step("loading the model")
        loaded = load_model(model)
        size = _passage_length(length, loaded)

        from farlight import report
        from farlight.analysis.audit import audit, steps
        from farlight.analysis.candidates_by_layer import Subject
        from farlight.analysis.passages import cut_passages

        spread = page is not None and passages is None
        cut = cut_passages(content, loaded.tokenizer, size, num_passages, spread=spread, stride=stride)
        if not judged and not fitting:
            judged = [*read_subjects(_defaults(loaded.model, cut))]
        check_heads(heads, loaded, size, len(judged) + fitting)
        fitted = None
        if fitting:
            # Twice as many passages: the first half is fitted to, the second half is audited.
            both = None if num_passages is None else 2 * num_passages
            all_passages = cut_passages(content, loaded.tokenizer, size, both, spread=spread, stride=stride)
            fitted, cut = _fit(loaded.model, all_passages, keep, density, time, candidate, progress)
            judged = [*judged, Subject(_fit_name(keep, density, time), fitted.patterns)]
            if save is not None:
                with writing("--save", save):
                    fitted.save(save)
        progress.start(steps(cut, judged) + ([*report.steps(judged), "attention weights"] if page is not None else []))
        result = audit(
            loaded.model, cut, judged,
            backend=backend, tokenizer=loaded.tokenizer, model_name=loaded.name, text_name=text_name, step=progress.step,
        )  # fmt: skip
        refusal = None
        if page is not None:
            refusal = write_page(page, result, judged, cut, content, loaded, heads, progress)
    if form:
        _print_data(result, fitted, form)
    else:
        name = _fit_name(keep, density, time) if fitting else ""
        _show(result, fitted, name, page if refusal is None else None, save, screen_width(wide))
    if refusal is not None:
        raise refusal


def _passage_length(length: int | None, loaded: LoadedModel) -> int:
    """Tokens in a passage. Raises ArgumentError for more than the model reads."""
    if length is not None and length > loaded.longest:
        raise ArgumentError(
            f"--length {length}: {loaded.name} reads at most {loaded.longest} tokens at once; give that or less."
        )
    return length or min(loaded.longest, _MAX_PASSAGE)


def _print_data(result: Audit, fitted: ModelFit | None, form: str) -> None:
    """Print an audit as JSON (with the fit that it judged), CSV or Markdown."""
    if form == "--json":
        extra = {} if fitted is None else {"fit": fitted.to_dict()}
        print(json.dumps(result.to_dict() | extra, indent=2, allow_nan=False))
    else:
        print((audit_tables.audit_csv if form == "--csv" else audit_tables.audit_markdown)(result), end="")


def _show(result: Audit, fitted: ModelFit | None, name: str, page: Path | None, save: Path | None, width: int | None) -> None:
    """Print an audit and the fit that it judged, as text."""
    print("\n".join(audit_tables.audit_lines(result, width)))
    if page is not None:
        print(f"\nreport: {page}")
    if fitted is not None:
        show(f"\nfitted ({name}): {fitted}" + (f"\nsaved: {save}" if save is not None else ""), width)


def _defaults(model: Any, passages: Passages) -> tuple[str, ...]:
    """The patterns that a model is asked about when none is given: a causal one is asked about causal ones."""
    from farlight.analysis.loss.own_mask import own_mask
    from farlight.patterns.algebra import looks_back

    return CAUSAL_PATTERNS if looks_back(own_mask(model, passages.ids)) else DEFAULT_PATTERNS


def _fit_name(keep: float | None, density: float | None, time: float | None) -> str:
    """The name of the fitted pattern in tables."""
    targets = {"keep": keep, "density": density, "time": time}
    return "fitted, " + ", ".join(f"{name} {value:g}" for name, value in targets.items() if value is not None)


def _check_fit(
    keep: float | None, density: float | None, time: float | None, candidates: list[str] | None, save: Path | None
) -> None:
    """Raise for invalid fit options, before the model is loaded."""
    from farlight.analysis.fit.candidates import parse_candidates
    from farlight.analysis.fit.fit import read_target
    from farlight.analysis.fit.loss_fit import loss_expressions
    from farlight.analysis.fit.whole_model import check_time

    if time is None:
        read_target(keep, density, False)
        parse_candidates(candidates, False)
    else:
        check_time(time, keep, density)
        loss_expressions(candidates)
    if save is not None:
        check_place("--save", save)


def _fit(
    model: Any,
    passages: Passages,
    keep: float | None,
    density: float | None,
    time: float | None,
    candidates: list[str] | None,
    progress: Progress,
) -> tuple[ModelFit, Passages]:
    """(fit to the first half of the passages, the second half). Raises ArgumentError for fewer than two passages."""
    from farlight.analysis.fit.model_profile import profile_model
    from farlight.analysis.fit.whole_model import fit_profile, fit_to_loss, fits_by_loss, loss_fit_steps
    from farlight.analysis.loss.fidelity import BATCH_TOKENS

    if passages.count < 2:
        raise ArgumentError(
            f"the text makes {passages.count} passage of {passages.length} tokens; a fit needs one to fit to and "
            "another to be judged on. Give a longer text, or a smaller --length."
        )
    half = passages.count // 2
    others = replace(passages, ids=passages.ids[half:], starts=passages.starts[half:])
    if time is not None or fits_by_loss(model, None, density, candidates):
        progress.start(loss_fit_steps(half))
        both = passages.ids[:half], others.ids
        return fit_to_loss(model, *both, density, candidates, time=time, step=progress.step), others
    batch = max(1, BATCH_TOKENS // passages.length)
    read_steps = [f"reading: {min(first + batch, half)} of {half} passages" for first in range(0, half, batch)]
    progress.start([*read_steps, "frontiers of all heads", "judged on what it was fitted to", "judged on other text"])
    profile = profile_model(model, passages.ids[:half], candidates, step=progress.step)
    fitted = fit_profile(profile, passages.ids[half:], keep=keep, density=density, step=progress.step)
    return fitted, others


def _num_passages(passages: str | None, default: int) -> int | None:
    """The value of --passages; None means all. Raises ArgumentError unless it is "all" or a positive number."""
    if passages is None:
        return default
    if passages == "all":
        return None
    if not passages.isdecimal() or len(passages) > 18 or int(passages) < 1:
        raise ArgumentError(f'--passages {passages}: at least one passage is needed; give a number such as 8, or "all".')
    return int(passages)
