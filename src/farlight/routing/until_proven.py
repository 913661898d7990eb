"""The choice of `TopBlocks(lost=…)` in torch operations: key blocks are added until the missed share is proven to be small.

The rule is that of csrc/content/choose_until.h, which chooses on the CPU; this module serves other devices and float64. It
scores every pair, n_q · n_k products, in chunks of query blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.routing.pooling import block_bounds, block_sizes

__all__ = ["ProvenChoice"]


class ProvenChoice:
    """Lists of key blocks of k `(B, G, N, D)`, real keys `(B, N)` or None, for queries that choose together.

    For blocks c in the order of Σ_rows softmax_c(bound + log n_c), largest first, a list ends where for each of its rows
    Σ_c left out n_c exp(bound) <= lost / (1 - lost) · Σ_keys seen exp(score): the share left out is then at most `lost`.
    """

    def __init__(self, k: Tensor, real: Tensor | None, block: int, scale: float, lost: float) -> None:
        self.k, self.real, self.block, self.lost = k, real, block, lost
        self.factor, self.sign = abs(scale), -1.0 if scale < 0 else 1.0
        self.lower, self.upper = (bound.transpose(-1, -2)[:, :, None] for bound in block_bounds(k, block, real))
        self.log_sizes = block_sizes(k.shape[2], block, real, k.device).clamp(min=1).to(k.dtype).log()[:, None, None, None]

    def blocks(self, rows: Tensor, mask: Tensor, positions: Tensor | None, scored: Tensor) -> Tensor:
        """`(B, G, U, C)` bool: which of the scored blocks each of U query blocks takes.

        rows: `(B, G, U, s, D)`; mask: `(B|1, 1, U, s)`, the real ones; positions: `(U, s)`, behind which they see no key.
        scored: `(B|1, 1, U, C)`.
        """
        rows, scored_by_row = rows * self.sign, scored[..., None, :]
        exponents = self.factor * (rows.clamp(min=0) @ self.upper + rows.clamp(max=0) @ self.lower) + self.log_sizes
        exponents = exponents.masked_fill(~scored_by_row, float("-inf"))
        largest = exponents.amax(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).min)
        left_out = (exponents - largest).double().exp()
        held = (self._held(rows, positions) - largest).double().exp()
        shares = exponents.softmax(-1).masked_fill(~mask[..., None], 0.0).sum(-2)
        order = shares.nan_to_num(-1.0).masked_fill(~scored, -2.0).sort(dim=-1, descending=True, stable=True).indices
        by_row = order[..., None, :].expand(left_out.shape)
        seen = held.masked_fill(scored_by_row, 0.0).sum(-1, keepdim=True)
        left_out, held = (x.masked_fill(~scored_by_row, 0.0).gather(-1, by_row) for x in (left_out, held))
        # Before the block at place m is added: what the blocks from m on may hold, and what has been seen.
        unresolved = 1e-12 * left_out.sum(-1, keepdim=True) + self.k.shape[2] * 2.0**-110
        remaining = left_out.flip(-1).cumsum(-1).flip(-1) + unresolved
        seen = seen + held.cumsum(-1) - held
        is_open = ~(remaining * self._error(rows)[..., None] <= self.lost / (1 - self.lost) * seen)
        number = (is_open & mask[..., None]).any(-2).sum(-1, keepdim=True)
        is_taken = torch.arange(order.shape[-1], device=order.device) < number
        return torch.zeros_like(is_taken).scatter(-1, order, is_taken) & scored

    def _held(self, rows: Tensor, positions: Tensor | None) -> Tensor:
        """`(B, G, U, s, C)`: the logarithm of the sum of exp(score) over the keys of each block that a row sees."""
        scores = self.factor * (rows @ self.k.transpose(-1, -2)[:, :, None])
        if self.real is not None:
            scores = scores.masked_fill(~self.real[:, None, None, None], float("-inf"))
        if positions is not None:
            keys = torch.arange(self.k.shape[2], device=self.k.device)
            scores = scores.masked_fill(keys > positions[..., None], float("-inf"))
        padded = torch.nn.functional.pad(scores, (0, -scores.shape[-1] % self.block), value=float("-inf"))
        by_block: Tensor = padded.unflatten(-1, (-1, self.block))
        return by_block.logsumexp(-1)

    def _error(self, rows: Tensor) -> Tensor:
        """`(B, G, U, s)`: the factor by which rounding may lift what is left out against what is seen."""
        half_ulps = 4 * rows.shape[-1] * torch.finfo(rows.dtype).eps / 2
        slack = self.factor * half_ulps * rows.abs().sum(-1) * self.k.abs().amax((2, 3))[..., None, None]
        error: Tensor = (2 * slack.double()).exp() * (1 + 2e-5)
        return error
