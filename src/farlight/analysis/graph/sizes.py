"""Which batch item and head a question is about, and the sizes that the pattern itself asks for."""

from __future__ import annotations

from farlight.errors import ArgumentError, show
from farlight.patterns.algebra import PerHead
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern, Sizes

__all__ = ["position_in", "sizes_of"]


def sizes_of(pattern: Pattern, n: int, batch: int, head: int) -> Sizes:
    """Sizes of a text of n tokens with as many batch items and heads as the pattern's tables have, or as are asked for.

    >>> import farlight as fl
    >>> sizes_of(fl.per_head([fl.window(1), fl.full(), fl.causal()]), 10, 0, 1).heads
    3
    """
    if not isinstance(pattern, Pattern):
        raise ArgumentError(f"pattern = {show(pattern)}: {type(pattern).__name__} is not a pattern; pass e.g. fl.window(256).")
    n, batch, head = (_at_least(name, value, low) for name, value, low in (("n", n, 1), ("batch", batch, 0), ("head", head, 0)))
    items, heads = _asked_for(pattern)
    for name, value, known, what in (("batch", batch, items, "batch items"), ("head", head, heads, "heads")):
        if known > 1 and value >= known:
            raise ArgumentError(f"{name} = {value}: this pattern has {known} {what}; use 0 … {known - 1}.")
    sizes = Sizes.of(n, batch=max(items, batch + 1), heads=max(heads, head + 1))
    pattern.check(sizes)
    return sizes


def position_in(name: str, value: int, n: int) -> int:
    """A position of the text; negative counts from the end."""
    number = _at_least(name, value, None)
    if not -n <= number < n:
        raise ArgumentError(
            f"{name} = {number} is not a position in a text of n = {n} tokens; use 0 … {n - 1}, or {-n} … -1 from the end."
        )
    return number % n


def _at_least(name: str, value: int, low: int | None) -> int:
    try:
        return whole(name, value, -(2**62) if low is None else low)
    except ValueError as error:
        raise ArgumentError(str(error)) from None


def _asked_for(pattern: Pattern) -> tuple[int, int]:
    """(batch items, heads) that the pattern's tables and lists have; 1 where it does not care."""
    items = heads = 1
    if isinstance(pattern, PerHead):
        heads = len(pattern.parts)
    for part in getattr(pattern, "parts", ()):
        inner = _asked_for(part)
        items, heads = max(items, inner[0]), max(heads, inner[1])
    if not hasattr(pattern, "parts"):
        for table in pattern._tables:
            items = max(items, table.shape[0])
            # Tables of tokens are (batch, tokens); all others are (batch, head, …).
            heads = max(heads, table.shape[1] if table.dim() > 2 else 1)
        lengths = getattr(pattern, "lengths", None)
        if lengths is not None and pattern.varies_over_batch:
            items = max(items, len(lengths))
    return items, heads
