"""The mask that a model's own attention has, seen by running its first layers on a few tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from farlight.analysis.loss.fidelity import last_hidden_states
from farlight.hf.interface import Observation, use_pattern
from farlight.patterns import full
from farlight.patterns.expression import Pattern

__all__ = ["own_mask"]

_TOKENS = 32


def own_mask(model: Any, ids: Tensor) -> Pattern:
    """The own mask of the first layer that attends, on the first tokens of `ids` `(B, N)`; `full()` where none does.

    Raises UnsupportedError for a model whose attention cannot be replaced.
    """
    calls: list[Observation] = []
    with use_pattern(model, None, observer=calls.append):
        last_hidden_states(model, ids[:1, :_TOKENS])
    return calls[0].own if calls else full()
