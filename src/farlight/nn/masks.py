"""What torch's masks say, as patterns.

torch's layers take a mask of forbidden pairs, True or minus infinity, and turn one into the other on the way. A pattern
is a set of allowed pairs. Adding a bias to scores is more than a set can say, so that is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.errors import ArgumentError, UnsupportedError
from farlight.patterns.expression import Pattern
from farlight.patterns.packing import padding
from farlight.patterns.positional import causal, full
from farlight.patterns.tables import pairs

__all__ = ["both", "padded", "real_tokens", "restricted"]


def both(a: Pattern, b: Pattern) -> Pattern:
    """The pairs of both, written without a `full()` that says nothing and without saying one thing twice."""
    # By their texts: comparing patterns looks into their tables, which a program that is being traced cannot.
    everything = full().text
    if a.text == everything or a is b:
        return b
    return a if b.text in (everything, None if b._tables else a.text) else a & b


def real_tokens(owner: str, mask: Tensor | None, batch: int, n: int) -> Tensor | None:
    """`(B, n)` True where a token is real, from torch's key padding mask (True or -inf = ignore); None where all are."""
    if mask is None:
        return None
    _check(owner, "key_padding_mask", mask, [(batch, n)])
    real = _allowed(owner, "key_padding_mask", mask)
    return None if _readable(real) and bool(real.all()) else real


def _readable(mask: Tensor) -> bool:
    """Whether the entries can be read. A program that is being traced, `torch.vmap` and the meta device cannot: there a mask
    always takes part.
    """
    functorch = torch._C._functorch
    while not torch.compiler.is_compiling() and not mask.is_meta and not functorch.is_batchedtensor(mask):
        if not functorch.is_functorch_wrapped_tensor(mask):
            return True
        mask = functorch.get_unwrapped(mask)
    return False


def padded(pattern: Pattern, real: Tensor | None) -> Pattern:
    return pattern if real is None else both(pattern, padding(real))


def restricted(
    owner: str, mask: Tensor | Pattern | None, is_causal: bool, batch: int, heads: int, n_q: int, n_k: int, q_offset: int
) -> Pattern:
    """The pattern that `attn_mask` and `is_causal` stand for."""
    if mask is None or isinstance(mask, Pattern):
        allowed = full() if mask is None else mask
        return both(allowed, causal()) if is_causal else allowed
    _check(owner, "attn_mask", mask, [(n_q, n_k), (batch * heads, n_q, n_k)])
    seen = _allowed(owner, "attn_mask", mask)
    rows = torch.arange(n_q, device=seen.device) + q_offset
    past = torch.arange(n_k, device=seen.device) <= rows[:, None]
    if is_causal:
        # As in torch the flag says that the mask is the causal one; here that is checked.
        _require(
            (seen == past).all(),
            f"{owner}: is_causal=True says that attn_mask is the causal mask, but it is another one; pass "
            "is_causal=True alone, or attn_mask alone.",
        )
        return causal()
    if _readable(seen) and seen.dim() == 2 and torch.equal(seen, past):
        return causal()
    if n_q == n_k and q_offset:
        raise UnsupportedError(
            f"{owner}: attn_mask has a row for each of {n_q} queries, which begin at position {q_offset} of {n_k}; such a "
            "table would be read by position. Pass a pattern instead of a tensor."
        )
    return pairs(seen if seen.dim() == 2 else seen.unflatten(0, (batch, heads)))


def _check(owner: str, name: str, mask: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        found = f"of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentError(f"{owner}: {name} is {found}; pass a bool tensor (True = ignore), or 0 and -inf.")
    if tuple(mask.shape) not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise ArgumentError(f"{owner}: {name} has shape {tuple(mask.shape)}; {wanted} is needed.")


def _allowed(owner: str, name: str, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return ~mask
    seen = mask == 0
    # Half of the smallest number: sums of several "minus infinities" are at least that low.
    _require(
        (seen | (mask <= torch.finfo(mask.dtype).min / 2)).all(),
        f"{owner}: {name} adds numbers other than 0 and minus infinity to the scores: a bias, which a pattern cannot "
        "express. Pass a bool mask (True = ignore), or use nn.MultiheadAttention.",
    )
    return seen


def _require(holds: Tensor, otherwise: str) -> None:
    """Raise now, or, in a program that is being traced, when it runs; without data there is nothing to check."""
    if holds.is_meta:
        return
    if torch.compiler.is_compiling():
        torch._assert_async(holds, otherwise)
    elif not _readable(holds):
        raise UnsupportedError(f"under torch.vmap this cannot be checked: {otherwise}")
    elif not bool(holds):
        raise UnsupportedError(otherwise)
