"""The Triton kernels under Triton's interpreter: run by `test_triton.py` in a process with TRITON_INTERPRET=1.

Cases are run always in float32, and as `slow` tests in 16 bits, the long ones in both. Not collected by itself: the variable
must be set before triton is first imported.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from routed_cases import ROUTED
from torch import Tensor
from waits import SyncCounter

import farlight as fl
from farlight.kernels import registry
from farlight.kernels import triton as backend
from farlight.kernels.triton import routed, work_partition
from farlight.kernels.triton.decode import decode
from farlight.plan import Plan
from farlight.plan.build import build
from farlight.plan.cache import kept_with, plans
from farlight.testing import CASES, Answer, Case, assert_answer, case, inputs
from parity import SEED, answer, compare, same, solution

assert backend.interpreted(), "run by test_triton.py, which sets TRITON_INTERPRET=1"

pytestmark = pytest.mark.usefixtures("poison")
HALF = (torch.bfloat16, torch.float16)
# Each of these meets something in 16 bits that the others do not.
IN_HALF = ("dilated window, one side", "scale, negative", "head_dim 72")
# Each takes the interpreter ten seconds and more. Rows in parts are also tested by `test_split_items_are_merged_exactly`.
LONG = (
    *("long row", "long rows, per head", "dropout, long row", "strided beyond the text", "dilated wider than the text"),
    *("clusters of one", "chosen blocks of odd sizes"),
)


def test_the_named_cases_exist() -> None:
    assert {*IN_HALF, *LONG} <= {of.name for of in (*CASES, *ROUTED)}


def long_ones_slow(cases: Sequence[Case]) -> list[Any]:
    return [pytest.param(of, id=str(of), marks=[pytest.mark.slow] if of.name in LONG else []) for of in cases]


@pytest.mark.parametrize("of", long_ones_slow(CASES))
def test_parity(of: Case) -> None:
    """Output, lse and gradients, those through the lse too."""
    compare(of, "triton", torch.float32, with_grad_lse=True)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", IN_HALF)
def test_parity_in_16_bits(name: str, dtype: torch.dtype) -> None:
    compare(case(name), "triton", dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("of", [of for of in CASES if of.name not in IN_HALF], ids=str)
def test_parity_on_the_rest_in_16_bits(of: Case, dtype: torch.dtype) -> None:
    compare(of, "triton", dtype)


def computed(of: Case, plan: Plan, dtype: torch.dtype = torch.float32) -> Answer:
    """A case computed with this very plan."""
    given = inputs(of, dtype)
    options: dict[str, Any] = {"scale": of.scale_value, "dropout": of.dropout, "seed": torch.tensor(SEED)}
    out, lse = backend.forward(given.q, given.k, given.v, plan, **options)
    return Answer(out, lse, *backend.backward(given.grad_out, None, given.q, given.k, given.v, out, lse, plan, **options))


@pytest.fixture
def split_everything(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(work_partition, "MIN_BLOCKS", 1)
    monkeypatch.setattr(work_partition, "PARTS_PER_PROCESSOR", 1000)
    plans.clear()
    yield
    plans.clear()


@pytest.mark.parametrize(
    "name", ["dilated windows and lighthouses", "one key head, clusters", "a sparse mask", "dropout, clusters"]
)
def test_split_items_are_merged_exactly(name: str, split_everything: None) -> None:
    """Every row and every key in as many parts as it has blocks."""
    of = case(name)
    plan = build(of.pattern, of.sizes, backend.SHAPE)
    assert_answer(computed(of, plan), solution(of, torch.float32), name)
    lowered = [work for key, work in plan.derived.items() if "triton" in str(key)]
    assert any(launch.num_partials for work in lowered for launch in work.launches)  # type: ignore[attr-defined]


# ---- plans of routers, made on the device --------------------------------------------------------------------------------
@pytest.fixture
def device_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed, "allow_cpu", True)


@pytest.mark.parametrize("of", long_ones_slow(ROUTED))
def test_parity_of_routed(of: Case, device_planning: None) -> None:
    compare(of, "triton", torch.float32, with_grad_lse=True)
    assert kept_with(of.pattern, ("triton", of.sizes), lambda: None) is not None, "planned on the device"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("of", ROUTED, ids=str)
def test_parity_of_routed_in_16_bits(of: Case, dtype: torch.dtype, device_planning: None) -> None:
    compare(of, "triton", dtype)


def test_routed_and_host_plans_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    of = case("clusters")
    by_host = answer(of, "triton", torch.float32)
    monkeypatch.setattr(routed, "allow_cpu", True)
    by_device = answer(dataclasses.replace(of, pattern=fl.clusters(of.pattern.tables[0])), "triton", torch.float32)
    for name in ("out", "lse", "dq"):
        same(getattr(by_host, name), getattr(by_device, name), name)


# ---- scores of any size -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("split", [False, True], ids=["whole items", "split items"])
def test_equal_scores_share_a_row_whatever_their_size(split: bool, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """Pieces that overlap and items that are split are joined by row max and sum: an lse of 1e6 has float32 steps of 1/16."""
    if split:
        request.getfixturevalue("split_everything")
    n, pattern = 200, fl.window(3) | fl.window(3, dilation=8) | fl.sees_all([5])
    mask = pattern.dense(n)
    v = torch.randn(1, 1, n, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert fl.plan(pattern, n).overlapping
    # Powers of 2: the scores are equal in whatever order a product is summed.
    for magnitude in (2.0**7, 2.0**13, 2.0**23, 2.0**30):
        q, k = torch.ones(1, 1, n, 16), torch.full((1, 1, n, 16), magnitude / 16)
        q, k = q.to(dtype), k.to(dtype)
        out, lse = fl.attention(q, k, v, pattern, backend="triton", scale=1.0, return_lse=True)
        expected, expected_lse = fl.testing.attend(q.double(), k.double(), v.double(), mask, scale=1.0)
        unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20
        torch.testing.assert_close(out.double(), expected, rtol=4 * unit, atol=4 * unit)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=2.0**-20, atol=0)


def test_decoding_shares_equal_scores_whatever_their_size() -> None:
    v = torch.randn(1, 1, 700, 16, generator=torch.Generator().manual_seed(0))
    for magnitude in (2.0**7, 2.0**13, 2.0**23, 2.0**30):  # Powers of 2, as above.
        q, k = torch.ones(1, 1, 1, 16), torch.full((1, 1, 700, 16), magnitude / 16)
        out, _ = decode(q, k, v, scale=1.0)
        torch.testing.assert_close(out.double(), v.double().mean(2, keepdim=True), rtol=0, atol=2.0**-18)


def test_batch_strides_of_more_than_32_bits() -> None:
    """Strides are passed divided by 16 and multiplied in 64 bits. Of the 4 GiB only the pages of the rows are touched."""
    n, dim, stride = 20, 16, 2**31
    storage = mmap.mmap(-1, 2 * (stride + n * dim))
    q = torch.frombuffer(storage, dtype=torch.float16).as_strided((2, 1, n, dim), (stride, n * dim, dim, 1))
    near, k, v = torch.randn(3, 2, 1, n, dim, generator=torch.Generator().manual_seed(0)).half().unbind(0)
    q.copy_(near)
    same(*(fl.attention(x, k, v, fl.window(3), backend="triton") for x in (q, near)), "out")


# ---- synchronisation ------------------------------------------------------------------------------------------------------
class LaunchCounter:
    """A kernel that counts its launches and computes nothing."""

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            assert all(type(n) is int for n in grid)
            self.launches += 1

        return launch


@pytest.fixture
def launch_counter(monkeypatch: pytest.MonkeyPatch) -> LaunchCounter:
    """In place of every kernel; a call takes the path of plain tensors although a dispatch mode is active."""
    counter = LaunchCounter()
    for module, names in (
        ("fwd", ("fwd_kernel", "merge_kernel")),
        ("bwd_dq", ("dq_kernel", "sum_kernel", "delta_kernel")),
        ("bwd_dkdv", ("dkdv_kernel",)),
    ):
        for name in names:
            monkeypatch.setattr(importlib.import_module(f"farlight.kernels.triton.jit.{module}"), name, counter)
    monkeypatch.setattr(importlib.import_module("farlight.ops"), "is_plain", lambda *tensors: True)
    return counter


def sync_calls(pattern: fl.Pattern, dropout: float) -> list[str]:
    """The synchronising operations of a forward and a backward pass."""
    q = torch.randn(2, 4, 150, 16, requires_grad=True)
    k, v = (torch.randn(2, 2, 150, 16, requires_grad=True) for _ in range(2))
    seed = torch.tensor(7)
    with SyncCounter() as syncs:
        out = fl.attention(q, k, v, pattern, dropout=dropout, seed=seed, backend="triton")
        assert isinstance(out, Tensor)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    return syncs.calls


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(
    "pattern",
    [
        fl.window(4) | fl.global_tokens([0, -1]) | fl.random_keys(2),
        fl.window(3, dilation=2) | fl.strided(7),
        fl.clusters(torch.arange(150) % 3) | fl.window(2),
        fl.pairs(torch.rand(150, 150) < 0.1),
    ],
    ids=["global tokens and random keys", "sorted", "clusters and a window", "a mask"],
)
def test_a_call_with_a_known_plan_does_not_synchronise(
    pattern: fl.Pattern, dropout: float, launch_counter: LaunchCounter, cold_cache: None
) -> None:
    """So it can be captured in a CUDA graph."""
    assert sync_calls(pattern, dropout)
    before = launch_counter.launches
    assert sync_calls(pattern, dropout) == []
    assert launch_counter.launches - before >= 4


@pytest.mark.parametrize("of", ROUTED, ids=str)
def test_a_new_choice_synchronises_once_and_a_known_one_never(
    of: Case, launch_counter: LaunchCounter, device_planning: None
) -> None:
    earlier, pattern = (fl.parse(of.pattern.text, of.pattern.tables) for _ in range(2))
    q = torch.randn(of.batch, of.heads, of.n_q, 16, requires_grad=True)
    k, v = (torch.randn(of.batch, of.kv_heads, of.n_k, 16, requires_grad=True) for _ in range(2))
    calls = []
    # The fixed part of a union is planned on the host, with the first choice that it meets.
    for choice in (earlier, pattern, pattern):
        with SyncCounter() as syncs:
            out = fl.attention(q, k, v, choice, q_offset=of.q_offset, backend="triton")
            assert isinstance(out, Tensor)
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        calls.append([what.split()[0] for what in syncs.calls])
    assert calls[1:] == [["tolist"], []]


@pytest.mark.parametrize("name", ["two strides", "clusters within clusters", "per head, dilations"])
def test_key_heads_whose_query_heads_sort_keys_differently(name: str) -> None:
    of = dataclasses.replace(case(name), kv_heads=1)
    compare(of, "triton", torch.float32)


def test_results_are_the_same_to_the_bit_every_time() -> None:
    of = dataclasses.replace(case("grouped heads"), n_q=66, n_k=66, heads=2, kv_heads=1, dropout=0.2)
    plan = build(of.pattern, of.sizes, backend.SHAPE)
    first, second = computed(of, plan), computed(of, build(of.pattern, of.sizes, backend.SHAPE))
    for field in dataclasses.fields(Answer):
        same(getattr(first, field.name), getattr(second, field.name), field.name)


def damaged_plans(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Plans with one wrong number."""

    def with_layer(**changes: Tensor) -> Plan:
        piece = plan.pieces[0]
        layer = dataclasses.replace(piece.layers[0], **changes)
        piece = dataclasses.replace(piece, layers=(layer, *piece.layers[1:]))
        return dataclasses.replace(plan, pieces=(piece, *plan.pieces[1:]))

    layer = plan.pieces[0].layers[0]
    lo = layer.lo.clone()
    lo[0] += 1
    yield "a run begins late", with_layer(lo=lo)
    yield "a mask is forgotten", with_layer(mask=torch.full_like(layer.mask, -1))
    data = plan.masks.data.clone()
    data[plan.masks.start[0] + 3] -= 1
    yield "a bound is one off", dataclasses.replace(plan, masks=dataclasses.replace(plan.masks, data=data))


def test_a_damaged_table_is_noticed() -> None:
    of = case("window, wide")
    plan = build(of.pattern, of.sizes, backend.SHAPE)
    assert_answer(computed(of, plan), solution(of, torch.float32), "sound")
    for what, damaged in damaged_plans(plan):
        with pytest.raises(AssertionError, match=r"rows are wrong|the mean error"):
            assert_answer(computed(of, damaged), solution(of, torch.float32), what)


def test_tensors_that_do_not_fit_the_plan_are_refused() -> None:
    """Work tables with rows and keys that the tensors do not have would be read out of bounds."""
    of = case("window, wide")
    plan, given = build(of.pattern, of.sizes, backend.SHAPE), inputs(of)
    q, k, v = given.q, given.k, given.v
    out, lse = backend.forward(q, k, v, plan, scale=1.0)
    halves = lse[..., 1:]

    def run(q: Tensor, k: Tensor) -> Any:
        return backend.forward(q, k, v, plan, scale=1.0)

    for message, call in (
        (r"plan is for 300 queries and 300 keys, the tensors have 299 and 300", lambda: run(q[:, :, 1:], k)),
        (r"the plan is for 1 batch items and 1 heads, q has 1 and 2", lambda: run(q.expand(1, 2, -1, -1), k)),
        (r"k is torch.float64 of shape .* the Triton kernels take", lambda: run(q, k.double())),
        (r"they must be \(B, H, n_q, D\), \(B, H_kv, n_k, D\) and", lambda: run(q, k[:, :, 1:])),
        (
            r"lse has shape \(1, 1, 299\), but q and v need \(1, 1, 300\)",
            lambda: backend.backward(given.grad_out, None, q, k, v, out, halves, plan, scale=1.0),
        ),
    ):
        with pytest.raises(fl.ArgumentError, match=message):
            call()


def test_a_wrong_dropout_seed_is_noticed() -> None:
    of = case("dropout of half, full")
    plan = build(of.pattern, of.sizes, backend.SHAPE)
    given = inputs(of)
    options: dict[str, Any] = {"scale": of.scale_value, "dropout": 0.5}
    out, _ = backend.forward(given.q, given.k, given.v, plan, **options, seed=SEED)
    other, _ = backend.forward(given.q, given.k, given.v, plan, **options, seed=SEED + 2**33)
    fl.testing.assert_matches(out, solution(of, torch.float32).truth.out, solution(of, torch.float32).baseline.out, "right")
    with pytest.raises(AssertionError, match="rows are wrong"):
        fl.testing.assert_matches(other, solution(of, torch.float32).truth.out, solution(of, torch.float32).baseline.out, "no")


def test_nan_propagates() -> None:
    """A NaN in one key reaches the rows that see it, and no row whose tile does not."""
    q, k, v = torch.randn(3, 1, 1, 600, 16).unbind(0)
    k[0, 0, 0, 3] = float("nan")
    out = fl.attention(q, k, v, fl.window(4), backend="triton")
    assert bool(out[0, 0, :5].isnan().all())
    assert not bool(out[0, 0, 200:].isnan().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_q, heads, kv_heads", [(1, 2, 2), (1, 6, 2), (3, 4, 1)])
def test_decoding(n_q: int, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """A few queries over a cache: lengths for each item, a mask, rows without keys."""
    q = torch.randn(2, heads, n_q, 40).to(dtype)
    k, v = (torch.randn(2, 700, kv_heads, 40).to(dtype).transpose(1, 2) for _ in range(2))
    lengths, allowed = torch.tensor([700, 331]), torch.rand(2, 1, n_q, 700) < 0.5
    allowed[0, 0, -1] = False
    all_keys = torch.ones(2, 1, n_q, 700, dtype=torch.bool)
    for given, mask in itertools.product((None, lengths), (None, allowed)):
        real = all_keys if given is None else torch.arange(700) < given.view(-1, 1, 1, 1)
        seen = real & (all_keys if mask is None else mask)
        truth, truth_lse = fl.testing.attend(q.double(), k.double(), v.double(), seen, scale=40**-0.5)
        plain, plain_lse = fl.testing.attend(q, k, v, seen, scale=40**-0.5)
        out, lse = decode(q, k, v, lengths=given, allowed=mask)
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        fl.testing.assert_matches(out, truth, plain, "out")
        fl.testing.assert_matches(lse, truth_lse, plain_lse, "lse")


def test_a_cache_decodes_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fl.decode` gives the same with the kernel as in plain torch."""
    attend = importlib.import_module("farlight.decoding.kept_attention")
    calls = []

    def counted_decode(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return decode(*arguments, **options)

    answers = []
    for serves in (False, True):
        torch.manual_seed(3)
        monkeypatch.setattr(attend.triton_decode, "serves", lambda q, k, serves=serves: serves)
        monkeypatch.setattr(attend.triton_decode, "decode", counted_decode)
        # On a CPU the native kernels would decode; without them it is this kernel or plain torch.
        monkeypatch.setattr(importlib.import_module("farlight.decoding.cache"), "is_native", lambda *arguments: False)
        cache = fl.KVCache(fl.causal() & (fl.window(20, 0) | fl.global_tokens([0])))
        for length in (70, 1, 3):
            q, k, v = torch.randn(1, 4, length, 16), *torch.randn(2, 1, 2, length, 16).unbind(0)
            cache.append(k, v)
            answers.append(fl.decode(q[:, :, -3:], cache, return_lse=True))
    assert calls
    for (out, lse), (other, other_lse) in zip(answers[:3], answers[3:], strict=True):
        torch.testing.assert_close(other, out)
        torch.testing.assert_close(other_lse, lse)


def test_decoding_refuses_tensors_that_do_not_fit() -> None:
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 30, 8)
    out, lse = decode(q[:, :, :0], k, k)
    assert (out.shape, lse.shape) == ((1, 4, 0, 8), (1, 4, 0))
    empty, nothing = decode(q, k[:, :, :0], k[:, :, :0])
    assert not bool(empty.any())
    assert bool((nothing == -torch.inf).all())
    for message, call in (
        (r"with H a multiple of H_kv", lambda: decode(q[:, :3], k, k)),
        (r"q and k have head_dim 8, v has 4; decoding takes equal ones", lambda: decode(q, k, k[..., :4])),
        (
            r"decoding takes \(B, H, N, D\) tensors of one dtype, float32, bfloat16 or float16",
            lambda: decode(q.double(), k.double(), k.double()),
        ),
        (r"lengths is torch.float32 of shape \(1,\); pass \(1,\) integers", lambda: decode(q, k, k, lengths=torch.ones(1))),
        (r"allowed is torch.int64; pass bool", lambda: decode(q, k, k, allowed=torch.ones(1, 1, 1, 30, dtype=torch.int64))),
        (r"does not broadcast to \(1, 4, 1, 30\)", lambda: decode(q, k, k, allowed=torch.ones(1, 3, 1, 30, dtype=torch.bool))),
        (r"head_dim 300 is outside 1 … 256", lambda: decode(*(torch.zeros(1, 1, 1, 300) for _ in range(3)))),
    ):
        with pytest.raises(fl.FarlightError, match=message):
            call()


# ---- derivatives --------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")  # torch's own formulas of forward mode
def test_func_vmap_and_higher_derivatives() -> None:
    pattern = fl.window(2) | fl.global_tokens([0])
    q, k, v = torch.randn(3, 2, 1, 2, 20, 16).unbind(0)

    def f(q: Tensor, k: Tensor, v: Tensor, backend: str = "triton") -> Tensor:
        out = fl.attention(q, k, v, pattern, backend=backend)
        assert isinstance(out, Tensor)
        return out.square().sum()

    gradients = torch.vmap(torch.func.grad(f, (0, 1, 2)))(q, k, v)
    expected = zip(
        *(torch.func.grad(lambda *x: f(*x, "reference"), (0, 1, 2))(*x) for x in zip(q, k, v, strict=True)), strict=True
    )
    for a, b in zip(gradients, map(torch.stack, expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    def tangent(backend: str) -> Tensor:
        return torch.func.jvp(lambda x: f(x, k[0], v[0], backend), (q[0],), (q[0],))[1]

    def penalty(backend: str) -> Tensor:
        x = q[0].clone().requires_grad_()
        (g,) = torch.autograd.grad(f(x, k[0], v[0], backend), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    for way in (tangent, penalty):
        torch.testing.assert_close(way("triton"), way("reference"), atol=1e-4, rtol=1e-4)


def test_a_given_plan_is_executed_without_planning_or_looking_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = fl.window(5) | fl.global_tokens([0])
    q, k, v = (torch.randn(1, 2, 60, 16, requires_grad=True) for _ in range(3))
    plan = fl.plan(pattern, 60, heads=2, backend="triton")
    expected = fl.attention(q, k, v, pattern, backend="reference")

    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("a plan was given, and another one was looked up")

    monkeypatch.setattr(registry, "plan_for", refuse)
    monkeypatch.setattr(plans, "find", refuse)
    out = fl.attention(q, k, v, plan)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), q)[0], torch.autograd.grad(expected.sum(), q)[0])
