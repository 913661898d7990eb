"""farlight as an attention implementation of Hugging Face transformers, and the setting of a pattern on a model.

transformers looks up two functions under one name: the attention function and the mask function. With the first alone, models
drop causality and padding silently, so `register` always registers both.

`install_pattern` writes a `Setting` on every module of a model, which the attention function reads, and switches the model's
configuration to attn_implementation="farlight". `Undo` holds what was there before.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from farlight.errors import ArgumentError, UnsupportedError
from farlight.hf import alibi, attention_function, cached_tensors, masks, swap
from farlight.hf.configs import SavedConfigs, configs_of, copy_configs, restore_configs
from farlight.hf.layers import (
    PARTS,
    attention_layers,
    attention_modules,
    attention_parts,
    foreign_attention,
    has_cross_attention,
    other_mixers,
    patterns_by_module,
    patterns_by_part,
)
from farlight.hf.setting import (
    ATTN_IMPLEMENTATION,
    SETTING,
    DecoderPosition,
    LayerPattern,
    Observation,
    Observer,
    PartPattern,
    Setting,
)
from farlight.hf.spread import Spread
from farlight.kernels import registry
from farlight.patterns.expression import Pattern
from farlight.patterns.named import global_tokens, sees_all
from farlight.routing.base import Router

__all__ = ["Observation", "install_pattern", "register", "use_pattern"]


def register() -> None:
    """Make `attn_implementation="farlight"` known to transformers. Calling it again changes nothing.

    A model that runs under this name computes its own attention exactly, causality, sliding windows and padding
    included, until `use_pattern` gives it a sparser one. Raises ImportError when transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError("farlight.hf needs transformers, which cannot be imported; pip install 'farlight[hf]'.") from error
    cached_tensors.mark_for_compilers()
    masks.mark_for_compilers()
    attention_function.mark_for_compilers()
    AttentionMaskInterface.register(ATTN_IMPLEMENTATION, masks.model_mask)
    AttentionInterface.register(ATTN_IMPLEMENTATION, attention_function.attention_forward)


@contextmanager
def use_pattern(
    model: Any,
    pattern: LayerPattern | Mapping[int, LayerPattern] | Mapping[str, PartPattern],
    *,
    backend: str = "auto",
    observer: Observer | None = None,
) -> Iterator[Any]:
    """Run a Hugging Face model under `pattern` inside a `with` block; the model's attention is restored at its end.

    A pair is allowed when the model's own mask and `pattern` both allow it; None leaves the model's own attention. Positions
    that a pattern names count the real tokens of each text, so padding changes nothing. A router is called in every layer with
    that layer's queries and keys, padding left out. A mapping {layer number: pattern, router or None} sets the layers one by
    one; layers it does not name keep the model's attention. A model of two texts takes {"encoder": …, "decoder": …,
    "cross": …}, each one pattern or such a mapping, see `sparsify`. `observer` is called with an `Observation` for each layer
    before it runs.

    The setting belongs to the model: two threads may use two models at once, not one model under two patterns.

    Raises:
        ArgumentError: `pattern` is something else, or names a layer or part that the model does not have.
        UnsupportedError: the model does not take its attention from transformers' AttentionInterface, or it has
            cross-attention, whose queries and keys are positions of two different texts, under one pattern.

    >>> import torch, farlight as fl
    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    >>> model = BertModel(BertConfig(**sizes)).eval()
    >>> with torch.no_grad(), use_pattern(model, fl.window(2)):
    ...     model(torch.arange(6)[None]).last_hidden_state.shape
    torch.Size([1, 6, 8])
    """
    undo = install_pattern(model, pattern, backend=backend, observer=observer)
    try:
        yield model
    finally:
        undo()


@dataclass(frozen=True)
class Undo:
    """The settings and configurations of a model before `install_pattern`; calling it restores them.

    `replaced`: the model, where its attention modules were replaced. Copied and pickled with the model.
    """

    settings: list[tuple[nn.Module, Setting | None]]
    configs: SavedConfigs
    replaced: nn.Module | None = None

    def __call__(self) -> None:
        for module, setting in self.settings:
            if setting is None:
                module.__dict__.pop(SETTING, None)
            else:
                module.__dict__[SETTING] = setting
        restore_configs(self.configs)
        if self.replaced is not None:
            swap.restore(self.replaced)


def install_pattern(
    model: Any,
    pattern: Any,
    *,
    backend: str = "auto",
    observer: Observer | None = None,
    spread: Spread | None = None,
) -> Undo:
    """Set `pattern` on the model as `use_pattern` says, until the returned `Undo` is called. On errors nothing changes."""
    register()
    registry.check_name(backend)
    _check_pattern(pattern)
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation"):
        raise UnsupportedError(f"{name} is not a transformers model; a PreTrainedModel is needed.")
    if pattern is not None and not _names_parts(model, pattern) and has_cross_attention(model):
        raise UnsupportedError(
            f"{name} has cross-attention, in which a query and a key are positions of two different texts; a pattern "
            'speaks of one text. Give each part its own, {"encoder": …, "decoder": …, "cross": …}, or use its encoder alone '
            "(model.get_encoder())."
        )
    replaced = model if alibi.install(model) else None
    already_registered = all(each._attn_implementation == ATTN_IMPLEMENTATION for each in configs_of(model))
    settings = [(module, module.__dict__.get(SETTING)) for module in model.modules()]
    undo = Undo(settings, [] if already_registered else copy_configs(model), replaced)
    try:
        alibi.set_implementation(model)
        model.set_attn_implementation(ATTN_IMPLEMENTATION)
        if model.config._attn_implementation != ATTN_IMPLEMENTATION or not attention_modules(model):
            raise UnsupportedError(
                f"{name} does not take its attention from transformers' AttentionInterface, so no other attention can "
                "be plugged in. Use a model of the same family whose modeling file calls ALL_ATTENTION_FUNCTIONS."
            )
        if _names_parts(model, pattern):
            _set_parts(model, pattern, backend, observer, spread)
        elif isinstance(pattern, Mapping):
            by_module, numbered = patterns_by_module(model, pattern), set(attention_layers(model).values())
            for module, _ in undo.settings:
                module.__dict__[SETTING] = Setting(by_module.get(module), backend, observer, module in numbered, spread)
        else:
            if pattern is not None:
                _refuse_unreached_attention(model)
            for module, _ in undo.settings:
                module.__dict__[SETTING] = Setting(pattern, backend, observer, spread=spread)
    except BaseException:
        undo()
        raise
    return undo


def _set_parts(model: Any, pattern: Mapping[str, Any], backend: str, observer: Observer | None, spread: Spread | None) -> None:
    """Write the settings of a mapping {"encoder" | "decoder" | "cross": pattern or mapping by layer}."""
    by_module, position = patterns_by_part(model, pattern), DecoderPosition()
    part_of = {module: part for part, layers in attention_parts(model).items() for module in layers.values()}
    for module, chosen in by_module.items():
        named = [a for a in chosen.atoms() if isinstance(a, global_tokens | sees_all)] if isinstance(chosen, Pattern) else []
        if part_of[module] == "cross" and (named or isinstance(chosen, Router)):
            raise UnsupportedError(
                f"{type(model).__name__}, cross: {chosen!r} reads queries as tokens of the keys' text, but they are the "
                "decoder's; give patterns of distances, or of keys by fl.seen_by_all."
            )
    for module in model.modules():
        setting = Setting(by_module.get(module), backend, observer, True, spread, part_of.get(module), position)
        module.__dict__[SETTING] = setting


def _names_parts(model: Any, pattern: Any) -> bool:
    """Whether a mapping is one of the parts of an encoder-decoder model, not of layer numbers."""
    names = [key for key in pattern if isinstance(key, str)] if isinstance(pattern, Mapping) else []
    return any(getattr(model.config, "is_encoder_decoder", False) or name in PARTS for name in names)


def _refuse_unreached_attention(model: Any) -> None:
    """Raise where one pattern for the whole model would not reach every place in which tokens are mixed."""
    name, mixers = type(model).__name__, other_mixers(model)
    if mixers:
        numbers = [path.rpartition(".")[2] for path in mixers]
        shown = ", ".join(numbers[:12]) + (", …" if len(numbers) > 12 else "")
        raise UnsupportedError(
            f"{name} is a hybrid: in layers {shown} tokens also meet otherwise than in attention "
            f"({', '.join(sorted(set(mixers.values())))}), where a pattern for the whole model would not reach. Give a mapping "
            f"{{layer number: pattern}} for the layers that attend: {{n: pattern for n in {list(attention_layers(model))}}}."
        )
    foreign = foreign_attention(model)
    if foreign:
        raise UnsupportedError(
            f"{name} holds {type(foreign[0]).__name__}, which computes attention by itself, so that a pattern for the whole "
            "model would not reach it; give a mapping {layer number: pattern} for the layers that take one, of "
            f"{', '.join(map(str, attention_layers(model)))}."
        )


def unpickle_setting(*values: Any) -> Setting:
    """A pickled setting. The process that loads a sparse model must know farlight's functions, so they are registered."""
    register()
    return Setting(*values)


def _reduce_setting(setting: Setting) -> tuple[Any, ...]:
    return unpickle_setting, (
        setting.pattern,
        setting.backend,
        setting.observer,
        setting.has_layer_number,
        setting.spread,
        setting.part,
        setting.position,
    )


copyreg.pickle(Setting, _reduce_setting)


def _check_pattern(pattern: Any) -> None:
    """Raise ArgumentError unless `pattern` is a pattern, a router, None, or a mapping to these."""
    if isinstance(pattern, Mapping):
        for number, layer_pattern in pattern.items():
            if isinstance(number, str) and isinstance(layer_pattern, Mapping):
                _check_pattern(layer_pattern)
            elif not isinstance(layer_pattern, Pattern | Router | None):
                raise ArgumentError(
                    f"the pattern of layer {number!r} is {type(layer_pattern).__name__}; pass a pattern such as "
                    "fl.window(256), a router such as fl.routing.TopBlocks(8), or None for the model's own attention."
                )
    elif not isinstance(pattern, Pattern | Router | None):
        raise ArgumentError(
            f"the pattern is {type(pattern).__name__}; pass a pattern such as fl.window(256), a router such as "
            "fl.routing.TopBlocks(8), a mapping {layer number: one of these}, or None for the model's own attention."
        )
