"""farlight inside Hugging Face transformers: `register()`, then `attn_implementation="farlight"`."""

from farlight.hf.interface import Observation, register, use_pattern
from farlight.hf.lengthen import lengthen

__all__ = ["Observation", "lengthen", "register", "use_pattern"]
