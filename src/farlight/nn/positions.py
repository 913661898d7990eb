"""Where a token stands, told to a layer: rotary positions for attention, learned ones for embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from farlight.errors import ArgumentError, show
from farlight.patterns.arguments import whole

__all__ = ["LearnedPositions", "RotaryPositions", "Rotation", "read_rotary"]

# What turns queries and keys: (tensor (B, H, N, D), positions (N,)) to the same shape.
Rotation = Callable[[Tensor, Tensor], Tensor]


class RotaryPositions(nn.Module):
    """Rotary positions: a query at i and a key at j meet as if only i - j were known.

    With x = (a, b), its first and its second half, and angle_d = position / scale · base^(-2d / D):

        x ↦ (a cos - b sin, b cos + a sin)

    `scale` > 1 presses a longer text into the positions that a model was trained on (position interpolation, Chen et al.
    2023, arXiv:2306.15595). There are no weights; angles are taken in float64, so that they stay exact at a million tokens.
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
            raise ArgumentError(f"RotaryPositions: head_dim = {head_dim} is odd; it turns pairs, so make it even.")
        for name, value in (("base", base), ("scale", scale)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ArgumentError(f"RotaryPositions: {name} = {show(value)}; a positive number is needed.")
        self.base, self.scale = float(base), float(scale)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base:g}" + (f", scale={self.scale:g}" if self.scale != 1 else "")

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        if x.shape[-1] != self.head_dim:
            raise ArgumentError(
                f"RotaryPositions({self.head_dim}): the tensor has head_dim {x.shape[-1]}; make one for that size."
            )
        half = self.head_dim // 2
        # Devices without float64 exist; there positions below some ten thousand are still told apart.
        exact = torch.float32 if x.device.type == "mps" else torch.float64
        steps = torch.arange(half, device=x.device, dtype=exact) * (-math.log(self.base) / half)
        angle = positions.to(device=x.device, dtype=exact)[:, None] / self.scale * steps.exp()
        kind = torch.promote_types(x.dtype, torch.float32)
        cos, sin = angle.cos().to(kind), angle.sin().to(kind)
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def read_rotary(owner: str, rotary: RotaryPositions | Rotation | bool | None, head_dim: int) -> Rotation | None:
    """None and False turn nothing, True means `RotaryPositions(head_dim)`, and any function of the same kind is taken as
    it is. Raises ArgumentError.
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
    """A learned vector for each of `max_positions` places: token i gets row `offset + i` of `weight`.

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
        """`x` `(B, N, embed_dim)` plus the vectors of its places. Raises ArgumentError for a text that is too long."""
        n = x.shape[1]
        if offset < 0 or offset + n > self.max_positions:
            raise ArgumentError(
                f"LearnedPositions: {n} tokens from position {offset} on need {offset + n} positions, and there are "
                f"{self.max_positions}; make it larger, cut the text, or use rotary positions, which have no end."
            )
        return x + self.weight[offset : offset + n]
