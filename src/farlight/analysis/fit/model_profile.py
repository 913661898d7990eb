"""Profiles of all layers of a model from one full-attention pass over passages, ready to be fitted to any target.

An observer on the model's attention calls adds every layer's q and k to a `LayerProfile`; routers, which cannot be derived from
a profile, are measured on a few passages by `CandidateMeasurements`. Options are derived later, once for each set of families.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from farlight.analysis.fit.candidates import parse_candidates
from farlight.analysis.fit.fit import head_options
from farlight.analysis.fit.frontier import Option
from farlight.analysis.fit.measurements import CandidateMeasurements
from farlight.analysis.fit.profile import LayerProfile
from farlight.analysis.loss.fidelity import BATCH_TOKENS, last_hidden_states
from farlight.errors import UnsupportedError
from farlight.hf.interface import Observation, use_pattern
from farlight.hf.layers import attention_layers
from farlight.patterns import full
from farlight.patterns.algebra import looks_back
from farlight.patterns.expression import Pattern
from farlight.score.terms import KeyBias, Score

__all__ = ["ModelProfile", "profile_model"]

# Passages on which routers are measured: a router has no parameters that could overfit them.
_MEASURED_PASSAGES = 8


@dataclass(frozen=True)
class ModelProfile:
    """The attention of a model's heads over passages.

    Attributes:
        model: the model that read them.
        ids: `(passages, tokens)` token ids.
        numbers: the layer numbers, in rising order.
        profiles, measurements: of each layer in that order.
        families: names of the fixed candidate families.
    """

    model: Any
    ids: Tensor
    numbers: list[int]
    profiles: list[LayerProfile]
    measurements: list[CandidateMeasurements]
    families: list[str]
    _options: dict[tuple[tuple[str, ...], bool], tuple[list[list[list[Option]]], list[Tensor]]] = field(default_factory=dict)

    def options(self, families: Sequence[str] | None, even: bool) -> tuple[list[list[list[Option]]], list[Tensor]]:
        """By layer: the options of each head, and the links of each head's full attention `(H,)`; cached by arguments."""
        families = self.families if families is None else families
        key = (tuple(families), even)
        if key not in self._options:
            layers = zip(self.profiles, self.measurements, strict=True)
            results = [head_options(profile, measurements, families, even) for profile, measurements in layers]
            self._options[key] = [options for options, _ in results], [base_links for _, base_links in results]
        return self._options[key]


class _ProfileObserver:
    """Observer that adds the attention call of every layer to its profile, and those of some passages to its measurements.

    `numbers` maps id(module) to the layer number. Call `start_batch` before each forward pass.
    """

    def __init__(self, candidates: Sequence[str | Pattern] | None) -> None:
        self.candidates = candidates
        self.numbers: dict[int, int] = {}
        self.profiles: dict[int, LayerProfile] = {}
        self.measurements: dict[int, CandidateMeasurements] = {}
        self.measured_rows: list[int] = []
        self.calls = 0

    def start_batch(self, measured_rows: list[int]) -> None:
        """`measured_rows`: the batch items on which routers are measured."""
        self.measured_rows, self.calls = measured_rows, 0

    def __call__(self, call: Observation) -> None:
        number = self.numbers.get(id(call.module), self.calls)
        self.calls += 1
        base = None if call.own == full() else call.own
        if number not in self.profiles:
            self.profiles[number] = LayerProfile()
            _, expressions = parse_candidates(self.candidates, base is not None and looks_back(base))
            self.measurements[number] = CandidateMeasurements(expressions)
        options: dict[str, Any] = {"base": base, "scale": call.scale, "q_offset": call.q_offset}
        options |= call.terms
        self.profiles[number].add(call.q, call.k, **options)
        rows, measurements = self.measured_rows, self.measurements[number]
        if rows and measurements.expressions:
            if base is not None and base.varies_over_batch:
                raise UnsupportedError(
                    "the passages are padded, so each has a mask of its own; fit to passages of one length, unpadded."
                )
            options["score"] = _of_items(call.score, rows)
            measurements.add(call.q[rows], call.k[rows], **options)


def _of_items(score: Score | None, items: list[int]) -> Score | None:
    """The score of some batch items."""
    if score is None:
        return None
    terms = (
        KeyBias(term.bias[items]) if isinstance(term, KeyBias) and term.bias.shape[0] > 1 else term for term in score.terms
    )
    return Score(tuple(terms))


def profile_model(
    model: Any,
    ids: Tensor,
    candidates: Sequence[str | Pattern] | None = None,
    *,
    step: Callable[[str], None] = lambda label: None,
) -> ModelProfile:
    """Run `model` over `ids` `(passages, tokens)` with full attention, profiling every head and measuring routers.

    `candidates` as in `farlight.fit`; `step` is called with a label before each batch. Raises ArgumentError and PatternError
    for candidates that cannot be used (before the model runs), UnsupportedError for a model whose attention cannot be observed.
    """
    families, _ = parse_candidates(candidates, False)
    observer = _ProfileObserver(candidates)
    batch = max(1, BATCH_TOKENS // ids.shape[1])
    stride = max(1, ids.shape[0] // _MEASURED_PASSAGES)
    for start in range(0, ids.shape[0], batch):
        passages = ids[start : start + batch]
        observer.start_batch([row for row in range(passages.shape[0]) if (start + row) % stride == 0])
        step(f"reading: {start + passages.shape[0]} of {ids.shape[0]} passages")
        with use_pattern(model, None, observer=observer):
            observer.numbers.update((id(module), number) for number, module in attention_layers(model).items())
            last_hidden_states(model, passages)
    if not observer.profiles:
        raise UnsupportedError(
            f"{type(model).__name__} accepted another attention implementation but never called it; its attention cannot be "
            "fitted. Use a model whose layers call transformers' AttentionInterface."
        )
    numbers = sorted(observer.profiles)
    profiles = [observer.profiles[number] for number in numbers]
    return ModelProfile(model, ids, numbers, profiles, [observer.measurements[number] for number in numbers], families)
