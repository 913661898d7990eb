"""Context-parallel sparse attention on torch.distributed: tokens are spread over ranks; only needed keys or queries travel."""

from farlight.distributed.attention import attention
from farlight.distributed.communication import Communication, communication
from farlight.distributed.layout import Layout

__all__ = ["Communication", "Layout", "attention", "communication"]


def __dir__() -> list[str]:
    """The public names alone: no submodules, no imports."""
    return sorted(__all__)
