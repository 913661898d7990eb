"""`fl.explain`: which backend a call of `fl.attention` would take, why each other cannot, and the expected cost, as a value."""

from __future__ import annotations

from torch import Tensor

from farlight.errors import shorten
from farlight.inputs import autocast_inputs, check_tensors, read_dropout
from farlight.kernels import registry
from farlight.kernels.backend import Request
from farlight.kernels.cost import Estimate
from farlight.patterns.chooser import Chooser
from farlight.patterns.expression import Pattern
from farlight.patterns.positional import causal, window
from farlight.patterns.positional import full as full_pattern
from farlight.plan import Plan
from farlight.plan.clauses import clauses_of
from farlight.requests import chosen, read_pattern, read_request, read_sizes
from farlight.score.lowered import lower
from farlight.score.terms import Score

__all__ = ["Explanation", "explain"]


class Explanation(str):
    """The text of `fl.explain`, a `str`, with what it was written from as attributes.

    Attributes:
        backend: the name of the backend that `fl.attention` would take.
        refusals: for each backend the reasons why it cannot serve the call; empty where it can.
        sparse, full: the estimates of the sparse computation and of full attention: `.pairs` and `.seconds`.
        speedup: full.seconds / sparse.seconds.
        unrouted: for a router, the estimate of attention over every link without it (every causal one where its links are);
            None for a pattern.
        request: the call, without its tensors.
    """

    backend: str
    refusals: dict[str, list[str]]
    sparse: Estimate
    full: Estimate
    speedup: float
    unrouted: Estimate | None
    request: Request

    def __repr__(self) -> str:
        return str(self)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Plan | Chooser,
    *,
    q_offset: int | None = None,
    dropout: float = 0.0,
    score: Score | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Explanation:
    """Which backend `fl.attention` would take for these arguments, why each other cannot, and the expected cost.

    Arguments as in `fl.attention`. Returns an `Explanation`: text to print, with the figures as attributes.

    >>> import torch, farlight as fl
    >>> q = torch.randn(1, 1, 64, 8)
    >>> print(fl.explain(q, q, q, fl.window(4)).splitlines()[0])
    window(4) on batch 1, 1 heads, 64 queries, 64 keys, head_dim 8, float32 on cpu
    >>> fl.explain(q, q, q, fl.window(4)).refusals["reference"]
    []
    """
    q, k, v = autocast_inputs(q, k, v)
    check_tensors(q, k, v)
    sizes = read_sizes(q, k, q_offset)
    choice: int | None = None
    if isinstance(pattern, Chooser):
        choice = pattern.products(sizes)
        pattern = chosen(pattern, q, k, sizes)
    expression = read_pattern(pattern, sizes)
    terms = lower(score, sinks, sizes, q.device, q.dtype)
    request = read_request(q, k, v, expression, sizes, read_dropout(dropout), return_lse, terms, choice)
    expression.check(sizes)
    selection = registry.select(request, with_estimates=True)
    taken = registry.select(request, plan=pattern) if isinstance(pattern, Plan) else selection
    sparse, full = selection.sparse, selection.full
    assert sparse is not None
    assert full is not None
    lines = [f"{shorten(repr(expression), 200)} on {request.describe()}", f"auto takes {taken.backend.name!r}"]
    refusals = {name: registry.reasons(name, request) for name in registry.names()}
    lines += [f"  {name}: {'cannot: ' + '; '.join(why) if why else 'can'}" for name, why in refusals.items()]
    lines.append(f"sparse computes {sparse.pairs:,} pairs, expected {_milliseconds(sparse)}")
    lines.append(f"full attention computes {full.pairs:,} pairs, expected {_milliseconds(full)}")
    lines.append(f"sparse is expected to be {selection.speedup:.1f} × as fast as full attention")
    unrouted = None if choice is None else _unrouted(request)
    if unrouted is not None and selection.taken is not None:
        lines.append(_verdict(selection.taken.seconds, unrouted))
    explanation = Explanation("\n".join(lines))
    explanation.backend, explanation.refusals, explanation.request = taken.backend.name, refusals, request
    explanation.sparse, explanation.full, explanation.speedup = sparse, full, selection.speedup
    explanation.unrouted = unrouted
    return explanation


def _milliseconds(estimate: Estimate) -> str:
    """The expected time, and its parts where the links are chosen in the call."""
    text = f"{estimate.seconds * 1e3:.2f} ms"
    if not estimate.choosing and not estimate.planning:
        return text
    parts = (("choosing", estimate.choosing), ("planning", estimate.planning), ("attending", estimate.remaining))
    return f"{text}: " + ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in parts)


def _unrouted(request: Request) -> Estimate | None:
    """The cost of attention without a router: over every link, or every causal one where the router's links are causal."""
    every = causal() if _is_causal(request.pattern) else full_pattern()
    return registry.select(request._replace(pattern=every, choice=None), with_estimates=True).taken


def _is_causal(pattern: Pattern) -> bool:
    """Whether every clause of the union is causal."""
    clauses = clauses_of(pattern)
    return bool(clauses) and all(
        any(isinstance(atom, causal) or (isinstance(atom, window) and atom.right <= 0) for atom in clause) for clause in clauses
    )


def _verdict(routed: float, unrouted: Estimate) -> str:
    """Whether the router saves time. `auto` never changes its links: other links would be another result."""
    text = f"without the router every link takes {unrouted.seconds * 1e3:.2f} ms"
    if routed <= unrouted.seconds:
        return f"{text}: the router is expected to save {(unrouted.seconds - routed) * 1e3:.2f} ms"
    return f"{text}, so that choosing costs more than it saves here; the router's links are kept all the same"
