"""Which modules of a Hugging Face model compute attention, and under which number each is known.

A pattern per layer needs one number per attention module. transformers' decoders and most encoders carry it as
`layer_idx`, the number that also names a layer's place in the cache; where a model has none, its attention modules are
counted in the order in which they are built. Nothing here changes a model.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from farlight.errors import ArgumentError, UnsupportedError

__all__ = ["attention_layers", "attention_modules", "crosses", "for_layers", "foreign_attention", "other_mixers"]

Chosen = TypeVar("Chosen")

# What `config.layer_types` calls layers whose tokens meet in attention only, and layers in which they do not meet.
_ATTENDS = {
    "attention", "full_attention", "sliding_attention", "chunked_attention", "window_attention", "indexed_attention",
    "compressed_sparse_attention", "heavily_compressed_attention", "minimax_m3_sparse", "reference_sliding_attention",
    "deepseek_sparse_attention", "qwen_sparse_attention",
}  # fmt: skip
_TOKEN_BY_TOKEN = {"moe", "mlp", "sparse", "dense"}
# Classes of transformers that mix tokens in the place of attention, or beside it in one layer.
_MIXES = re.compile(r"Mamba|SSM|ShortConv|DeltaNet|LinearAttention|LightningAttention|Recurrent|R[gG][lL][rR][uU]|Mixer\b")
_NO_MIXER = re.compile(r"Norm|Rotary|Layer$|Model$|Experts|M[lL][pP]|Cache|For[A-Z]")


def attention_layers(model: Any) -> dict[int, nn.Module]:
    """The modules that take their attention from AttentionInterface, by layer number, in rising order.

    A module used several times in one pass, as in ALBERT, is one layer. Raises UnsupportedError when two modules carry
    one number (two stacks in one model), so that a number would not say which is meant.
    """
    modules = list(attention_modules(model).values())
    numbers = [getattr(module, "layer_idx", None) for module in modules]
    if not all(isinstance(number, int) for number in numbers):
        return dict(enumerate(modules))
    found: dict[int, nn.Module] = {}
    for number, module in zip(numbers, modules, strict=True):
        assert isinstance(number, int)
        if number in found:
            raise UnsupportedError(
                f"{type(model).__name__} has two attention layers with the number {number} ({type(found[number]).__name__} "
                f"and {type(module).__name__}), so that {{{number}: pattern}} could mean either. Give the mapping for the "
                "part of the model that is meant, such as model.language_model or model.text_model."
            )
        found[number] = module
    return dict(sorted(found.items()))


def attention_modules(model: Any) -> dict[str, nn.Module]:
    """The modules that take their attention from AttentionInterface, by their place in the model."""
    return {name: module for name, module in model.named_modules() if _calls_the_interface(type(module))}  # type: ignore[arg-type]


def foreign_attention(model: Any) -> list[nn.Module]:
    """The modules named for attention that compute it by themselves, so that no pattern would reach them."""
    reached: set[nn.Module] = set()
    for name, module in attention_modules(model).items():
        reached.update(module.modules())
        parts = name.split(".")
        reached.update(model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))
    return [module for module in model.modules() if "Attention" in type(module).__name__ and module not in reached]


def other_mixers(model: Any) -> dict[str, str]:
    """The layers of a hybrid in which tokens meet otherwise than in attention: place in the model, and what they hold.

    Linear attention, state-space and recurrent layers, short convolutions, and layers with one of these beside attention.
    They are known by `config.layer_types` and by the classes in the stacks of layers that hold the attention modules.
    """
    attending = attention_modules(model)
    stacks = {name.rsplit(".", depth)[0] for name in attending for depth in range(1, name.count(".") + 1)}
    stacks = {name for name in stacks if isinstance(model.get_submodule(name), nn.ModuleList)}
    found: dict[str, str] = {}
    for name in sorted(stacks):
        stack = model.get_submodule(name)
        owner = model.get_submodule(name.rpartition(".")[0])
        kinds = _layer_types(getattr(owner, "config", None), len(stack))
        for number, layer in enumerate(stack):
            place = f"{name}.{number}"
            reached = {id(m) for at, each in attending.items() if f"{at}.".startswith(f"{place}.") for m in each.modules()}
            mixers = [type(m).__name__ for m in layer.modules() if id(m) not in reached and _is_mixer(type(m).__name__)]
            if mixers:
                found[place] = mixers[0]
            elif kinds is not None and kinds[number] not in _ATTENDS | _TOKEN_BY_TOKEN:
                found[place] = kinds[number]
    return found


def _layer_types(config: Any, count: int) -> list[str] | None:
    for name in ("layer_types", "layers_block_type"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, list | tuple) and len(kinds) == count and all(isinstance(kind, str) for kind in kinds):
            return list(kinds)
    return None


def _is_mixer(name: str) -> bool:
    return bool(_MIXES.search(name)) and not _NO_MIXER.search(name)


def crosses(model: Any) -> bool:
    """Whether a query and a key may be positions of two texts. transformers has no flag that says so of every model."""
    places = [f"{name}.{type(module).__name__}".lower() for name, module in attention_modules(model).items()]
    decodes = getattr(model.config, "is_encoder_decoder", False) and any("decoder" in place for place in places)
    return decodes or any(word in place for place in places for word in ("cross", "encoder_attn", "encdec"))


def for_layers(model: Any, chosen: Mapping[int, Chosen]) -> dict[nn.Module, Chosen]:
    """What is chosen for each attention module that `chosen` names by number. Raises ArgumentError for other numbers."""
    layers = attention_layers(model)
    unknown = [number for number in chosen if isinstance(number, bool) or number not in layers]
    if unknown:
        known = f"{', '.join(map(str, layers))}" if layers else "none"
        raise ArgumentError(
            f"a pattern is given for layer {unknown[0]!r}, but the attention layers of {type(model).__name__} are {known}; "
            "use these numbers as keys."
        )
    return {layers[number]: what for number, what in chosen.items()}


@functools.cache
def _calls_the_interface(kind: type[nn.Module]) -> bool:
    """Whether a module class looks its attention up: transformers itself decides by this text, per file."""
    from transformers import PreTrainedModel

    if issubclass(kind, PreTrainedModel):  # holds attention modules; is none
        return False
    for base in kind.__mro__:
        if base is nn.Module:
            return False
        try:
            if "ALL_ATTENTION_FUNCTIONS.get_interface(" in inspect.getsource(base):
                return True
        except (OSError, TypeError):  # a class made at run time has no source; its bases may have
            continue
    return False
