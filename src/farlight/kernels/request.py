"""What is asked of a backend, in sizes and types: everything on which "can you run this?" may depend."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from farlight.patterns.expression import Pattern, Sizes

__all__ = ["Request"]


@dataclass(frozen=True)
class Request:
    """One call of `fl.attention`, without its tensors."""

    pattern: Pattern
    sizes: Sizes
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    needs_grad: bool
    dropout: float
    return_lse: bool

    def describe(self) -> str:
        s = self.sizes
        heads = f"{s.heads} heads" if s.heads == self.kv_heads else f"{s.heads} query heads on {self.kv_heads} key heads"
        more = [
            f"{str(self.dtype).removeprefix('torch.')} on {self.device.type}",
            *(["with gradients"] if self.needs_grad else []),
            *([f"dropout {self.dropout:g}"] if self.dropout else []),
            *(["returning lse"] if self.return_lse else []),
        ]
        return f"batch {s.batch}, {heads}, {s.n_q} queries, {s.n_k} keys, head_dim {self.head_dim}, " + ", ".join(more)
