"""Replacement of attention modules in a Hugging Face model, with shared parameters, and its reversal.

Longformer and BigBird compute a sparse attention of their own and do not use AttentionInterface, so their attention modules are
replaced one by one. A `Replacement` shares the dictionaries of the original (parameters, buffers, submodules, hooks): the state
dict, optimisers and forward hooks are the same objects, and what is registered meanwhile stays after `restore`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Replacement",
    "TensorVersion",
    "capture_probabilities",
    "children",
    "collapse_batch",
    "contains",
    "loaded_class",
    "merge_heads",
    "reset_output_capturing",
    "restore",
    "set_attribute",
    "split_heads",
]

_SAVED_ATTRIBUTES = "_farlight_saved_attributes"
# State of a module outside its dictionaries: the training mode, and the type of its backward hooks.
_MODULE_STATE = ("training", "_is_full_backward_hook")


class Replacement(nn.Module):
    """A module that replaces `original` and shares its parameters, buffers, submodules and hooks."""

    original: nn.Module

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # Not registered as a submodule: the parameters would be counted twice.
        self.__dict__["original"] = original
        for name, value in vars(original).items():
            if name in _MODULE_STATE or (name in self.__dict__ and isinstance(value, dict | set)):
                self.__dict__[name] = value

    def restore_original(self) -> nn.Module:
        """The original, in the training mode of the replacement."""
        for name in _MODULE_STATE:
            self.original.__dict__[name] = self.__dict__[name]
        return self.original


def loaded_class(module: str, name: str) -> Any:
    """A class of transformers if its file has been imported, else None: no model can then contain an instance of it."""
    return getattr(sys.modules.get(f"transformers.models.{module}"), name, None)


def set_attribute(owner: nn.Module, target: Any, name: str, value: Any) -> None:
    """Set `target.name`, `target` a module or configuration of `owner`; `restore(owner)` undoes it."""
    attributes = vars(target)
    owner.__dict__.setdefault(_SAVED_ATTRIBUTES, []).append((target, name, name in attributes, attributes.get(name)))
    attributes[name] = value


def contains(model: nn.Module, cls: type[Replacement]) -> bool:
    """Whether the model contains a replacement of this class."""
    return any(isinstance(module, cls) for module in model.modules())


def restore(model: Any) -> Any:
    """Undo `sparsify`: the model's own attention modules and methods, with the parameters as they are now."""
    saved: list[tuple[Any, str, bool, Any]] = []
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Replacement):
                setattr(module, name, child.restore_original())
        saved += module.__dict__.pop(_SAVED_ATTRIBUTES, [])
    if saved:
        reset_output_capturing(model)
    for target, name, was_set, value in reversed(saved):
        if was_set:
            vars(target)[name] = value
        else:
            vars(target).pop(name, None)
    return model


def reset_output_capturing(model: nn.Module) -> None:
    """Remove the hooks for `output_attentions`: transformers installs them once, by class, and misses replaced modules."""
    for module in model.modules():
        module.__dict__.pop("_output_capturing_hooks_installed", None)
        for number, hook in list(module._forward_hooks.items()):
            if hook is capture_probabilities or getattr(hook, "__module__", "") == "transformers.utils.output_capturing":
                del module._forward_hooks[number]


def capture_probabilities(module: nn.Module, args: Any, output: tuple[Tensor, Tensor | None]) -> None:
    """A forward hook that hands the second output to transformers' collector, as its hooks on the original's class do."""
    from transformers.utils.output_capturing import _active_collector

    collected = _active_collector.get()
    if collected is not None and "attentions" in collected and output[1] is not None:
        collected["attentions"].append(output[1])


def children(model: nn.Module, cls: Any) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, child) of every submodule of this class that does not override its `forward`; none where cls is None."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if cls is not None and isinstance(child, cls) and type(child).forward is cls.forward:
                yield parent, name, child


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`(B, N, H·D)` as a view `(B, H, N, D)`."""
    view: Tensor = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return view


def merge_heads(x: Tensor) -> Tensor:
    """`(B, H, N, D)` as `(B, N, H·D)`."""
    return x.transpose(1, 2).flatten(2)


def collapse_batch(mask: Tensor) -> Tensor:
    """A mask `(B, N)` as `(1, N)` where all batch items agree, so that one plan serves the batch."""
    if torch.compiler.is_compiling():  # the values are unknown
        return mask
    return mask[:1] if mask.shape[0] > 1 and torch.equal(mask, mask[:1].expand_as(mask)) else mask


class TensorVersion:
    """A weak reference to a tensor with its version counter, to recognise the same tensor with the same content."""

    def __init__(self, x: Tensor | None) -> None:
        self._tensor = None if x is None else weakref.ref(x)
        self._version = _version(x)

    def is_unchanged(self, x: Tensor | None) -> bool:
        """Whether `x` is the referenced tensor and was not written to since; None matches None."""
        if self._tensor is None or x is None:
            return self._tensor is None and x is None
        return self._tensor() is x and self._version is not None and self._version == _version(x)


def _version(x: Tensor | None) -> int | None:
    """torch's count of in-place writes; None for inference tensors, whose writes are not counted."""
    return None if x is None or x.is_inference() else x._version
