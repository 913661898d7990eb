"""A model's configuration objects, copied before farlight changes them.

transformers' models keep the configuration object they were built from, and several models may share one. A value written
into it would reach all of them, so a model is given its own copy first.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

__all__ = ["SavedConfigs", "configs_of", "copy_configs", "restore_configs"]

# (module, its configuration object before the copy)
SavedConfigs = list[tuple[nn.Module, Any]]
_IMPLEMENTATION = "_attn_implementation_internal"


def configs_of(model: nn.Module) -> list[Any]:
    """Every configuration object of the model's modules, nested ones included, each once."""
    pending = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "sub_configs")]
    configs: dict[int, Any] = {}
    while pending:
        config = pending.pop()
        if id(config) not in configs:
            configs[id(config)] = config
            pending += _sub_configs(config).values()
    return list(configs.values())


def copy_configs(model: nn.Module) -> SavedConfigs:
    """Give the model deep copies of its configurations. Returns the originals, for `restore_configs`."""
    saved = [(m, m.__dict__["config"]) for m in model.modules() if hasattr(m.__dict__.get("config"), "sub_configs")]
    memo: dict[int, Any] = {}  # modules that share a configuration share its copy
    for module, config in saved:
        module.__dict__["config"] = copy.deepcopy(config, memo)
    return saved


def restore_configs(saved: SavedConfigs) -> None:
    """Undo `copy_configs`. A copy that was changed meanwhile stays, with the original's attention implementation."""
    for module, original in saved:
        config = module.__dict__["config"]
        _reset_implementation(config, original)
        if config.to_dict() == original.to_dict():  # == raises where a setting differs by layer, as in Gemma 4
            module.__dict__["config"] = original


def _reset_implementation(config: Any, original: Any) -> None:
    vars(config)[_IMPLEMENTATION] = vars(original)[_IMPLEMENTATION]
    originals = _sub_configs(original)
    for name, sub_config in _sub_configs(config).items():
        if name in originals:
            _reset_implementation(sub_config, originals[name])


def _sub_configs(config: Any) -> dict[str, Any]:
    return {name: sub for name in config.sub_configs if (sub := getattr(config, name, None)) is not None}
