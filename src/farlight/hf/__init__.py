"""farlight inside Hugging Face transformers: `register()`, then `attn_implementation="farlight"`."""

from farlight.hf.fitted import read_layers, write_layers
from farlight.hf.fitting import fit
from farlight.hf.interface import Observation, register, use_pattern
from farlight.hf.sparsify import restore, sparsify

__all__ = ["Observation", "fit", "read_layers", "register", "restore", "sparsify", "use_pattern", "write_layers"]
