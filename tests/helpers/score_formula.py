"""Attention under score terms as a dense formula, written from the documentation; its cases; the comparison with a backend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import farlight as fl
from farlight.kernels import registry
from farlight.testing import Case, assert_matches, case, dropout_mask, inputs
from parity import SEED

__all__ = ["CASES", "SETS", "TERMS", "Dense", "Terms", "compare_scored", "make_terms", "supports"]

BUCKETS, FARTHEST = 8, 20
CAP = 1.5
TERMS = ("softcap", "alibi", "relative", "t5", "key_bias", "sinks")
SETS = (*((name,) for name in TERMS), *itertools.combinations(TERMS, 2), TERMS)

# Every kind of plan: windows, sorted orders, gathered pairs, masks by bit, split rows, variants by head and item, empty rows.
NAMES = (
    "window and a lighthouse, n=65",
    "causal, last queries",
    "window, rows far before the text",
    "dilated window",
    "strided, phase by head",
    "scattered lighthouses and a window",
    "documents that come back",
    "padding and a causal window",
    "random keys, causal",
    "random keys without a window",
    "a mask with holes",
    "a mask per item and head",
    "many heads and items",
)
CASES = (
    *(case(name) for name in NAMES),
    Case(
        "scored, grouped heads and dropout",
        fl.window(9) | fl.random_keys(2) | fl.global_tokens([0]),
        70,
        77,
        heads=6,
        kv_heads=2,
        dropout=0.3,
    ),
    Case(
        "scored, clusters by item",
        fl.clusters(torch.arange(160).view(2, 1, 80) * 7 % 5),
        80,
        batch=2,
        heads=4,
        kv_heads=2,
        head_dim=24,
    ),
    Case("scored, two pieces", fl.strided(4) | fl.window(6), 130, heads=3, batch=2),
)


@dataclass
class Terms:
    """Tensors of the terms that take part; None for the others."""

    cap: float = 0.0
    slopes: Tensor | None = None
    table: Tensor | None = None
    t5_table: Tensor | None = None
    key_bias: Tensor | None = None
    sinks: Tensor | None = None
    bidirectional: bool = True

    @property
    def tensors(self) -> dict[str, Tensor]:
        names = ("slopes", "table", "t5_table", "key_bias", "sinks")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def to(self, dtype: torch.dtype) -> Terms:
        """Leaves that require gradients."""
        leaves = {name: x.detach().to(dtype).clone().requires_grad_() for name, x in self.tensors.items()}
        return Terms(self.cap, bidirectional=self.bidirectional, **leaves)

    def score(self) -> fl.score.Score | None:
        parts = [] if not self.cap else [fl.score.softcap(self.cap)]
        if self.key_bias is not None:
            parts.append(fl.score.key_bias(self.key_bias))
        if self.slopes is not None:
            parts.append(fl.score.alibi(self.slopes))
        if self.table is not None:
            parts.append(fl.score.relative(self.table))
        if self.t5_table is not None:
            parts.append(fl.score.t5(self.t5_table, BUCKETS, FARTHEST, self.bidirectional))
        return sum(parts[1:], parts[0]) if parts else None


def make_terms(names: tuple[str, ...], case: Case, bidirectional: bool = True) -> Terms:
    """Random terms of a case, drawn in float64 and rounded to float32."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    items = case.batch if case.heads % 2 else 1
    heads = 1 if case.heads % 2 and case.batch > 1 else case.heads
    return Terms(
        CAP if "softcap" in names else 0.0,
        draw(case.heads).abs() / 8 if "alibi" in names else None,
        draw(case.heads, 11) if "relative" in names else None,
        draw(BUCKETS, case.heads) if "t5" in names else None,
        draw(items, heads, case.n_k) if "key_bias" in names else None,
        draw(case.heads) if "sinks" in names else None,
        bidirectional,
    )


def supports(backend: str, names: tuple[str, ...], of: Case, dtype: torch.dtype, *, return_lse: bool = True) -> bool:
    terms = make_terms(names, of)
    lowered = fl.score.lower(terms.score(), terms.sinks, of.sizes, torch.device("cpu"), dtype)
    assert lowered is not None
    shapes = of.kv_heads, of.head_dim, of.value_dim, dtype, torch.device("cpu")
    request = registry.Request(of.pattern, of.sizes, *shapes, True, of.dropout, return_lse, lowered.names)
    return not registry.reasons(backend, request)


def bucket(distance: int, bidirectional: bool) -> int:
    """T5's bucket of one distance j - i, in plain Python."""
    first, buckets = 0, BUCKETS
    if bidirectional:
        buckets //= 2
        first = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    share = math.log(distance / exact) / math.log(FARTHEST / exact)
    return first + min(exact + int(share * (buckets - exact) + 1e-6), buckets - 1)


class Dense:
    """The formula at the dtype of q, scores in float32, in float64 for float64.

    `flip`: keys are summed from the last to the first, so that in float64 too the baseline has a sample of rounding.
    """

    def __init__(self, case: Case, terms: Terms, q: Tensor, k: Tensor, v: Tensor, *, flip: bool = False) -> None:
        sizes, exact = case.sizes, torch.float64 if q.dtype == torch.float64 else torch.float32
        group = case.heads // case.kv_heads
        order = torch.arange(case.n_k).flip(0) if flip else torch.arange(case.n_k)
        self.keys, self.values = (x.repeat_interleave(group, 1)[:, :, order] for x in (k, v))
        s = ((q @ self.keys.mT) * case.scale_value).to(exact)
        if terms.cap:
            s = terms.cap * torch.tanh(s / terms.cap)
        distance = order - (torch.arange(case.n_q) + sizes.q_offset)[:, None]
        for bias in self._biases(terms, distance, order, exact):
            s = s + bias
        allowed = case.pattern.dense(case.n_q, case.n_k, batch=case.batch, heads=case.heads, q_offset=sizes.q_offset)
        self.scores = s
        s = s.masked_fill(~allowed[..., order], -torch.inf)
        if terms.sinks is not None:
            s = torch.cat([s, terms.sinks.to(exact)[:, None, None].expand(*s.shape[:3], 1)], 3)
        top = s.detach().amax(3, keepdim=True)
        weights = torch.exp(s - torch.where(top == -torch.inf, 0.0, top))
        total = weights.sum(3, keepdim=True)
        self.lse = torch.where(total > 0, torch.log(total) + top, -torch.inf).squeeze(3)
        self.p = weights / torch.where(total > 0, total, 1.0)
        self.factor = torch.ones(())
        keep = dropout_mask(sizes, SEED, case.dropout)
        if keep is not None:
            self.factor = keep[..., order].to(exact) / (1 - case.dropout or 1.0)
        self.dropped = self.p[..., : case.n_k] * self.factor
        self.out = self.dropped.to(q.dtype) @ self.values

    @staticmethod
    def _biases(terms: Terms, distance: Tensor, order: Tensor, exact: torch.dtype) -> Iterator[Tensor]:
        if terms.slopes is not None:
            yield -terms.slopes.to(exact)[:, None, None] * distance.abs()
        if terms.table is not None:
            reach = terms.table.shape[1] // 2
            yield terms.table.to(exact)[:, distance.clamp(-reach, reach) + reach]
        if terms.t5_table is not None:
            low, high = int(distance.min()), int(distance.max())
            of_distance = torch.tensor([bucket(d, terms.bidirectional) for d in range(low, high + 1)])
            yield terms.t5_table.to(exact)[of_distance[distance - low]].permute(2, 0, 1)
        if terms.key_bias is not None:
            yield terms.key_bias.to(exact)[:, :, None, order]

    def magnitudes(self, case: Case, terms: Terms, q: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> dict[str, Tensor]:
        """For each result the sum of the absolute values of the terms that are summed to it."""
        group = case.heads // case.kv_heads
        dp = (grad_out.abs() @ self.values.abs().mT) * self.factor
        delta = (grad_out * self.out).abs().sum(3) + (0.0 if grad_lse is None else grad_lse.abs())
        # Probabilities computed as exp(score - lse) share the rounding of the lse.
        common = 1 + torch.where(self.lse.isfinite(), self.lse.abs(), 0.0)[..., None]
        ds = self.p[..., : case.n_k] * (dp + delta[..., None]) * common
        of_keys = {"dk": ds.mT @ q.abs() * abs(case.scale_value), "dv": (self.dropped * common).mT @ grad_out.abs()}
        found = {
            "out": self.dropped @ self.values.abs(),
            "lse": torch.where(self.lse.isfinite(), self.lse.abs(), 0.0) + self.scores.abs().amax(3) + 1,
            "dq": ds @ self.keys.abs() * abs(case.scale_value),
            **{name: x.unflatten(1, (-1, group)).sum(2) for name, x in of_keys.items()},
        }
        biases = {name: x for name, x in terms.tensors.items() if name != "sinks"}
        if biases:
            grads = torch.autograd.grad((self.scores * ds.detach()).sum(), tuple(biases.values()), retain_graph=True)
            found |= {name: x.abs() for name, x in zip(biases, grads, strict=True)}
        if terms.sinks is not None:
            found["sinks"] = (self.p[..., -1] * delta * common[..., 0]).sum((0, 2))
        return {name: x.detach() for name, x in found.items()}


def compare_scored(case: Case, terms: Terms, backend: str, dtype: torch.dtype, *, return_lse: bool = True) -> None:
    """Outputs and the gradients of q, k, v and of every tensor of the terms, within twice the error of plain torch."""
    given = inputs(case, dtype)
    results: dict[str, dict[str, Tensor]] = {}
    size: dict[str, Tensor] = {}
    for kind in ("truth", "baseline", "actual"):
        width = torch.float64 if kind == "truth" else dtype
        q, k, v = (x.detach().to(width).clone().requires_grad_() for x in (given.q, given.k, given.v))
        leaves = terms.to(torch.float64 if width == torch.float64 else torch.float32)
        grad_out, grad_lse = (
            given.grad_out.to(width),
            given.grad_lse.to(torch.float64 if width == torch.float64 else torch.float32),
        )
        if kind == "actual":
            options = {"scale": case.scale, "q_offset": case.q_offset, "dropout": case.dropout, "seed": SEED}
            result = fl.attention(
                q,
                k,
                v,
                case.pattern,
                score=leaves.score(),
                sinks=leaves.sinks,
                return_lse=return_lse,
                backend=backend,
                **options,
            )
            out, lse = result if isinstance(result, tuple) else (result, grad_lse)
        else:
            dense = Dense(case, leaves, q, k, v, flip=kind == "baseline")
            out, lse = dense.out, dense.lse
            if kind == "truth":
                size = dense.magnitudes(case, leaves, q, grad_out, grad_lse if return_lse else None)
        loss = (out * grad_out).sum()
        if return_lse:
            loss = loss + torch.where(lse > -torch.inf, lse * grad_lse, 0.0).sum()
        wanted = {"dq": q, "dk": k, "dv": v, **leaves.tensors}
        grads = torch.autograd.grad(loss, tuple(wanted.values()), materialize_grads=True)
        results[kind] = {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}
        if return_lse:
            results[kind]["lse"] = lse.detach()
    truth, baseline = results["truth"], results["baseline"]
    for name, actual in results["actual"].items():
        assert actual.dtype == baseline[name].dtype, name
        what = f"{case.name}, {backend}, {str(dtype).removeprefix('torch.')}: {name}"
        # Gradients of the terms are float32 sums of numbers that the inputs' dtype rounds: its unit is theirs.
        assert_matches(actual.to(dtype), truth[name], baseline[name], what, magnitude=size[name])
