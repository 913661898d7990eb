"""Score terms and sinks of the newest queries over the keys of a cache.

`fl.score` lowers a score for a text of n_q queries and n_k keys, with a table over all distances for ALiBi. A step of decoding
has one query and a text that grows: slopes stay slopes here, so that evicted tokens cost nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from farlight.decoding.checks import check_score, refuse_gradients
from farlight.errors import ArgumentError
from farlight.patterns.expression import Sizes
from farlight.score.lowered import alibi_slopes, by_distance, lower
from farlight.score.terms import Alibi, KeyBias, RelativeTable, Score, T5Table, Term

if TYPE_CHECKING:
    from farlight.decoding.cache import KVCache

__all__ = ["DecodeTerms", "KeptTerms", "read_terms"]


@dataclass(frozen=True, eq=False, slots=True)
class KeptTerms:
    """S = cap · tanh(scale · q kᵀ / cap) + bias of some queries over some keys.

    cap: 0 = none; bias `(B|1, H|1, n, kept)` or None; sinks `(H,)` or None.
    """

    cap: float
    bias: Tensor | None
    sinks: Tensor | None

    def on(self, scores: Tensor) -> Tensor:
        """S `(B, H, n, kept)` from scale · q kᵀ."""
        scores = self.cap * torch.tanh(scores / self.cap) if self.cap else scores
        return scores if self.bias is None else scores + self.bias


@dataclass(frozen=True, eq=False, slots=True)
class DecodeTerms:
    """S = cap · tanh(scale · q kᵀ / cap) - slopes[h] · |j - i| + distance[h, clip(j - i - first)] + key_bias[b, h, j].

    score: as passed, its biases of keys cut to the text so far; None without any. cap: 0 = none. slopes `(H,)`, distance
    `(H, L)`, key_bias `(B|1, H|1, length)`, sinks `(H,)`: contiguous float32, for float64 float64; or None.
    """

    score: Score | None
    sinks: Tensor | None
    cap: float
    slopes: Tensor | None
    first: int
    distance: Tensor | None
    key_bias: Tensor | None

    def of_heads(self, heads: list[int]) -> DecodeTerms:
        """The terms of these query heads, in this order."""
        parts: dict[str, Any] = {
            name: x[heads] for name in ("slopes", "distance", "sinks") if (x := getattr(self, name)) is not None
        }
        if self.key_bias is not None and self.key_bias.shape[1] > 1:
            parts["key_bias"] = self.key_bias[:, heads]
        score = None if self.score is None else Score(tuple(_term_of_heads(term, heads) for term in self.score.terms))
        return dataclasses.replace(self, score=score, **parts)

    def at(self, i: Tensor, j: Tensor) -> KeptTerms:
        """The terms at query positions i `(B|1, 1, n, 1)` and key positions j `(B|1, 1, 1, kept)`, both int64."""
        total = None
        if self.slopes is not None:
            total = -self.slopes.view(1, -1, 1, 1) * (j - i).abs()
        if self.distance is not None:
            index = (j - i - self.first).clamp(0, self.distance.shape[1] - 1).squeeze(1)
            table = by_distance(self.distance, index).movedim(0, 1)
            total = table if total is None else total + table
        if self.key_bias is not None:
            of_keys = self._of_keys(j)
            total = of_keys if total is None else total + of_keys
        return KeptTerms(self.cap, total, self.sinks)

    def _of_keys(self, j: Tensor) -> Tensor:
        """`(B|1, H|1, 1, kept)`: the biases of the keys at positions j `(B|1, 1, 1, kept)`."""
        assert self.key_bias is not None
        batch = max(self.key_bias.shape[0], j.shape[0])
        biases = self.key_bias.expand(batch, -1, -1)
        index = j[:, 0].clamp(min=0).expand(batch, biases.shape[1], -1)
        return biases.gather(2, index).unsqueeze(2)

    def score_of(self, length: int, items: slice) -> Score | None:
        """The score of a text of the first `length` tokens of these batch items, for `fl.attention`."""
        if self.score is None:
            return None
        return Score(tuple(_cut(term, length, items) if isinstance(term, KeyBias) else term for term in self.score.terms))

    @property
    def native(self) -> tuple[float, tuple[int, ...]]:
        """The cap, and the addresses and sizes that `farlight._cpu.Decoder` reads; valid while this object lives."""
        slopes, distance, biases, sinks = self.slopes, self.distance, self.key_bias, self.sinks
        length = 0 if distance is None else distance.shape[1]
        steps = (0, 0) if biases is None else tuple(0 if biases.shape[d] == 1 else biases.stride(d) for d in (0, 1))
        key_bias = _address(biases), *steps
        return self.cap, (_address(slopes), _address(distance), self.first, length, *key_bias, _address(sinks))


def read_terms(
    what: str, q: Tensor, cache: KVCache, score: Score | None, sinks: Tensor | None, length: int
) -> DecodeTerms | None:
    """The terms of queries q `(B, H, n, D)` of a text of `length` tokens; None without any.

    score, sinks: of the call; None: those of the cache. Raises ArgumentError for tensors that do not fit, or that require grad.
    """
    score, sinks = cache.score if score is None else score, cache.sinks if sinks is None else sinks
    if score is None and sinks is None:
        return None
    check_score(what, score, sinks)
    tensors = (*(() if score is None else score.tensors), *(() if sinks is None else (sinks,)))
    refuse_gradients(what, *tensors)
    sizes = Sizes(q.shape[2], length, length - q.shape[2], q.shape[0], q.shape[1])
    if score is None:
        lowered = lower(score, sinks, sizes, q.device, q.dtype)
        assert lowered is not None
        return DecodeTerms(None, lowered.sinks, 0.0, None, 0, None, None)
    score = Score(tuple(_trimmed(what, term, length) if isinstance(term, KeyBias) else term for term in score.terms))
    slopes = None
    for term in score.terms:
        if isinstance(term, Alibi):
            added = alibi_slopes(term, sizes, q.device, torch.promote_types(q.dtype, torch.float32))
            slopes = added if slopes is None else slopes + added
    others = Score(tuple(term for term in score.terms if not isinstance(term, Alibi)))
    lowered = lower(others, sinks, sizes, q.device, q.dtype)
    assert lowered is not None
    distance, key_bias, sinks = (
        None if x is None else x.contiguous() for x in (lowered.distance, lowered.key_bias, lowered.sinks)
    )
    slopes = None if slopes is None else slopes.contiguous()
    return DecodeTerms(score, sinks, lowered.cap, slopes, lowered.first, distance, key_bias)


def _trimmed(what: str, term: KeyBias, length: int) -> KeyBias:
    if term.bias.shape[2] < length:
        raise ArgumentError(
            f"{what}: key_bias names {term.bias.shape[2]} keys, but the text has {length} tokens; pass one bias for each "
            "position so far. Those of positions to come are not read."
        )
    return _cut(term, length, slice(None))


def _cut(term: KeyBias, length: int, items: slice) -> KeyBias:
    bias = term.bias[..., :length]
    return KeyBias(bias if bias.shape[0] == 1 else bias[items])


def _term_of_heads(term: Term, heads: list[int]) -> Term:
    if isinstance(term, Alibi):
        return Alibi(term.slopes[heads])
    if isinstance(term, RelativeTable):
        return RelativeTable(term.table[heads])
    if isinstance(term, T5Table):
        return dataclasses.replace(term, table=term.table[:, heads])
    return KeyBias(term.bias[:, heads]) if isinstance(term, KeyBias) and term.bias.shape[1] > 1 else term


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
