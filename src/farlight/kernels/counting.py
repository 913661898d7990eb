"""The exact number of links of a pattern: of lists by the native planner, of everything else by key intervals."""

from __future__ import annotations

from farlight.kernels.cpu import SHAPE
from farlight.kernels.cpu.content import listed_pairs
from farlight.patterns.expression import Pattern, Sizes
from farlight.plan.build import count_pairs

__all__ = ["count_links"]


def count_links(pattern: Pattern, sizes: Sizes) -> int:
    """The number of allowed pairs over batch and heads.

    From the key intervals of each row; those of lists of keys or key blocks are as many as a row has blocks, so the native
    planner counts them tile by tile. Raises PatternError for a pattern that does not fit the sizes.
    """
    pattern.check(sizes)
    pairs = listed_pairs(pattern, sizes, SHAPE)
    return count_pairs(pattern, sizes) if pairs is None else pairs
