"""What bad input to the public functions says: the value that was found, the rule, and the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import farlight as fl
from farlight.errors import ArgumentError, FarlightError, PatternError, PlanError, UnsupportedError
from farlight.kernels import registry
from farlight.testing import case
from parity import BACKENDS, request_of

Q = torch.zeros(2, 4, 10, 8)
K = torch.zeros(2, 2, 12, 8)
P = fl.window(3)


def attend(q: Any = Q, k: Any = K, v: Any = None, pattern: Any = P, **options: Any) -> Callable[[], object]:
    return lambda: fl.attention(q, k, k if v is None else v, pattern, **options)


# (bad call, type, the whole text)
TABLE: list[tuple[Callable[[], object], type[Exception], str]] = [
    (attend(q=None), ArgumentError, "q is NoneType, not a torch tensor; pass (B, H, N, D) tensors."),
    (attend(v=[1.0]), ArgumentError, "v is list, not a torch tensor; pass (B, H, N, D) tensors."),
    (attend(q=Q[0]), ArgumentError, "q has shape (4, 10, 8): attention needs 4 dimensions (B, H, N, D); add or split some."),
    (
        attend(k=K[None]),
        ArgumentError,
        "k has shape (1, 2, 2, 12, 8): attention needs 4 dimensions (B, H, N, D); add or split some.",
    ),
    (attend(q=Q.long()), ArgumentError, "q has dtype torch.int64; use float16, bfloat16, float32 or float64."),
    (attend(v=K.cfloat()), ArgumentError, "v has dtype torch.complex64; use float16, bfloat16, float32 or float64."),
    (attend(k=K.half()), ArgumentError, "q is torch.float32, but k is torch.float16; cast them to one dtype."),
    (attend(v=K.double()), ArgumentError, "q is torch.float32, but v is torch.float64; cast them to one dtype."),
    (attend(k=K.to("meta")), ArgumentError, "q is on cpu, but k is on meta; move them to one device."),
    (attend(k=K[:1]), ArgumentError, "q has a batch of 2, but k of 1; they must be equal."),
    (attend(v=K[:1]), ArgumentError, "q has a batch of 2, but v of 1; they must be equal."),
    (attend(k=K[..., :4]), ArgumentError, "q has head_dim 8, but k has 4; they must be equal."),
    (attend(q=Q.to_sparse()), ArgumentError, "q has layout torch.sparse_coo; a dense tensor is needed: call q.to_dense()."),
    (attend(v=K.to_mkldnn()), ArgumentError, "v has layout torch._mkldnn; a dense tensor is needed: call v.to_dense()."),
    (
        attend(k=torch.nested.nested_tensor([torch.zeros(2, 3, 8), torch.zeros(2, 2, 8)], layout=torch.jagged)),
        UnsupportedError,
        "k is a nested tensor, which is not supported: pad it and pass fl.padding(lengths), or pack the texts into one row and "
        "pass fl.documents(lengths=…).",
    ),
    (
        attend(v=K[:, :, :5]),
        ArgumentError,
        "k has shape (2, 2, 12, 8), but v has (2, 2, 5, 8); they must have equal heads and tokens: only the last dimension, "
        "head_dim, may differ.",
    ),
    (
        attend(v=K[:, :1]),
        ArgumentError,
        "k has shape (2, 2, 12, 8), but v has (2, 1, 12, 8); they must have equal heads and tokens: only the last dimension, "
        "head_dim, may differ.",
    ),
    (attend(q=Q[:, :3]), ArgumentError, "q has 3 heads and k has 2: the first must be a multiple of the second."),
    (attend(q=Q[:, :1]), ArgumentError, "q has 1 heads and k has 2: the first must be a multiple of the second."),
    (
        attend(k=K[:, :0], v=K[:, :0]),
        ArgumentError,
        "q (2, 4, 10, 8), k (2, 0, 12, 8), v (2, 0, 12, 8): heads and head_dim must be at least 1.",
    ),
    (
        attend(q=Q[..., :0], k=K[..., :0], v=K[..., :0]),
        ArgumentError,
        "q (2, 4, 10, 0), k (2, 2, 12, 0), v (2, 2, 12, 0): heads and head_dim must be at least 1.",
    ),
    (
        attend(scale=float("nan")),
        ArgumentError,
        "scale = nan is not finite; pass a finite number, or None for head_dim ** -0.5.",
    ),
    (
        attend(scale=float("inf")),
        ArgumentError,
        "scale = inf is not finite; pass a finite number, or None for head_dim ** -0.5.",
    ),
    (attend(scale="1"), ArgumentError, "scale = '1' is str; pass a number, or None for head_dim ** -0.5."),
    (attend(scale=True), ArgumentError, "scale = True is bool; pass a number, or None for head_dim ** -0.5."),
    (attend(dropout=1.1), ArgumentError, "dropout = 1.1: it is the share of links to drop and must lie in 0 <= dropout <= 1."),
    (
        attend(dropout=-0.1),
        ArgumentError,
        "dropout = -0.1: it is the share of links to drop and must lie in 0 <= dropout <= 1.",
    ),
    (
        attend(dropout=float("nan")),
        ArgumentError,
        "dropout = nan: it is the share of links to drop and must lie in 0 <= dropout <= 1.",
    ),
    (
        attend(dropout=None),
        ArgumentError,
        "dropout = None: it is the share of links to drop and must lie in 0 <= dropout <= 1.",
    ),
    (attend(q_offset=1.5), ArgumentError, "q_offset = 1.5: it is the position of the first query, a whole number or None."),
    (attend(q_offset=True), ArgumentError, "q_offset = True: it is the position of the first query, a whole number or None."),
    (attend(seed=-1), ArgumentError, "seed = -1: pass a whole number in 0 … 2^63 - 1, or None."),
    (attend(seed=2**63), ArgumentError, "seed = 9223372036854775808: pass a whole number in 0 … 2^63 - 1, or None."),
    (attend(seed=0.5), ArgumentError, "seed = 0.5: pass a whole number in 0 … 2^63 - 1, or None."),
    (
        attend(seed=torch.zeros(2, dtype=torch.int64)),
        ArgumentError,
        "seed has shape (2,) and dtype torch.int64; pass one int64 number.",
    ),
    (attend(seed=torch.zeros(())), ArgumentError, "seed has shape () and dtype torch.float32; pass one int64 number."),
    (
        attend(pattern=None),
        ArgumentError,
        "the pattern is NoneType; pass a pattern such as fl.window(256), or a plan from fl.plan.",
    ),
    (
        attend(pattern="window(3)"),
        ArgumentError,
        "the pattern is str; pass a pattern such as fl.window(256), or a plan from fl.plan.",
    ),
    (
        attend(pattern=torch.ones(10, 12) > 0),
        ArgumentError,
        "the pattern is Tensor; make one of a mask by fl.from_dense(mask), of links by fl.from_edges(rows, cols, n).",
    ),
    (
        attend(backend="cuda"),
        ArgumentError,
        f"backend = 'cuda' is unknown; use 'auto' or one of {', '.join(repr(name) for name in registry.names())}.",
    ),
    (
        attend(pattern=fl.global_tokens(torch.arange(13) < 1)),
        PatternError,
        "global_tokens: the mask has 13 tokens, but there are 12 keys; they must agree.",
    ),
    (
        attend(pattern=fl.per_head([P] * 2)),
        PatternError,
        "per_head was given 2 patterns, but there are 4 heads; give one pattern for each.",
    ),
    (
        attend(pattern=fl.plan(P, 10, 13, batch=2, heads=4)),
        PlanError,
        "the plan was made for n_q=10, n_k=13, batch=2, heads=4, q_offset=3, "
        "but the tensors have n_q=10, n_k=12, batch=2, heads=4, "
        "q_offset=2; make one with fl.plan(pattern, …) for these sizes, or pass the pattern itself.",
    ),
    (
        attend(pattern=fl.plan(P, 10, 12), q_offset=0),
        PlanError,
        "the plan was made for n_q=10, n_k=12, batch=1, heads=1, q_offset=2, "
        "but the tensors have n_q=10, n_k=12, batch=2, heads=4, "
        "q_offset=0; make one with fl.plan(pattern, …) for these sizes, or pass the pattern itself.",
    ),
    (
        attend(backend="dense", return_lse=True),
        UnsupportedError,
        "backend 'dense' cannot run this attention (batch 2, 4 query heads on 2 key heads, 10 queries, 12 keys, "
        "head_dim 8, float32 on cpu, "
        "returning lse): scaled_dot_product_attention does not give the lse; pass return_lse=False. "
        "A backend that is named never falls back; use backend='auto' or another one.",
    ),
    (
        attend(backend="dense", dropout=0.5),
        UnsupportedError,
        "backend 'dense' cannot run this attention (batch 2, 4 query heads on 2 key heads, 10 queries, 12 keys, "
        "head_dim 8, float32 on cpu, "
        "dropout 0.5): its dropout draws other links than farlight's; use dropout=0. "
        "A backend that is named never falls back; use backend='auto' or another one.",
    ),
    # merge
    (lambda: fl.merge([]), ArgumentError, "merge: there is nothing to merge; give at least one (out, lse)."),
    (
        lambda: fl.merge([(Q, Q[..., 0])], weights=[1.0, 2.0]),
        ArgumentError,
        "merge: 2 weights for 1 pieces; give one weight for each.",
    ),
    (
        lambda: fl.merge([(Q, Q[..., 0])], weights=[-1.0]),
        ArgumentError,
        "merge: weight -1.0 is not a finite number >= 0; a weight says how often a piece counts.",
    ),
    (
        lambda: fl.merge([(Q, Q[..., 0])], weights=[float("nan")]),
        ArgumentError,
        "merge: weight nan is not a finite number >= 0; a weight says how often a piece counts.",
    ),
    (
        lambda: fl.merge([(Q, Q[..., 0]), (K, K[..., 0])]),
        ArgumentError,
        "merge: out (2, 2, 12, 8) with lse (2, 2, 12) does not fit the first piece's (2, 4, 10, 8); "
        "all pieces must have one shape.",
    ),
    (
        lambda: fl.merge([(Q, Q)]),
        ArgumentError,
        "merge: out (2, 4, 10, 8) with lse (2, 4, 10, 8) does not fit the first piece's (2, 4, 10, 8); "
        "all pieces must have one shape.",
    ),
]


@pytest.mark.parametrize(("call", "kind", "text"), TABLE, ids=[text[:70] for _, _, text in TABLE])
def test_the_whole_text(call: Callable[[], object], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(text)}$") as caught:
        call()
    assert isinstance(caught.value, FarlightError)
    assert type(caught.value) is kind


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "dense"])
def test_the_same_checks_guard_every_backend(name: str) -> None:
    for call, kind, text in TABLE[:34]:
        function: Any = call
        options = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))
        q, k, v, pattern, more = (options[key] for key in ("q", "k", "v", "pattern", "options"))
        with pytest.raises(kind, match=re.escape(text)):
            fl.attention(q, k, k if v is None else v, pattern, backend=name, **more)


def test_errors_are_what_a_caller_would_expect() -> None:
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(PatternError, ValueError)
    assert issubclass(PlanError, ValueError)
    assert issubclass(UnsupportedError, NotImplementedError)
    for kind in (ArgumentError, PatternError, PlanError, UnsupportedError):
        assert issubclass(kind, FarlightError)
        assert issubclass(kind, Exception)


def test_a_backend_that_cannot_says_all_its_reasons() -> None:
    found = registry.reasons("dense", request_of(case("dropout"), torch.float32, return_lse=True))
    assert len(found) == 2
    q = torch.zeros(1, 1, 20_000, 8)
    with pytest.raises(UnsupportedError, match="its mask would take 381 MiB, more than 256 MiB"):
        fl.attention(q, q, q, fl.window(1), backend="dense")


def test_bad_input_is_refused_while_compiling_too() -> None:
    """Validation is not skipped in a traced program: what can be known there is checked there."""
    compiled = torch.compile(lambda q, k: fl.attention(q, k, k, P, scale=float("nan")), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="scale = nan is not finite"):
        compiled(Q, K)
    compiled = torch.compile(lambda q, k: fl.attention(q, k, k, P), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="q has 3 heads and k has 2"):
        compiled(Q[:, :3], K)
    compiled = torch.compile(lambda q, k: fl.attention(q, k, k, fl.padding([13])), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="a length of 13 exceeds the 12 keys"):
        compiled(Q, K)
