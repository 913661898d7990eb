"""A Hugging Face model against itself with farlight's attention inside: outputs and the gradient of every parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

# What the argument and the output for a cache are called: the second name is deprecated from transformers 5.24 on.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
OUTPUT, GRADIENT = 1e-5, 1e-4


@dataclass(frozen=True)
class Errors:
    """Relative to the largest number of the tensor compared, for a gradient to at least a hundredth of the model's largest;
    `gradient` is the worst parameter's."""

    output: float
    gradient: float
    where: str = ""

    @property
    def fine(self) -> bool:
        return self.output <= OUTPUT and self.gradient <= GRADIENT


Answer = tuple[dict[str, Tensor], dict[str, Tensor | None]]


def answer(model: nn.Module, inputs: dict[str, Any]) -> Answer:
    """The floating-point outputs, and the gradients of a fixed random sum of them."""
    torch.manual_seed(5)
    found = model(**inputs)
    outputs = {name: x for name, x in found.items() if isinstance(x, Tensor) and x.is_floating_point()}
    if "loss" in outputs:
        total = outputs["loss"]
    else:
        draw = torch.Generator().manual_seed(6)
        total = sum((x * torch.randn(x.shape, generator=draw)).sum() for x in outputs.values())
    model.zero_grad()
    total.backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return {name: x.detach() for name, x in outputs.items()}, gradients


def errors(theirs: Answer, ours: Answer) -> Errors:
    assert theirs[0].keys() == ours[0].keys()
    output = max(_relative(x, ours[0][name], float(x.abs().max())) for name, x in theirs[0].items())
    worst, where = 0.0, ""
    largest = max(float(g.abs().max()) for g in theirs[1].values() if g is not None)
    for name, g in theirs[1].items():
        mine = ours[1][name]
        if g is None or mine is None:
            assert g is mine, f"only one of the two gives {name} a gradient"
            continue
        # Some gradients are 0 by symmetry (a key's bias shifts all scores of a row alike) and hold rounding only.
        size = max(float(g.abs().max()), 1e-2 * largest)
        error = _relative(g, mine, size)
        worst, where = max((worst, where), (error, name))
    return Errors(output, worst, where)


def _relative(expected: Tensor, found: Tensor, size: float) -> float:
    assert expected.shape == found.shape
    assert bool(found.isfinite().all())
    return float((expected - found).abs().max()) / size if size else float(found.abs().max())


def compare(model: nn.Module, inputs: dict[str, Any], sparsify: Callable[[Any], Any]) -> Errors:
    theirs = answer(model, inputs)
    return errors(theirs, answer(sparsify(model), inputs))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                # An expanded tensor takes no memory.
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out
