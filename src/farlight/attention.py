"""`fl.attention`: check the arguments, select a backend, compute."""

from __future__ import annotations

import contextlib
from typing import Literal, cast, overload

import torch
from torch import Tensor

from farlight import flops, ops, score_operators
from farlight.errors import UnsupportedError, refuse_tracing
from farlight.inputs import (
    autocast_inputs,
    check_tensors,
    read_dropout,
    read_scale,
    read_seed,
    refuse_distributed,
    without_autocast,
)
from farlight.kernels import dense, registry
from farlight.kernels.backend import Backend, MaskBackend, Request
from farlight.packed import attend_jagged, is_jagged
from farlight.patterns.chooser import Chooser, is_chooser
from farlight.patterns.expression import Pattern, Sizes
from farlight.plan import Plan
from farlight.requests import chosen, read_pattern, read_request, read_sizes
from farlight.score.lowered import ScoreTerms, lower
from farlight.score.terms import Score

__all__ = ["attention"]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Plan | Chooser,
    *,
    scale: float | None = ...,
    q_offset: int | None = ...,
    dropout: float = ...,
    seed: int | Tensor | None = ...,
    score: Score | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Plan | Chooser,
    *,
    scale: float | None = ...,
    q_offset: int | None = ...,
    dropout: float = ...,
    seed: int | Tensor | None = ...,
    score: Score | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Plan | Chooser,
    *,
    scale: float | None = ...,
    q_offset: int | None = ...,
    dropout: float = ...,
    seed: int | Tensor | None = ...,
    score: Score | None = ...,
    sinks: Tensor | None = ...,
    return_lse: bool,
    backend: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Plan | Chooser,
    *,
    scale: float | None = ...,
    q_offset: int | None = ...,
    dropout: float = ...,
    seed: int | Tensor | None = ...,
    score: Score | None = ...,
    sinks: Tensor | None = ...,
    return_lse: bool = ...,
    return_lost: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, ...]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Plan | Chooser,
    *,
    scale: float | None = None,
    q_offset: int | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    score: Score | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    return_lost: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Exact softmax attention over the pairs that a pattern allows; differentiable, by `torch.func` and under vmap too.

        out[i] = Σ_j P[i, j] v[j],   P[i, j] = exp(S[i, j] - lse[i]) over allowed (i, j),   S = scale · q kᵀ

    Args:
        q: `(B, H, n_q, D)`; float16, bfloat16, float32 or float64; any strides.
        k, v: `(B, H_kv, n_k, D)`, H a multiple of H_kv (grouped or multi-query attention; nothing is copied for it); v may have
            another head_dim D_v, as in multi-head latent attention. q, k and v may be jagged `torch.nested` tensors
            `(B, H, ragged, D)`: each item is a sequence of its own, and out and lse are jagged.
        pattern: who may look at whom; or a plan of `fl.plan`, which is executed as it is, by the backend it was made for; or
            a router of `fl.routing`, which chooses the links from these q and k: the pattern is then `router(q, k)`.
        scale: None means D^-½; 0.0 means 0.0.
        q_offset: position of the first query; None means `n_k - n_q` (the queries are the last ones); may be negative.
        dropout: share of links dropped at random, the others divided by 1 - dropout; 1.0 leaves none. The lse is
            that without dropout.
        seed: where dropout draws from; None takes one from torch's default generator. A link's fate is a function of
            (seed, batch, head, position, key): the same on every backend and in the backward pass.
        score: terms on the scores, a value of `fl.score`: S = softcap(scale · q kᵀ) + biases; gradients reach its tensors.
        sinks: `(H,)`; each row sees one more key of this score and value 0, which the lse counts. A row without keys then
            gives 0 and the sink.
        return_lse: also return the natural log of each row's sum of exponentials, `(B, H, n_q)`, differentiable.
        return_lost: also return, last, a proven upper bound of the share of full attention that each row has missed,
            `(B, H, n_q)` float32, without gradient; for routers' lists in union with windows and named tokens, on the CPU.
        backend: "auto", or one of "cpu", "triton", "torch", "dense", "reference"; one that is named never falls back.

    Returns:
        out `(B, H, n_q, D_v)` in q's dtype; with `return_lse` also lse, float32 (float64 for float64 inputs); with
        `return_lost` also the bound. A row that sees nothing gives 0, -inf and zero gradients. Sums are in float32, for
        float64 in float64. Under autocast the inputs are cast as for torch's own attention.

    Raises:
        ArgumentError, PatternError, PlanError: an argument cannot be used. UnsupportedError: a named backend cannot run;
        torch.jit.trace.

    >>> import torch, farlight as fl
    >>> q = k = v = torch.randn(1, 2, 100, 8)
    >>> fl.attention(q, k, v, fl.window(8) | fl.global_tokens([0])).shape
    torch.Size([1, 2, 100, 8])
    """
    refuse_tracing("fl.attention")
    options = scale, q_offset, dropout, seed, score, sinks, return_lse, return_lost, backend
    if isinstance(q, Tensor) and q.is_nested and not return_lost and is_jagged(q, k, v):
        named = {"scale": scale, "q_offset": q_offset, "dropout": dropout, "seed": seed, "score": score, "sinks": sinks}
        results = attend_jagged(attention, (q, k, v), pattern, named | {"return_lse": return_lse, "backend": backend})
        return results if return_lse else results[0]
    return _attention(q, k, v, pattern, *options)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Plan | Chooser,
    scale: float | None,
    q_offset: int | None,
    dropout: float,
    seed: int | Tensor | None,
    score: Score | None,
    sinks: Tensor | None,
    return_lse: bool,
    return_lost: bool,
    backend: str,
) -> Tensor | tuple[Tensor, ...]:
    """`attention`, with all of its arguments."""
    if isinstance(q, Tensor) and not q.is_meta and torch.is_autocast_enabled(q.device.type):
        q, k, v = autocast_inputs(q, k, v)
        # Cast once, here: inside, autocast would also round the scores and weights that are kept in float32.
        with without_autocast(q):
            options = scale, q_offset, dropout, seed, score, sinks, return_lse, return_lost, backend
            return _attention(q, k, v, pattern, *options)
    check_tensors(q, k, v)
    registry.check_name(backend)
    scale, dropout = read_scale(scale, q.shape[-1]), read_dropout(dropout)
    sizes = read_sizes(q, k, q_offset)
    choice: int | None = None
    if not isinstance(pattern, (Pattern, Plan)) and is_chooser(pattern):
        choice = pattern.products(sizes)
        pattern = chosen(pattern, q, k, sizes)
    plan = pattern if isinstance(pattern, Plan) else None
    expression = read_pattern(pattern, sizes)
    drawn = read_seed(seed, dropout)
    terms = None if score is None and sinks is None else lower(score, sinks, sizes, q.device, q.dtype)
    is_plain = ops.is_plain(q, k, v, *(() if terms is None else terms.tensors))
    out: Tensor
    lse: Tensor | None
    if return_lost:
        _check_lost(is_plain and not q.is_meta and bool(sizes.batch), terms)
    if not sizes.batch:
        if is_plain:
            expression.check(sizes)
        out, lse = _empty_batch(q, k, v, scale, terms)
    elif is_plain and not q.is_meta:
        request = read_request(q, k, v, expression, sizes, dropout, return_lse or return_lost, terms, choice)
        out, lse = _eager(q, k, v, request, backend, plan, scale, drawn, terms)
    else:
        if plan is not None and backend == "auto":
            backend = plan.backend or backend
        out, lse = _traced(q, k, v, expression, sizes, backend, scale, dropout, drawn, return_lse, terms)
    if not return_lse and not return_lost:
        return out
    assert lse is not None
    lost = (registry.lost_bound(q, k, expression, sizes, lse, scale),) if return_lost else ()
    return (out, lse, *lost) if return_lse else (out, *lost)


def _check_lost(is_plain: bool, terms: ScoreTerms | None) -> None:
    """Raise UnsupportedError where `return_lost` has no bound, whatever the pattern."""
    if not is_plain:
        raise UnsupportedError(
            "return_lost: the bound is computed for plain tensors of at least one batch item, outside torch.compile, export "
            "and torch.func; call fl.attention there without it."
        )
    if terms is not None:
        raise UnsupportedError("return_lost: the bound is of scale · q·k alone, but score or sinks were given; leave one out.")


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: Request,
    backend: str,
    plan: Plan | None,
    scale: float,
    seed: Tensor,
    terms: ScoreTerms | None,
) -> tuple[Tensor, Tensor | None]:
    """Plain tensors: the selection is made once, and its plan serves both passes."""
    # Planning, or forming the mask, checks that the pattern fits: a check here would read its tables from the device.
    selection = registry.select(request, backend, plan)
    if selection.plan is not None and terms is not None:
        executor = cast(Backend, selection.backend)
        return score_operators.attend_scored_selected(q, k, v, terms, request, executor, selection.plan, scale, seed)
    if selection.plan is not None:
        return ops.attend_selected(q, k, v, request, cast(Backend, selection.backend), selection.plan, scale, seed)
    if selection.backend is dense.BACKEND and terms is None:
        q, k, v = dense.readable(q, "q"), dense.readable(k, "k"), dense.readable(v, "v")
        out = dense.attend(q, k, v, dense.cached_mask(request), scale=scale)
        return ops.differentiable_again(out, q, k, v, request.pattern, scale, request.sizes.q_offset), None
    masking = cast(MaskBackend, selection.backend)
    out, lse = _masked(q, k, v, request.pattern, request.sizes, masking, scale, request.dropout, seed, terms)
    if masking is dense.BACKEND and terms is not None:
        out = score_operators.differentiable_again(out, q, k, v, terms, request.pattern, scale, request.sizes.q_offset)
    return out, lse


def _traced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    sizes: Sizes,
    backend: str,
    scale: float,
    dropout: float,
    seed: Tensor,
    return_lse: bool,
    terms: ScoreTerms | None,
) -> tuple[Tensor, Tensor | None]:
    """Traced, transformed or subclassed tensors: sizes and tables may be symbols, and are checked inside the operator."""
    refuse_distributed(q, k, v)
    if not torch.compiler.is_compiling():
        flops.register()
    if backend == "auto" or backend in registry.plan_backends():
        options = pattern.text, scale, sizes.q_offset, dropout, backend
        if terms is None:
            out, lse = ops.attend(q, k, v, list(pattern._tables), seed, *options)
        else:
            tensors = terms.distance, terms.key_bias, terms.sinks
            more = terms.cap, terms.first
            out, lse = score_operators.attend_scored(q, k, v, *tensors, list(pattern._tables), seed, *options, *more)
        return out, lse
    if return_lse or dropout or terms is not None:  # the operators below have no place where a refusal would be noticed
        registry.require(backend, read_request(q, k, v, pattern, sizes, dropout, return_lse, terms))
    executor = cast(MaskBackend, registry.backend_named(backend))
    if executor is not dense.BACKEND or torch.compiler.is_compiling():
        return _masked(q, k, v, pattern, sizes, executor, scale, dropout, seed, terms)
    with dense.differentiable() if ops.is_transformed() else contextlib.nullcontext():
        out, _ = _masked(q, k, v, pattern, sizes, executor, scale, dropout, seed, terms)
    if not ops.is_transformed():
        again = pattern, scale, sizes.q_offset
        if terms is None:
            out = ops.differentiable_again(out, q, k, v, *again)
        else:
            out = score_operators.differentiable_again(out, q, k, v, terms, *again)
    return out, None


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    sizes: Sizes,
    backend: MaskBackend,
    scale: float,
    dropout: float,
    seed: Tensor,
    terms: ScoreTerms | None,
) -> tuple[Tensor, Tensor | None]:
    """Attention under the dense mask: one operator forms it, or in an exported program, which may run without farlight, torch's
    own operations.
    """
    if torch.compiler.is_exporting():
        mask = pattern.dense_rows(0, sizes.n_q, sizes, device=q.device)
    else:
        shape = (sizes.n_q, sizes.n_k, sizes.q_offset, sizes.batch, sizes.heads)
        # The mask follows from the tables alone: an empty tensor keeps the transforms of q by torch.func out of it.
        mask = ops.pattern_mask(torch.empty(0, device=q.device), list(pattern._tables), pattern.text, *shape)
    more: dict[str, ScoreTerms] = {} if terms is None else {"terms": terms}
    return backend.attend(q, k, v, mask, scale=scale, q_offset=sizes.q_offset, dropout=dropout, seed=seed, **more)


def _empty_batch(q: Tensor, k: Tensor, v: Tensor, scale: float, terms: ScoreTerms | None) -> tuple[Tensor, Tensor]:
    """The answer to a batch of no items, through which gradients of no items flow."""
    out = dense.attend(q, k, v, None, scale=scale)
    for x in () if terms is None else terms.tensors:
        out = out + 0 * x.sum().to(out.dtype)
    return out, out.sum(-1, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
