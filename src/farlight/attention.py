"""`fl.attention`: check what was given, choose a backend, compute. And `fl.explain`: say what would be chosen, and why."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from farlight import flops, ops
from farlight.derivatives import FirstOrderOnly
from farlight.errors import ArgumentError, PlanError, UnsupportedError, show
from farlight.kernels import dense, dispatch, reference
from farlight.kernels.request import Request
from farlight.patterns.arguments import refuse_tracing
from farlight.patterns.expression import Pattern, Sizes
from farlight.plan import Plan

__all__ = ["attention", "explain"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Plan,
    *,
    scale: float | None = None,
    q_offset: int | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention over the pairs that a pattern allows; differentiable, by `torch.func` and under vmap too.

        out[i] = Σ_j P[i, j] v[j],   P[i, j] = exp(S[i, j] - lse[i]) over allowed (i, j),   S = scale · q kᵀ

    Args:
        q: `(B, H, n_q, D)`; float16, bfloat16, float32 or float64; any strides.
        k, v: `(B, H_kv, n_k, D)`, H a multiple of H_kv (grouped or multi-query attention; nothing is copied for it).
        pattern: who may look at whom, or a plan made for these sizes.
        scale: None means D^-½; 0.0 means 0.0.
        q_offset: position of the first query; None means `n_k - n_q` (the queries are the last ones); may be negative.
        dropout: share of links dropped at random, the others divided by 1 - dropout; 1.0 leaves none. The lse is
            that without dropout.
        seed: where dropout draws from; None takes one from torch's default generator. A link's fate is a function of
            (seed, batch, head, position, key): the same on every backend and in the backward pass.
        return_lse: also return the natural log of each row's sum of exponentials, `(B, H, n_q)`, differentiable.
        backend: "auto", or one of "cpu", "triton", "torch", "dense", "reference"; one that is named never falls back.

    Returns:
        out `(B, H, n_q, D)` in q's dtype; with `return_lse` also lse, float32 (float64 for float64 inputs). A row that sees
        nothing gives 0, -inf and zero gradients. Sums are in float32, for float64 in float64. Under autocast the inputs are
        cast as for torch's own attention.

    Raises:
        ArgumentError, PatternError, PlanError: an argument cannot be used. UnsupportedError: a named backend cannot run; a
        forward-mode or second derivative was asked of a backend other than "reference"; torch.jit.trace.

    >>> import torch, farlight as fl
    >>> q = k = v = torch.randn(1, 2, 100, 8)
    >>> fl.attention(q, k, v, fl.window(8) | fl.global_tokens([0])).shape
    torch.Size([1, 2, 100, 8])
    """
    refuse_tracing("fl.attention")
    if isinstance(q, Tensor) and not q.is_meta and torch.is_autocast_enabled(q.device.type):
        q, k, v = _autocast(q, k, v)
        # Cast once, here: inside, autocast would also round the scores and weights that are kept in float32.
        with torch.autocast(q.device.type, enabled=False):
            return attention(
                q,
                k,
                v,
                pattern,
                scale=scale,
                q_offset=q_offset,
                dropout=dropout,
                seed=seed,
                return_lse=return_lse,
                backend=backend,
            )
    _check_tensors(q, k, v)
    dispatch.check_name(backend)
    scale = _read_scale(scale, q.shape[-1])
    dropout = _read_dropout(dropout)
    offset = k.shape[2] - q.shape[2] if q_offset is None else _read_offset(q_offset)
    pattern = _read_pattern(pattern, q, k, offset)
    drawn = _read_seed(seed, dropout)
    plain = ops.is_plain(q, k, v)
    if not q.shape[0]:
        if plain:
            pattern.check(_sizes(q, k, offset))
        return _no_items(q, k, v, scale, return_lse)
    # While a graph is being traced there are no sizes to check or to plan for: that happens inside the operator, later.
    if plain and not q.is_meta:
        request = _request(q, k, v, pattern, offset, dropout, return_lse)
        # Whoever plans the pattern or forms its mask checks that it fits: here that would ask the device about its tables.
        if backend == "auto":
            backend = dispatch.choose(request).backend
        else:
            dispatch.require(backend, request)
        if backend in dispatch.PLANNED:
            out, lse = ops.attend_now(q, k, v, request, scale=scale, seed=drawn, backend=backend)
            return (out, lse) if return_lse else out
        if backend == "dense" and forward_ad._current_level < 0:
            q, k, v = dense.readable(q, "q"), dense.readable(k, "k"), dense.readable(v, "v")
            return dense.attend(q, k, v, dispatch.dense_mask(request), scale=scale)
    if not plain:
        _refuse_spread(q, k, v)
        if not torch.compiler.is_compiling():
            flops.register()
    if backend in dispatch.PLANNED or backend == "auto":
        out, lse = ops.attend(q, k, v, list(pattern._tables), drawn, pattern.text, scale, offset, dropout, backend)
        return (out, lse) if return_lse else out
    mask = _traced_mask(q, k, pattern, offset)
    if backend == "dense":
        if return_lse or dropout:  # traced: the operator below has no place where this would be noticed
            dispatch.require(backend, _request(q, k, v, pattern, offset, dropout, return_lse))
        if not torch.compiler.is_compiling():
            q, k, v = FirstOrderOnly.apply(q, k, v)
        return dense.attend(q, k, v, dense.Mask.of(mask), scale=scale)
    out, lse = reference.attend(q, k, v, mask, scale=scale, q_offset=offset, dropout=dropout, seed=drawn)
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Plan,
    *,
    q_offset: int | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
) -> str:
    """Which backend `fl.attention` would take for these arguments, why each other cannot, and the expected cost.

    >>> import torch, farlight as fl
    >>> q = torch.randn(1, 1, 64, 8)
    >>> print(fl.explain(q, q, q, fl.window(4)).splitlines()[0])
    window(4) on batch 1, 1 heads, 64 queries, 64 keys, head_dim 8, float32 on cpu
    """
    q, k, v = _autocast(q, k, v)
    _check_tensors(q, k, v)
    offset = k.shape[2] - q.shape[2] if q_offset is None else _read_offset(q_offset)
    pattern = _read_pattern(pattern, q, k, offset)
    request = _request(q, k, v, pattern, offset, _read_dropout(dropout), return_lse)
    pattern.check(request.sizes)
    choice = dispatch.choose(request)
    pairs, every = choice.sparse.pairs, choice.dense.pairs
    text = repr(pattern)
    lines = [f"{text if len(text) <= 200 else text[:199] + '…'} on {request.describe()}"]
    lines.append(f"auto takes {choice.backend!r}")
    for name in dispatch.BACKENDS:
        why = dispatch.reasons(name, request)
        lines.append(f"  {name}: {'cannot: ' + '; '.join(why) if why else 'can'}")
    lines.append(f"sparse computes {pairs:,} pairs, expected {choice.sparse.seconds * 1e3:.2f} ms")
    lines.append(f"full attention computes {every:,} pairs, expected {choice.dense.seconds * 1e3:.2f} ms")
    ratio = choice.dense.seconds / choice.sparse.seconds
    lines.append(f"sparse is expected to be {ratio:.1f} × as fast as full attention")
    return "\n".join(lines)


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(q, Tensor) or q.is_meta or not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    kind = torch.get_autocast_dtype(q.device.type)
    return tuple(x.to(kind) if isinstance(x, Tensor) and x.dtype != torch.float64 else x for x in (q, k, v))  # type: ignore[return-value]


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Autocast switched off for the device of x; tensors without data know no autocast."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ArgumentError(f"{name} is {type(x).__name__}, not a torch tensor; pass (B, H, N, D) tensors.")
        if x.is_nested or x.layout is not torch.strided:
            refuse_layouts(**{name: x})
        if x.dim() != 4:
            raise ArgumentError(
                f"{name} has shape {tuple(x.shape)}: attention needs 4 dimensions (B, H, N, D); add or split some."
            )
        if x.dtype not in _DTYPES:
            raise ArgumentError(f"{name} has dtype {x.dtype}; use float16, bfloat16, float32 or float64.")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ArgumentError(f"q is {q.dtype}, but {name} is {x.dtype}; cast them to one dtype.")
        if x.device != q.device:
            raise ArgumentError(f"q is on {q.device}, but {name} is on {x.device}; move them to one device.")
        if x.shape[0] != q.shape[0]:
            raise ArgumentError(f"q has a batch of {q.shape[0]}, but {name} of {x.shape[0]}; they must be equal.")
    if k.shape[3] != q.shape[3]:
        raise ArgumentError(f"q has head_dim {q.shape[3]}, but k has {k.shape[3]}; they must be equal.")
    if v.shape[3] != k.shape[3]:
        raise ArgumentError(
            f"q and k have head_dim {k.shape[3]}, but v has {v.shape[3]}; {even_widths(k.shape[3], v.shape[3])}"
        )
    if k.shape != v.shape:
        raise ArgumentError(f"k has shape {tuple(k.shape)}, but v has {tuple(v.shape)}; they must be equal.")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[3] == 0:
        raise ArgumentError(f"q {tuple(q.shape)}, k {tuple(k.shape)}: heads and head_dim must be at least 1.")
    if q.shape[1] % k.shape[1]:
        raise ArgumentError(f"q has {q.shape[1]} heads and k has {k.shape[1]}: the first must be a multiple of the second.")


def refuse_layouts(**tensors: object) -> None:
    """Raise for a tensor whose values do not stand at strides in one piece of memory: nested, sparse, of another library."""
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.is_nested:
            raise UnsupportedError(
                f"{name} is a nested tensor, which is not supported: pad it and pass fl.padding(lengths), or pack the texts "
                "into one row and pass fl.documents(lengths=…)."
            )
        if isinstance(x, Tensor) and x.layout is not torch.strided:
            raise ArgumentError(f"{name} has layout {x.layout}; a dense tensor is needed: call {name}.to_dense().")


def even_widths(of_keys: int, of_values: int) -> str:
    """What to do where values are narrower or wider than keys."""
    if of_values < of_keys:
        return f"pad v with zeros by torch.nn.functional.pad(v, (0, {of_keys - of_values})) and keep out[..., :{of_values}]."
    return (
        f"pad q and k with zeros by torch.nn.functional.pad(…, (0, {of_values - of_keys})) and pass scale={of_keys} ** -0.5, "
        "or the scale that you use."
    )


def _refuse_spread(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise for tensors that are spread over processes."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if type(x).__name__ == "DTensor":
            raise UnsupportedError(f"{name} is a DTensor, which is not supported; pass {name}.to_local() on each rank.")


def _traced_mask(q: Tensor, k: Tensor, pattern: Pattern, offset: int) -> Tensor:
    """The pattern's dense mask: one operator, or in an exported program, which may run without farlight, plain operations."""
    sizes = _sizes(q, k, offset)
    if torch.compiler.is_exporting():
        return pattern.dense_rows(0, sizes.n_q, sizes, device=q.device)
    shape = (sizes.n_q, sizes.n_k, offset, sizes.batch, sizes.heads)
    # Where torch.func transforms q, its mask is not to be transformed: it has tables only.
    mask: Tensor = ops.pattern_mask(torch.empty(0, device=q.device), list(pattern._tables), pattern.text, *shape)
    return mask


def _no_items(q: Tensor, k: Tensor, v: Tensor, scale: float, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """The answer to a batch of no items, through which gradients of no items flow."""
    out = dense.attend(q, k, v, None, scale=scale)
    lse_type = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (out, out.sum(-1, dtype=lse_type)) if return_lse else out


def _read_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return float(head_dim**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ArgumentError(f"scale = {show(scale)} is {type(scale).__name__}; pass a number, or None for head_dim ** -0.5.")
    if not math.isfinite(scale):
        raise ArgumentError(f"scale = {scale} is not finite; pass a finite number, or None for head_dim ** -0.5.")
    return float(scale)


def _read_dropout(dropout: float) -> float:
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout <= 1.0:
        raise ArgumentError(f"dropout = {show(dropout)}: it is the share of links to drop and must lie in 0 <= dropout <= 1.")
    return float(dropout)


def _read_offset(q_offset: int) -> int:
    if isinstance(q_offset, bool) or not isinstance(q_offset, (int, torch.SymInt)):
        raise ArgumentError(f"q_offset = {show(q_offset)}: it is the position of the first query, a whole number or None.")
    return q_offset


def _read_seed(seed: int | Tensor | None, dropout: float) -> Tensor:
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ArgumentError(f"seed has shape {tuple(seed.shape)} and dtype {seed.dtype}; pass one int64 number.")
        return seed.reshape(())
    if seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ArgumentError(f"seed = {show(seed)}: pass a whole number in 0 … 2^63 - 1, or None.")
        return torch.tensor(seed, dtype=torch.int64, device="cpu")
    if not dropout:
        return torch.zeros((), dtype=torch.int64, device="cpu")
    return torch.randint(2**62, (), dtype=torch.int64, device="cpu")


def _read_pattern(pattern: Pattern | Plan, q: Tensor, k: Tensor, offset: int) -> Pattern:
    if isinstance(pattern, Pattern):
        return pattern
    if not isinstance(pattern, Plan):
        raise ArgumentError(
            f"the pattern is {type(pattern).__name__}; pass a pattern such as fl.window(256), or a plan from fl.plan."
        )
    wanted, made = _sizes(q, k, offset), pattern.sizes
    if wanted != made:
        raise PlanError(
            f"the plan was made for n_q={made.n_q}, n_k={made.n_k}, batch={made.batch}, heads={made.heads}, "
            f"q_offset={made.q_offset}, but the tensors have n_q={wanted.n_q}, n_k={wanted.n_k}, batch={wanted.batch}, "
            f"heads={wanted.heads}, q_offset={wanted.q_offset}; make one with fl.plan(pattern, …) for these sizes, or pass "
            "the pattern itself."
        )
    return pattern.pattern


def _sizes(q: Tensor, k: Tensor, offset: int) -> Sizes:
    return Sizes(q.shape[2], k.shape[2], offset, q.shape[0], q.shape[1])


def _request(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, offset: int, dropout: float, return_lse: bool) -> Request:
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return Request(pattern, _sizes(q, k, offset), k.shape[1], q.shape[3], q.dtype, q.device, needs_grad, dropout, return_lse)
