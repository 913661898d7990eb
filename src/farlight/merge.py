"""Joining attention over disjoint sets of keys: exact, differentiable, and with weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from farlight.errors import ArgumentError

__all__ = ["merge"]


def merge(pieces: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
    """The attention over the union of disjoint sets of keys, from the attention over each.

        lse = log Σ wₙ exp(lseₙ);   out = Σ wₙ exp(lseₙ - lse) outₙ

    `pieces` are (out `(…, D)`, lse `(…)`) pairs of one shape, as `fl.attention(…, return_lse=True)` gives. A weight w counts
    every key of a piece w times; 0 leaves the piece out. A row that no piece sees gives 0 and -inf. Computed in float32
    (float64 for float64); `out` comes back in the pieces' type. Gradients flow through out and lse of every piece.

    Raises ArgumentError when there is no piece, shapes differ, or a weight is negative or not finite.

    >>> import farlight as fl, torch
    >>> q, k, v = torch.randn(3, 1, 2, 8, 4).unbind(0)
    >>> left = fl.attention(q, k[:, :, :5], v[:, :, :5], fl.full(), return_lse=True)
    >>> right = fl.attention(q, k[:, :, 5:], v[:, :, 5:], fl.full(), return_lse=True)
    >>> torch.allclose(fl.merge([left, right])[0], fl.attention(q, k, v, fl.full()), atol=1e-6)
    True
    """
    if not pieces:
        raise ArgumentError("merge: there is nothing to merge; give at least one (out, lse).")
    factors = [1.0] * len(pieces) if weights is None else [float(w) for w in weights]
    if len(factors) != len(pieces):
        raise ArgumentError(f"merge: {len(factors)} weights for {len(pieces)} pieces; give one weight for each.")
    for w in factors:
        if not (math.isfinite(w) and w >= 0):
            raise ArgumentError(f"merge: weight {w} is not a finite number >= 0; a weight says how often a piece counts.")
    shape = pieces[0][0].shape
    for out, lse in pieces:
        if out.shape != shape or lse.shape != shape[:-1]:
            raise ArgumentError(
                f"merge: out {tuple(out.shape)} with lse {tuple(lse.shape)} does not fit the first piece's {tuple(shape)}; "
                "all pieces must have one shape."
            )
    kind = torch.float64 if pieces[0][0].dtype == torch.float64 else torch.float32
    shifted = torch.stack(
        [lse.to(kind) + (math.log(w) if w else float("-inf")) for (_, lse), w in zip(pieces, factors, strict=True)]
    )
    # Where no piece sees anything the sum is taken over zeros and blanked, so that no NaN enters the gradient.
    seeing = (shifted > float("-inf")) | shifted.isnan()
    some = seeing.any(0)
    # Shares by their sum, not by its logarithm: they add up to 1 where an lse has few digits, too.
    base = torch.where(some, shifted, 0.0)
    top = base.detach().amax(0)
    powers = torch.exp(base - top)
    total = powers.sum(0)
    share = torch.where(seeing, powers / total, 0.0)
    out = share[0].unsqueeze(-1) * pieces[0][0].to(kind)
    for n, (piece, _) in enumerate(pieces[1:], 1):
        # In place: a product of our own, which no gradient reads. Under torch.vmap it may have fewer dimensions than the piece.
        add = out.addcmul_ if torch._C._functorch.peek_interpreter_stack() is None else out.addcmul
        out = add(share[n].unsqueeze(-1), piece.to(kind))
    return out.to(pieces[0][0].dtype), torch.where(some, top + torch.log(total), float("-inf"))
