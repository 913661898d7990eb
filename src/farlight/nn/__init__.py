"""Layers with sparse attention: `nn.MultiheadAttention`, encoders, decoders, native sparse attention, positions."""

from farlight.nn.attention import SparseAttention
from farlight.nn.decoder import SparseDecoder, SparseDecoderLayer
from farlight.nn.encoder import SparseEncoder, SparseEncoderLayer
from farlight.nn.native_sparse import NativeSparseAttention
from farlight.nn.positions import LearnedPositions, RotaryPositions
from farlight.nn.sparsify import scaled_dot_product_attention, sparsify

__all__ = [
    "LearnedPositions",
    "NativeSparseAttention",
    "RotaryPositions",
    "SparseAttention",
    "SparseDecoder",
    "SparseDecoderLayer",
    "SparseEncoder",
    "SparseEncoderLayer",
    "scaled_dot_product_attention",
    "sparsify",
]


def __dir__() -> list[str]:
    """The public names alone: no submodules, no imports."""
    return sorted(__all__)
