"""Fidelity of a model under a pattern: attention mass kept, and hidden states, embeddings and loss against full attention.

For each batch of passages the model runs once with its own attention, with an observer that measures the retention of every
candidate in every layer on that run's q and k; then once under each candidate. So mass depends on the pattern alone, while the
cosines of last hidden states and a causal language model's loss include how errors of early layers propagate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from farlight.analysis.candidates_by_layer import Judged, Subject, pattern_for, subjects
from farlight.analysis.loss.kernel_shares import KernelShares, kept_share
from farlight.analysis.loss.language import LanguageLoss, LanguageReader, LossSums
from farlight.analysis.loss.probabilities import sizes_of
from farlight.analysis.loss.retention import Retention, retentions
from farlight.analysis.loss.top_losses import LINKS_PER_HEAD, LostLink, heaviest_per_head, top_losses
from farlight.errors import UnsupportedError
from farlight.hf.interface import Observation, use_pattern
from farlight.hf.layers import attention_layers
from farlight.patterns import causal, full
from farlight.patterns.algebra import looks_back
from farlight.patterns.expression import Pattern
from farlight.plan.build import count_pairs
from farlight.routing.base import Router
from farlight.routing.gist_router import Gist, count_summaries

__all__ = ["BATCH_TOKENS", "Fidelity", "FidelityRun", "last_hidden_states", "measure_fidelity", "token_cosine"]

# Tokens per forward pass of the model: enough to keep two cores busy, few enough for a laptop's memory.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Fidelity:
    """Fidelity of one candidate.

    Attributes:
        mass: `(layers, heads)` float64, attention probability kept, mean over passages and rows.
        best: `(layers, heads)` float64, what the best pattern with as many links in that head and passage keeps; None with
            `best=False`.
        links: pairs in one passage that pattern and model both allow, mean over layers, heads and passages; summaries count.
        base_links: the same for the pairs of full attention under the model's own mask.
        token_cosine: cosine of last hidden states, sparse against full, mean over tokens and passages.
        pooled_cosine: cosine of their means over a passage, mean over passages.
        lost: the heaviest links outside the pattern over all layers, heads and passages, reduced by `top_losses`.
        language: next-token loss; None for a model without a language head or with attention that is not causal.
    """

    mass: Tensor
    best: Tensor | None
    links: float
    base_links: float
    token_cosine: float
    pooled_cosine: float
    lost: tuple[LostLink, ...] = ()
    language: LanguageLoss | None = None


@dataclass(frozen=True)
class FidelityRun:
    """`Fidelity` of each candidate; the first layer's attention call on the first batch, for timing; the number of layers."""

    patterns: tuple[Fidelity, ...]
    first_call: Observation
    layers: int


def measure_fidelity(
    model: Any,
    ids: Tensor,
    patterns: Sequence[Judged | Subject],
    *,
    backend: str = "auto",
    best: bool = True,
    lost: int = 0,
    words: Sequence[Sequence[str]] | None = None,
    step: Callable[[str], None] = lambda label: None,
) -> FidelityRun:
    """Run `model` over passages `ids` with full attention and under each of `patterns`.

    Args:
        model: a Hugging Face causal language model, or one whose first output is the last hidden states; call `.eval()` first.
        ids: `(passages, length)` int64.
        patterns: patterns, routers, or mappings {layer number: pattern or router}.
        backend: as in `farlight.attention`.
        best: measure what the best patterns would keep, which forms every probability. Without it, and with `lost=0`, mass and
            links come from the sparse kernels.
        lost: number of heaviest lost links, and of predictions that suffered most, to list for each pattern.
        words: `words[passage][position]`, the words at the ends of those links.
        step: called with a label before each pass of the model.

    Raises UnsupportedError for a model whose attention cannot be replaced.
    """
    candidates = subjects(patterns)
    sums = [_FidelitySums(lost) for _ in candidates]
    lost_per_head = LINKS_PER_HEAD if lost else 0
    shares = None if best or lost else KernelShares()
    first_call: Observation | None = None
    num_layers = num_passages = 0
    reader = LanguageReader(model)
    for batch in ids.split(max(1, BATCH_TOKENS // ids.shape[1])):
        batch_words = None if words is None else words[num_passages : num_passages + batch.shape[0]]
        observer = _RetentionObserver(candidates, lost_per_head, num_passages, batch_words, shares)
        step("full attention")
        with use_pattern(model, None, observer=observer):
            observer.numbers = {id(module): number for number, module in attention_layers(model).items()}
            reference, full_losses = reader(batch)
        if not observer.records:
            raise UnsupportedError(
                f"{type(model).__name__} accepted another attention implementation but never called it; its attention "
                "cannot be replaced. Use a model whose layers call transformers' AttentionInterface."
            )
        if first_call is None:
            first_call = observer.first_call
            if first_call is not None and _sees_later_keys(first_call):
                reader.with_loss = False  # tokens see what they predict
        num_layers, num_passages = len(observer.records), num_passages + batch.shape[0]
        for index, (candidate, candidate_sums) in enumerate(zip(candidates, sums, strict=True)):
            step(candidate.name)
            with use_pattern(model, candidate.chosen, backend=backend):
                states, losses = reader(batch)
            candidate_sums.add([layer[index] for layer in observer.records], reference, states)
            if full_losses is not None and losses is not None:
                candidate_sums.language.add(batch, full_losses, losses)
    assert first_call is not None
    return FidelityRun(tuple(candidate_sums.finish() for candidate_sums in sums), first_call, num_layers)


def last_hidden_states(model: Any, ids: Tensor) -> Tensor:
    """The last hidden states of `ids` `(B, N)`, `(B, N, features)` in float32, or float64 where the model gives float64."""
    return LanguageReader(model, with_loss=False)(ids)[0]


def token_cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine similarity of two `(B, N, features)` tensors over tokens."""
    return float(torch.cosine_similarity(a, b, dim=-1).mean())


@dataclass(frozen=True)
class _LayerRecord:
    """The part of a layer's `Retention` that outlives the layer, `(B, H)` tensors; its rows and histogram are dropped."""

    mass: Tensor
    best: Tensor | None
    links: Tensor
    base_links: Tensor
    lost: tuple[LostLink, ...]


class _RetentionObserver:
    """Observer of one full-attention pass: `records[layer][candidate]`, from every layer's q and k.

    `numbers` maps id(module) to the layer number; set once `use_pattern` has found the model's attention layers.
    `first_passage`: the number of passages in earlier batches. `shares`: measure by the sparse kernels.
    """

    def __init__(
        self,
        candidates: Sequence[Subject],
        lost_per_head: int,
        first_passage: int,
        words: Sequence[Sequence[str]] | None,
        shares: KernelShares | None,
    ) -> None:
        self.candidates, self.lost_per_head, self.shares = candidates, lost_per_head, shares
        self.first_passage, self.words = first_passage, words
        self.numbers: dict[int, int] = {}
        self.records: list[list[_LayerRecord]] = []
        self.first_call: Observation | None = None

    def __call__(self, call: Observation) -> None:
        if self.first_call is None:
            self.first_call = call
        number = self.numbers.get(id(call.module), len(self.records))
        choices = [candidate.at(number) for candidate in self.candidates]
        if self.shares is not None:
            self.records.append(_records_by_kernels(self.shares, call, choices))
            return
        base = None if call.own == full() else call.own
        chosen = [pattern_for(choice, call.q, call.k, call.key_real) for choice in choices]
        patterns = [full() if pattern is None else pattern for pattern in chosen]
        options: dict[str, Any] = {"base": base, "scale": call.scale, "q_offset": call.q_offset}
        options |= call.terms
        results = retentions(call.q, call.k, patterns, lost=self.lost_per_head, by_head=True, without_sink=False, **options)
        extra = [summary_links(choice, pattern, call) for choice, pattern in zip(choices, patterns, strict=True)]
        self.records.append([self._record(result, links) for result, links in zip(results, extra, strict=True)])

    def _record(self, result: Retention, extra_links: Tensor | int) -> _LayerRecord:
        lost = () if result.lost is None else result.lost.links(layer=len(self.records), words=self.words)
        lost = tuple(replace(link, text=link.text + self.first_passage) for link in lost)
        return _LayerRecord(result.mass.double(), result.best, result.links + extra_links, result.base_links, lost)


def _records_by_kernels(
    shares: KernelShares, call: Observation, choices: Sequence[Pattern | Router | None]
) -> list[_LayerRecord]:
    """A record of each choice, without `best` and lost links."""
    whole, records = shares.full(call), []
    for choice in choices:
        under = shares.under(call, choice)
        sparse = whole if under is None else under
        links = sparse.links + summary_links(choice, sparse.pattern, call)
        records.append(_LayerRecord(kept_share(sparse.lse, whole.lse), None, links, whole.links, ()))
    return records


def _sees_later_keys(call: Observation) -> bool:
    """Whether the model's own mask allows a key after its query."""
    sizes = sizes_of(call.q, call.k, call.q_offset)
    return count_pairs(call.own - causal(), sizes) > 0


def summary_links(choice: Pattern | Router | None, pattern: Pattern, call: Observation) -> Tensor | int:
    """Number of block summaries attended beside `pattern`, `(B or 1, H or 1)` int64; 0 unless `choice` is a `Gist`."""
    if not isinstance(choice, Gist):
        return 0
    allowed = pattern if call.own == full() else call.own & pattern
    return count_summaries(allowed, choice.block, sizes_of(call.q, call.k, call.q_offset), looks_back(call.own))


class _FidelitySums:
    """Running sums of one candidate over passages. `max_lost`: the number of lost links to report."""

    def __init__(self, max_lost: int) -> None:
        self.passages = 0
        self.max_lost, self.lost = max_lost, list[LostLink]()
        self.mass: Tensor | float = 0.0
        self.best: dict[int, Tensor] = {}
        self.links = self.base_links = self.token_cosine = self.pooled_cosine = 0.0
        self.language = LossSums()

    def add(self, layers: Sequence[_LayerRecord], full_states: Tensor, sparse_states: Tensor) -> None:
        """Add a batch: a record per layer, and last hidden states `(B, N, features)` of the full and the sparse run."""
        self.passages += full_states.shape[0]
        self.mass = self.mass + torch.stack([layer.mass.sum(0) for layer in layers])
        for number, layer in enumerate(layers):
            if layer.best is not None:
                self.best[number] = self.best.get(number, 0) + layer.best.sum(0)
        self.links += sum(layer.links.double().mean(1).sum().item() for layer in layers) / len(layers)
        self.base_links += sum(layer.base_links.double().mean(1).sum().item() for layer in layers) / len(layers)
        self.lost = heaviest_per_head([*self.lost, *(link for layer in layers for link in layer.lost)], LINKS_PER_HEAD)
        self.token_cosine += torch.cosine_similarity(full_states, sparse_states, dim=-1).mean(1).sum().item()
        self.pooled_cosine += torch.cosine_similarity(full_states.mean(1), sparse_states.mean(1), dim=-1).sum().item()

    def finish(self) -> Fidelity:
        assert isinstance(self.mass, Tensor)
        n = self.passages
        best = torch.stack(list(self.best.values())) / n if self.best else None
        means = (self.links / n, self.base_links / n, self.token_cosine / n, self.pooled_cosine / n)
        lost = top_losses(self.lost, self.max_lost)
        return Fidelity(self.mass / n, best, *means, lost, self.language.finish(self.max_lost))
