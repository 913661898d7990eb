"""Position encodings: rotary for queries and keys, learned vectors for embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from farlight.errors import ArgumentError, show
from farlight.patterns.arguments import whole

__all__ = ["LearnedPositions", "RotaryPositions", "Rotation", "read_rotary"]

# Rotates queries or keys: (tensor (B, H, N, D), positions (N,)) to the same shape.
Rotation = Callable[[Tensor, Tensor], Tensor]


class RotaryPositions(nn.Module):
    """Rotary positions: the score of a query at i and a key at j depends on i - j alone.

    With x = (a, b), its first and its second half, and angle_d = position / scale · base^(-2d / D):

        x ↦ (a cos - b sin, b cos + a sin)

    `scale` > 1 maps a longer text to the positions that a model was trained on (position interpolation, Chen et al. 2023,
    arXiv:2306.15595). There are no weights; angles are computed in float64, exact enough for a million tokens.
    Su et al. 2021, arXiv:2104.09864; the halves as in Llama.

    Call it as `rotary(x, positions)` with x `(B, H, N, D)` and positions `(N,)`; it also serves as `rotate=` of
    `fl.nn.NativeSparseAttention`.

    >>> import torch, farlight.nn
    >>> rotary = farlight.nn.RotaryPositions(2)
    >>> rotary(torch.tensor([1.0, 0.0]).expand(1, 1, 3, 2), torch.arange(3))[0, 0, :, 0]
    tensor([ 1.0000,  0.5403, -0.4161])
    """

    def __init__(self, head_dim: int, *, base: float = 10_000.0, scale: float = 1.0) -> None:
        super().__init__()
        self.head_dim = whole("RotaryPositions: head_dim", head_dim, 2)
        if self.head_dim % 2:
            raise ArgumentError(f"RotaryPositions: head_dim = {head_dim} is odd; it rotates pairs, so make it even.")
        for name, value in (("base", base), ("scale", scale)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ArgumentError(f"RotaryPositions: {name} = {show(value)}; a positive number is needed.")
        self.base, self.scale = float(base), float(scale)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base:g}" + (f", scale={self.scale:g}" if self.scale != 1 else "")

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` `(B, H, N, D)` rotated by the angles of `positions` `(N,)`; same shape and dtype."""
        if x.shape[-1] != self.head_dim:
            raise ArgumentError(
                f"RotaryPositions({self.head_dim}): the tensor has head_dim {x.shape[-1]}; make one for that size."
            )
        half = self.head_dim // 2
        # MPS has no float64; float32 distinguishes positions up to some ten thousand.
        angle_dtype = torch.float32 if x.device.type == "mps" else torch.float64
        steps = torch.arange(half, device=x.device, dtype=angle_dtype) * (-math.log(self.base) / half)
        angle = positions.to(device=x.device, dtype=angle_dtype)[:, None] / self.scale * steps.exp()
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

    if TYPE_CHECKING:
        __call__ = forward


def read_rotary(owner: str, rotary: RotaryPositions | Rotation | bool | None, head_dim: int) -> Rotation | None:
    """The rotation that a `rotary` argument means: None and False none, True `RotaryPositions(head_dim)`, else the function.

    Raises ArgumentError for anything else, and for a RotaryPositions of another head_dim.
    """
    if rotary is None or rotary is False:
        return None
    if rotary is True:
        return RotaryPositions(head_dim)
    if isinstance(rotary, RotaryPositions) and rotary.head_dim != head_dim:
        raise ArgumentError(
            f"{owner}: its heads have {head_dim} dimensions, but the rotary positions are made for {rotary.head_dim}; "
            f"pass RotaryPositions({head_dim})."
        )
    if not callable(rotary):
        raise ArgumentError(
            f"{owner}: rotary is {type(rotary).__name__}; pass True, a RotaryPositions, a function of (tensor, positions), or "
            "None."
        )
    return rotary


class LearnedPositions(nn.Module):
    """A learned vector for each of `max_positions` positions: token i gets row `offset + i` of `weight`.

    >>> import torch, farlight.nn
    >>> farlight.nn.LearnedPositions(512, 16)(torch.zeros(2, 100, 16)).shape
    torch.Size([2, 100, 16])
    """

    def __init__(
        self, max_positions: int, embed_dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.max_positions = whole("LearnedPositions: max_positions", max_positions, 1)
        self.weight = nn.Parameter(torch.empty(self.max_positions, embed_dim, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)

    def extra_repr(self) -> str:
        return f"{self.max_positions}, {self.weight.shape[1]}"

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """`x` `(B, N, embed_dim)` plus the vectors of its positions. Raises ArgumentError for a text that is too long."""
        n = x.shape[1]
        if offset < 0 or offset + n > self.max_positions:
            raise ArgumentError(
                f"LearnedPositions: {n} tokens from position {offset} on need {offset + n} positions, and there are "
                f"{self.max_positions}; make it larger, cut the text, or use rotary positions, which have no end."
            )
        return x + self.weight[offset : offset + n]

    if TYPE_CHECKING:
        __call__ = forward
