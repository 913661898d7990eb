"""Named positions: the query at a position, also beyond the last key; the key at it; nothing outside the sequence."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import farlight as fl
from farlight.kernels import registry
from farlight.kernels.backend import Request
from farlight.patterns.liveness import last_use, liveness_sizes
from farlight.report.formula import formula

BACKENDS = ("cpu", "torch", "dense", "reference")
NAMED = (fl.global_tokens, fl.sees_all, fl.seen_by_all)


def rule(kind: object, positions: list[int], n_q: int, n_k: int, q_offset: int) -> Tensor:
    """The definition, pair by pair."""
    named = {p if p >= 0 else n_k + p for p in positions if p >= -n_k}
    return torch.tensor(
        [
            [
                (kind is not fl.seen_by_all and q_offset + r in named) or (kind is not fl.sees_all and j in named)
                for j in range(n_k)
            ]
            for r in range(n_q)
        ],
        dtype=torch.bool,
    ).reshape(n_q, n_k)


# ---- texts shorter than what is named --------------------------------------------------------------------------------
SHORT: dict[str, fl.Pattern] = {
    "streaming": fl.presets.streaming(4, 8),
    "bigbird": fl.presets.bigbird(8, 2),
    "etc": fl.presets.etc(3, 2),
    "longformer": fl.presets.longformer(4, (0, 5, -6)),
    "star": fl.presets.star(),
    "sees_all": fl.sees_all([0, 4, -5]),
    "seen_by_all": fl.seen_by_all([0, 4, -5]),
    "per_head": fl.per_head([fl.global_tokens([7]), fl.window(1)]),
    "denied": ~fl.global_tokens([6, -9]),
}


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("n", [0, 1, 3, 7])
def test_backends_agree_on_positions_outside_the_sequence(name: str, n: int) -> None:
    pattern = SHORT[name]
    q, k, v = torch.randn(3, 1, 2, n, 8, dtype=torch.float32).unbind(0)
    mask = pattern.dense(n, heads=2)
    wanted = torch.softmax((q @ k.transpose(2, 3) * 8**-0.5).masked_fill(~mask, -torch.inf), -1).nan_to_num() @ v
    for backend in ("auto", "torch", "reference"):
        torch.testing.assert_close(fl.attention(q, k, v, pattern, backend=backend), wanted, atol=1e-5, rtol=1e-5)
    assert pattern.count(n, heads=2) == int(mask.expand(1, 2, n, n).sum())
    assert torch.equal(fl.plan(pattern, n, heads=2).dense(), mask.expand(1, 2, n, n))
    fl.explain(q, k, v, pattern)


@pytest.mark.parametrize("name", [name for name in SHORT if name != "per_head"])
def test_analysis_agrees_on_positions_outside_the_sequence(name: str) -> None:
    """Small-world figures, paths, reach, retention, the page's rules and JSON take what attention takes."""
    pattern, n = SHORT[name], 3
    assert fl.Pattern.from_json(pattern.to_json()) == pattern
    assert fl.smallworld(pattern, n).links == pattern.count(n)
    assert fl.reach(pattern, n, 1).share.shape[-1] == n
    q = torch.randn(1, 1, n, 4)
    fl.retention(q, q, pattern)
    json.dumps(formula(pattern, n))
    assert bool(fl.path(fl.full() | pattern, n, 0, 2).positions)


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("positions", [[0], [-1], [5, -6], [2**31], [], [3, 4, 9, 10]], ids=str)
@pytest.mark.parametrize("n", [0, 1, 4, 10])
def test_a_position_outside_the_sequence_names_nothing(kind: type, positions: list[int], n: int) -> None:
    pattern = kind(positions)
    wanted = rule(kind, positions, n, n, 0)
    assert torch.equal(pattern.dense(n)[0, 0], wanted)
    assert pattern.count(n) == int(wanted.sum())
    assert torch.equal(fl.plan(pattern, n).dense()[0, 0], wanted)


# ---- more queries than keys ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("n_q, n_k, q_offset", [(12, 9, 0), (12, 9, None), (5, 9, 20), (40, 7, -3), (3, 0, 0)])
@pytest.mark.parametrize("positions", [[7, 8, 9, 10, 11], [0, 30, -1], [22], [36]], ids=str)
def test_a_position_names_the_query_at_it(kind: type, n_q: int, n_k: int, q_offset: int | None, positions: list[int]) -> None:
    offset = n_k - n_q if q_offset is None else q_offset
    for pattern, wanted in (
        (kind(positions), rule(kind, positions, n_q, n_k, offset)),
        (fl.window(2) | kind(positions), fl.window(2).dense(n_q, n_k, q_offset=offset)[0, 0]),
    ):
        wanted = wanted | rule(kind, positions, n_q, n_k, offset)
        assert torch.equal(pattern.dense(n_q, n_k, q_offset=q_offset)[0, 0], wanted)
        assert torch.equal(fl.plan(pattern, n_q, n_k, q_offset=q_offset).dense()[0, 0], wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_named_queries_beyond_the_last_key_are_attended_and_differentiated(backend: str) -> None:
    if backend == "cpu" and registry.reasons("cpu", _request(12, 9)):
        pytest.skip("no native kernels here")
    pattern = (fl.sees_all(range(7, 12)) & fl.seen_by_all(range(6, 9))) | fl.sees_all([10]) | fl.window(1)
    q = torch.randn(1, 2, 12, 8, requires_grad=True)
    k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(2))
    mask = pattern.dense(12, 9, q_offset=0)
    wanted = torch.softmax((q @ k.transpose(2, 3) * 8**-0.5).masked_fill(~mask, -1e30), -1)
    wanted = torch.where(mask.any(-1, keepdim=True), wanted @ v, 0.0)
    found = fl.attention(q, k, v, pattern, q_offset=0, backend=backend)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(wanted)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), (q, k, v)),
        torch.autograd.grad((wanted * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def _request(n_q: int, n_k: int) -> Request:
    sizes = fl.plan(fl.full(), n_q, n_k).sizes
    return Request(fl.full(), sizes, 1, 8, 8, torch.float32, torch.device("cpu"), True, 0.0, False)


@pytest.mark.parametrize("n_q, n_k, q_offset", [(12, 9, 0), (12, 9, -3), (4, 9, 5), (9, 9, 4)])
def test_a_mask_of_sees_all_is_over_queries_or_over_positions(n_q: int, n_k: int, q_offset: int) -> None:
    """As every table of queries: one entry for each query, or for each position (as many as there are keys)."""
    by_query, by_position = torch.arange(n_q) % 3 == 1, torch.arange(n_k) % 3 == 1
    rows = torch.arange(n_q) + q_offset
    at_position = (rows >= 0) & (rows < n_k) & by_position[rows.clamp(0, n_k - 1)]
    for mask, named in ((by_query, at_position if n_q == n_k else by_query), (by_position, at_position)):
        pattern = fl.sees_all(mask)
        wanted = named[:, None].expand(n_q, n_k)
        assert torch.equal(pattern.dense(n_q, n_k, q_offset=q_offset)[0, 0], wanted)
        assert torch.equal(fl.plan(pattern, n_q, n_k, q_offset=q_offset).dense()[0, 0], wanted)


def test_keys_stay_live_until_a_later_named_query() -> None:
    """Which keys a cache holds: every position may still be reached, named or not."""
    zero, j = torch.zeros(3, dtype=torch.int64), torch.arange(3)
    pattern = fl.causal() & (fl.window(1, 0) | fl.sees_all([6]))
    assert last_use(pattern, liveness_sizes(pattern, None), zero, zero, j).last.tolist() == [6, 6, 6]
    assert last_use(pattern, liveness_sizes(pattern, 5), zero, zero, j).last.tolist() == [1, 2, 3]


# ---- the work grows with the text, not with its square ---------------------------------------------------------------
class Elements(TorchDispatchMode):
    """Counts the elements that torch operations write."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            Elements.total += out.numel()
        return out


def bits(n: int) -> Tensor:
    return torch.arange(n) < 5


COUNTED: dict[str, Callable[[int], fl.Pattern]] = {
    "full": lambda n: fl.full(),
    "causal": lambda n: fl.causal(),
    "sees_all": lambda n: fl.sees_all([0]),
    "seen_by_all": lambda n: fl.seen_by_all([0]),
    "global": lambda n: fl.global_tokens([0]),
    "global, scattered": lambda n: fl.global_tokens([0, 9, -1]),
    "global, mask": lambda n: fl.global_tokens(bits(n)),
    "padding": lambda n: fl.padding([n - 1]),
    "padding, mask": lambda n: fl.padding(~bits(n)),
    "documents": lambda n: fl.documents(lengths=[n // 4] * 4),
    "documents, ids": lambda n: fl.documents(torch.arange(n) // 1000),
    "united": lambda n: fl.window(3) | fl.global_tokens(range(8)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_counting_is_linear_in_the_sequence_length(name: str) -> None:
    work = []
    for n in (1 << 17, 1 << 20):
        pattern, Elements.total = COUNTED[name](n), 0
        with Elements():
            pattern.count(n)
        work.append(Elements.total)
    assert work[1] <= 9 * work[0]
