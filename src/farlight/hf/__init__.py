"""farlight inside Hugging Face transformers: `register()`, then `attn_implementation="farlight"`."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from farlight.hf.fit_file import read_layers, write_layers
from farlight.hf.interface import register, use_pattern
from farlight.hf.lengthen import lengthen
from farlight.hf.setting import Observation
from farlight.hf.sparsify import restore, sparsify
from farlight.hf.spread import sequence_collator

if TYPE_CHECKING:
    from farlight.analysis.fit.whole_model import fit_model as fit
    from farlight.hf.cache import SparseCache as SparseCache

# Without SparseCache: `from farlight.hf import *` needs no optional package.
__all__ = [
    "Observation",
    "fit",
    "lengthen",
    "read_layers",
    "register",
    "restore",
    "sequence_collator",
    "sparsify",
    "use_pattern",
    "write_layers",
]


def __getattr__(name: str) -> Any:
    """`SparseCache` inherits from a class of transformers, and `fit` is analysis: not loaded before they are needed."""
    if name == "SparseCache":
        from farlight.hf.cache import SparseCache

        return SparseCache
    if name == "fit":
        from farlight.analysis.fit.whole_model import fit_model

        return fit_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names alone, no submodules and no imports; `SparseCache` where transformers is installed."""
    return sorted([*__all__, *(["SparseCache"] if find_spec("transformers") else [])])
