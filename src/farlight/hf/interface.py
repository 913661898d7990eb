"""farlight as an attention implementation of Hugging Face transformers.

transformers looks up two functions under one name: one that computes attention and one that builds the mask.
Registering the first without the second makes models drop causality and padding without a word, so here they are only
ever registered together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from farlight.errors import ArgumentError, UnsupportedError
from farlight.hf import attention_function as attend
from farlight.hf import masks
from farlight.hf.attention_function import SETTING, Chosen, Observation, Setting, attention_forward
from farlight.hf.configs import Held, configs_of, own_configs, put_back
from farlight.hf.layers import attention_layers, attention_modules, crosses, for_layers, foreign_attention, other_mixers
from farlight.hf.masks import model_mask
from farlight.kernels import registry
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router

__all__ = ["KEY", "Observation", "register", "settle", "use_pattern"]

KEY = "farlight"


def register() -> None:
    """Make `attn_implementation="farlight"` known to transformers. Calling it again changes nothing.

    A model that runs under this name computes its own attention exactly, causality, sliding windows and padding
    included, until `use_pattern` gives it a sparser one. Raises ImportError when transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError("farlight.hf needs transformers, which cannot be imported; pip install 'farlight[hf]'.") from error
    masks.mark_for_compilers()
    attend.mark_for_compilers()
    AttentionMaskInterface.register(KEY, model_mask)
    AttentionInterface.register(KEY, attention_forward)


@contextmanager
def use_pattern(
    model: Any,
    pattern: Chosen | Mapping[int, Chosen],
    *,
    backend: str = "auto",
    observer: Callable[[Observation], None] | None = None,
) -> Iterator[Any]:
    """Run a Hugging Face model under `pattern` for the length of a `with` block, then put everything back.

    A pair is seen when the model itself allows it and `pattern` does; None leaves the model's own attention. Positions that
    a pattern names count the real tokens of each text, so that padding changes nothing. A router is called in every layer
    with that layer's queries and keys, padding left out. A mapping {layer number: pattern, router or None} gives layers
    their own; those it does not name keep the model's attention. `observer` is called with an `Observation` for each layer
    before it runs.

    The setting belongs to the model: two threads may use two models at once, not one model under two patterns.

    Raises:
        ArgumentError: `pattern` is something else, or names a layer that the model does not have.
        UnsupportedError: the model does not take its attention from transformers' AttentionInterface, or it has
            cross-attention, whose queries and keys are positions of two different texts.

    >>> import torch, farlight as fl
    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    >>> model = BertModel(BertConfig(**sizes)).eval()
    >>> with torch.no_grad(), use_pattern(model, fl.window(2)):
    ...     model(torch.arange(6)[None]).last_hidden_state.shape
    torch.Size([1, 6, 8])
    """
    undo = settle(model, pattern, backend=backend, observer=observer)
    try:
        yield model
    finally:
        undo()


@dataclass(frozen=True)
class Undo:
    """How a model computed its attention before `settle`; called, it puts that back. Copied and pickled with the model."""

    settings: list[tuple[nn.Module, Setting | None]]
    configs: Held

    def __call__(self) -> None:
        for module, before in self.settings:
            if before is None:
                module.__dict__.pop(SETTING, None)
            else:
                module.__dict__[SETTING] = before
        put_back(self.configs)


def settle(
    model: Any,
    pattern: Chosen | Mapping[int, Chosen],
    *,
    backend: str = "auto",
    observer: Callable[[Observation], None] | None = None,
) -> Undo:
    """Let the model compute its attention with farlight under `pattern`, as `use_pattern` says. Returns how to undo it."""
    register()
    registry.check_name(backend)
    _check_chosen(pattern)
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation"):
        raise UnsupportedError(f"{name} is not a transformers model; a PreTrainedModel is needed.")
    if pattern is not None and crosses(model):
        raise UnsupportedError(
            f"{name} has cross-attention, in which a query and a key are positions of two different texts; a pattern "
            "speaks of one text. Use its encoder alone (model.get_encoder())."
        )
    settled = all(each._attn_implementation == KEY for each in configs_of(model))
    undo = Undo([(module, module.__dict__.get(SETTING)) for module in model.modules()], [] if settled else own_configs(model))
    try:
        model.set_attn_implementation(KEY)
        if model.config._attn_implementation != KEY or not attention_modules(model):
            raise UnsupportedError(
                f"{name} does not take its attention from transformers' AttentionInterface, so no other attention can "
                "be plugged in. Use a model of the same family whose modeling file calls ALL_ATTENTION_FUNCTIONS."
            )
        mixers = other_mixers(model) if isinstance(pattern, Pattern | Router) else {}
        if mixers:
            raise UnsupportedError(_hybrid(model, mixers))
        own = foreign_attention(model) if isinstance(pattern, Pattern | Router) else []
        if own:
            raise UnsupportedError(
                f"{name} holds {type(own[0]).__name__}, which computes attention by itself, so that a pattern for the whole "
                "model would not reach it; give a mapping {layer number: pattern} for the layers that take one, of "
                f"{', '.join(map(str, attention_layers(model)))}."
            )
        if isinstance(pattern, Mapping):
            by_layer, numbered = for_layers(model, pattern), set(attention_layers(model).values())
            for module, _ in undo.settings:
                module.__dict__[SETTING] = Setting(by_layer.get(module), backend, observer, module in numbered)
        else:
            for module, _ in undo.settings:
                module.__dict__[SETTING] = Setting(pattern, backend, observer)
    except BaseException:
        undo()
        raise
    return undo


def _hybrid(model: Any, mixers: dict[str, str]) -> str:
    """Why one pattern for a whole hybrid is refused, and what to pass instead."""
    numbers = [place.rpartition(".")[2] for place in mixers]
    shown = ", ".join(numbers[:12]) + (", …" if len(numbers) > 12 else "")
    layers = list(attention_layers(model))
    return (
        f"{type(model).__name__} is a hybrid: in layers {shown} tokens also meet otherwise than in attention "
        f"({', '.join(sorted(set(mixers.values())))}), where a pattern for the whole model would not reach. Give a mapping "
        f"{{layer number: pattern}} for the layers that attend: {{n: pattern for n in {layers}}}."
    )


def settled_again(*values: Any) -> Setting:
    """A setting as it comes out of a pickle: what its model asks transformers for must be known there."""
    register()
    return Setting(*values)


def _check_chosen(pattern: Any) -> None:
    """Raise ArgumentError for what cannot stand for a pattern."""
    if isinstance(pattern, Mapping):
        for number, inner in pattern.items():
            if not isinstance(inner, Pattern | Router | None):
                raise ArgumentError(
                    f"the pattern of layer {number!r} is {type(inner).__name__}; pass a pattern such as fl.window(256), a "
                    "router such as fl.routing.TopBlocks(8), or None for the model's own attention."
                )
    elif not isinstance(pattern, Pattern | Router | None):
        raise ArgumentError(
            f"the pattern is {type(pattern).__name__}; pass a pattern such as fl.window(256), a router such as "
            "fl.routing.TopBlocks(8), a mapping {layer number: one of these}, or None for the model's own attention."
        )
