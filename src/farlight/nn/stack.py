"""The common base of encoders and decoders: a list of layers, positions, checkpointing and a final norm."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint as checkpoint_step

from farlight.errors import ArgumentError, show
from farlight.nn.block import make_norm
from farlight.nn.masks import mask_pattern
from farlight.nn.positions import LearnedPositions, RotaryPositions
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router

__all__ = ["Stack"]


class Stack(nn.Module):
    """`num_layers` layers of class `layer_type`, one after another; arguments as in `SparseEncoder`."""

    layer_type: ClassVar[Callable[..., nn.Module]]

    def __init__(
        self,
        num_layers: int,
        embed_dim: int,
        num_heads: int,
        pattern: Pattern | Router | Sequence[Pattern | Router],
        *,
        positions: str | RotaryPositions | LearnedPositions | None = "rotary",
        max_positions: int | None = None,
        checkpoint: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        patterns = _patterns_by_layer(name, pattern, whole(f"{name}: num_layers", num_layers, 1))
        self.embed_dim, self.num_heads, self.checkpoint = embed_dim, num_heads, bool(checkpoint)
        factory_kwargs = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.positions: LearnedPositions | None = None
        if isinstance(positions, LearnedPositions) or positions == "learned":
            if max_positions is None and not isinstance(positions, LearnedPositions):
                raise ArgumentError(f"{name}: learned positions need max_positions, the length of the longest text.")
            self.positions = (
                positions
                if isinstance(positions, LearnedPositions)
                else LearnedPositions(max_positions, embed_dim, **factory_kwargs)  # type: ignore[arg-type]
            )
        elif isinstance(positions, RotaryPositions) or positions == "rotary":
            if "rotary" in options:
                raise ArgumentError(f"{name}: give either positions={show(positions)} or rotary=…, not both.")
            options = options | {
                "rotary": positions if isinstance(positions, RotaryPositions) else _shared_rotary(embed_dim, num_heads)
            }
        elif positions is not None:
            raise ArgumentError(
                f"{name}: positions = {show(positions)} is unknown; use 'rotary', 'learned', a RotaryPositions, a "
                "LearnedPositions, or None."
            )
        if max_positions is not None and self.positions is None:
            raise ArgumentError(f"{name}: max_positions = {max_positions} means something for positions='learned' only.")
        self.layers = nn.ModuleList(
            self.layer_type(embed_dim, num_heads, layer_pattern, **options) for layer_pattern in patterns
        )
        self.norm: nn.Module | None = None
        if options.get("norm_first", True):
            norm, eps, bias = options.get("norm", "layer"), options.get("norm_eps", 1e-5), options.get("bias", True)
            self.norm = make_norm(name, norm, embed_dim, eps, bias, factory_kwargs)

    def self_attention_mask(self, x: Tensor, mask: Tensor | Pattern | None, is_causal: bool) -> Pattern | None:
        """A mask on self-attention as a pattern, converted once for all layers; None for no mask."""
        if mask is None and not is_causal:
            return None
        return mask_pattern(type(self).__name__, mask, is_causal, x.shape[0], self.num_heads, x.shape[1], x.shape[1], 0)

    def run(self, x: Tensor, step: Callable[[Any, Tensor, list[Pattern] | None], Tensor]) -> Tensor:
        """`step(layer, x, chosen)` for each layer, after positions and before the final norm.

        `chosen`: the list in which a router's pattern is stored for the recomputation, see `SparseAttention.forward`.
        """
        if x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise ArgumentError(
                f"{type(self).__name__}: the input is {tuple(x.shape)}; (batch, tokens, {self.embed_dim}) is needed."
            )
        if self.positions is not None:
            x = self.positions(x)
        for layer in self.layers:
            if self.checkpoint and self.training and is_grad_enabled():
                # The recomputation reuses the router's pattern: a learning router would choose other links the second time.
                chosen: list[Pattern] | None = [] if any(isinstance(part, Router) for part in layer.modules()) else None
                x = checkpoint_step(functools.partial(step, layer), x, chosen, use_reentrant=False)
            else:
                x = step(layer, x, None)
        return x if self.norm is None else self.norm(x)


def _shared_rotary(embed_dim: int, num_heads: int) -> RotaryPositions | bool:
    """One module for all layers; True where embed_dim is no multiple of num_heads, so that the layers raise."""
    return RotaryPositions(embed_dim // num_heads) if num_heads and embed_dim % num_heads == 0 else True


def _patterns_by_layer(
    name: str, pattern: Pattern | Router | Sequence[Pattern | Router], num_layers: int
) -> list[Pattern | Router]:
    """One pattern or router for each layer; a single router is copied. Raises ArgumentError for a list of another length."""
    if isinstance(pattern, Router):
        return [copy.deepcopy(pattern) for _ in range(num_layers)]
    if isinstance(pattern, Pattern):
        return [pattern] * num_layers
    if not isinstance(pattern, (list, tuple)) or len(pattern) != num_layers:
        actual = f"{len(pattern)} of them" if isinstance(pattern, (list, tuple)) else type(pattern).__name__
        raise ArgumentError(
            f"{name}: the pattern is {actual} for {num_layers} layers; give one pattern or router, or a list with one for each."
        )
    return list(pattern)
