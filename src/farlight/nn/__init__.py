"""Layers to build models with."""

from farlight.nn.native_sparse import NativeSparseAttention

__all__ = ["NativeSparseAttention"]
