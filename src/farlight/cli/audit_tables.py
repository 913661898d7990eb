"""The two tables of `farlight audit`, the links that patterns lose, and the legend, as text, CSV or Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farlight.cli.numbers import bytes_text, count_text, factor_text, seconds_text
from farlight.cli.screen import wrapped
from farlight.cli.tables import Column, Table, as_csv, as_markdown, as_text

if TYPE_CHECKING:
    from farlight.analysis.audit import Audit
    from farlight.analysis.loss.language import Prediction

__all__ = ["audit_csv", "audit_lines", "audit_markdown"]

# Links listed: each once, with the patterns that lose it.
_LISTED_LOSSES = 8
# Predictions listed for each pattern.
_LISTED_PREDICTIONS = 2


def _percent(digits: int) -> Any:
    return lambda value: f"{value:.{digits}%}"


def _spread_text(seconds: float, spread: float) -> str:
    """Half the interquartile range as a share of the median."""
    return f"±{spread / seconds:.0%}" if seconds else "-"


def _spread(long: bool, full: bool) -> Any:
    """A column's value: (seconds, spread) of sparse or full attention; None for a single call."""

    def value(row: Any) -> tuple[float, float] | None:
        if long:
            row = row.long_text
        if full:
            return row.full_seconds, row.full_spread
        return None if long and row.runs < 2 else (row.seconds, row.spread)

    return value


# Priorities: the lowest is dropped first. Order of loss below 120 columns: backend, memory, prediction, spread, …
FIDELITY = (
    Column("density", "density", lambda row: row.density, _percent(1), 90),
    Column("links", "links", lambda row: row.links, count_text, 50),
    Column("mass", "mass", lambda row: row.mass, "{:.3f}".format, 100),
    Column("worst_head", "worst\nhead", lambda row: row.worst_head, "{:.3f}".format, 70),
    Column("of_best", "of\nbest", lambda row: row.of_best, _percent(1), 60),
    Column("token_cosine", "token\ncosine", lambda row: row.token_cosine, "{:.3f}".format, 95),
    Column("pooled_cosine", "pooled\ncosine", lambda row: row.pooled_cosine, "{:.3f}".format, 65),
    Column("measured_speedup", "speed-up\nmeasured", lambda row: row.measured_speedup, factor_text, 80),
    Column("spread", "speed-up\nspread", _spread(False, False), lambda pair: _spread_text(*pair), 40),
    Column("predicted_speedup", "speed-up\npredicted", lambda row: row.predicted_speedup, factor_text, 30),
    Column("peak_bytes", "\nmemory", lambda row: row.peak_bytes, bytes_text, 20),
    Column("backend", "\nbackend", lambda row: row.backend, priority=10, left=True),
)


def _of_language(name: str) -> Any:
    return lambda row: None if row.language is None else getattr(row.language, name)


def _interval_text(ends: tuple[float, float]) -> str:
    return "{:+.3f} … {:+.3f}".format(*ends)


# Empty but for causal language models.
LOSS = (
    Column("loss", "\nloss", _of_language("loss"), "{:.3f}".format, 90),
    Column("loss_full", "loss\nfull", _of_language("loss_full"), "{:.3f}".format, 80),
    Column("loss_lost", "\nlost", _of_language("lost"), "{:+.3f}".format, 100),
    Column("loss_interval", "lost, 95 %\ninterval", _of_language("interval"), _interval_text, 70),
    Column("perplexity", "\nperplexity", _of_language("perplexity"), "{:.2f}".format, 60),
    Column("perplexity_full", "perplexity\nfull", _of_language("perplexity_full"), "{:.2f}".format, 50),
    Column("lost_early", "lost, first\npart judged", _of_language("lost_early"), "{:+.3f}".format, 20),
    Column("lost_late", "lost,\nlast part", _of_language("lost_late"), "{:+.3f}".format, 30),
)


def _of_long(name: str) -> Any:
    return lambda row: None if row.long_text.why_not else getattr(row.long_text, name)


def _long_spread(full: bool) -> Any:
    inner = _spread(True, full)
    return lambda row: None if row.long_text.why_not else inner(row)


LONG_TEXT = (
    Column("links", "links", _of_long("links"), count_text, 60),
    Column(
        "density", "of all\nlinks",
        lambda row: None if row.long_text.why_not else row.long_text.links / max(1, row.long_text.full_links), _percent(3), 70,
    ),
    Column("seconds", "sparse,\nmeasured", _of_long("seconds"), seconds_text, 100),
    Column("spread", "sparse\nspread", _long_spread(False), lambda pair: _spread_text(*pair), 40),
    Column("full_seconds", "full,\nexpected", _of_long("full_seconds"), seconds_text, 90),
    Column("full_spread", "full\nspread", _long_spread(True), lambda pair: _spread_text(*pair), 30),
    Column("speedup", "\nspeed-up", _of_long("speedup"), factor_text, 80),
    Column("peak_bytes", "\nmemory", _of_long("peak_bytes"), bytes_text, 20),
    Column("backend", "\nbackend", _of_long("backend"), priority=10, left=True),
)  # fmt: skip


def _tables(result: Audit) -> list[Table]:
    names = tuple(row.pattern for row in result.patterns)
    tokens = _long_tokens(result)
    whole = "the whole text" if tokens == result.tokens else f"of {result.tokens:,}, the longest that is timed"
    loss = Table("Next-token loss in nats, second half of each passage", LOSS, names, result.patterns)
    has_loss = any(row.language is not None for row in result.patterns)
    return [
        Table(f"In passages of {result.passage_tokens} tokens", FIDELITY, names, result.patterns),
        *([loss] if has_loss else []),
        Table(f"Over {tokens:,} tokens ({whole})", LONG_TEXT, names, result.patterns, prefix="long_text_"),
    ]


def _long_tokens(result: Audit) -> int:
    return result.patterns[0].long_text.tokens


def audit_lines(result: Audit, width: int | None) -> list[str]:
    """The audit as lines of at most `width` characters (None: as wide as they are)."""
    heads = f"{result.heads} heads of {result.head_dim}"
    own = "" if result.own == "full()" else f", its own mask {result.own}"
    shared = f" ({result.kv_heads} for keys)" if result.kv_heads != result.heads else ""
    threads = f"{result.threads} thread{'s' * (result.threads != 1)}"
    before = [
        f"{result.model}: {result.layers} layers, {heads}{shared}{own} | {threads} | backend {result.backend}",
        f"{result.text}: {result.tokens:,} tokens, judged on {result.passages} passages of {result.passage_tokens}",
    ]
    after = ["", *_suffered_lines(result), *_loss_lines(result), *_failures(result), *_legend(result)]
    return [
        *(part for line in before for part in wrapped(line, width)),
        *as_text(_tables(result), width),
        *(part for line in after for part in wrapped(line, width)),
    ]


def audit_csv(result: Audit) -> str:
    """One row per pattern, the columns of both tables, numbers unrounded and times in seconds."""
    plain = []
    for table in _tables(result):
        columns = (_plain_spread(column) if "spread" in column.key else column for column in table.columns)
        plain.append(Table(table.title, tuple(columns), table.names, table.rows, table.prefix))
    return as_csv(plain)


def _plain_spread(column: Column) -> Column:
    """A column of spreads in seconds."""

    def value(row: Any) -> float | None:
        pair = column.value(row)
        return None if pair is None else pair[1]

    return Column(f"{column.key}_seconds", column.title, value)


def audit_markdown(result: Audit) -> str:
    """Both tables in Markdown."""
    return as_markdown(_tables(result))


def _loss_lines(result: Audit) -> list[str]:
    """The heaviest lost links, each once, with the numbers of the patterns that lose it."""
    if not result.shared_losses:
        return []
    several = len(result.patterns) > 1
    lines = ["Lost, the heaviest links first" + (" (the numbers are the patterns that lose it):" if several else ":")]
    for loss in result.shared_losses[:_LISTED_LOSSES]:
        numbers = ", ".join(str(index + 1) for index in loss.patterns)
        lines.append(f"  {loss.link}" + (f" [{numbers}]" if several else ""))
    return [*lines, ""]


def _suffered_lines(result: Audit) -> list[str]:
    """The predictions of a language model that lost most under each pattern, each once, with the numbers of those patterns."""
    several = len(result.patterns) > 1
    listed: dict[tuple[int, int], tuple[Prediction, list[str]]] = {}
    for number, row in enumerate(result.patterns, 1):
        for prediction in [] if row.language is None else row.language.suffered[:_LISTED_PREDICTIONS]:
            place = prediction.passage, prediction.position
            _, losses = listed.setdefault(place, (prediction, []))
            losses.append(f"{prediction.loss:.2f}" + (f" [{number}]" if several else ""))
    if not listed:
        return []
    title = "Suffered, the predictions that lost most" + (" (the numbers are the patterns)" if several else "")
    lines = [
        f"  {each.label}: {each.loss_full:.2f} nats with full attention, {', '.join(losses)}" + ("" if several else " without")
        for each, losses in listed.values()
    ]
    return [f"{title}:", *lines, ""]


def _failures(result: Audit) -> list[str]:
    return [
        f"{row.pattern}: not measured on the long text: {row.long_text.why_not}"
        for row in result.patterns
        if row.long_text.why_not
    ]


def _legend(result: Audit) -> list[str]:
    own = "" if result.own == "full()" else " under the model's own mask"
    return [
        "mass: share of full attention kept, mean over layers, heads and rows; of best: of what the best links of that "
        "number keep.",
        "cosines: last hidden states, and their mean over a passage, sparse against full.",
        f"speed-up: of one attention layer, batch of all passages, against full attention{own}; medians of calls in turn, "
        "spread: half their interquartile range; predicted for sparse attention, measured for the backend that ran.",
        "memory: peak beside q, k and v, output included.",
        f"Long text: links, times and memory are all of {_long_tokens(result):,} tokens; sparse attention measured on one "
        f"layer, times {result.layers}; full attention{own} measured at {result.full_measured_at:,} tokens, scaled by the "
        "square.",
    ]
