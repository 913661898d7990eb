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
from farlight.plan import Plan
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
        request: the call, without its tensors.
    """

    backend: str
    refusals: dict[str, list[str]]
    sparse: Estimate
    full: Estimate
    speedup: float
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
    if isinstance(pattern, Chooser):
        pattern = chosen(pattern, q, k, sizes)
    expression = read_pattern(pattern, sizes)
    terms = lower(score, sinks, sizes, q.device, q.dtype)
    request = read_request(q, k, v, expression, sizes, read_dropout(dropout), return_lse, terms)
    expression.check(sizes)
    selection = registry.select(request)
    taken = registry.select(request, plan=pattern) if isinstance(pattern, Plan) else selection
    sparse, full = selection.sparse, selection.full
    assert sparse is not None
    assert full is not None
    lines = [f"{shorten(repr(expression), 200)} on {request.describe()}", f"auto takes {taken.backend.name!r}"]
    refusals = {name: registry.reasons(name, request) for name in registry.names()}
    lines += [f"  {name}: {'cannot: ' + '; '.join(why) if why else 'can'}" for name, why in refusals.items()]
    lines.append(f"sparse computes {sparse.pairs:,} pairs, expected {sparse.seconds * 1e3:.2f} ms")
    lines.append(f"full attention computes {full.pairs:,} pairs, expected {full.seconds * 1e3:.2f} ms")
    lines.append(f"sparse is expected to be {selection.speedup:.1f} × as fast as full attention")
    explanation = Explanation("\n".join(lines))
    explanation.backend, explanation.refusals, explanation.request = taken.backend.name, refusals, request
    explanation.sparse, explanation.full, explanation.speedup = sparse, full, selection.speedup
    return explanation
