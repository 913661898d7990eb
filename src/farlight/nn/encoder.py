"""Encoders with sparse self-attention: `SparseEncoderLayer` and `SparseEncoder`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from farlight.nn.attention import SparseAttention
from farlight.nn.block import Block
from farlight.nn.positions import RotaryPositions, Rotation
from farlight.nn.stack import Stack
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router

__all__ = ["SparseEncoder", "SparseEncoderLayer"]


class SparseEncoderLayer(Block):
    """One layer of an encoder: sparse self-attention and an MLP, each with a norm and a residual.

        norm_first:  x + attend(norm1(x)), then x + mlp(norm2(x));    else: norm1(x + attend(x)), then norm2(x + mlp(x))

    The call and the names in the state dict are those of `nn.TransformerEncoderLayer(batch_first=True)`, so weights of one
    load into the other ("gelu" and "relu"), and `nn.TransformerEncoder` can hold these layers.

    Args:
        embed_dim, num_heads, pattern, kv_heads, rotary, route_before_rotary, backend, device, dtype: as in SparseAttention.
        mlp_dim: width of the MLP; None means 4 · embed_dim, and about two thirds of it for "swiglu".
        dropout: on links, inside the MLP and on what each branch adds.
        activation: "gelu", "relu" or "swiglu".
        norm_first, norm, norm_eps: where the norms stand; "layer" or "rms"; their epsilon.
        bias: in projections, MLP and layer norms.

    >>> import torch, farlight as fl
    >>> layer = fl.nn.SparseEncoderLayer(32, 4, fl.window(8) | fl.global_tokens([0]), activation="swiglu", rotary=True)
    >>> layer(torch.randn(2, 100, 32)).shape
    torch.Size([2, 100, 32])
    """

    self_attn: SparseAttention

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: Pattern | Router,
        *,
        mlp_dim: int | None = None,
        kv_heads: int | None = None,
        dropout: float = 0.0,
        activation: str = "gelu",
        norm_first: bool = True,
        norm: str = "layer",
        norm_eps: float = 1e-5,
        bias: bool = True,
        rotary: RotaryPositions | Rotation | bool | None = None,
        route_before_rotary: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = type(self).__name__
        self_attn = SparseAttention(
            embed_dim, num_heads, pattern, kv_heads=kv_heads, bias=bias, dropout=dropout, rotary=rotary,
            route_before_rotary=route_before_rotary, backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        super().__init__(
            name, embed_dim, branches={"self_attn": self_attn}, mlp_dim=mlp_dim, dropout=dropout, activation=activation,
            norm_first=norm_first, norm=norm, norm_eps=norm_eps, bias=bias, device=device, dtype=dtype,
        )  # fmt: skip

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | Pattern | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        chosen: list[Pattern] | None = None,
    ) -> Tensor:
        """`(B, N, embed_dim)` to the same; masks and `chosen` as in SparseAttention."""

        def attend(x: Tensor) -> Tensor:
            masks: Any = {"attn_mask": src_mask, "is_causal": is_causal, "chosen": chosen}
            out: Tensor = self.self_attn(x, x, x, src_key_padding_mask, **masks)[0]
            return out

        return self.apply_branches(src, attend)

    if TYPE_CHECKING:
        __call__ = forward


class SparseEncoder(Stack):
    """A stack of `SparseEncoderLayer`: embeddings `(B, N, embed_dim)` in, states of the same shape out.

    The call and the names in the state dict are those of `nn.TransformerEncoder`, with a final norm (`norm`) where norms come
    first.

    Args:
        num_layers: the number of layers.
        pattern: one for all layers, or a list with one for each. A router that is given once is copied for each layer, so
            that each has its own centroids.
        positions: "rotary" (in every layer), "learned" (added to the embeddings; needs `max_positions`), a RotaryPositions or
            LearnedPositions, or None where the embeddings contain positions already.
        checkpoint: in training store only each layer's input and recompute the rest in the backward pass. A router's
            choice is stored, not recomputed.
        options: those of SparseEncoderLayer.

    >>> import torch, farlight as fl
    >>> skim = fl.window(8) | fl.global_tokens([0])
    >>> encoder = fl.nn.SparseEncoder(2, 32, 4, [skim, skim | fl.random_keys(2)])
    >>> padding = torch.zeros(2, 100, dtype=torch.bool)
    >>> encoder(torch.randn(2, 100, 32), src_key_padding_mask=padding).shape
    torch.Size([2, 100, 32])
    """

    layer_type = SparseEncoderLayer

    def forward(
        self,
        src: Tensor,
        mask: Tensor | Pattern | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """`(B, N, embed_dim)` to the same; masks as in SparseAttention, for every layer."""
        allowed = self.self_attention_mask(src, mask, bool(is_causal))
        return self.run(src, lambda layer, x, chosen: layer(x, allowed, src_key_padding_mask, chosen=chosen))

    if TYPE_CHECKING:
        __call__ = forward
