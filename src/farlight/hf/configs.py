"""A model's configuration, apart from the one that the caller and other models hold.

transformers' models keep the configuration object that they were built from, and one object may serve several models. What
farlight writes into it would reach all of them, so a model is given a copy of its own first.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

__all__ = ["Held", "configs_of", "own_configs", "put_back"]

# A module, and the configuration that it came with.
Held = list[tuple[nn.Module, Any]]
_IMPLEMENTATION = "_attn_implementation_internal"


def configs_of(model: nn.Module) -> list[Any]:
    """Every configuration in the model, those inside others included."""
    pending = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "sub_configs")]
    found: dict[int, Any] = {}
    while pending:
        config = pending.pop()
        if id(config) not in found:
            found[id(config)] = config
            pending += _inside(config).values()
    return list(found.values())


def own_configs(model: nn.Module) -> Held:
    """Give the model copies of its configurations. Returns what `put_back` needs."""
    held = [(m, m.__dict__["config"]) for m in model.modules() if hasattr(m.__dict__.get("config"), "sub_configs")]
    memo: dict[int, Any] = {}  # what several modules share, they go on sharing
    for module, config in held:
        module.__dict__["config"] = copy.deepcopy(config, memo)
    return held


def put_back(held: Held) -> None:
    """Undo `own_configs`. A copy that was changed meanwhile stays, with the attention implementation that there was."""
    for module, before in held:
        config = module.__dict__["config"]
        _reset(config, before)
        if config == before:
            module.__dict__["config"] = before


def _reset(config: Any, before: Any) -> None:
    vars(config)[_IMPLEMENTATION] = vars(before)[_IMPLEMENTATION]
    inner = _inside(before)
    for name, sub in _inside(config).items():
        if name in inner:
            _reset(sub, inner[name])


def _inside(config: Any) -> dict[str, Any]:
    return {name: sub for name in config.sub_configs if (sub := getattr(config, name, None)) is not None}
