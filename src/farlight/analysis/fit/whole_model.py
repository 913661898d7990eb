"""A whole model fitted to texts: every layer and head gets what it needs of one budget, judged on text not seen before.

The model reads the first texts with full attention, while the attention of every head is profiled. One walk over all
frontiers shares the links among all heads of all layers. What came out is then run on those texts and on the others: the
difference between the two is what the fit learned by heart.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from farlight.analysis.candidates_by_layer import Subject
from farlight.analysis.fit.candidates import sorted_out
from farlight.analysis.fit.fit import Fit, gathered, head_options, read_target
from farlight.analysis.fit.frontier import Option, allocate
from farlight.analysis.fit.measurements import Measured
from farlight.analysis.fit.profile import DENSE, Profile
from farlight.analysis.loss.fidelity import Fidelity, hidden, measure_fidelity, token_cosine
from farlight.analysis.passages import cut_passages
from farlight.errors import ArgumentError, UnsupportedError
from farlight.hf.fit_file import write_layers
from farlight.hf.interface import Observation, use_pattern
from farlight.hf.layers import attention_layers
from farlight.patterns import full
from farlight.patterns.algebra import looks_back
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router
from farlight.routing.notation import read_router

__all__ = ["ModelFit", "Reading", "fit_model", "fit_reading", "read_passages"]

# Passages on which candidates that are not grown are measured: they have nothing to learn by heart.
_MEASURED = 8
# Passages on which the weight of each layer is found.
_WEIGHED = 4


@dataclass(frozen=True)
class ModelFit:
    """A pattern for each head of each layer. Returned by `farlight.hf.fit`.

    Attributes:
        layers: by layer number, what each head looks at (see `farlight.Fit`).
        weights: by layer, how much a lost share counted there; all 1 unless asked for.
        trained, held_out: what it keeps and how far hidden states move, on the texts it was fitted to and on the others;
            held_out is None when no text was left for it.
        passages: (fitted to, judged on).
        model: what the saved file says of the model.
        gist: tokens in a block that is heard in summary where it is not seen; None: what is not seen is not heard.
    """

    layers: dict[int, Fit]
    weights: tuple[float, ...]
    trained: Fidelity
    held_out: Fidelity | None
    passages: tuple[int, int]
    passage_tokens: int
    model: dict[str, Any]
    gist: int | None = None

    @property
    def patterns(self) -> dict[int, Pattern | Router]:
        """By layer number, what `fl.hf.sparsify` and `fl.hf.use_pattern` take."""
        return patterns_of(self.layers, self.gist)

    @property
    def density(self) -> float:
        """Links of all layers and heads as a share of those of full attention, on the texts fitted to; without summaries."""
        links, base = (
            sum(float(x.sum()) for x in xs) for xs in zip(*((f.links, f.base_links) for f in self.fits), strict=True)
        )
        return links / max(1.0, base)

    @property
    def fits(self) -> list[Fit]:
        return list(self.layers.values())

    @property
    def kept_by_head(self) -> Tensor:
        """`(layers, heads)` float64: the share of full attention kept, on the texts it was fitted to."""
        return torch.stack([fit.kept for fit in self.fits])

    @property
    def density_by_head(self) -> Tensor:
        """`(layers, heads)` float64: links as a share of those of full attention in that head."""
        return torch.stack([fit.links / fit.base_links.clamp(min=1) for fit in self.fits])

    def save(self, path: str | os.PathLike[str] | None = None) -> str:
        """Write the patterns as JSON, which `fl.hf.sparsify(model, path)` loads. Returns the text."""
        told = self.model | {"passage_tokens": self.passage_tokens, "density": self.density, "kept": _mean(self.trained.mass)}
        if self.held_out is not None:
            told |= {"held_out_kept": _mean(self.held_out.mass), "held_out_token_cosine": self.held_out.token_cosine}
        return write_layers(self.patterns, path, model=told)

    def to_dict(self) -> dict[str, Any]:
        """Numbers and texts: the target met, both judgements, and kept share, density and family by layer and head."""
        judged = {
            name: {
                "kept": _mean(found.mass),
                "density": found.links / max(1.0, found.own_links),
                "token_cosine": found.token_cosine,
                "pooled_cosine": found.pooled_cosine,
            }
            for name, found in (("trained", self.trained), ("held_out", self.held_out))
            if found is not None
        }
        return {
            "density": self.density,
            "passages": list(self.passages),
            "weights": list(self.weights),
            "gist": self.gist,
            "kept_by_head": self.kept_by_head.tolist(),
            "density_by_head": self.density_by_head.tolist(),
            "families": [list(fit.families) for fit in self.fits],
            **judged,
        }

    def __str__(self) -> str:
        lines = [
            f"{self.density:.1%} of all links, fitted to {self.passages[0]} passages of {self.passage_tokens} tokens",
            f"{'':22}{'kept':>8}{'density':>9}{'token cosine':>14}{'pooled cosine':>15}",
        ]
        for name, found in (("fitted to", self.trained), ("held out", self.held_out)):
            if found is not None:
                lines.append(
                    f"{name:22}{_mean(found.mass):8.1%}{found.links / max(1.0, found.own_links):9.1%}"
                    f"{found.token_cosine:14.4f}{found.pooled_cosine:15.4f}"
                )
        if self.held_out is not None:
            gap = self.held_out.token_cosine - self.trained.token_cosine
            lines.append(f"{'difference':22}{_mean(self.held_out.mass) - _mean(self.trained.mass):8.1%}{'':9}{gap:14.4f}")
        for number, fit in self.layers.items():
            families = ", ".join(f"{fit.families.count(f)} {f}" for f in dict.fromkeys(fit.families))
            lines.append(f"layer {number:2d}: {fit.density:6.1%} of its links keep {fit.mass:6.1%}  ({families})")
        return "\n".join(lines)


def _mean(x: Tensor) -> float:
    return float(x.mean())


def fit_model(
    model: Any,
    texts: str | Sequence[str] | Tensor,
    *,
    tokenizer: Any = None,
    keep: float | None = None,
    density: float | None = None,
    candidates: Sequence[str | Pattern] | None = None,
    held_out: float = 0.5,
    length: int | None = None,
    passages: int | None = None,
    even: bool | None = None,
    weigh: bool = False,
    gist: int | None = None,
    step: Callable[[str], None] = lambda what: None,
) -> ModelFit:
    """For each layer and head the cheapest candidate such that `keep` of full attention is kept, or the most within `density`.

    As `farlight.fit`, over all heads of all layers at once: the budget goes where a link keeps most. The first texts are fitted
    to, the last ones only judged on; both results and their difference are reported.

    Args:
        model: an encoder or causal language model in evaluation mode.
        texts: token ids `(passages, tokens)`, or a text or texts, which `tokenizer` reads and which are cut into passages of
            `length` tokens (default: 512, or what the model reads), at most `passages` of them.
        keep, density, candidates: as in `farlight.fit`.
        held_out: share of the passages, the last ones, that is not fitted to.
        even: count a row's share as 1 - (1 - share)², so that no row is left with little; None = with `density`, where it is
            possible.
        weigh: count what is lost in a layer by how far it moves the model's output, measured layer by layer.
        gist: let every block of so many tokens of which a query sees nothing be heard in summary (`gist_attention`). The
            summaries, 1 / gist of all links at most, are part of `density`.
        step: called with a few words before each piece of work.

    Raises:
        ArgumentError: texts, targets or candidates that cannot be used. UnsupportedError: the model's attention cannot be
        replaced, or passages are padded.

    >>> import torch, farlight as fl
    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8)
    >>> model = BertModel(BertConfig(**sizes)).eval()
    >>> found = fl.hf.fit(model, torch.randint(0, 99, (4, 40)), density=0.2)
    >>> found.density <= 0.2, sorted(found.patterns)
    (True, [0, 1])
    >>> model = fl.hf.sparsify(model, found.patterns)
    """
    read_target(keep, density, bool(even))
    if isinstance(texts, Tensor):
        ids = texts
        if ids.dim() != 2 or ids.dtype.is_floating_point or not ids.numel():
            raise ArgumentError(
                f"texts is a tensor {tuple(ids.shape)} of {ids.dtype}; token ids (passages, tokens), int64, are needed."
            )
    else:
        if tokenizer is None:
            raise ArgumentError("texts are words, but there is no tokenizer to read them; pass tokenizer=, or token ids.")
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 512
        whole = texts if isinstance(texts, str) else "\n\n".join(texts)
        ids = cut_passages(whole, tokenizer, length or min(512, limit), passages or 1_000_000).ids
    if not 0.0 <= held_out < 1.0:
        raise ArgumentError(f"held_out = {held_out}: it is the share of passages to judge on, 0 <= held_out < 1.")
    apart = min(round(ids.shape[0] * held_out), ids.shape[0] - 1)
    reading = read_passages(model, ids[: ids.shape[0] - apart], candidates, step=step)
    rest = ids[ids.shape[0] - apart :] if apart else None
    return fit_reading(reading, rest, keep=keep, density=density, even=even, weigh=weigh, gist=gist, step=step)


@dataclass(frozen=True)
class Reading:
    """What a model's heads attended to while it read passages: the frontiers of all heads, ready to be fitted to any target."""

    model: Any
    ids: Tensor
    numbers: list[int]
    profiles: list[Profile]
    measured: list[Measured]
    families: list[str]
    _grown: dict[tuple[tuple[str, ...], bool], tuple[list[list[list[Option]]], list[Tensor]]] = field(default_factory=dict)

    def options(self, families: Sequence[str] | None, even: bool) -> tuple[list[list[list[Option]]], list[Tensor]]:
        """By layer: the options of each head, and the links of its full attention. Grown once for each set of families."""
        families = self.families if families is None else families
        key = (tuple(families), even)
        if key not in self._grown:
            found = [head_options(p, m, families, even) for p, m in zip(self.profiles, self.measured, strict=True)]
            self._grown[key] = [options for options, _ in found], [links for _, links in found]
        return self._grown[key]


def read_passages(
    model: Any,
    ids: Tensor,
    candidates: Sequence[str | Pattern] | None = None,
    *,
    step: Callable[[str], None] = lambda what: None,
) -> Reading:
    """Read all passages with full attention, profiling every head and measuring the candidates that cannot be grown."""
    profiles: dict[int, Profile] = {}
    measured: dict[int, Measured] = {}
    families, _ = sorted_out(candidates, False)  # what is wrong with them is said before the model runs
    batch = max(1, 4096 // ids.shape[1])
    every = max(1, ids.shape[0] // _MEASURED)
    numbers: dict[int, int] = {}
    for start in range(0, ids.shape[0], batch):
        rows = ids[start : start + batch]
        pick = [row for row in range(rows.shape[0]) if (start + row) % every == 0]
        place = 0

        def observe(call: Observation, pick: list[int] = pick) -> None:
            nonlocal place
            number = numbers.get(id(call.module), place)
            place += 1
            base = None if call.own == full() else call.own
            if number not in profiles:
                profiles[number] = Profile()
                measured[number] = Measured(sorted_out(candidates, base is not None and looks_back(base))[1])
            profiles[number].add(call.q, call.k, base=base, scale=call.scale, q_offset=call.q_offset)
            if pick and measured[number].expressions:
                if base is not None and base.varies_over_batch:
                    raise UnsupportedError(
                        "the passages are padded, so each has a mask of its own; fit to passages of one length, unpadded."
                    )
                measured[number].add(call.q[pick], call.k[pick], base=base, scale=call.scale, q_offset=call.q_offset)

        step(f"reading: {start + rows.shape[0]} of {ids.shape[0]} passages")
        with use_pattern(model, None, observer=observe):
            numbers.update((id(module), number) for number, module in attention_layers(model).items())
            hidden(model, rows)
    if not profiles:
        raise UnsupportedError(
            f"{type(model).__name__} accepted another attention implementation but never called it; its attention cannot be "
            "fitted. Use a model whose layers call transformers' AttentionInterface."
        )
    order = sorted(profiles)
    return Reading(model, ids, order, [profiles[number] for number in order], [measured[number] for number in order], families)


def fit_reading(
    reading: Reading,
    held_out: Tensor | None,
    *,
    keep: float | None = None,
    density: float | None = None,
    families: Sequence[str] | None = None,
    even: bool | None = None,
    weigh: bool = False,
    gist: int | None = None,
    judged: int = 16,
    step: Callable[[str], None] = lambda what: None,
) -> ModelFit:
    """Fit what was read and judge it on at most `judged` passages of `held_out`, and half as many of those read, taken evenly.

    `families` are those of the reading unless given; the rest is as in `farlight.hf.fit`.
    """
    model, ids, numbers = reading.model, reading.ids, reading.numbers
    if even is None:
        even = density is not None
    keep, density = read_target(keep, density, even)
    step("frontiers of all heads")
    options, base_links = reading.options(families, even)
    flat = [head for layer in options for head in layer]
    budget = None
    if density is not None:
        if gist is not None and density <= 1 / gist:
            raise ArgumentError(
                f"density = {density} with gist = {gist}: the summaries alone may take 1/{gist} of all links; allow more, or "
                "take larger blocks."
            )
        budget = (density - (0.0 if gist is None else 1 / gist)) * float(sum(links.sum() for links in base_links))

    def chosen(weights: Sequence[float]) -> dict[int, Fit]:
        spread = [weight for weight, layer in zip(weights, options, strict=True) for _ in layer]
        picked = iter(allocate(flat, keep=keep, links=budget, weights=spread))
        fits = [gathered(layer, [next(picked) for _ in layer], links) for layer, links in zip(options, base_links, strict=True)]
        return dict(zip(numbers, fits, strict=True))

    weights = [1.0] * len(options)
    layers = chosen(weights)
    if weigh:
        weights = _layer_weights(model, ids, layers, even, step)
        layers = chosen(weights)
    subject = Subject("fitted", patterns_of(layers, gist))
    backend = _backend(ids, gist is not None)
    step("judged on what it was fitted to")
    trained = measure_fidelity(model, _evenly(ids, -(-judged // 2)), [subject], backend=backend).patterns[0]
    apart = None
    if held_out is not None:
        step("judged on other text")
        apart = measure_fidelity(model, _evenly(held_out, judged), [subject], backend=backend).patterns[0]
    told = {"class": type(model).__name__, "type": getattr(model.config, "model_type", None), "layers": len(layers)}
    return ModelFit(
        layers,
        tuple(weights),
        trained,
        apart,
        (ids.shape[0], 0 if held_out is None else held_out.shape[0]),
        ids.shape[1],
        told | {"heads": len(flat) // max(1, len(layers))},
        gist,
    )


def patterns_of(layers: dict[int, Fit], gist: int | None) -> dict[int, Pattern | Router]:
    """By layer number a pattern or router, whose unseen blocks of `gist` tokens are heard in summary."""
    if gist is None:
        return {number: layer.pattern for number, layer in layers.items()}
    return {number: read_router(f"gist({layer.expression}, block={gist})") for number, layer in layers.items()}


def _layer_weights(model: Any, ids: Tensor, layers: dict[int, Fit], even: bool, step: Callable[[str], None]) -> list[float]:
    """How much a lost share counts in each layer, mean 1: √(loss of cosine / loss of attention) with that layer alone sparse.

    The loss of attention is squared where squares are fitted.

    The root lies half way between counting all layers alike and trusting what was measured with one layer at a time, which
    does not see how errors of early layers add up.
    """
    sample = _evenly(ids, _WEIGHED)
    reference = _run(model, sample, None)
    ratios = []
    for number, layer in layers.items():
        step(f"weighing: layer {number}")
        moved = 1 - token_cosine(reference, _run(model, sample, {number: layer.pattern}))
        lost = layer.lost.square() if even else layer.lost
        ratios.append((max(moved, 0.0) / max(float(lost.mean()), 1e-6)) ** 0.5)
    mean = sum(ratios) / len(ratios)
    return [ratio / mean if mean else 1.0 for ratio in ratios]


def _run(model: Any, ids: Tensor, layers: Any) -> Tensor:
    with use_pattern(model, layers, backend=_backend(ids)):
        return hidden(model, ids)


def _backend(ids: Tensor, merged: bool = False) -> str:
    """Short passages are judged under a mask: what is asked is what is lost, and a plan for each head would take longer.

    Summaries are `merged` by their lse, which the reference gives and torch's own attention does not.
    """
    if ids.shape[1] > DENSE:
        return "auto"
    return "reference" if merged else "dense"


def _evenly(ids: Tensor, count: int) -> Tensor:
    """At most `count` passages, taken evenly."""
    count = min(count, ids.shape[0])
    return ids[[place * ids.shape[0] // count for place in range(count)]]
