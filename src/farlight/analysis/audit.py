"""The audit: what each pattern saves and what it loses when a given model reads a given text.

Fidelity is judged in passages of the model's own length, where full attention can still be run beside the sparse one;
cost is taken there and on a long text. This module puts the two together and knows nothing of printing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from farlight.analysis.candidates_by_layer import Judged, Subject, subjects
from farlight.analysis.cost import Cost, Layer, cost_at_length, cost_in_passages, full_seconds, mean_cost, timed_length
from farlight.analysis.loss.fidelity import BATCH_TOKENS, Fidelity, measure_fidelity
from farlight.analysis.loss.top_losses import LostLink, words_of
from farlight.analysis.passages import Passages
from farlight.errors import PatternError
from farlight.patterns import full
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router

__all__ = ["Audit", "LongText", "PatternAudit", "audit", "steps"]


@dataclass(frozen=True)
class LongText:
    """One pattern on a long text, all layers together.

    `links` and `full_links` are counted over `tokens`, the whole text (where content decides, over `timed_tokens`).
    `seconds` and `peak_bytes` are measured over `timed_tokens`, the whole text unless that is too long for it, on one layer of
    random queries, keys and values (times the layers; memory is used by one layer at a time). `full_seconds` is predicted for
    the same length. `why_not` says why a pattern could not be measured.
    """

    tokens: int
    timed_tokens: int
    links: int
    full_links: int
    backend: str
    seconds: float
    full_seconds: float
    peak_bytes: int
    peak_method: str
    why_not: str | None = None

    @property
    def speedup(self) -> float:
        return self.full_seconds / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class PatternAudit:
    """What one pattern saves and loses.

    In passages: `density` is links against the model's own links, `links` the allowed pairs of all layers and heads in
    one passage. `predicted_speedup` is what `farlight.explain` expects of sparse against full attention,
    `measured_speedup` compares the time of one attention layer under `backend` with torch's full attention (about 1
    where "auto" decided for full attention), and `peak_bytes` is what that layer needs beside q, k and v. `mass` and
    `best` are means over layers, heads and rows: the share of full attention kept, and the most that as many links
    could keep, `mass_by_head` and `best_by_head` the same by layer and head; `worst_head` is the smallest mass of a head, in
    layer and head `worst_head_at`. The cosines compare last hidden states and their means over a passage, sparse against
    full. `lost` are the heaviest lost links, the words at their ends included where they are known. Where layers have patterns
    of their own, times are means over the layers and memory is the largest.
    """

    pattern: str
    density: float
    links: int
    backend: str
    predicted_speedup: float
    measured_speedup: float
    peak_bytes: int
    mass: float
    worst_head: float
    worst_head_at: tuple[int, int]
    best: float
    token_cosine: float
    pooled_cosine: float
    long_text: LongText
    mass_by_head: tuple[tuple[float, ...], ...] = ()
    best_by_head: tuple[tuple[float, ...], ...] = ()
    lost: tuple[LostLink, ...] = ()

    @property
    def of_best(self) -> float:
        """Mass kept as a share of the mass that the best pattern of the same size keeps."""
        return self.mass / self.best if self.best else 0.0


@dataclass(frozen=True)
class Audit:
    """An audit's circumstances and its result for each pattern."""

    model: str
    text: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    own: str
    tokens: int
    passages: int
    passage_tokens: int
    threads: int
    backend: str
    full_measured_at: int
    patterns: tuple[PatternAudit, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, texts and lists, the derived figures included."""
        out = asdict(self)
        for row, pattern in zip(out["patterns"], self.patterns, strict=True):
            row["of_best"] = pattern.of_best
            row["long_text"]["speedup"] = pattern.long_text.speedup
        return out


def steps(passages: Passages, patterns: Sequence[Judged | Subject]) -> list[str]:
    """What `audit` reports as progress, in order: the name of each step, repeated where the work is repeated."""
    batches = -(-passages.count // max(1, BATCH_TOKENS // passages.length))
    names = [one.name for one in subjects(patterns)]
    timed = ["timed: full attention", *(f"timed: {name}" for name in names)]
    return ["full attention", *names] * batches + timed + [f"long text: {name}" for name in names]


def audit(
    model: Any,
    passages: Passages,
    patterns: Sequence[Judged | Subject],
    *,
    backend: str = "auto",
    tokenizer: Any = None,
    lost: int = 24,
    model_name: str = "",
    text_name: str = "",
    step: Callable[[str], None] = lambda what: None,
) -> Audit:
    """Judge `patterns` on a Hugging Face `model` that reads `passages`.

    Args:
        model: an encoder or causal language model in evaluation mode whose output begins with the last hidden states.
        passages: from `cut_passages`; its `tokens` is the full length at which cost is measured.
        patterns: patterns, routers, or mappings {layer number: one of these}; each is intersected with what the model itself
            allows.
        backend: as in `farlight.attention`; also used where the model runs under a pattern.
        tokenizer: tells the words at the ends of lost links; `lost` is how many links to list for each pattern.
        step: called with a few words before each piece of work, those of `steps(passages, patterns)`.

    Raises:
        PatternError: no pattern, or one that does not fit the passages. UnsupportedError: the model's attention cannot
        be replaced.
    """
    if not patterns:
        raise PatternError("no pattern was given; an audit needs at least one, such as window(32).")
    judged = subjects(patterns)
    words = None if tokenizer is None else [words_of(row, tokenizer) for row in passages.ids.tolist()]
    run = measure_fidelity(model, passages.ids, judged, backend=backend, lost=lost, words=words, step=step)
    q, k, v = run.first_call.q, run.first_call.k, run.first_call.v
    layer = Layer(q.shape[1], k.shape[1], q.shape[3], v.shape[3], q.dtype, q.device, run.first_call.own, run.first_call.scale)

    step("timed: full attention")
    timed = timed_length(layer, passages.tokens)
    long_full, measured_at = full_seconds(layer, timed)
    short: list[Cost] = []
    for one in judged:
        step(f"timed: {one.name}")
        short.append(
            mean_cost([cost_in_passages(layer, chosen, (q, k, v), backend=backend) for chosen in _layers(one, run.layers)])
        )
    long_tensors = layer.random(timed)
    rows = []
    for one, found, cost in zip(judged, run.patterns, short, strict=True):
        step(f"long text: {one.name}")
        chosen = _layers(one, run.layers)
        # Where content decides in some layer, links are those of its choice, over the tokens that it chose among.
        counted = passages.tokens if all(isinstance(each, Pattern) for each in chosen) else None
        options: dict[str, Any] = {"backend": backend, "counted": counted}
        long = mean_cost([cost_at_length(layer, each, long_tensors, long_full, **options) for each in chosen])
        rows.append(_row(one, found, cost, long, run.layers, layer.heads))
    return Audit(
        model=model_name or type(model).__name__,
        text=text_name,
        layers=run.layers,
        heads=layer.heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        own=repr(layer.own),
        tokens=passages.tokens,
        passages=passages.count,
        passage_tokens=passages.length,
        threads=torch.get_num_threads(),
        backend=backend,
        full_measured_at=measured_at,
        patterns=tuple(rows),
    )


def _layers(one: Subject, layers: int) -> list[Pattern | Router]:
    """What is to be timed: one pattern for all layers, or each layer's own."""
    numbers = range(layers) if isinstance(one.chosen, Mapping) else range(1)
    chosen = [one.at(number) for number in numbers]
    return [full() if judged is None else judged for judged in chosen]


def _row(one: Subject, found: Fidelity, short: Cost, long: Cost, layers: int, heads: int) -> PatternAudit:
    worst = int(found.mass.argmin())
    return PatternAudit(
        pattern=one.name,
        density=found.links / found.own_links if found.own_links else 0.0,
        links=round(found.links * layers * heads),
        backend=short.backend,
        predicted_speedup=short.predicted_speedup,
        measured_speedup=short.measured_speedup,
        peak_bytes=short.peak_bytes,
        mass=found.mass.mean().item(),
        worst_head=found.mass.min().item(),
        worst_head_at=(worst // heads, worst % heads),
        best=found.best.mean().item(),
        token_cosine=found.token_cosine,
        pooled_cosine=found.pooled_cosine,
        long_text=LongText(
            tokens=long.counted,
            timed_tokens=long.tokens,
            links=round(long.links * layers * heads),
            full_links=round(long.own_links * layers * heads),
            backend=long.backend,
            seconds=long.plan_seconds * (1 if isinstance(one.chosen, Pattern) else layers) + long.seconds * layers,
            full_seconds=long.full_seconds * layers,
            peak_bytes=long.peak_bytes,
            peak_method=long.peak_method,
            why_not=long.why_not,
        ),
        mass_by_head=tuple(tuple(row) for row in found.mass.tolist()),
        best_by_head=tuple(tuple(row) for row in found.best.tolist()),
        lost=found.lost,
    )
