"""The attention modules of a Hugging Face model and their layer numbers.

A mapping {layer number: pattern} needs one number per attention module. transformers' decoders and most encoders store it as
`layer_idx`, which also indexes the cache; where a model has none, its attention modules are counted in the order of
`model.modules()`. An attention module is one whose class looks its attention up in AttentionInterface. Nothing here changes
a model.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from farlight.errors import ArgumentError, UnsupportedError

__all__ = [
    "PARTS",
    "attention_layers",
    "attention_modules",
    "attention_parts",
    "foreign_attention",
    "has_cross_attention",
    "other_mixers",
    "patterns_by_module",
    "patterns_by_part",
]

T = TypeVar("T")

# Parts of a model that reads two texts: the encoder, the decoder's own attention, and that from the decoder to the encoder.
PARTS = ("encoder", "decoder", "cross")
_CROSS = ("cross", "encoder_attn", "encdec")

# Entries of `config.layer_types`: layers that mix tokens by attention only, and layers that do not mix tokens.
_ATTENTION_TYPES = {
    "attention", "full_attention", "sliding_attention", "chunked_attention", "window_attention", "indexed_attention",
    "compressed_sparse_attention", "heavily_compressed_attention", "minimax_m3_sparse", "reference_sliding_attention",
    "deepseek_sparse_attention", "qwen_sparse_attention",
}  # fmt: skip
_POINTWISE_TYPES = {"moe", "mlp", "sparse", "dense"}
# Class names of modules that mix tokens without attention, and of modules that match by accident.
_MIXER = re.compile(r"Mamba|SSM|ShortConv|DeltaNet|LinearAttention|LightningAttention|Recurrent|R[gG][lL][rR][uU]|Mixer\b")
_NOT_A_MIXER = re.compile(r"Norm|Rotary|Layer$|Model$|Experts|M[lL][pP]|Cache|For[A-Z]")


def attention_layers(model: Any) -> dict[int, nn.Module]:
    """The modules that take their attention from AttentionInterface, by layer number, in ascending order.

    A module used several times in one pass, as in ALBERT, is one layer. Raises UnsupportedError when two modules carry
    one number (two stacks in one model), so that a number would not say which is meant.
    """
    modules = list(attention_modules(model).values())
    numbers = [getattr(module, "layer_idx", None) for module in modules]
    if not all(isinstance(number, int) for number in numbers):
        return dict(enumerate(modules))
    layers: dict[int, nn.Module] = {}
    for number, module in zip(numbers, modules, strict=True):
        assert isinstance(number, int)
        if number in layers:
            raise UnsupportedError(
                f"{type(model).__name__} has two attention layers with the number {number} ({type(layers[number]).__name__} "
                f"and {type(module).__name__}), so that {{{number}: pattern}} could mean either. Give the mapping for the "
                "part of the model that is meant, such as model.language_model or model.text_model."
            )
        layers[number] = module
    return dict(sorted(layers.items()))


def attention_modules(model: Any) -> dict[str, nn.Module]:
    """The modules that take their attention from AttentionInterface, by their path in the model."""
    return {name: module for name, module in model.named_modules() if _calls_attention_interface(type(module))}  # type: ignore[arg-type]


def foreign_attention(model: Any) -> list[nn.Module]:
    """The modules named for attention that do not use AttentionInterface, which no pattern reaches."""
    reached: set[nn.Module] = set()
    for name, module in attention_modules(model).items():
        reached.update(module.modules())
        parts = name.split(".")
        reached.update(model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))
    return [module for module in model.modules() if "Attention" in type(module).__name__ and module not in reached]


def other_mixers(model: Any) -> dict[str, str]:
    """The layers of a hybrid model that mix tokens otherwise than by attention: {path: class name or layer type}.

    Linear attention, state-space and recurrent layers, short convolutions, and layers with one of these beside attention.
    Recognised by `config.layer_types` and by class names in the module lists that hold the attention modules.
    """
    attending = attention_modules(model)
    stacks = {name.rsplit(".", depth)[0] for name in attending for depth in range(1, name.count(".") + 1)}
    stacks = {name for name in stacks if isinstance(model.get_submodule(name), nn.ModuleList)}
    mixers_by_path: dict[str, str] = {}
    for name in sorted(stacks):
        stack = model.get_submodule(name)
        owner = model.get_submodule(name.rpartition(".")[0])
        types = _layer_types(getattr(owner, "config", None), len(stack))
        for number, layer in enumerate(stack):
            path = f"{name}.{number}"
            reached = {id(m) for at, each in attending.items() if f"{at}.".startswith(f"{path}.") for m in each.modules()}
            mixers = [type(m).__name__ for m in layer.modules() if id(m) not in reached and _is_mixer(type(m).__name__)]
            if mixers:
                mixers_by_path[path] = mixers[0]
            elif types is not None and types[number] not in _ATTENTION_TYPES | _POINTWISE_TYPES:
                mixers_by_path[path] = types[number]
    return mixers_by_path


def _layer_types(config: Any, count: int) -> list[str] | None:
    """The configuration's type of each of `count` layers; None where it does not list them."""
    for name in ("layer_types", "layers_block_type"):
        types = getattr(config, name, None)
        if isinstance(types, list | tuple) and len(types) == count and all(isinstance(item, str) for item in types):
            return list(types)
    return None


def _is_mixer(name: str) -> bool:
    return bool(_MIXER.search(name)) and not _NOT_A_MIXER.search(name)


def has_cross_attention(model: Any) -> bool:
    """Whether a query and a key may be positions of two texts, by class and module names: transformers has no flag for it."""
    paths = [f"{name}.{type(module).__name__}".lower() for name, module in attention_modules(model).items()]
    decodes = getattr(model.config, "is_encoder_decoder", False) and any("decoder" in path for path in paths)
    return decodes or any(word in path for path in paths for word in _CROSS)


def attention_parts(model: Any) -> dict[str, dict[int, nn.Module]]:
    """The attention modules of each of `PARTS`, numbered from 0 in the order of `model.modules()`."""
    has_encoder = getattr(model.config, "is_encoder_decoder", False)
    parts: dict[str, dict[int, nn.Module]] = {part: {} for part in PARTS}
    for name, module in attention_modules(model).items():
        path = f"{name}.{type(module).__name__}".lower()
        own = "encoder" if has_encoder and "decoder" not in path else "decoder"
        layers = parts["cross" if any(word in path for word in _CROSS) else own]
        layers[len(layers)] = module
    return parts


def patterns_by_module(model: Any, patterns: Mapping[int, T]) -> dict[nn.Module, T]:
    """`patterns` by attention module instead of layer number. Raises ArgumentError for numbers that no layer has."""
    return _by_module(type(model).__name__, attention_layers(model), patterns)


def patterns_by_part(model: Any, patterns: Mapping[str, Any]) -> dict[nn.Module, Any]:
    """`patterns` of `PARTS`, each one for all layers or by layer number, by attention module. Raises ArgumentError."""
    parts = attention_parts(model)
    by_module: dict[nn.Module, Any] = {}
    for part, pattern in patterns.items():
        name, layers = f"{type(model).__name__}, {part},", parts.get(part)
        if not layers:
            known = ", ".join(repr(part) for part in PARTS if parts[part])
            raise ArgumentError(f"a pattern is given for {part!r}, but {type(model).__name__} has attention in {known} only.")
        by_number = pattern if isinstance(pattern, Mapping) else dict.fromkeys(layers, pattern)
        by_module |= _by_module(name, layers, by_number)
    return by_module


def _by_module(name: str, layers: Mapping[int, nn.Module], patterns: Mapping[int, T]) -> dict[nn.Module, T]:
    unknown = [number for number in patterns if isinstance(number, bool) or number not in layers]
    if unknown:
        known = f"{', '.join(map(str, layers))}" if layers else "none"
        raise ArgumentError(
            f"a pattern is given for layer {unknown[0]!r}, but the attention layers of {name} are {known}; use these numbers "
            "as keys."
        )
    return {layers[number]: pattern for number, pattern in patterns.items()}


@functools.cache
def _calls_attention_interface(cls: type[nn.Module]) -> bool:
    """Whether the source of a module class looks its attention up; transformers itself searches the file for this text.

    farlight's replacements of modules that do not (`farlight.hf.alibi`) say so by an attribute.
    """
    from transformers import PreTrainedModel

    if getattr(cls, "calls_attention_interface", False):
        return True
    if issubclass(cls, PreTrainedModel):  # holds attention modules; is none
        return False
    for base in cls.__mro__:
        if base is nn.Module:
            return False
        try:
            if "ALL_ATTENTION_FUNCTIONS.get_interface(" in inspect.getsource(base):
                return True
        except (OSError, TypeError):  # a class made at run time has no source; its bases may have
            continue
    return False
