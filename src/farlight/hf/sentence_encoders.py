"""The transformers model inside a `SentenceTransformer`, which is an `nn.Sequential` whose first module holds it."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["unwrap"]


def unwrap(model: Any) -> tuple[Any, Any]:
    """(transformers model, the module of sentence-transformers that holds it); (model, None) for any other model."""
    if isinstance(model, nn.Sequential):
        for module in model.children():
            inner = getattr(module, "auto_model", None)
            if isinstance(inner, nn.Module):
                return inner, module
    return model, None
