"""Conversion of torch's attention masks to patterns.

torch's layers take masks of forbidden pairs: bool (True = forbidden) or additive (minus infinity = forbidden). A pattern is a
set of allowed pairs. An additive mask with other values is a bias, which a set cannot express, and is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.errors import ArgumentError, UnsupportedError
from farlight.patterns.expression import Pattern
from farlight.patterns.packing import padding
from farlight.patterns.positional import causal, full
from farlight.patterns.tables import pairs

__all__ = ["intersect", "mask_pattern", "real_keys", "without_padding"]


def intersect(a: Pattern, b: Pattern) -> Pattern:
    """`a & b`, simplified where one is `full()` or both are the same."""
    # Compared by text: comparing patterns reads their tables, whose values are unknown in a traced program.
    full_text = full().text
    if a.text == full_text or a is b:
        return b
    return a if b.text in (full_text, None if b._tables else a.text) else a & b


def real_keys(owner: str, mask: Tensor | None, batch: int, n: int) -> Tensor | None:
    """`(B, n)` bool, True where a token is real, from torch's key padding mask (True or -inf = ignore); None where all are."""
    if mask is None:
        return None
    _check_mask(owner, "key_padding_mask", mask, [(batch, n)])
    real = _allowed(owner, "key_padding_mask", mask)
    return None if _has_values(real) and bool(real.all()) else real


def _has_values(mask: Tensor) -> bool:
    """Whether the entries can be read: not in a traced program, under `torch.vmap` or on the meta device.

    Where they cannot, a mask is always applied.
    """
    functorch = torch._C._functorch
    while not torch.compiler.is_compiling() and not mask.is_meta and not functorch.is_batchedtensor(mask):
        if not functorch.is_functorch_wrapped_tensor(mask):
            return True
        mask = functorch.get_unwrapped(mask)
    return False


def without_padding(pattern: Pattern, real: Tensor | None) -> Pattern:
    """The pairs of `pattern` with a real key; `real` `(B, n_k)` as `real_keys` returns it."""
    return pattern if real is None else intersect(pattern, padding(real))


def mask_pattern(
    owner: str, mask: Tensor | Pattern | None, is_causal: bool, batch: int, heads: int, n_q: int, n_k: int, q_offset: int
) -> Pattern:
    """The allowed pairs of `attn_mask` (`(n_q, n_k)`, `(B·H, n_q, n_k)` or a pattern) and `is_causal`.

    Raises UnsupportedError for a bias, for `is_causal` beside a mask that is not causal, and for a square table whose rows are
    not the positions 0, 1, ….
    """
    if mask is None or isinstance(mask, Pattern):
        pattern = full() if mask is None else mask
        return intersect(pattern, causal()) if is_causal else pattern
    _check_mask(owner, "attn_mask", mask, [(n_q, n_k), (batch * heads, n_q, n_k)])
    allowed = _allowed(owner, "attn_mask", mask)
    rows = torch.arange(n_q, device=allowed.device) + q_offset
    causal_mask = torch.arange(n_k, device=allowed.device) <= rows[:, None]
    if is_causal:
        # As in torch, the flag asserts that the mask is the causal one; here the assertion is checked.
        _require(
            (allowed == causal_mask).all(),
            f"{owner}: is_causal=True says that attn_mask is the causal mask, but it is another one; pass "
            "is_causal=True alone, or attn_mask alone.",
        )
        return causal()
    if _has_values(allowed) and allowed.dim() == 2 and torch.equal(allowed, causal_mask):
        return causal()
    if n_q == n_k and q_offset:
        raise UnsupportedError(
            f"{owner}: attn_mask has a row for each of {n_q} queries, which begin at position {q_offset} of {n_k}; such a "
            "table would be read by position. Pass a pattern instead of a tensor."
        )
    return pairs(allowed if allowed.dim() == 2 else allowed.unflatten(0, (batch, heads)))


def _check_mask(owner: str, name: str, mask: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        actual = f"of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentError(f"{owner}: {name} is {actual}; pass a bool tensor (True = ignore), or 0 and -inf.")
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise ArgumentError(f"{owner}: {name} has shape {tuple(mask.shape)}; {expected} is needed.")


def _allowed(owner: str, name: str, mask: Tensor) -> Tensor:
    """The mask as bool with True = allowed. Raises UnsupportedError for a bias."""
    if mask.dtype == torch.bool:
        return ~mask
    allowed = mask == 0
    # Half of the smallest number: sums of several "minus infinities" are at least that low.
    _require(
        (allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all(),
        f"{owner}: {name} adds numbers other than 0 and minus infinity to the scores: a bias, which a pattern cannot "
        "express. Pass a bool mask (True = ignore), or use nn.MultiheadAttention.",
    )
    return allowed


def _require(condition: Tensor, message: str) -> None:
    """Raise UnsupportedError where the condition is False: now, or in a traced program when it runs; meta tensors pass."""
    if condition.is_meta:
        return
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not _has_values(condition):
        raise UnsupportedError(f"under torch.vmap this cannot be checked: {message}")
    elif not bool(condition):
        raise UnsupportedError(message)
