"""The terms of a score and their sum: `alibi`, `relative`, `t5`, `key_bias`, `softcap`, joined by `+`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from farlight.errors import ArgumentError, show

__all__ = [
    "Alibi",
    "KeyBias",
    "RelativeTable",
    "Score",
    "Softcap",
    "T5Table",
    "Term",
    "alibi",
    "key_bias",
    "relative",
    "softcap",
    "t5",
]


@dataclass(frozen=True, eq=False)
class Alibi:
    """-slope · |i - j|; slopes (H,)."""

    slopes: Tensor


@dataclass(frozen=True, eq=False)
class RelativeTable:
    """table[h, clip(j - i, -R, R) + R]; table (H, 2R + 1)."""

    table: Tensor


@dataclass(frozen=True, eq=False)
class T5Table:
    """table[bucket(j - i), h]; table (buckets, H)."""

    table: Tensor
    buckets: int
    max_distance: int
    bidirectional: bool


@dataclass(frozen=True, eq=False)
class KeyBias:
    """bias[b, h, j]; bias (B|1, H|1, n_k)."""

    bias: Tensor


@dataclass(frozen=True, eq=False)
class Softcap:
    """cap · tanh(x / cap)."""

    cap: float


Term: TypeAlias = Alibi | RelativeTable | T5Table | KeyBias | Softcap
NAMES: dict[type, str] = {Alibi: "alibi", RelativeTable: "relative", T5Table: "t5", KeyBias: "key_bias", Softcap: "softcap"}


@dataclass(frozen=True, eq=False)
class Score:
    """A sum of terms, immutable: softcap first, where there is one, then biases. Made by the functions of `fl.score` and `+`.

    Equal to another where the terms are, in this order, with tensors of equal dtype and values. Pickled with its tensors.
    """

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        caps = [place for place, term in enumerate(self.terms) if isinstance(term, Softcap)]
        if len(caps) > 1:
            raise ArgumentError(f"{self!r}: the scores are capped twice; keep one softcap, the first term.")
        if caps and caps[0]:
            raise ArgumentError(
                f"{self!r}: softcap stands behind a bias, but only scale · q kᵀ is capped and biases are added to the result; "
                "write softcap(c) first: softcap(c) + alibi(slopes)."
            )

    def __add__(self, other: object) -> Score:
        return Score(self.terms + other.terms) if isinstance(other, Score) else NotImplemented

    def __repr__(self) -> str:
        return " + ".join(_shown(term) for term in self.terms)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Score) or len(self.terms) != len(other.terms):
            return NotImplemented if not isinstance(other, Score) else False
        return all(_equal(a, b) for a, b in zip(self.terms, other.terms, strict=True))

    def __hash__(self) -> int:
        return hash(tuple((type(term), *(tuple(x.shape) for x in tensors_of(term))) for term in self.terms))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of all terms, in their order; the objects themselves, so that an optimizer can have them."""
        return tuple(x for term in self.terms for x in tensors_of(term))

    def to_json(self) -> str:
        """The score as JSON text, with the values of its tensors."""
        from farlight.score.json_format import to_json

        return to_json(self)

    @staticmethod
    def from_json(text: str) -> Score:
        """The score that `to_json` wrote, with new tensors. Raises ArgumentError for anything else.

        >>> import farlight as fl
        >>> score = fl.score.softcap(30.0) + fl.score.alibi([0.5, 0.25])
        >>> fl.score.Score.from_json(score.to_json()) == score
        True
        """
        from farlight.score.json_format import from_json

        return from_json(text)


def tensors_of(term: Term) -> list[Tensor]:
    """The tensors of a term."""
    values = (getattr(term, field.name) for field in dataclasses.fields(term))
    return [x for x in values if isinstance(x, Tensor)]


def _shown(term: Term) -> str:
    values = [getattr(term, field.name) for field in dataclasses.fields(term)]
    return f"{NAMES[type(term)]}({', '.join(show(x) if isinstance(x, Tensor) else repr(x) for x in values)})"


def _equal(a: Term, b: Term) -> bool:
    if type(a) is not type(b):
        return False
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, Tensor):
            if x is not y and (x.dtype != y.dtype or x.device != y.device or not torch.equal(x, y)):
                return False
        elif x != y:
            return False
    return True


def alibi(slopes: Tensor | Sequence[float]) -> Score:
    """ALiBi: -slopes[h] · |i - j| is added to the score of query position i and key position j.

    slopes: `(H,)`, one for each query head. Press et al. 2022, "Train Short, Test Long". Raises ArgumentError.

    >>> import torch, farlight as fl
    >>> q = torch.randn(1, 2, 100, 8)
    >>> fl.attention(q, q, q, fl.causal(), score=fl.score.alibi([0.5, 0.25])).shape
    torch.Size([1, 2, 100, 8])
    """
    return Score((Alibi(_floats(slopes, "alibi: slopes", 1)),))


def relative(table: Tensor) -> Score:
    """A learned bias by distance: table[h, clip(j - i, -R, R) + R] is added to the score of query i and key j.

    table: `(H, 2R + 1)`. Shaw et al. 2018 (clipped distances). Raises ArgumentError.

    >>> import torch, farlight as fl
    >>> fl.score.relative(torch.zeros(2, 33)).tensors[0].shape
    torch.Size([2, 33])
    """
    table = _floats(table, "relative: table", 2)
    if table.shape[1] % 2 == 0:
        raise ArgumentError(
            f"relative: the table has shape {tuple(table.shape)}; it is (H, 2R + 1), one column for each distance -R … R."
        )
    return Score((RelativeTable(table),))


def t5(table: Tensor, buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> Score:
    """T5's bias: table[bucket(j - i), h], with buckets of one distance each near by and logarithmically wider ones far away.

    table: `(buckets, H)`, the weight of T5's `relative_attention_bias`. bidirectional: one half of the buckets is for keys
    after the query; else these share the bucket of distance 0. Raffel et al. 2020. Raises ArgumentError.

    >>> import torch, farlight as fl
    >>> q, table = torch.randn(1, 2, 100, 8), torch.randn(32, 2)
    >>> fl.attention(q, q, q, fl.full(), scale=1.0, score=fl.score.t5(table)).shape
    torch.Size([1, 2, 100, 8])
    """
    table = _floats(table, "t5: table", 2)
    for name, x in (("buckets", buckets), ("max_distance", max_distance)):
        if isinstance(x, bool) or not isinstance(x, int):
            raise ArgumentError(f"t5: {name} = {show(x)}: pass a whole number.")
    sides = 2 if bidirectional else 1
    if buckets < 2 * sides or max_distance <= buckets // sides // 2:
        raise ArgumentError(
            f"t5: {buckets} buckets up to distance {max_distance} leave no logarithmic bucket; at least {2 * sides} buckets "
            f"are needed, and a max_distance above {max(buckets, 2 * sides) // sides // 2}."
        )
    if table.shape[0] != buckets:
        raise ArgumentError(f"t5: the table has shape {tuple(table.shape)}; it is (buckets, H), with buckets={buckets}.")
    return Score((T5Table(table, buckets, max_distance, bool(bidirectional)),))


def key_bias(bias: Tensor) -> Score:
    """A bias by key: bias[b, h, j] is added to every score of key j.

    bias: `(B or 1, H or 1, n_k)`, finite. Raises ArgumentError.

    >>> import torch, farlight as fl
    >>> fl.score.key_bias(torch.zeros(1, 1, 5)) + fl.score.alibi([1.0])  # doctest: +ELLIPSIS
    key_bias(a (1, 1, 5) float32 tensor [0.0, 0.0, 0.0, 0.0, 0.0]) + alibi(a (1,) float32 tensor [1.0])
    """
    return Score((KeyBias(_floats(bias, "key_bias: bias", 3)),))


def softcap(cap: float) -> Score:
    """cap · tanh(x / cap) of the scores x = scale · q kᵀ, which then lie within ±cap. It stands before every bias in a sum.

    Gemma 2 (Riviere et al. 2024). Raises ArgumentError unless the cap is a finite number above 0.

    >>> import farlight as fl
    >>> fl.score.softcap(50.0)
    softcap(50.0)
    """
    if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not math.isfinite(cap) or cap <= 0:
        raise ArgumentError(f"softcap({show(cap)}): the cap is a finite number above 0.")
    return Score((Softcap(float(cap)),))


def _floats(x: Tensor | Sequence[float], what: str, dims: int) -> Tensor:
    if not isinstance(x, Tensor):
        try:
            x = torch.tensor(x, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise ArgumentError(f"{what} is {show(x)}; pass a tensor of floating-point numbers.") from None
    if not x.is_floating_point() or x.dim() != dims:
        raise ArgumentError(f"{what} is {show(x)}; a floating-point tensor of {dims} dimension{'s' * (dims > 1)} is needed.")
    return x
