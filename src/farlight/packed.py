"""Packed sequences: documents one after another in one row, with queries and keys of different lengths, and jagged tensors.

Every document is a sequence of its own: its keys stand at positions 0 … n_k - 1, its queries are the last of them (bottom-right
alignment). A pattern of distances alone is one call over all documents; any other one is a call for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from farlight.errors import ArgumentError, UnsupportedError
from farlight.patterns import causal, documents, full, offsets, padding, sees_all, strided, window
from farlight.patterns.deferred import is_unreadable
from farlight.patterns.expression import Pattern
from farlight.patterns.packing import lengths_of_cumulative
from farlight.plan import Plan
from farlight.ragged import expand_ranges
from farlight.score.terms import KeyBias, Score

__all__ = ["attend_jagged", "attend_packed", "is_jagged", "is_translation_invariant", "read_cumulative"]

# `fl.attention`, which is above this module.
Attend: TypeAlias = Callable[..., Any]
Operands: TypeAlias = tuple[Tensor, Tensor, Tensor]
Lengths: TypeAlias = tuple[Sequence[int], Sequence[int]]


def is_translation_invariant(pattern: Pattern) -> bool:
    """Whether a pattern is a function of the distance j - i alone, so that it does not matter where counting starts."""
    return all(
        isinstance(atom, full | causal | window | offsets) or (isinstance(atom, strided) and atom.phase is None)
        for atom in pattern.atoms()
    )


def read_cumulative(name: str, values: Any, total: int) -> list[int]:
    """The lengths of documents from their cumulative lengths 0 … total. Raises PatternError, UnsupportedError."""
    if is_unreadable(values):
        raise UnsupportedError(
            f"{name} cannot be read in a compiled or fake call, but decides what is computed; leave this call out of the graph."
        )
    return lengths_of_cumulative(name, values, total)


def attend_packed(
    attend: Attend, operands: Operands, pattern: Any, lengths: Lengths, options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """What `attend` returns, (out,) or (out, lse), for documents packed in one row.

    operands: q `(1, H, Σ n_q, D)`, k and v `(1, H_kv, Σ n_k, …)`. lengths: the documents' numbers of queries and of keys.
    options: keyword arguments of `attend`.
    """
    q, k, _ = operands
    q_lengths, k_lengths = lengths
    if len(q_lengths) != len(k_lengths):
        raise ArgumentError(f"{len(q_lengths)} documents of queries, but {len(k_lengths)} of keys; they must be as many.")
    if q.shape[0] != 1 or k.shape[0] != 1:
        raise ArgumentError(
            f"packed documents lie in one row, but q has a batch of {q.shape[0]} and k of {k.shape[0]}; pass 1."
        )
    if isinstance(pattern, Plan):
        raise ArgumentError("a plan is for one sequence, but these are packed documents; pass its pattern.")
    score = options.get("score")
    if isinstance(score, Score) and any(isinstance(term, KeyBias) for term in score.terms):
        raise UnsupportedError(
            "key_bias names each key, which packed documents and jagged tensors do not; call fl.attention for each document."
        )
    if not q_lengths:
        return _as_tuple(attend(*operands, full(), **options))
    if not isinstance(pattern, Pattern) or not is_translation_invariant(pattern):
        return _one_by_one(attend, operands, pattern, lengths, options)
    if list(q_lengths) == list(k_lengths):
        return _as_tuple(attend(*operands, documents(lengths=k_lengths) & pattern, q_offset=0, **options))
    return _aligned(attend, operands, pattern, lengths, options)


def _one_by_one(
    attend: Attend, operands: Operands, pattern: Any, lengths: Lengths, options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """A call for each document that has queries; dropout of document d draws from seed + d."""
    seed = options.get("seed")
    results: list[tuple[Tensor, ...]] = []
    parts = [x.split(list(of_documents), 2) for x, of_documents in zip(operands, (*lengths, lengths[1]), strict=True)]
    for number, document in enumerate(zip(*parts, strict=True)):
        if document[0].shape[2] or (number == len(lengths[0]) - 1 and not results):
            drawn = {} if seed is None else {"seed": seed + number}
            results.append(_as_tuple(attend(*document, pattern, **options | drawn)))
    return tuple(torch.cat(parts, 2) for parts in zip(*results, strict=True))


def _aligned(
    attend: Attend, operands: Operands, pattern: Pattern, lengths: Lengths, options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """One call in which every document has max(n_q, n_k) positions, and ends with its last query and its last key."""
    q_lengths, k_lengths = (torch.tensor(list(x), dtype=torch.int64, device="cpu") for x in lengths)
    longer = torch.maximum(q_lengths, k_lengths)
    ends, total = longer.cumsum(0), int(longer.sum())
    places = [expand_ranges(ends - x, ends)[1] for x in (q_lengths, k_lengths)]
    real = [torch.zeros(total, dtype=torch.bool, device="cpu").index_fill(0, at, True) for at in places]
    at_q, at_k = (x.to(operands[0].device) for x in places)
    spread = [
        x.new_zeros((*x.shape[:2], total, x.shape[3])).index_copy(2, at, x)
        for x, at in zip(operands, (at_q, at_k, at_k), strict=True)
    ]
    pattern = documents(lengths=longer.tolist()) & pattern
    # Positions without a query or a key see nothing and are seen by none.
    pattern = pattern if real[0].all() else pattern & sees_all(real[0])
    pattern = pattern if real[1].all() else pattern & padding(real[1])
    return tuple(x.index_select(2, at_q) for x in _as_tuple(attend(*spread, pattern, q_offset=0, **options)))


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


# ---- jagged tensors -----------------------------------------------------------------------------------------------------
def is_jagged(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q, k and v are jagged nested tensors `(B, H, ragged, D)` without unused rows between their items."""
    return all(
        isinstance(x, Tensor)
        and x.is_nested
        and x.layout is torch.jagged
        and x.dim() == 4
        and getattr(x, "_ragged_idx", 2) == 2
        and _lengths(x) is None
        for x in (q, k, v)
    )


def attend_jagged(attend: Attend, operands: Operands, pattern: Any, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """What `attend` returns for jagged q, k and v `(B, H, ragged, D)`: jagged, `(B, H, ragged, D_v)` and `(B, H, ragged)`."""
    if options.pop("q_offset", None) is not None:
        raise ArgumentError("q_offset with jagged tensors: the queries of each item are the last of its tokens; leave it out.")
    (q, q_lengths), (k, k_lengths), (v, v_lengths) = (_flat(x) for x in operands)
    if k_lengths != v_lengths:
        raise ArgumentError("k and v are jagged tensors of different lengths; they must be equal.")
    results = attend_packed(attend, (q, k, v), pattern, (q_lengths, k_lengths), options)
    starts = _offsets(operands[0])
    return tuple(_jagged(x[0].transpose(0, 1), starts) for x in results)


def _flat(x: Tensor) -> tuple[Tensor, list[int]]:
    """The items of a jagged tensor `(B, H, ragged, D)` in one row `(1, H, tokens, D)`, and their lengths."""
    row = x.transpose(1, 2).values().transpose(0, 1)[None]
    return row, read_cumulative("the offsets of a jagged tensor", _offsets(x), row.shape[2])


def _offsets(x: Any) -> Tensor:
    """The cumulative lengths of a jagged tensor's items."""
    starts: Tensor = x.offsets()
    return starts


def _lengths(x: Any) -> Tensor | None:
    """The lengths of items between which there are unused rows; None where one item begins where the last ends."""
    lengths: Tensor | None = x.lengths()
    return lengths


def _jagged(values: Tensor, starts: Tensor) -> Tensor:
    """`(B, H, ragged, …)` from `(tokens, H, …)`."""
    jagged: Tensor = torch.nested.nested_tensor_from_jagged(values, starts)
    return jagged.transpose(1, 2)
