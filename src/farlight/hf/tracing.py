"""What may be read while a program is being traced: shapes, never the values of a mask."""

from __future__ import annotations

import torch

from farlight.errors import UnsupportedError

__all__ = ["refuse_jit_trace"]


def refuse_jit_trace() -> None:
    """Raise under torch.jit.trace: the values of the example's mask would become constants of the traced program."""
    if torch._C._get_tracing_state() is not None:
        raise UnsupportedError(
            "torch.jit.trace would record this model's attention mask, and the plan made from it, as constants, so that the "
            "traced program ignored other padding; use torch.export.export, or restore(model) before tracing."
        )
