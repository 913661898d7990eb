"""The common base of encoder and decoder layers: branches with norms and residuals, and an MLP; torch's parameter names."""

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


def make_norm(owner: str, norm: str, dim: int, eps: float, bias: bool, factory_kwargs: dict[str, Any]) -> nn.Module:
    """A LayerNorm (`norm` = "layer") or an RMSNorm ("rms") over `dim` features. Raises ArgumentError for another name."""
    if norm not in NORMS:
        raise ArgumentError(f"{owner}: norm = {show(norm)} is unknown; use one of {', '.join(map(repr, NORMS))}.")
    return nn.RMSNorm(dim, eps, **factory_kwargs) if norm == "rms" else nn.LayerNorm(dim, eps, bias=bias, **factory_kwargs)


class Block(nn.Module):
    """Attention branches, then an MLP, each with a norm and a residual.

        mlp(x) = W2 gelu(W1 x)   or   W2 (silu(g) · u) with (g, u) = W1 x   ("swiglu", Shazeer 2020, arXiv:2002.05202)

    With `norm_first`: x + branch(norm(x)); else norm(x + branch(x)).

    Args:
        owner: name of the public class, for error messages.
        branches: the attention modules by attribute name, in torch's order.
        The others: as in `SparseEncoderLayer`.
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
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        if activation not in ACTIVATIONS:
            raise ArgumentError(
                f"{owner}: activation = {show(activation)} is unknown; use one of {', '.join(map(repr, ACTIVATIONS))}."
            )
        gated = activation == "swiglu"
        if mlp_dim is None:
            # The gate adds a third matrix: two thirds of the width keep the number of parameters.
            mlp_dim = -(-8 * embed_dim // 3 // 8) * 8 if gated else 4 * embed_dim
        self.mlp_dim, self.activation = whole(f"{owner}: mlp_dim", mlp_dim, 1), activation
        self.norm_first, self.dropout_p = bool(norm_first), float(dropout)
        # In torch's order: an optimizer's state refers to parameters by their index.
        for name, branch in branches.items():
            self.add_module(name, branch)
        self.linear1 = nn.Linear(embed_dim, self.mlp_dim * (2 if gated else 1), bias=bias, **factory_kwargs)
        self.linear2 = nn.Linear(self.mlp_dim, embed_dim, bias=bias, **factory_kwargs)
        for number in range(1, len(branches) + 2):
            setattr(self, f"norm{number}", make_norm(owner, norm, embed_dim, norm_eps, bias, factory_kwargs))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, norm_first={self.norm_first}"

    def apply_dropout(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout_p, self.training)

    def apply_branches(self, x: Tensor, *branches: Callable[[Tensor], Tensor]) -> Tensor:
        """x after the attention branches and the MLP, each with norm, dropout and residual."""
        for number, branch in enumerate((*branches, self.mlp), 1):
            norm = getattr(self, f"norm{number}")
            x = x + self.apply_dropout(branch(norm(x))) if self.norm_first else norm(x + self.apply_dropout(branch(x)))
        return x

    def mlp(self, x: Tensor) -> Tensor:
        """The MLP, `(…, embed_dim)` to the same."""
        x = self.linear1(x)
        if self.activation == "swiglu":
            gate, up = x.chunk(2, -1)
            x = functional.silu(gate) * up
        else:
            x = functional.gelu(x) if self.activation == "gelu" else functional.relu(x)
        out: Tensor = self.linear2(self.apply_dropout(x))
        return out
