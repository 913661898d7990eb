"""Comparison of a Hugging Face model with itself under farlight: outputs and the gradient of every parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

# Name of the argument and the output for a cache; transformers 5.24 deprecates the second.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
OUTPUT, GRADIENT = 1e-5, 1e-4


@dataclass(frozen=True)
class Errors:
    """Largest absolute errors, relative to the largest entry of the tensor; for a gradient at least 1% of the model's largest.

    `gradient` is that of the worst parameter, `where` its name.
    """

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
    result = model(**inputs)
    outputs = {name: x for name, x in result.items() if isinstance(x, Tensor) and x.is_floating_point()}
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
    """The errors of `ours`, both with the same outputs and parameters."""
    assert theirs[0].keys() == ours[0].keys()
    output = max(_relative(x, ours[0][name], float(x.abs().max())) for name, x in theirs[0].items())
    worst, where = 0.0, ""
    largest = max(float(g.abs().max()) for g in theirs[1].values() if g is not None)
    for name, g in theirs[1].items():
        actual = ours[1][name]
        if g is None or actual is None:
            assert g is actual, f"only one of the two gives {name} a gradient"
            continue
        # Some gradients are 0 by symmetry (a key's bias shifts all scores of a row alike) and hold rounding only.
        size = max(float(g.abs().max()), 1e-2 * largest)
        error = _relative(g, actual, size)
        worst, where = max((worst, where), (error, name))
    return Errors(output, worst, where)


def _relative(expected: Tensor, actual: Tensor, size: float) -> float:
    assert expected.shape == actual.shape
    assert bool(actual.isfinite().all())
    return float((expected - actual).abs().max()) / size if size else float(actual.abs().max())


def compare(model: nn.Module, inputs: dict[str, Any], sparsify: Callable[[Any], Any]) -> Errors:
    """The errors of a model after `sparsify`, against the model before."""
    theirs = answer(model, inputs)
    return errors(theirs, answer(sparsify(model), inputs))


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                # The storage counts, not the shape: an expanded tensor takes no memory.
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out
