"""What a pattern loses on a real model: attention mass, hidden states and embeddings, sparse against full.

The model reads each batch of passages once with its own attention, while every layer's queries and keys are judged as
they pass; then once under each pattern. Mass is taken on the queries and keys of the full run, so that it speaks of the
pattern alone; the cosines compare the last hidden states and so include what errors do to later layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farlight.errors import UnsupportedError
from farlight.hf.interface import Observation, use_pattern
from farlight.patterns import full
from farlight.patterns.base import Pattern
from farlight.understanding.retention import Retention, retentions

__all__ = ["BATCH_TOKENS", "Fidelity", "FidelityRun", "measure_fidelity"]

# Tokens that go through the model at once: enough to keep two cores busy, few enough for a laptop's memory.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Fidelity:
    """What one pattern keeps.

    `mass` and `best` are `(layers, heads)` float64, means over passages and rows; `best` is what the best pattern with
    as many links in that head and passage would keep. `links` and `own_links` count pairs per passage, averaged over
    layers, heads and passages: allowed by the pattern and the model, and by the model alone.
    """

    mass: Tensor
    best: Tensor
    links: float
    own_links: float
    token_cosine: float
    pooled_cosine: float


@dataclass(frozen=True)
class FidelityRun:
    """The result for each pattern, and the first layer's attention on the first batch, for timing."""

    patterns: tuple[Fidelity, ...]
    first: Observation
    layers: int


def measure_fidelity(
    model: Any,
    ids: Tensor,
    patterns: Sequence[Pattern],
    *,
    backend: str = "auto",
    step: Callable[[str], None] = lambda what: None,
) -> FidelityRun:
    """Run `model` over passages `ids` `(passages, length)` with full attention and under each pattern.

    `model` is a Hugging Face model whose output has `last_hidden_state`; it is run in the mode it is in, so call
    `.eval()` first. `step` is called with a few words before each pass of the model. Raises UnsupportedError for a
    model whose attention cannot be replaced.
    """
    sums = [_Sums() for _ in patterns]
    first: Observation | None = None
    layers = 0
    for batch in ids.split(max(1, BATCH_TOKENS // ids.shape[1])):
        seen: list[list[_Layer]] = []

        def observe(call: Observation, seen: list[list[_Layer]] = seen) -> None:
            nonlocal first
            if first is None:
                first = call
            base = None if call.own == full() else call.own
            found = retentions(call.q, call.k, patterns, base=base, scale=call.scale, q_offset=call.q_offset)
            seen.append([_shed(one) for one in found])

        step("full attention")
        with use_pattern(model, None, observer=observe):
            reference = _hidden(model, batch)
        if not seen:
            raise UnsupportedError(
                f"{type(model).__name__} accepted another attention implementation but never called it; its attention "
                "cannot be replaced. Use a model whose layers call transformers' AttentionInterface."
            )
        layers = len(seen)
        for index, (pattern, total) in enumerate(zip(patterns, sums, strict=True)):
            step(repr(pattern))
            with use_pattern(model, pattern, backend=backend):
                total.add([layer[index] for layer in seen], reference, _hidden(model, batch))
    assert first is not None
    return FidelityRun(tuple(total.finish() for total in sums), first, layers)


def _hidden(model: Any, ids: Tensor) -> Tensor:
    """The last hidden states, `(B, N, features)` in float32 at least."""
    # No cache: a causal model would otherwise keep keys and values that nobody reads.
    extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad():
        hidden: Tensor = model(input_ids=ids.to(model.device), attention_mask=torch.ones_like(ids).to(model.device), **extra)[0]
    return hidden if hidden.dtype == torch.float64 else hidden.float()


@dataclass(frozen=True)
class _Layer:
    """What is needed of a `Retention` once its layer has passed: `(B, H)` each."""

    mass: Tensor
    best: Tensor
    links: Tensor
    own_links: Tensor


def _shed(found: Retention) -> _Layer:
    return _Layer(found.mass.double(), found.best, found.links, found.base_links)


class _Sums:
    """Sums over passages for one pattern."""

    def __init__(self) -> None:
        self.passages = 0
        self.mass: Tensor | float = 0.0
        self.best: Tensor | float = 0.0
        self.links = self.own_links = self.token = self.pooled = 0.0

    def add(self, layers: Sequence[_Layer], full_run: Tensor, sparse_run: Tensor) -> None:
        self.passages += full_run.shape[0]
        self.mass = self.mass + torch.stack([layer.mass.sum(0) for layer in layers])
        self.best = self.best + torch.stack([layer.best.sum(0) for layer in layers])
        self.links += sum(layer.links.double().mean(1).sum().item() for layer in layers) / len(layers)
        self.own_links += sum(layer.own_links.double().mean(1).sum().item() for layer in layers) / len(layers)
        self.token += torch.cosine_similarity(full_run, sparse_run, dim=-1).mean(1).sum().item()
        self.pooled += torch.cosine_similarity(full_run.mean(1), sparse_run.mean(1), dim=-1).sum().item()

    def finish(self) -> Fidelity:
        assert isinstance(self.mass, Tensor)
        assert isinstance(self.best, Tensor)
        n = self.passages
        return Fidelity(self.mass / n, self.best / n, self.links / n, self.own_links / n, self.token / n, self.pooled / n)
