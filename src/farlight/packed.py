"""Packed sequences: documents one after another in one row, with queries and keys of different lengths, and jagged tensors.

Every document is a sequence of its own: its keys stand at positions 0 … n_k - 1, its queries are the last of them (bottom-right
alignment). A pattern of distances alone is one call over all documents; any other one is a call for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from farlight.errors import ArgumentError, UnsupportedError
from farlight.patterns import causal, documents, full, offsets, padding, sees_all, strided, window
from farlight.patterns.arguments import read_list, whole
from farlight.patterns.deferred import is_unreadable
from farlight.patterns.expression import Pattern
from farlight.plan import Plan
from farlight.ragged import expand_ranges
from farlight.score.terms import KeyBias, Score

__all__ = ["attend_jagged", "attend_packed", "is_jagged", "is_translation_invariant", "read_cumulative"]

# (q, k, v, pattern, **options of `fl.attention`) -> (out, lse); q_offset is among the options.
Attend: TypeAlias = Callable[..., Any]


def is_translation_invariant(pattern: Pattern) -> bool:
    """Whether a pattern is a function of the distance j - i alone, so that it does not matter where counting starts."""
    return all(
        isinstance(atom, full | causal | window | offsets) or (isinstance(atom, strided) and atom.phase is None)
        for atom in pattern.atoms()
    )


def read_cumulative(name: str, values: Any, total: int) -> list[int]:
    """The lengths of documents from their cumulative lengths 0 … total. Raises ArgumentError, UnsupportedError."""
    if is_unreadable(values):
        raise UnsupportedError(
            f"{name} cannot be read in a compiled or fake call, but decides what is computed; leave this call out of the graph."
        )
    ends = [whole(name, x, 0) for x in read_list("packed", values.tolist() if isinstance(values, Tensor) else values, name)]
    if not ends or ends[0] or ends[-1] != total or any(a > b for a, b in itertools.pairwise(ends)):
        raise ArgumentError(f"{name} = {ends[:8]}{' …' if len(ends) > 8 else ''}: it must rise from 0 to {total}, the tokens.")
    return [b - a for a, b in itertools.pairwise(ends)]


def attend_packed(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Any,
    lengths: tuple[Sequence[int], Sequence[int]],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(out, lse) of documents packed in one row: q `(1, H, Σ n_q, D)`, k and v `(1, H_kv, Σ n_k, …)`; lengths of (q, k)."""
    of_q, of_k = lengths
    if len(of_q) != len(of_k):
        raise ArgumentError(f"{len(of_q)} documents of queries, but {len(of_k)} of keys; they must be as many.")
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
    if not isinstance(pattern, Pattern) or not is_translation_invariant(pattern):
        return _one_by_one(attend, q, k, v, pattern, lengths, options)
    if list(of_q) == list(of_k):
        out, lse = attend(q, k, v, documents(lengths=of_k) & pattern, q_offset=0, **options)
        return out, lse
    return _aligned(attend, q, k, v, pattern, lengths, options)


def _one_by_one(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Any,
    lengths: tuple[Sequence[int], Sequence[int]],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """A call for each document; dropout of document d draws from seed + d."""
    seed = options.get("seed")
    found = []
    operands = zip(q.split(list(lengths[0]), 2), *(x.split(list(lengths[1]), 2) for x in (k, v)), strict=True)
    for number, (q_of, k_of, v_of) in enumerate(operands):
        drawn = {} if seed is None else {"seed": seed + number}
        found.append(attend(q_of, k_of, v_of, pattern, **options | drawn))
    if not found:
        return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3])
    return torch.cat([out for out, _ in found], 2), torch.cat([lse for _, lse in found], 2)


def _aligned(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    lengths: tuple[Sequence[int], Sequence[int]],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """One call in which every document has max(n_q, n_k) positions, and ends with its last query and its last key."""
    of_q, of_k = (torch.tensor(list(x), dtype=torch.int64, device="cpu") for x in lengths)
    of_both = torch.maximum(of_q, of_k)
    ends, total = of_both.cumsum(0), int(of_both.sum())
    places = [expand_ranges(ends - x, ends)[1] for x in (of_q, of_k)]
    real = [torch.zeros(total, dtype=torch.bool, device="cpu").index_fill(0, at, True) for at in places]
    at_q, at_k = (x.to(q.device) for x in places)
    q, k, v = (
        x.new_zeros((*x.shape[:2], total, x.shape[3])).index_copy(2, at, x) for x, at in ((q, at_q), (k, at_k), (v, at_k))
    )
    pattern = documents(lengths=of_both.tolist()) & pattern
    # Positions without a query or a key see nothing and are seen by none.
    pattern = pattern if real[0].all() else pattern & sees_all(real[0])
    pattern = pattern if real[1].all() else pattern & padding(real[1])
    out, lse = attend(q, k, v, pattern, q_offset=0, **options)
    return out.index_select(2, at_q), lse.index_select(2, at_q)


# ---- jagged tensors -----------------------------------------------------------------------------------------------------
def is_jagged(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q, k and v are jagged nested tensors `(B, H, ragged, D)`."""
    nested = all(isinstance(x, Tensor) and x.is_nested and x.layout is torch.jagged and x.dim() == 4 for x in (q, k, v))
    return nested and all(getattr(x, "_ragged_idx", 2) == 2 for x in (q, k, v))


def attend_jagged(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, pattern: Any, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(out, lse) of jagged q, k and v `(B, H, ragged, D)`: jagged, `(B, H, ragged, D_v)` and `(B, H, ragged)`."""
    if options.pop("q_offset", None) is not None:
        raise ArgumentError("q_offset with jagged tensors: the queries of each item are the last of its tokens; leave it out.")
    (flat_q, of_q), (flat_k, of_k), (flat_v, of_v) = (_flat(x) for x in (q, k, v))
    if of_k != of_v:
        raise ArgumentError("k and v are jagged tensors of different lengths; they must be equal.")
    out, lse = attend_packed(attend, flat_q, flat_k, flat_v, pattern, (of_q, of_k), options)
    starts = _offsets(q)
    return _jagged(out[0].transpose(0, 1), starts), _jagged(lse[0].transpose(0, 1), starts)


def _flat(x: Tensor) -> tuple[Tensor, list[int]]:
    """The items of a jagged tensor `(B, H, ragged, D)` in one row `(1, H, tokens, D)`, and their lengths."""
    row = x.transpose(1, 2).values().transpose(0, 1)[None]
    return row, read_cumulative("the offsets of a jagged tensor", _offsets(x), row.shape[2])


def _offsets(x: Any) -> Tensor:
    """The cumulative lengths of a jagged tensor's items."""
    starts: Tensor = x.offsets()
    return starts


def _jagged(values: Tensor, starts: Tensor) -> Tensor:
    """`(B, H, ragged, …)` from `(tokens, H, …)`."""
    jagged: Tensor = torch.nested.nested_tensor_from_jagged(values, starts)
    return jagged.transpose(1, 2)
