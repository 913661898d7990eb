"""farlight inside Hugging Face transformers: `register()`, then `attn_implementation="farlight"`."""

from typing import Any

from farlight.hf.fitted import read_layers, write_layers
from farlight.hf.fitting import fit
from farlight.hf.interface import Observation, register, use_pattern
from farlight.hf.lengthen import lengthen
from farlight.hf.sparsify import restore, sparsify

__all__ = [
    "Observation",
    "SparseCache",
    "fit",
    "lengthen",
    "read_layers",
    "register",
    "restore",
    "sparsify",
    "use_pattern",
    "write_layers",
]


def __getattr__(name: str) -> Any:
    """`SparseCache` inherits from a class of transformers, which is not loaded before it is needed."""
    if name == "SparseCache":
        from farlight.hf.cache import SparseCache

        return SparseCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
