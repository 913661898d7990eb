"""`fl.score`: parametric terms on the attention scores, as values: biases by distance, biases by key, softcap.

    S = softcap(scale · q kᵀ) + bias

`fl.attention(q, k, v, pattern, score=fl.score.softcap(50) + fl.score.alibi(slopes))`. Distances are those of positions,
whatever order a plan visits the tokens in. The tensors of a term (slopes, tables, biases) are kept as they are: gradients
reach them.
"""

from farlight.score.lowered import ScoreTerms, lower
from farlight.score.terms import Score, alibi, key_bias, relative, softcap, t5

__all__ = ["Score", "ScoreTerms", "alibi", "key_bias", "lower", "relative", "softcap", "t5"]


def __dir__() -> list[str]:
    """The public names alone: no submodules, no imports."""
    return sorted(__all__)
