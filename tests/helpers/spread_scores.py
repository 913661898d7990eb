"""Score terms and sinks over ranks against the dense formula; run by `ranks.in_ranks`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from score_formula import Dense, Terms, make_terms
from spread_cases import SEED, broadcasting, layouts
from torch import Tensor

from farlight.distributed import Layout, attention
from farlight.testing import Case, assert_matches, inputs

__all__ = ["compare_scores"]


def compare_scores(rank: int, world: int, problems: list[tuple[Case, tuple[str, ...]]], dtype: torch.dtype) -> int:
    """Outputs and all gradients of every (case, names of terms), by rank 0; returns the number of comparisons."""
    compared = 0
    for number, (case, names) in enumerate(problems):
        terms = make_terms(names, case)
        queries, keys = layouts(case, world, number if number % 3 else None)
        with broadcasting(8 if number % 2 else 0):
            found = _spread(case, terms, dtype, rank, queries, keys)
        if rank == 0:
            truth, size = _dense(case, terms, torch.float64, dtype, is_truth=True)
            baseline, _ = _dense(case, terms, dtype, dtype, is_truth=False)
            for name, actual in found.items():
                what = f"{case.name}, {' + '.join(names)}, {queries}, {keys}: {name}"
                assert_matches(actual.to(dtype), truth[name], baseline[name], what, magnitude=size[name])
                compared += 1
    return compared


def _spread(case: Case, terms: Terms, dtype: torch.dtype, rank: int, queries: Layout, keys: Layout) -> dict[str, Tensor]:
    """The results of the whole case, gathered; the gradients of the terms summed over the ranks. Collective."""
    given, leaves = inputs(case, dtype), terms.to(torch.float64 if dtype == torch.float64 else torch.float32)
    q, k, v = (
        layout.shard(x, 2, rank).detach().requires_grad_()
        for layout, x in ((queries, given.q), (keys, given.k), (keys, given.v))
    )
    options = {"scale": case.scale, "q_offset": case.q_offset, "dropout": case.dropout, "seed": SEED}
    out, lse = attention(
        q, k, v, case.pattern, layout=keys, q_layout=queries, score=leaves.score(), sinks=leaves.sinks, return_lse=True,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
    loss = (out * queries.shard(given.grad_out, 2, rank)).sum()
    loss = loss + torch.where(lse > -torch.inf, lse * queries.shard(given.grad_lse, 2, rank), 0.0).sum()
    wanted = {"dq": q, "dk": k, "dv": v, **leaves.tensors}
    grads = dict(zip(wanted, torch.autograd.grad(loss, tuple(wanted.values()), materialize_grads=True), strict=True))
    layout_of = {"out": queries, "lse": queries, "dq": queries, "dk": keys, "dv": keys}
    results = {"out": out.detach(), "lse": lse.detach(), **grads}
    for name, x in results.items():
        if name in layout_of:
            results[name] = layout_of[name].unshard(x, 2)
        else:
            dist.all_reduce(x)
    return results


def _dense(
    case: Case, terms: Terms, width: torch.dtype, dtype: torch.dtype, *, is_truth: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(results, magnitudes of the truth) of the formula on the inputs of `dtype`, computed in `width`."""
    given, exact = inputs(case, dtype), torch.float64 if width == torch.float64 else torch.float32
    q, k, v = (x.detach().to(width).clone().requires_grad_() for x in (given.q, given.k, given.v))
    leaves, grad_out, grad_lse = terms.to(exact), given.grad_out.to(width), given.grad_lse.to(exact)
    dense = Dense(case, leaves, q, k, v, flip=not is_truth)
    size = dense.magnitudes(case, leaves, q, grad_out, grad_lse) if is_truth else {}
    loss = (dense.out * grad_out).sum() + torch.where(dense.lse > -torch.inf, dense.lse * grad_lse, 0.0).sum()
    wanted = {"dq": q, "dk": k, "dv": v, **leaves.tensors}
    grads = torch.autograd.grad(loss, tuple(wanted.values()), materialize_grads=True)
    return {"out": dense.out.detach(), "lse": dense.lse.detach(), **dict(zip(wanted, grads, strict=True))}, size
