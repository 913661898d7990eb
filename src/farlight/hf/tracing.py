"""The refusal of torch.jit.trace: it runs a model once on an example and freezes every value read from a tensor."""

from __future__ import annotations

import torch
from torch import nn

from farlight.errors import refuse_tracing

__all__ = ["refuse_jit_trace"]


def refuse_jit_trace(module: nn.Module | None = None) -> None:
    """Raise UnsupportedError under torch.jit.trace: the example's mask would become a constant of the traced program."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        refuse_tracing("attn_implementation='farlight'" if module is None else type(module).__name__)
