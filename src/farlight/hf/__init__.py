"""farlight inside Hugging Face transformers: `register()`, then `attn_implementation="farlight"`."""

from farlight.hf.interface import Observation, register, use_pattern

__all__ = ["Observation", "register", "use_pattern"]
