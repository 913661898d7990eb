"""The result of fitting a whole model: patterns by layer and head, their fidelity on fitted and on held-out text, JSON,
tables."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farlight.analysis.fit.fit import Fit
from farlight.analysis.fit.loss_fit import LossFit
from farlight.analysis.loss.fidelity import Fidelity
from farlight.analysis.loss.language import LanguageLoss
from farlight.analysis.notebook import grid
from farlight.hf.fit_file import write_layers
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router
from farlight.routing.notation import read_router

__all__ = ["ModelFit", "layer_patterns"]


@dataclass(frozen=True, repr=False)
class ModelFit:
    """A pattern for each head of each layer. Returned by `farlight.hf.fit`.

    Attributes:
        layers: by layer number, the `farlight.Fit` of its heads.
        weights: by layer, the factor on the values of its heads; 1 without `weigh`.
        trained, held_out: fidelity of the model under the fit, on passages it was fitted to and on others; held_out is None
            without held-out passages.
        passages: number of passages (fitted to, held out).
        passage_tokens: tokens of a passage.
        model: what the saved file says of the model.
        loss: what the loss was predicted to be, of a fit by loss.
        gist: tokens of a block that is attended through its summary where none of its keys is allowed; None: without summaries.
    """

    layers: dict[int, Fit]
    weights: tuple[float, ...]
    trained: Fidelity
    held_out: Fidelity | None
    passages: tuple[int, int]
    passage_tokens: int
    model: dict[str, Any]
    gist: int | None = None
    loss: LossFit | None = None

    @property
    def patterns(self) -> dict[int, Pattern | Router]:
        """By layer number, the argument of `fl.hf.sparsify` and `fl.hf.use_pattern`."""
        return layer_patterns(self.layers, self.gist)

    @property
    def density(self) -> float:
        """Σ links / Σ base_links over layers and heads, on the passages fitted to; without summaries."""
        links = sum(float(fit.links.sum()) for fit in self.fits)
        return links / max(1.0, sum(float(fit.base_links.sum()) for fit in self.fits))

    @property
    def fits(self) -> list[Fit]:
        """The fits of the layers, in order."""
        return list(self.layers.values())

    @property
    def kept_by_head(self) -> Tensor:
        """`(layers, heads)` float64: the share of full attention kept, on the passages fitted to."""
        return torch.stack([fit.kept for fit in self.fits])

    @property
    def density_by_head(self) -> Tensor:
        """`(layers, heads)` float64: links / base_links of each head."""
        return torch.stack([fit.links / fit.base_links.clamp(min=1) for fit in self.fits])

    def save(self, path: str | os.PathLike[str] | None = None) -> str:
        """Write the patterns as JSON, which `fl.hf.sparsify(model, path)` loads. Returns the text."""
        header = self.model | {"measure": "attention" if self.loss is None else "loss", "passages": list(self.passages)}
        header |= {"passage_tokens": self.passage_tokens, "density": self.density, "kept": _mean(self.trained.mass)}
        header |= {} if self.loss is None else self.loss.to_dict()
        if self.held_out is not None:
            header |= {"held_out_kept": _mean(self.held_out.mass), "held_out_token_cosine": self.held_out.token_cosine}
        for name, measured in (("", self.trained), ("held_out_", self.held_out)):
            if measured is not None and measured.language is not None:
                header |= {f"{name}lost_nats": measured.language.lost, f"{name}lost_interval": measured.language.interval}
        return write_layers(self.patterns, path, model=header)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable results: density, fidelity on both sets of passages, kept, density and family by layer and head."""
        fidelity = {
            name: {
                "kept": _mean(measured.mass),
                "density": measured.links / max(1.0, measured.base_links),
                "token_cosine": measured.token_cosine,
                "pooled_cosine": measured.pooled_cosine,
            }
            | _language_figures(measured.language)
            for name, measured in (("trained", self.trained), ("held_out", self.held_out))
            if measured is not None
        }
        return {
            "density": self.density,
            "passages": list(self.passages),
            "weights": list(self.weights),
            "gist": self.gist,
            "kept_by_head": self.kept_by_head.tolist(),
            "density_by_head": self.density_by_head.tolist(),
            "families": [list(fit.families) for fit in self.fits],
            **({} if self.loss is None else self.loss.to_dict()),
            **fidelity,
        }

    def __repr__(self) -> str:
        return f"<ModelFit of {len(self.layers)} layers: {self.density:.1%} of all links, {self.passages[0]} passages>"

    def _repr_html_(self) -> str:
        head = ["layer", "links", "kept", "families"]
        rows = [[str(number), f"{fit.density:.1%}", f"{fit.mass:.1%}", _families(fit)] for number, fit in self.layers.items()]
        measured = [("fitted to", self.trained), ("held out", self.held_out)]
        notes = [
            f"{name}: keeps {_mean(fidelity.mass):.1%}, token cosine {fidelity.token_cosine:.4f}"
            for name, fidelity in measured
            if fidelity is not None
        ]
        return grid(repr(self), head, rows, "; ".join(notes))

    def __str__(self) -> str:
        lines = [
            f"{self.density:.1%} of all links, fitted to {self.passages[0]} passages of {self.passage_tokens} tokens",
            f"{'':22}{'kept':>8}{'density':>9}{'token cosine':>14}{'pooled cosine':>15}",
        ]
        for name, measured in (("fitted to", self.trained), ("held out", self.held_out)):
            if measured is not None:
                lines.append(
                    f"{name:22}{_mean(measured.mass):8.1%}{measured.links / max(1.0, measured.base_links):9.1%}"
                    f"{measured.token_cosine:14.4f}{measured.pooled_cosine:15.4f}"
                )
        if self.held_out is not None:
            gap = self.held_out.token_cosine - self.trained.token_cosine
            lines.append(f"{'difference':22}{_mean(self.held_out.mass) - _mean(self.trained.mass):8.1%}{'':9}{gap:14.4f}")
        lines += self._loss_lines()
        for number, fit in self.layers.items():
            lines.append(f"layer {number:2d}: {fit.density:6.1%} of its links keep {fit.mass:6.1%}  ({_families(fit)})")
        return "\n".join(lines)

    def _loss_lines(self) -> list[str]:
        """What the fit loses in nats per token, of a causal language model, and what was predicted."""
        lines = []
        for name, measured in (("fitted to", self.trained), ("held out", self.held_out)):
            if measured is not None and measured.language is not None:
                lines.append(f"{name}: {measured.language.lost:+.4f} nats per token ({measured.language.loss_full:.4f} full)")
        if self.loss is not None:
            lines.append(f"predicted: {self.loss.predicted:+.4f} nats per token")
            if self.loss.time is not None:
                lines.append(f"attention takes {self.loss.time:.0%} of the seconds of full attention, as timed head by head")
            if self.loss.uniform is not None:
                lines.append(f"best single candidate: {self.loss.uniform:+.4f} predicted, {self.loss.uniform_expression}")
        return lines


def _language_figures(language: LanguageLoss | None) -> dict[str, Any]:
    """JSON-serialisable loss of a causal language model; nothing for others."""
    if language is None:
        return {}
    return {"loss": language.loss, "loss_full": language.loss_full, "lost_interval": language.interval}


def layer_patterns(layers: dict[int, Fit], gist: int | None) -> dict[int, Pattern | Router]:
    """By layer number its pattern or router; with `gist`, a router that adds the summaries of uncovered blocks of that size."""
    if gist is None:
        return {number: layer.pattern for number, layer in layers.items()}
    return {number: read_router(f"gist({layer.expression}, block={gist})") for number, layer in layers.items()}


def _families(fit: Fit) -> str:
    """`2 window, 1 blocks`: how many heads chose from which family."""
    return ", ".join(f"{fit.families.count(family)} {family}" for family in dict.fromkeys(fit.families))


def _mean(x: Tensor) -> float:
    return float(x.mean())
