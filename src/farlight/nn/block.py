"""What encoder and decoder layers share: norms, an MLP, dropout and residuals, by the names that torch's layers use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from farlight.errors import ArgumentError, show
from farlight.patterns.arguments import whole

__all__ = ["ACTIVATIONS", "NORMS", "Block", "make_norm"]

ACTIVATIONS = ("gelu", "relu", "swiglu")
NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


def make_norm(owner: str, kind: str, dim: int, eps: float, bias: bool, made: dict[str, Any]) -> nn.Module:
    """A LayerNorm or an RMSNorm over `dim` features."""
    if kind not in NORMS:
        raise ArgumentError(f"{owner}: norm = {show(kind)} is unknown; use one of {', '.join(map(repr, NORMS))}.")
    return nn.RMSNorm(dim, eps, **made) if kind == "rms" else nn.LayerNorm(dim, eps, bias=bias, **made)


class Block(nn.Module):
    """Attention branches, then an MLP, each with a norm and a residual.

        mlp(x) = W2 gelu(W1 x)   or   W2 (silu(g) · u) with (g, u) = W1 x   ("swiglu", Shazeer 2020, arXiv:2002.05202)

    Before each branch (`norm_first`) x + branch(norm(x)), after it norm(x + branch(x)).
    """

    norm1: nn.Module
    norm2: nn.Module
    norm3: nn.Module

    def __init__(
        self,
        owner: str,
        embed_dim: int,
        *,
        branches: dict[str, nn.Module],
        mlp_dim: int | None,
        dropout: float,
        activation: str,
        norm_first: bool,
        norm: str,
        norm_eps: float,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if activation not in ACTIVATIONS:
            raise ArgumentError(
                f"{owner}: activation = {show(activation)} is unknown; use one of {', '.join(map(repr, ACTIVATIONS))}."
            )
        gated = activation == "swiglu"
        if mlp_dim is None:
            # The gate is a third matrix: two thirds of the width keep the number of parameters.
            mlp_dim = -(-8 * embed_dim // 3 // 8) * 8 if gated else 4 * embed_dim
        self.mlp_dim, self.activation = whole(f"{owner}: mlp_dim", mlp_dim, 1), activation
        self.norm_first, self.dropout_p = bool(norm_first), float(dropout)
        # In torch's order, so that an optimizer's state, which knows parameters by their number, loads too.
        for name, branch in branches.items():
            self.add_module(name, branch)
        self.linear1 = nn.Linear(embed_dim, self.mlp_dim * (2 if gated else 1), bias=bias, **made)
        self.linear2 = nn.Linear(self.mlp_dim, embed_dim, bias=bias, **made)
        for number in range(1, len(branches) + 2):
            setattr(self, f"norm{number}", make_norm(owner, norm, embed_dim, norm_eps, bias, made))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, norm_first={self.norm_first}"

    def drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout_p, self.training)

    def through(self, x: Tensor, *branches: Callable[[Tensor], Tensor]) -> Tensor:
        """x through the attention branches, then through the MLP."""
        for number, branch in enumerate((*branches, self.mlp), 1):
            norm = getattr(self, f"norm{number}")
            x = x + self.drop(branch(norm(x))) if self.norm_first else norm(x + self.drop(branch(x)))
        return x

    def mlp(self, x: Tensor) -> Tensor:
        x = self.linear1(x)
        if self.activation == "swiglu":
            gate, up = x.chunk(2, -1)
            x = functional.silu(gate) * up
        else:
            x = functional.gelu(x) if self.activation == "gelu" else functional.relu(x)
        out: Tensor = self.linear2(self.drop(x))
        return out
