"""The audit of a model on a text: for each pattern its fidelity (`loss.fidelity`) and its cost (`cost`), as one result.

Fidelity is measured in passages of the model's own length, where full attention can be run for comparison. Cost is measured
there and at the length of the whole text, on one layer. Printing and HTML are elsewhere (`farlight.cli.audit`,
`farlight.report`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from farlight.analysis.candidates_by_layer import Judged, Subject, subjects
from farlight.analysis.cost import (
    AttentionShape,
    Cost,
    cost_at_length,
    cost_in_passages,
    full_seconds,
    mean_cost,
    timed_length,
)
from farlight.analysis.loss.fidelity import BATCH_TOKENS, Fidelity, FidelityRun, measure_fidelity
from farlight.analysis.loss.language import LanguageLoss
from farlight.analysis.loss.shared_losses import SharedLoss, shared_losses
from farlight.analysis.loss.top_losses import LostLink, words_of
from farlight.analysis.passages import Passages
from farlight.errors import PatternError
from farlight.patterns import full
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router

__all__ = ["Audit", "LongText", "PatternAudit", "audit", "steps"]


@dataclass(frozen=True)
class LongText:
    """Cost of one pattern on a long text, all layers together; every field is of one length, `tokens`.

    Attributes:
        tokens: the whole text, or the largest power of two whose q, k, v and output take at most 1 GiB in one layer.
        links, full_links: pairs of the pattern and of full attention, summed over layers and heads.
        backend: the backend that was timed.
        seconds, peak_bytes: of one layer with random q, k and v; seconds are a median multiplied by the layers, memory is used
            by one layer at a time.
        spread, runs: half the interquartile range of the seconds, and the number of calls that the median is taken of.
        full_seconds, full_spread: the same for full attention under the model's own mask, scaled by the square from the length
            at which it was measured (`Audit.full_measured_at`).
        peak_method: how memory was measured.
        why_not: why the pattern could not be measured; None if it was.
    """

    tokens: int
    links: int
    full_links: int
    backend: str
    seconds: float
    spread: float
    runs: int
    full_seconds: float
    full_spread: float
    peak_bytes: int
    peak_method: str
    why_not: str | None = None

    @property
    def speedup(self) -> float:
        """full_seconds / seconds; 0 where the pattern was not measured."""
        return self.full_seconds / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class PatternAudit:
    """Fidelity and cost of one pattern.

    Attributes:
        pattern: its name.
        density: links over the model's own links, in a passage.
        links: allowed pairs of all layers and heads in one passage.
        backend: the backend that ran in passages ("auto" resolved).
        predicted_speedup: of sparse against full attention, from `farlight.explain`.
        measured_speedup: torch's full attention (of the model's own mask) over one attention layer under `backend`; about 1
            where "auto" chose full attention. Medians of `timed_runs` calls, taken in turn.
        seconds, spread, full_seconds, full_spread: those medians for one layer, and half their interquartile ranges.
        peak_bytes: memory of that layer beside q, k and v.
        mass: share of full attention probability kept, mean over layers, heads and rows.
        worst_head, worst_head_at: the smallest mass of a head, and its (layer, head).
        best: the most that as many links could keep, mean over layers and heads.
        token_cosine, pooled_cosine: of last hidden states, sparse against full, by token and of their mean over a passage.
        long_text: cost at the length of the whole text, or at the longest that is timed.
        language: next-token loss on the second half of each passage; None unless the model is a causal language model.
        mass_by_head, best_by_head: by layer and head.
        lost: the heaviest lost links, with words where a tokenizer was given.

    Where layers have different patterns, times are means over layers and memory is the largest.
    """

    pattern: str
    density: float
    links: int
    backend: str
    predicted_speedup: float
    measured_speedup: float
    seconds: float
    spread: float
    full_seconds: float
    full_spread: float
    timed_runs: int
    peak_bytes: int
    mass: float
    worst_head: float
    worst_head_at: tuple[int, int]
    best: float
    token_cosine: float
    pooled_cosine: float
    long_text: LongText
    language: LanguageLoss | None = None
    mass_by_head: tuple[tuple[float, ...], ...] = ()
    best_by_head: tuple[tuple[float, ...], ...] = ()
    lost: tuple[LostLink, ...] = ()

    @property
    def of_best(self) -> float:
        """mass / best: mass relative to that of the best pattern with as many links."""
        return self.mass / self.best if self.best else 0.0


@dataclass(frozen=True, repr=False)
class Audit:
    """The setting of an audit and its result for each pattern.

    Attributes:
        model, text: names. layers, heads, kv_heads, head_dim: of the model.
        own: str of the model's own mask, a pattern.
        tokens: of the whole text. passages, passage_tokens: number and length of the passages.
        threads: torch threads. backend: as requested.
        full_measured_at: length at which full attention was timed; longer ones are extrapolated by the square.
        shared_losses: the heaviest links that any pattern loses, each once, with the patterns that lose it.
        patterns: one result each, in the order given.
    """

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
    shared_losses: tuple[SharedLoss, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable fields, with derived ones: `of_best`, `speedup`, and for a language model `loss`, `loss_full`,
        `lost` and the two perplexities."""
        fields = asdict(self)
        for row, pattern in zip(fields["patterns"], self.patterns, strict=True):
            row["of_best"] = pattern.of_best
            row["long_text"]["speedup"] = pattern.long_text.speedup
            if pattern.language is not None:
                language = pattern.language
                row |= {"loss": language.loss, "loss_full": language.loss_full, "loss_lost": language.lost}
                row |= {"perplexity": language.perplexity, "perplexity_full": language.perplexity_full}
        return fields

    def __repr__(self) -> str:
        return (
            f"<Audit of {self.model}: {len(self.patterns)} patterns, {self.passages} passages of {self.passage_tokens} tokens>"
        )

    def _repr_html_(self) -> str:
        from farlight.analysis.notebook import audit_html

        return audit_html(self)


def steps(passages: Passages, patterns: Sequence[Judged | Subject]) -> list[str]:
    """The labels that `audit` passes to `step`, in order, repeated where the work is repeated; for progress bars."""
    batches = -(-passages.count // max(1, BATCH_TOKENS // passages.length))
    candidates = subjects(patterns)
    names = [candidate.name for candidate in candidates]
    long = [f"long text: {candidate.name}" for candidate in candidates for _ in _layers_timed(candidate)]
    return ["full attention", *names] * batches + [f"timed: {name}" for name in (*names, "full attention")] + long


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
    step: Callable[[str], None] = lambda label: None,
) -> Audit:
    """Measure fidelity and cost of `patterns` on a Hugging Face `model` that reads `passages`.

    Args:
        model: a causal language model, or an encoder whose first output is the last hidden states, in evaluation mode.
        passages: from `cut_passages`; cost is measured at the length `passages.tokens` too.
        patterns: patterns, routers, or mappings {layer number: one of these}; each is intersected with the model's own mask.
        backend: as in `farlight.attention`; also for running the model under a pattern.
        tokenizer: for the words at the ends of lost links and of predictions that suffered; None: without words.
        lost: number of lost links and of such predictions to list for each pattern.
        model_name, text_name: names in the result; model_name defaults to the model's class.
        step: called with a label before each piece of work, those of `steps(passages, patterns)`.

    Raises:
        PatternError: no pattern, or one that does not fit the passages. UnsupportedError: the model's attention cannot
        be replaced.
    """
    if not patterns:
        raise PatternError("no pattern was given; an audit needs at least one, such as window(32).")
    candidates = subjects(patterns)
    words = None if tokenizer is None else [words_of(row, tokenizer) for row in passages.ids.tolist()]
    run = measure_fidelity(model, passages.ids, candidates, backend=backend, lost=lost, words=words, step=step)
    call = run.first_call
    q, k, v = call.q, call.k, call.v
    layer = AttentionShape(q.shape[1], k.shape[1], q.shape[3], v.shape[3], q.dtype, q.device, call.own, call.scale)
    costs, measured_at = _measure_costs(layer, candidates, run, passages.tokens, backend, step)
    languages = [fidelity.language and fidelity.language.named(passages.ids, tokenizer, words) for fidelity in run.patterns]
    rows = [
        _pattern_audit(candidate, fidelity, language, passage_cost, long_cost, run.layers, layer.heads)
        for candidate, fidelity, language, (passage_cost, long_cost) in zip(
            candidates, run.patterns, languages, costs, strict=True
        )
    ]
    return Audit(
        model=model_name or type(model).__name__,
        text=text_name,
        layers=run.layers,
        heads=layer.heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        own=str(layer.base),
        tokens=passages.tokens,
        passages=passages.count,
        passage_tokens=passages.length,
        threads=torch.get_num_threads(),
        backend=backend,
        full_measured_at=measured_at,
        patterns=tuple(rows),
        shared_losses=shared_losses(candidates, [row.lost for row in rows], passages.length, lost),
    )


def _measure_costs(
    layer: AttentionShape,
    candidates: Sequence[Subject],
    run: FidelityRun,
    tokens: int,
    backend: str,
    step: Callable[[str], None],
) -> tuple[list[tuple[Cost, Cost]], int]:
    """((cost in passages, cost at the length of the text) of each candidate, length at which full attention was timed)."""
    tensors = run.first_call.q, run.first_call.k, run.first_call.v
    by_layer = []
    for candidate in candidates:
        step(f"timed: {candidate.name}")
        patterns = _timed(candidate, run.layers)
        by_layer.append([(pattern, cost_in_passages(layer, pattern, tensors, backend=backend)) for pattern in patterns])
    routed = max(sum(cost.seconds for pattern, cost in costs if isinstance(pattern, Router)) for costs in by_layer)
    step("timed: full attention")
    timed_tokens = timed_length(layer, tokens, routed / tensors[0].shape[0], tensors[0].shape[2])
    long_full, measured_at = full_seconds(layer, timed_tokens)
    long_tensors, long_costs = layer.random(timed_tokens), []
    for candidate, timed_layers in zip(candidates, by_layer, strict=True):
        costs = []
        for number, (pattern, _) in enumerate(timed_layers):
            if number in _layers_timed(candidate):
                step(f"long text: {candidate.name}")
            costs.append(cost_at_length(layer, pattern, long_tensors, long_full, backend=backend, layers=len(timed_layers)))
        long_costs.append(mean_cost(costs))
    passage_costs = [mean_cost([cost for _, cost in costs]) for costs in by_layer]
    return list(zip(passage_costs, long_costs, strict=True)), measured_at


def _timed(candidate: Subject, layers: int) -> list[Pattern | Router]:
    """The patterns to be timed: one for all layers, or one per layer where they differ; `full()` for a layer left alone."""
    numbers = range(layers) if isinstance(candidate.chosen, Mapping) else range(1)
    patterns = [candidate.at(number) for number in numbers]
    return [full() if pattern is None else pattern for pattern in patterns]


def _layers_timed(candidate: Subject) -> list[int]:
    """The layers whose timing is a step of its own: those that a mapping gives a pattern, or one for all layers."""
    layers = candidate.chosen if isinstance(candidate.chosen, Mapping) else {}
    return [number for number, pattern in layers.items() if pattern is not None] or [0]


def _pattern_audit(
    candidate: Subject,
    fidelity: Fidelity,
    language: LanguageLoss | None,
    passage_cost: Cost,
    long_cost: Cost,
    layers: int,
    heads: int,
) -> PatternAudit:
    worst = int(fidelity.mass.argmin())
    assert fidelity.best is not None  # `measure_fidelity` measures it unless told not to
    num_plans = 1 if isinstance(candidate.chosen, Pattern) else layers  # one pattern for all layers is planned once
    return PatternAudit(
        pattern=candidate.name,
        density=fidelity.links / fidelity.base_links if fidelity.base_links else 0.0,
        links=round(fidelity.links * layers * heads),
        backend=passage_cost.backend,
        predicted_speedup=passage_cost.predicted_speedup,
        measured_speedup=passage_cost.measured_speedup,
        seconds=passage_cost.seconds,
        spread=passage_cost.spread,
        full_seconds=passage_cost.full_seconds,
        full_spread=passage_cost.full_spread,
        timed_runs=passage_cost.runs,
        peak_bytes=passage_cost.peak_bytes,
        mass=fidelity.mass.mean().item(),
        worst_head=fidelity.mass.min().item(),
        worst_head_at=(worst // heads, worst % heads),
        best=fidelity.best.mean().item(),
        token_cosine=fidelity.token_cosine,
        pooled_cosine=fidelity.pooled_cosine,
        long_text=LongText(
            tokens=long_cost.tokens,
            links=round(long_cost.links * layers * heads),
            full_links=round(long_cost.base_links * layers * heads),
            backend=long_cost.backend,
            seconds=long_cost.plan_seconds * num_plans + long_cost.seconds * layers,
            spread=long_cost.spread * layers,
            runs=long_cost.runs,
            full_seconds=long_cost.full_seconds * layers,
            full_spread=long_cost.full_spread * layers,
            peak_bytes=long_cost.peak_bytes,
            peak_method=long_cost.peak_method,
            why_not=long_cost.why_not,
        ),
        language=language,
        mass_by_head=tuple(tuple(row) for row in fidelity.mass.tolist()),
        best_by_head=tuple(tuple(row) for row in fidelity.best.tolist()),
        lost=fidelity.lost,
    )
