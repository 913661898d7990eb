"""Modules of a Hugging Face model replaced by others that hold the same parameters, and everything put back.

Some models bring their own sparse attention and leave no place where another could be plugged in. Their attention modules
are replaced one by one. A replacement shares the containers of the original: parameters, buffers, submodules and hooks. The
state dict, optimisers and forward hooks do not notice, and what is registered meanwhile stays after `restore`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from farlight.errors import UnsupportedError

__all__ = ["Reference", "Replacement", "assign", "class_of", "common", "heads_apart", "heads_joined", "in_use", "restore"]

_BEFORE = "_farlight_before"
# What torch keeps about a module beside its containers: the mode, and what kind of backward hooks it has.
_STATES = ("training", "_is_full_backward_hook")


class Replacement(nn.Module):
    """An attention module in the place of `original`, whose parameters, buffers, submodules and hooks it shares."""

    original: nn.Module

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # Not registered as a submodule: its parameters are counted once, here.
        self.__dict__["original"] = original
        for name, value in vars(original).items():
            if name in _STATES or (name in self.__dict__ and isinstance(value, dict | set)):
                self.__dict__[name] = value

    def handed_back(self) -> nn.Module:
        """The original in the mode that the replacement is in now."""
        for name in _STATES:
            self.original.__dict__[name] = self.__dict__[name]
        return self.original


def class_of(module: str, name: str) -> Any:
    """A class of transformers if that file has been imported, else None: no model can then hold an object of it."""
    return getattr(sys.modules.get(f"transformers.models.{module}"), name, None)


def assign(owner: nn.Module, target: Any, name: str, value: Any) -> None:
    """Set an attribute of a module or configuration of `owner`; `restore` undoes it."""
    held = vars(target)
    owner.__dict__.setdefault(_BEFORE, []).append((target, name, name in held, held.get(name)))
    held[name] = value


def in_use(model: nn.Module, kind: type[Replacement]) -> bool:
    """Whether the model holds a replacement of this kind."""
    return any(isinstance(module, kind) for module in model.modules())


def restore(model: Any) -> Any:
    """Undo `sparsify`: the model's own attention modules and methods, with the parameters as they are now."""
    changed: list[tuple[Any, str, bool, Any]] = []
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Replacement):
                setattr(module, name, child.handed_back())
        changed += module.__dict__.pop(_BEFORE, [])
    if changed:
        _forget_capturing(model)
    for target, name, held, before in reversed(changed):
        if held:
            vars(target)[name] = before
        else:
            vars(target).pop(name, None)
    return model


def _forget_capturing(model: nn.Module) -> None:
    """Let transformers hook up `output_attentions` again: it does so once, by class, and replaced modules it did not know."""
    for module in model.modules():
        module.__dict__.pop("_output_capturing_hooks_installed", None)
        for number, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", "") == "transformers.utils.output_capturing":
                del module._forward_hooks[number]


def children(model: nn.Module, kind: Any) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, child) of every submodule that is of this class and computes as it does."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if kind is not None and isinstance(child, kind) and type(child).forward is kind.forward:
                yield parent, name, child


def heads_apart(x: Tensor, heads: int) -> Tensor:
    """`(B, N, H·D)` as `(B, H, N, D)`, nothing copied."""
    apart: Tensor = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return apart


def heads_joined(x: Tensor) -> Tensor:
    """`(B, H, N, D)` as `(B, N, H·D)`."""
    return x.transpose(1, 2).flatten(2)


def common(mask: Tensor) -> Tensor:
    """A mask `(B, N)` as `(1, N)` where all items agree, so that one plan serves the batch."""
    if torch.compiler.is_compiling():  # the values are unknown
        return mask
    return mask[:1] if mask.shape[0] > 1 and torch.equal(mask, mask[:1].expand_as(mask)) else mask


def refuse_attentions(module: nn.Module, wanted: Any) -> None:
    """Raise where a model is asked for the matrix of probabilities."""
    if wanted:
        raise UnsupportedError(
            f"output_attentions=True asks {type(module).__name__} for the attention probabilities, which are never formed "
            "here; call restore(model) to get them from Hugging Face's own modules, or leave the option out."
        )


class Reference:
    """Remembers a tensor without keeping it alive, and whether it was written to since."""

    def __init__(self, x: Tensor | None) -> None:
        self._of = None if x is None else weakref.ref(x)
        self._version = _version(x)

    def is_still(self, x: Tensor | None) -> bool:
        if self._of is None or x is None:
            return self._of is None and x is None
        return self._of() is x and self._version is not None and self._version == _version(x)


def _version(x: Tensor | None) -> int | None:
    """How often a tensor was written to; None when torch does not count."""
    return None if x is None or x.is_inference() else x._version
