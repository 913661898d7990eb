"""What a pattern loses on a real model: attention mass, hidden states and embeddings, sparse against full.

The model reads each batch of passages once with its own attention, while every layer's queries and keys are judged as
they pass; then once under each pattern. Mass is taken on the queries and keys of the full run, so that it speaks of the
pattern alone; the cosines compare the last hidden states and so include what errors do to later layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from farlight.analysis.candidates_by_layer import Judged, Subject, pattern_for, subjects
from farlight.analysis.loss.probabilities import sizes_of
from farlight.analysis.loss.retention import Retention, retentions
from farlight.analysis.loss.top_losses import KEPT, LostLink, of_each_head, told
from farlight.errors import UnsupportedError
from farlight.hf.interface import Observation, use_pattern
from farlight.hf.layers import attention_layers
from farlight.patterns import full
from farlight.patterns.algebra import looks_back
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router
from farlight.routing.gist_router import Gist, count_summaries

__all__ = ["BATCH_TOKENS", "Fidelity", "FidelityRun", "hidden", "measure_fidelity", "token_cosine"]

# Tokens that go through the model at once: enough to keep two cores busy, few enough for a laptop's memory.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Fidelity:
    """What one pattern keeps.

    `mass` and `best` are `(layers, heads)` float64, means over passages and rows; `best` is what the best pattern with
    as many links in that head and passage would keep. `links` and `own_links` count pairs per passage, averaged over
    layers, heads and passages: allowed by the pattern and the model, and by the model alone. `lost` are the heaviest links
    that full attention looks along and the pattern does not, over all layers, heads and passages, as `told` tells them.
    """

    mass: Tensor
    best: Tensor
    links: float
    own_links: float
    token_cosine: float
    pooled_cosine: float
    lost: tuple[LostLink, ...] = ()


@dataclass(frozen=True)
class FidelityRun:
    """The result for each pattern, and the first layer's attention on the first batch, for timing."""

    patterns: tuple[Fidelity, ...]
    first: Observation
    layers: int


def measure_fidelity(
    model: Any,
    ids: Tensor,
    patterns: Sequence[Judged | Subject],
    *,
    backend: str = "auto",
    lost: int = 0,
    words: Sequence[Sequence[str]] | None = None,
    step: Callable[[str], None] = lambda what: None,
) -> FidelityRun:
    """Run `model` over passages `ids` `(passages, length)` with full attention and under each of `patterns`.

    `model` is a Hugging Face model whose output has `last_hidden_state`; it is run in the mode it is in, so call
    `.eval()` first. Patterns may be routers, or mappings {layer number: pattern or router}. `lost` is how many of the heaviest
    lost links to list for each, `words[passage][position]` the words at their ends. `step` is called with a few words
    before each pass of the model. Raises UnsupportedError for a model whose attention cannot be replaced.
    """
    judged = subjects(patterns)
    sums = [_Sums(lost) for _ in judged]
    kept = KEPT if lost else 0
    first: Observation | None = None
    layers = passages = 0
    numbers: dict[int, int] = {}
    for batch in ids.split(max(1, BATCH_TOKENS // ids.shape[1])):
        seen: list[list[_Layer]] = []
        spoken = None if words is None else words[passages : passages + batch.shape[0]]

        def observe(
            call: Observation,
            seen: list[list[_Layer]] = seen,
            before: int = passages,
            spoken: Sequence[Sequence[str]] | None = spoken,
        ) -> None:
            nonlocal first
            if first is None:
                first = call
            base = None if call.own == full() else call.own
            number = numbers.get(id(call.module), len(seen))
            chosen = [pattern_for(one.at(number), call.q, call.k, call.key_real) for one in judged]
            asked = [full() if pattern is None else pattern for pattern in chosen]
            found = retentions(
                call.q, call.k, asked, base=base, scale=call.scale, q_offset=call.q_offset, lost=kept, by_head=True
            )
            # Summaries that are heard are links too.
            more = [heard_for(one.at(number), pattern, call) for one, pattern in zip(judged, asked, strict=True)]
            seen.append([_shed(one, len(seen), before, spoken, extra) for one, extra in zip(found, more, strict=True)])

        step("full attention")
        with use_pattern(model, None, observer=observe):
            numbers.update((id(module), number) for number, module in attention_layers(model).items())
            reference = hidden(model, batch)
        if not seen:
            raise UnsupportedError(
                f"{type(model).__name__} accepted another attention implementation but never called it; its attention "
                "cannot be replaced. Use a model whose layers call transformers' AttentionInterface."
            )
        layers, passages = len(seen), passages + batch.shape[0]
        for index, (one, total) in enumerate(zip(judged, sums, strict=True)):
            step(one.name)
            with use_pattern(model, one.chosen, backend=backend):
                total.add([layer[index] for layer in seen], reference, hidden(model, batch))
    assert first is not None
    return FidelityRun(tuple(total.finish() for total in sums), first, layers)


def hidden(model: Any, ids: Tensor) -> Tensor:
    """The last hidden states, `(B, N, features)` in float32 at least."""
    # No cache: a causal model would otherwise keep keys and values that nobody reads.
    extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad():
        hidden: Tensor = model(input_ids=ids.to(model.device), attention_mask=torch.ones_like(ids).to(model.device), **extra)[0]
    return hidden if hidden.dtype == torch.float64 else hidden.float()


def token_cosine(one: Tensor, other: Tensor) -> float:
    """Mean cosine of hidden states `(B, N, features)`, token by token."""
    return float(torch.cosine_similarity(one, other, dim=-1).mean())


@dataclass(frozen=True)
class _Layer:
    """What is needed of a `Retention` once its layer has passed: `(B, H)` each."""

    mass: Tensor
    best: Tensor
    links: Tensor
    own_links: Tensor
    lost: tuple[LostLink, ...]


def heard_for(chosen: Pattern | Router | None, pattern: Pattern, call: Observation) -> Tensor | int:
    """How many summaries are heard beside the pattern, `(B or 1, H or 1)`; 0 where none are."""
    if not isinstance(chosen, Gist):
        return 0
    back = looks_back(call.own)
    seen = pattern if call.own == full() else call.own & pattern
    return count_summaries(seen, chosen.block, sizes_of(call.q, call.k, call.q_offset), back)


def _shed(found: Retention, layer: int, before: int, words: Sequence[Sequence[str]] | None, extra: Tensor | int) -> _Layer:
    """`before` passages were read in earlier batches."""
    lost = () if found.lost is None else found.lost.links(layer=layer, words=words)
    lost = tuple(replace(link, text=link.text + before) for link in lost)
    return _Layer(found.mass.double(), found.best, found.links + extra, found.base_links, lost)


class _Sums:
    """Sums over passages for one pattern."""

    def __init__(self, lost: int) -> None:
        self.passages = 0
        self.most, self.lost = lost, list[LostLink]()
        self.mass: Tensor | float = 0.0
        self.best: Tensor | float = 0.0
        self.links = self.own_links = self.token = self.pooled = 0.0

    def add(self, layers: Sequence[_Layer], full_run: Tensor, sparse_run: Tensor) -> None:
        self.passages += full_run.shape[0]
        self.mass = self.mass + torch.stack([layer.mass.sum(0) for layer in layers])
        self.best = self.best + torch.stack([layer.best.sum(0) for layer in layers])
        self.links += sum(layer.links.double().mean(1).sum().item() for layer in layers) / len(layers)
        self.own_links += sum(layer.own_links.double().mean(1).sum().item() for layer in layers) / len(layers)
        self.lost = of_each_head([*self.lost, *(link for layer in layers for link in layer.lost)], KEPT)
        self.token += torch.cosine_similarity(full_run, sparse_run, dim=-1).mean(1).sum().item()
        self.pooled += torch.cosine_similarity(full_run.mean(1), sparse_run.mean(1), dim=-1).sum().item()

    def finish(self) -> Fidelity:
        assert isinstance(self.mass, Tensor)
        assert isinstance(self.best, Tensor)
        n = self.passages
        means = (self.links / n, self.own_links / n, self.token / n, self.pooled / n)
        return Fidelity(self.mass / n, self.best / n, *means, told(self.lost, self.most))
