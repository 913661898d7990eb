"""The contract between `fl.attention` and its backends: the request, the call, and the two kinds of backend.

A *plan backend* executes the tables of a plan, forward and backward; `farlight.ops` gives it to autograd. A *mask backend*
attends under the dense mask of the pattern with torch operations that autograd differentiates. `kernels/registry.py` lists the
backends and selects one; this module imports none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from farlight.patterns.expression import Pattern, Sizes
from farlight.plan.tables import PlanLike, TileShape
from farlight.score.lowered import ScoreTerms

__all__ = [
    "AnyBackend",
    "Backend",
    "Call",
    "DevicePlanner",
    "Grads",
    "MaskBackend",
    "Origin",
    "Request",
    "Saved",
    "ScoreGrads",
    "ScoringBackend",
]

Grads: TypeAlias = tuple[Tensor, Tensor, Tensor]
ScoreGrads: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


class Request(NamedTuple):
    """One call of `fl.attention` without its tensors: everything on which a backend's refusal may depend.

    A tuple, because one is made in every call: a frozen dataclass of 13 fields takes 2 µs longer to fill.
    """

    pattern: Pattern
    sizes: Sizes
    kv_heads: int
    head_dim: int
    value_dim: int  # of v and out
    dtype: torch.dtype
    device: torch.device
    needs_grad: bool = False
    dropout: float = 0.0
    return_lse: bool = False
    terms: frozenset[str] = frozenset()  # ScoreTerms.names
    renumbered: bool = False  # the call has an `Origin`
    choice: int | None = None  # products of head_dim by which a router chose the pattern in this call; None: no router

    def describe(self) -> str:
        """The request in one line, for errors and for `fl.explain`."""
        s = self.sizes
        heads = f"{s.heads} heads" if s.heads == self.kv_heads else f"{s.heads} query heads on {self.kv_heads} key heads"
        options = [
            f"{str(self.dtype).removeprefix('torch.')} on {self.device.type}",
            *(["with gradients"] if self.needs_grad else []),
            *([f"dropout {self.dropout:g}"] if self.dropout else []),
            *(["returning lse"] if self.return_lse else []),
            *sorted(self.terms),
            *(["at listed positions"] if self.renumbered else []),
        ]
        widths = f"head_dim {self.head_dim}"
        if self.value_dim != self.head_dim:
            widths += f" of q and k, {self.value_dim} of v"
        return f"batch {s.batch}, {heads}, {s.n_q} queries, {s.n_k} keys, {widths}, " + ", ".join(options)


@dataclass(frozen=True, eq=False, slots=True)
class Origin:
    """Where the rows, keys and heads of a piece stand in the whole problem, which dropout and biases by distance read.

    rows `(n_q,)`: positions of the queries; keys `(n_k,)`: positions of the keys; items, heads `(B, H)`: batch items and query
    heads. int64, on the CPU.
    """

    rows: Tensor
    keys: Tensor
    items: Tensor
    heads: Tensor


class Call(NamedTuple):
    """The operands of one execution of a plan: q `(B, H, n_q, D)`; k `(B, H_kv, n_k, D)`; v `(B, H_kv, n_k, D_v)`; `seed` a
    0-d int64 tensor.

    `terms`: what is added to the scores, for a `ScoringBackend`; `wanted`: whether the gradients of distance, key_bias and
    sinks are needed. `origin`: for a piece of a larger problem, given to a backend whose attribute `honours_origin`, which it
    may leave out, is true; `terms.distance` then has a row for each head of the whole.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    plan: PlanLike
    scale: float
    dropout: float
    seed: Tensor
    terms: ScoreTerms | None = None
    wanted: tuple[bool, bool, bool] = (True, True, True)
    origin: Origin | None = None


class Saved(NamedTuple):
    """Results of the forward pass that the backward pass reads: out `(B, H, n_q, D_v)` and lse `(B, H, n_q)`."""

    out: Tensor
    lse: Tensor


class Backend(Protocol):
    """A backend that executes plans made of tiles of `tile_shape`.

    `reasons`: why it cannot serve a request, one phrase each; empty when it can. `forward`: (out, lse), out in q's dtype, lse
    float32 (float64 for float64). `backward`: (dq, dk, dv) in the dtypes of q, k and v, from the gradients of out and of lse.
    """

    @property
    def name(self) -> str: ...

    @property
    def tile_shape(self) -> TileShape: ...

    def reasons(self, request: Request) -> list[str]: ...

    def forward(self, call: Call) -> tuple[Tensor, Tensor]: ...

    def backward(self, call: Call, saved: Saved, dout: Tensor, dlse: Tensor) -> Grads: ...


class ScoringBackend(Backend, Protocol):
    """A plan backend that honours the terms of `score_terms` (`ScoreTerms.names`); others are refused calls with any.

    `forward` reads `call.terms`; out and lse are those with the sinks. `score_backward`: beside the gradients of q, k and v
    those of `distance`, `key_bias` and `sinks`, None where the call has none or wants none (`kernels/sinks.py` for sinks).
    """

    @property
    def score_terms(self) -> frozenset[str]: ...

    def score_backward(self, call: Call, saved: Saved, dout: Tensor, dlse: Tensor) -> tuple[Grads, ScoreGrads]: ...


@runtime_checkable
class DevicePlanner(Protocol):
    """A plan backend that builds the plans of some requests on the tensors' device; None = built on the host, as for all."""

    def device_plan(self, request: Request) -> PlanLike | None: ...


@runtime_checkable
class MaskBackend(Protocol):
    """A backend that attends under the dense mask `(B|1, H|1, n_q, n_k)` of the pattern, differentiated by autograd.

    `attend`: (out, lse); lse is None where `reasons` refuses `return_lse`. `terms` is given to a backend only where its
    attribute `score_terms`, which it may leave out, names them all.
    """

    @property
    def name(self) -> str: ...

    def reasons(self, request: Request) -> list[str]: ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        *,
        scale: float,
        q_offset: int,
        dropout: float,
        seed: Tensor,
        terms: ScoreTerms | None = None,
    ) -> tuple[Tensor, Tensor | None]: ...


AnyBackend: TypeAlias = Backend | MaskBackend
