"""Named positions of a pattern, counted in each text of a padded batch.

`global_tokens([0])` means the first token. With left padding, slot 0 of a shorter text is padding; with right padding, slot -1
is. A pattern that names slots would lose exactly the tokens it was made to keep. So named positions count the real tokens of
each text, and a text gives the same result in a batch as alone. Distances mean the same in either count; everything else
(random draws, blocks, tables) counts slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.patterns.algebra import Complement, Difference, Intersection, PerHead, Union
from farlight.patterns.expression import Pattern
from farlight.patterns.named import global_tokens, seen_by_all, sees_all

__all__ = ["resolve_named_positions"]


def resolve_named_positions(pattern: Pattern, real: Tensor | None, n: int) -> Pattern:
    """The pattern with each named position p replaced by the slot of the p-th real token of each text (negative: from its end).

    `real`: `(B, n)` bool, False where a slot is padding; None where none is. A position past the end of a text names nothing
    there.
    """
    if isinstance(pattern, Union | Intersection | Difference | Complement | PerHead):
        parts = tuple(resolve_named_positions(part, real, n) for part in pattern.parts)
        return pattern if all(new is old for new, old in zip(parts, pattern.parts, strict=True)) else type(pattern)(parts)
    if not isinstance(pattern, global_tokens | sees_all | seen_by_all) or pattern.positions is None:
        return pattern
    if real is None:
        in_range = [p for p in pattern.positions if -n <= p < n]
        return pattern if len(in_range) == len(pattern.positions) else type(pattern)(in_range)
    token_ids = real.cumsum(1) - 1  # (B, n): position of each real token in its text
    named = torch.tensor(pattern.positions, dtype=torch.int64, device=real.device).expand(real.shape[0], -1)
    named = torch.where(named < 0, named + real.sum(1, keepdim=True), named)
    is_named = real.new_zeros(real.shape[0], n + 1)  # column n collects positions outside the text
    is_named.scatter_(1, torch.where((named >= 0) & (named < n), named, n), True)
    is_named[:, n] = False
    return type(pattern)(real & is_named.gather(1, token_ids.clamp(min=0)))
