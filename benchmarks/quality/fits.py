"""Fits of the model by predicted loss, one candidate for each head, kept as files beside the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from farlight.analysis.fit.loss_fit import LossProfile, loss_expressions, profile_loss
from farlight.hf import write_layers
from quality.rules import SINKS, Rule
from quality.texts import half_passages

__all__ = ["CANDIDATES", "FITS", "fit_rules", "profile", "store_fit"]

FITS = Path(__file__).resolve().parents[1] / "results" / "quality"
# What each fit chooses from: cheap choices, positions alone, and choices that read every score first.
CANDIDATES = {
    "blocks": loss_expressions(None),
    "positions": [
        *(f"window({width}, 0) | {SINKS}" for width in (8, 16, 32, 64, 128, 256, 512, 1024, 2048)),
        *(f"window({width}, 0) | strided({stride}) | {SINKS}" for width, stride in ((64, 64), (64, 16), (256, 32))),
        "full()",
    ],
    "keys": [
        f"window(1, 0) | {SINKS}",
        *(f"topkeys(share={share}, causal=True) | {SINKS}" for share in (0.01, 0.02, 0.035, 0.06, 0.1, 0.18, 0.3)),
        "full()",
    ],
}


def fit_rules() -> list[Rule]:
    """A rule for each stored fit; its expression is the file's name."""
    stored = [(name, path.name) for name in CANDIDATES for path in sorted(FITS.glob(f"{name}-*.json"))]
    return [Rule(f"fitted by loss, {name}, one for each head", "farlight", file) for name, file in stored]


def profile(
    model: Any, tokenizer: Any, texts: Sequence[Path | None], expressions: Sequence[str], tokens: int, passages: int
) -> LossProfile:
    """The predicted loss of every expression on passages of the first half of each text."""
    return profile_loss(model, half_passages(texts, tokenizer, tokens, passages, 0), expressions, step=print)


def store_fit(result: LossProfile, name: str, density: float, about: dict[str, Any]) -> Path:
    """Write the fit of this density as a file; its name says both."""
    fitted = result.fit(density)
    path = FITS / f"{name}-{density:g}.json"
    layers = {number: layer.expression for number, layer in fitted.layers.items()}
    write_layers(layers, path, model=about | {"density": density, "predicted_nats": round(fitted.predicted, 5)})
    return path
