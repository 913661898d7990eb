"""Checks of the arguments (n, batch, head, position) of graph analysis, and the `Sizes` that a pattern's tables require."""

from __future__ import annotations

from farlight.errors import ArgumentError, show
from farlight.patterns.algebra import PerHead
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern, Sizes

__all__ = ["position_in", "sizes_of"]


def sizes_of(pattern: Pattern, n: int, batch: int, head: int) -> Sizes:
    """Sizes of n tokens with the number of batch items and heads of the pattern's tables, at least `batch + 1`, `head + 1`.

    Raises ArgumentError for anything but a pattern and whole numbers in range, PatternError where n does not fit the tables.

    >>> import farlight as fl
    >>> sizes_of(fl.per_head([fl.window(1), fl.full(), fl.causal()]), 10, 0, 1).heads
    3
    """
    if not isinstance(pattern, Pattern):
        raise ArgumentError(f"pattern = {show(pattern)}: {type(pattern).__name__} is not a pattern; pass e.g. fl.window(256).")
    n, batch, head = (_at_least(name, value, low) for name, value, low in (("n", n, 1), ("batch", batch, 0), ("head", head, 0)))
    items, heads = _table_sizes(pattern)
    for name, value, size, noun in (("batch", batch, items, "batch items"), ("head", head, heads, "heads")):
        if size > 1 and value >= size:
            raise ArgumentError(f"{name} = {value}: this pattern has {size} {noun}; use 0 … {size - 1}.")
    sizes = Sizes.of(n, batch=max(items, batch + 1), heads=max(heads, head + 1))
    pattern.check(sizes)
    return sizes


def position_in(name: str, value: int, n: int) -> int:
    """A position in 0 … n - 1; negative values count from the end. Raises ArgumentError out of range."""
    number = _at_least(name, value, None)
    if not -n <= number < n:
        raise ArgumentError(
            f"{name} = {number} is not a position in a text of n = {n} tokens; use 0 … {n - 1}, or {-n} … -1 from the end."
        )
    return number % n


def _at_least(name: str, value: int, low: int | None) -> int:
    """`value` as an int, at least `low`. Raises ArgumentError otherwise."""
    try:
        return whole(name, value, -(2**62) if low is None else low)
    except ValueError as error:
        raise ArgumentError(str(error)) from None


def _table_sizes(pattern: Pattern) -> tuple[int, int]:
    """(batch items, heads) of the pattern's tables and per-head lists; 1 where the pattern does not vary."""
    items = heads = 1
    if isinstance(pattern, PerHead):
        heads = len(pattern.parts)
    for part in getattr(pattern, "parts", ()):
        part_items, part_heads = _table_sizes(part)
        items, heads = max(items, part_items), max(heads, part_heads)
    if not hasattr(pattern, "parts"):
        for table in pattern._tables:
            items = max(items, table.shape[0])
            # Token tables are (batch, tokens); all others are (batch, head, …).
            heads = max(heads, table.shape[1] if table.dim() > 2 else 1)
        lengths = getattr(pattern, "lengths", None)
        if lengths is not None and pattern.varies_over_batch:
            items = max(items, len(lengths))
    return items, heads
