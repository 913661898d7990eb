"""The page of `farlight audit --html`, and the heads whose attention weights it carries (`--head`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from farlight.errors import ArgumentError

if TYPE_CHECKING:
    from farlight.analysis.audit import Audit
    from farlight.analysis.candidates_by_layer import Subject
    from farlight.analysis.passages import Passages
    from farlight.analysis.progress import Progress
    from farlight.hf.loading import LoadedModel
    from farlight.patterns.expression import Pattern
    from farlight.routing import Router

__all__ = ["check_heads", "read_heads", "write_page"]


def read_heads(heads: list[str] | None, page: Path | None) -> list[tuple[int, int]] | None:
    """The values of --head as (layer, head). Raises ArgumentError for anything but two numbers, and without --html."""
    if not heads:
        return None
    if page is None:
        raise ArgumentError("--head belongs to a report: add --html report.html.")
    parts = [text.split(":") for text in heads]
    wrong = next((text for text, part in zip(heads, parts, strict=True) if [x.isdecimal() for x in part] != [True] * 2), None)
    if wrong is not None:
        raise ArgumentError(f"--head {wrong}: a layer and a head are needed, both numbered from 0, such as 5:2.")
    return [(int(layer), int(head)) for layer, head in parts]


def check_heads(heads: list[tuple[int, int]] | None, loaded: LoadedModel, tokens: int, patterns: int) -> None:
    """Raise ArgumentError for a --head that the model lacks, for more heads than a page carries at this length and number of
    patterns, and for passages too long for attention weights."""
    from farlight.hf.layers import attention_layers
    from farlight.report.weights import MAX_TOKENS, check_number

    if heads is None:
        return
    layers, count = list(attention_layers(loaded.model)), loaded.model.config.get_text_config().num_attention_heads
    for layer, head in heads:
        if layer not in layers or head >= count:
            raise ArgumentError(
                f"--head {layer}:{head}: {loaded.name} has layers {layers[0]} to {layers[-1]} with {count} heads each, "
                "numbered from 0; name one of those."
            )
    if tokens > MAX_TOKENS:
        raise ArgumentError(
            f"--head: a page carries weights of at most {MAX_TOKENS} tokens, a passage has {tokens}; add --length {MAX_TOKENS}."
        )
    check_number(len(set(heads)), tokens, patterns)


def write_page(
    page: Path,
    result: Audit,
    judged: Sequence[Pattern | Router | Subject],
    passages: Passages,
    content: str,
    loaded: LoadedModel,
    heads: list[tuple[int, int]] | None,
    progress: Progress,
) -> ArgumentError | None:
    """Write the report of an audit; why there is none, for the figures are printed first.

    heads: those whose attention weights it carries, None for a choice.
    """
    from farlight import report

    try:
        data = report.audit_data(result, judged, passages, report.words_of(content, loaded.tokenizer), progress=progress)
        progress.step("attention weights")
        data["weights"] = report.weights(loaded.model, result, judged, passages, heads)
        report.write(report.render(data), page)
    except ArgumentError as error:
        return error
    return None
