"""Decoders with causal sparse self-attention: `SparseDecoderLayer` and `SparseDecoder`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from farlight.errors import ArgumentError
from farlight.nn.attention import SparseAttention
from farlight.nn.block import Block
from farlight.nn.masks import intersect
from farlight.nn.positions import RotaryPositions, Rotation
from farlight.nn.stack import Stack
from farlight.patterns.expression import Pattern
from farlight.patterns.positional import causal
from farlight.routing.base import Router

__all__ = ["SparseDecoder", "SparseDecoderLayer"]


class SparseDecoderLayer(Block):
    """One layer of a decoder: causal sparse self-attention, optional cross-attention, and an MLP.

    Self-attention sees `pattern & causal()` whatever the pattern. A router must choose from past tokens only; those of
    fl.routing with `causal=False` are refused. Without `cross_pattern` this is a layer of a language model; with it,
    the call and the names in the state dict are those of `nn.TransformerDecoderLayer(batch_first=True)`.

    Args:
        cross_pattern: which tokens of the memory each token sees, both counted from 0 in their own text; None: there is no
            cross-attention.
        The others: as in SparseEncoderLayer.

    >>> import torch, farlight as fl
    >>> layer = fl.nn.SparseDecoderLayer(32, 4, fl.presets.streaming(4, 16), kv_heads=2, rotary=True)
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
        cross_pattern: Pattern | None = None,
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
        if isinstance(pattern, Router):
            for part in pattern.modules():
                if getattr(part, "causal", None) is False:
                    raise ArgumentError(
                        f"{name}: {type(part).__name__}(causal=False) may choose by what comes later, so a decoder would see "
                        "its own future; build the router with causal=True."
                    )
            pattern = pattern & causal()
        elif isinstance(pattern, Pattern):
            pattern = intersect(pattern, causal())
        options: dict[str, Any] = {"kv_heads": kv_heads, "bias": bias, "dropout": dropout, "backend": backend}
        options |= {"device": device, "dtype": dtype}
        branches: dict[str, nn.Module] = {
            "self_attn": SparseAttention(
                embed_dim, num_heads, pattern, rotary=rotary, route_before_rotary=route_before_rotary, **options
            )
        }
        if cross_pattern is not None:
            if not isinstance(cross_pattern, Pattern):
                raise ArgumentError(
                    f"{name}: cross_pattern is {type(cross_pattern).__name__}; pass a pattern such as fl.full(), or None."
                )
            branches["multihead_attn"] = SparseAttention(embed_dim, num_heads, cross_pattern, **options)
        super().__init__(
            name, embed_dim, branches=branches, mlp_dim=mlp_dim, dropout=dropout, activation=activation,
            norm_first=norm_first, norm=norm, norm_eps=norm_eps, bias=bias, device=device, dtype=dtype,
        )  # fmt: skip

    @property
    def _cross_attn(self) -> nn.Module | None:
        return self._modules.get("multihead_attn")

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | None = None,
        tgt_mask: Tensor | Pattern | None = None,
        memory_mask: Tensor | Pattern | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = True,
        memory_is_causal: bool = False,
        *,
        chosen: list[Pattern] | None = None,
    ) -> Tensor:
        """`(B, N, embed_dim)` to the same; `memory` `(B, M, embed_dim)` where there is cross-attention.

        `tgt_is_causal` exists for torch's call and changes nothing: a decoder is always causal.
        """
        name = type(self).__name__
        if memory is not None and self._cross_attn is None:
            raise ArgumentError(f"{name}: a memory was given, but there is no cross-attention; build it with cross_pattern.")
        if memory is None and self._cross_attn is not None:
            raise ArgumentError(f"{name}: there is cross-attention, but no memory was given; pass the encoder's states.")

        def attend_self(x: Tensor) -> Tensor:
            out: Tensor = self.self_attn(x, x, x, tgt_key_padding_mask, attn_mask=tgt_mask, chosen=chosen)[0]
            return out

        def attend_memory(x: Tensor) -> Tensor:
            out: Tensor = self._cross_attn(  # type: ignore[misc]
                x, memory, memory, memory_key_padding_mask, attn_mask=memory_mask, is_causal=memory_is_causal, q_offset=0
            )[0]
            return out

        return self.apply_branches(tgt, attend_self, *([] if memory is None else [attend_memory]))

    if TYPE_CHECKING:
        __call__ = forward


class SparseDecoder(Stack):
    """A stack of `SparseDecoderLayer`: embeddings `(B, N, embed_dim)` in, states of the same shape out; causal.

    The arguments are those of SparseEncoder, `options` those of SparseDecoderLayer; the call and the names in the state dict
    are those of `nn.TransformerDecoder`.

    >>> import torch, farlight as fl
    >>> decoder = fl.nn.SparseDecoder(2, 32, 4, fl.window(15, 0), kv_heads=2, activation="swiglu", norm="rms", bias=False)
    >>> decoder(torch.randn(2, 100, 32)).shape
    torch.Size([2, 100, 32])
    """

    layer_type = SparseDecoderLayer

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | None = None,
        tgt_mask: Tensor | Pattern | None = None,
        memory_mask: Tensor | Pattern | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """`(B, N, embed_dim)` to the same; masks as in SparseAttention, for every layer."""
        allowed = self.self_attention_mask(tgt, tgt_mask, False)

        def step(layer: SparseDecoderLayer, x: Tensor, chosen: list[Pattern] | None) -> Tensor:
            out: Tensor = layer(
                x, memory, allowed, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                memory_is_causal=memory_is_causal, chosen=chosen,
            )  # fmt: skip
            return out

        return self.run(tgt, step)

    if TYPE_CHECKING:
        __call__ = forward
