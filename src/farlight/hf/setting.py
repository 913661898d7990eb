"""The setting of a model's attention: the pattern, router, backend and observer stored on each of its modules.

transformers calls one attention function for every module of every model, so what a module runs under is read from the module
itself: `module.__dict__[SETTING]`. Recomputation in the backward pass and other threads read the same entry.
`farlight.hf.interface` writes it and makes it picklable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from farlight.hf.spread import Spread
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router
from farlight.score.terms import Score

__all__ = [
    "ATTN_IMPLEMENTATION",
    "SETTING",
    "DecoderPosition",
    "LayerPattern",
    "Observation",
    "Observer",
    "PartPattern",
    "Setting",
    "setting_of",
]

# The name under which transformers knows farlight: `attn_implementation="farlight"`.
ATTN_IMPLEMENTATION = "farlight"
SETTING = "_farlight_setting"

# What a layer runs under: a pattern, a router that chooses one in each call, or None for the model's own attention.
LayerPattern = Pattern | Router | None
# What a part of a model of two texts runs under: the same for its layers, or by their number in the part.
PartPattern = LayerPattern | Mapping[int, LayerPattern]

Observer = Callable[["Observation"], Callable[[Tensor], None] | None]


@dataclass(frozen=True)
class Observation:
    """One call of a layer's attention, passed to `use_pattern`'s observer before the attention is computed.

    Args:
        module: the attention module.
        q: `(B, H, n_q, D)`.
        k, v: `(B, H_kv, n_k, D)`.
        scale: factor on the scores q·kᵀ; None means D^-½.
        own: the model's own mask (causality, sliding window, padding) as a pattern.
        q_offset: position of the first query.
        key_real: `(B, n_k)` bool, False where a key is padding; None where none is.
        score, sinks: the model's own terms on the scores (softcap, position bias) and sinks, as in `fl.attention`.
    """

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    own: Pattern
    q_offset: int
    key_real: Tensor | None = None
    score: Score | None = None
    sinks: Tensor | None = None

    @property
    def terms(self) -> dict[str, Any]:
        """`score` and `sinks` as keywords of `fl.attention` and of the measures; sinks `(H,)`."""
        return {"score": self.score, "sinks": None if self.sinks is None else self.sinks.flatten()}


@dataclass
class DecoderPosition:
    """Where a decoder stands in its text: its own attention notes it, and its attention to the encoder reads it."""

    first_query: int | None = None


@dataclass(frozen=True)
class Setting:
    """What one module's attention runs under.

    Args:
        pattern: a pattern, a router, or None for the model's own attention.
        backend: as in `fl.attention`.
        observer: called with an `Observation` before each call; None for none. What it returns, unless None, is called with the
            output `(B, H, n_q, D_v)`.
        spread: the ranks over which the sequence is spread; None: this process has all of it.
        part: "encoder", "decoder" or "cross" where patterns are given by part of the model, else None.
        position: the decoder's position, shared by its modules; None without parts.
        has_layer_number: False where patterns are given by layer number and this module has none; its attention raises.
    """

    pattern: LayerPattern = None
    backend: str = "auto"
    observer: Observer | None = None
    has_layer_number: bool = True
    spread: Spread | None = None
    part: str | None = None
    position: DecoderPosition | None = None


def setting_of(module: nn.Module) -> Setting:
    """The setting stored on the module; without one the default: the model's own attention, backend "auto"."""
    setting: Setting = module.__dict__.get(SETTING) or Setting()
    return setting
