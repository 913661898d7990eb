"""Positions that a pattern names, counted in each text of a padded batch.

`global_tokens([0])` means the first token. In a batch that is padded on the left, slot 0 holds padding in the shorter
texts, and in one padded on the right, -1 is padding too: a pattern that names slots would lose exactly the tokens that it
was made to keep. So named positions count real tokens, text by text, and a text computes in a batch what it computes
alone. Rules of distance mean the same in any count; everything else (random draws, blocks, tables) counts slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.patterns.algebra import Complement, Difference, Intersection, PerHead, Union
from farlight.patterns.expression import Pattern
from farlight.patterns.named import global_tokens, seen_by_all, sees_all

__all__ = ["in_each_text"]


def in_each_text(pattern: Pattern, real: Tensor | None, n: int) -> Pattern:
    """The pattern with each named position p as the p-th real token of each text (negative: from its end).

    `real` is `(B, n)` bool, None where nothing is padding. A position past the end of a text names nothing there.
    """
    if isinstance(pattern, Union | Intersection | Difference | Complement | PerHead):
        parts = tuple(in_each_text(part, real, n) for part in pattern.parts)
        return pattern if all(new is old for new, old in zip(parts, pattern.parts, strict=True)) else type(pattern)(parts)
    if not isinstance(pattern, global_tokens | sees_all | seen_by_all) or pattern.positions is None:
        return pattern
    if real is None:
        there = [p for p in pattern.positions if -n <= p < n]
        return pattern if len(there) == len(pattern.positions) else type(pattern)(there)
    place = real.cumsum(1) - 1  # of each token in its text
    wanted = torch.tensor(pattern.positions, dtype=torch.int64, device=real.device).expand(real.shape[0], -1)
    wanted = torch.where(wanted < 0, wanted + real.sum(1, keepdim=True), wanted)
    is_wanted = real.new_zeros(real.shape[0], n + 1)  # the last column takes what lies outside
    is_wanted.scatter_(1, torch.where((wanted >= 0) & (wanted < n), wanted, n), True)
    is_wanted[:, n] = False
    return type(pattern)(real & is_wanted.gather(1, place.clamp(min=0)))
