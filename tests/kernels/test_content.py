"""Routers on the native road of the CPU: the choice of key blocks, the plan of their lists, and attention over both."""

from __future__ import annotations

import gc
import random
import re
import weakref
from typing import Any

import pytest
import torch
from content_cases import assert_same_choice, links, random_masks, random_router, true_loss

import farlight as fl
from farlight.kernels import cpu
from farlight.kernels.counting import count_links
from farlight.kernels.cpu.content import _numbers, content_plan
from farlight.kernels.cpu.launch import strided_address
from farlight.kernels.cpu.native import module, native_plan
from farlight.patterns.expression import Pattern, Sizes
from farlight.plan import TileShape
from farlight.plan.cache import plans
from farlight.plan.content import ContentPlan
from farlight.plan.content_clauses import listed_clauses
from farlight.routing import PerHeadRouter, Router, TopBlocks, meets, topblocks
from farlight.testing import assert_matches, attend

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the native module")

ISAS = cpu.available() if cpu.unavailable() is None else []


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Any:
    """Each ISA of this machine in turn."""
    previous = cpu.isa()
    cpu.use(request.param)
    yield request.param
    cpu.use(previous)


def random_pattern(rng: random.Random) -> tuple[Pattern, Sizes]:
    """A union of lists with bands, named tokens and padding, whose tables fit the sizes."""
    batch, heads = rng.choice([1, 2]), rng.choice([1, 3])
    n_k = rng.choice([1, 5, 31, 64, 100, 257])
    n_q = rng.choice([n_k, n_k, 1, max(1, n_k - 7), n_k + 3])
    sizes = Sizes.of(n_q, n_k, batch=batch, heads=heads, q_offset=rng.choice([None, None, 0, -2, 5]))
    if heads > 1 and rng.random() < 0.4:
        parts = [random_union(rng, sizes) for _ in range(heads)]
        parts[rng.randrange(heads)] = rng.choice([fl.full(), fl.causal(), fl.window(3, 0) | fl.seen_by_all([0]), parts[0]])
        pattern = fl.per_head(parts)
        return rng.choice([pattern, pattern & fl.causal(), pattern | fl.window(2)]), sizes
    return random_union(rng, sizes), sizes


def random_union(rng: random.Random, sizes: Sizes) -> Pattern:
    """What `random_pattern` says, the same in every head but for its tables."""
    batch, heads, n_q, n_k = sizes.batch, sizes.heads, sizes.n_q, sizes.n_k
    leading, width = (rng.choice([1, batch]), rng.choice([1, heads])), rng.choice([0, 1, 3, 8])
    pattern: Pattern
    if rng.random() < 0.75:
        block, query_block = rng.choice([1, 3, 8, 16, 64]), rng.choice([1, 2, 5, 16, 32, 64])
        lists = rng.choice([-(-n_k // query_block), -(-n_q // query_block)])
        indices = torch.randint(-1, -(-n_k // block), (*leading, lists, width))
        pattern = fl.chosen_blocks(indices, block=block, query_block=query_block)
    else:
        pattern = fl.chosen_keys(torch.randint(-1, n_k, (*leading, rng.choice([n_k, n_q]), width)))
    if rng.random() < 0.5:
        pattern = pattern & fl.causal()
    if rng.random() < 0.3:
        pattern = pattern & fl.padding(torch.rand(rng.choice([1, batch]), n_k) > 0.3)
    if rng.random() < 0.5:
        pattern = pattern | fl.window(rng.choice([0, 3, 32, 1000]), rng.choice([None, 0, 2]))
    if rng.random() < 0.5:
        named = [
            fl.seen_by_all([0, 1, 7, -1]),
            fl.seen_by_all([0, 3]) & fl.causal(),
            fl.global_tokens([0, -2]),
            fl.sees_all([2]),
        ]
        pattern = pattern | rng.choice([*named, fl.global_tokens([1]) & fl.causal()])
    return pattern


@pytest.mark.parametrize("seed", range(4))
def test_the_native_plan_holds_the_pairs_of_the_pattern(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    planned = 0
    for _ in range(40):
        pattern, sizes = random_pattern(rng)
        plan = content_plan(pattern, sizes, TileShape(gather=rng.choice([1, 8, 100])))
        assert isinstance(plan, ContentPlan)
        shape = (sizes.batch, sizes.heads, sizes.n_q, sizes.n_k)
        dense = pattern.dense(sizes.n_q, sizes.n_k, batch=sizes.batch, heads=sizes.heads, q_offset=sizes.q_offset).expand(shape)
        assert torch.equal(plan.dense(), dense), (pattern, sizes)
        assert plan.pairs == int(dense.sum()) <= plan.visited
        planned += 1
    assert planned == 40


def test_links_of_lists_are_counted_by_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the key intervals of each row, of which there are as many as blocks."""
    monkeypatch.setattr("farlight.kernels.counting.count_pairs", lambda *arguments: pytest.fail("counted row by row"))
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(20):
        pattern, sizes = random_pattern(rng)
        shape = (sizes.batch, sizes.heads, sizes.n_q, sizes.n_k)
        dense = pattern.dense(sizes.n_q, sizes.n_k, batch=sizes.batch, heads=sizes.heads, q_offset=sizes.q_offset).expand(shape)
        assert count_links(pattern, sizes) == int(dense.sum()), (pattern, sizes)
    chosen = TopBlocks(2, 8, 16, causal=True)(*torch.randn(2, 1, 3, 100, 8).unbind())
    assert chosen.count(100, heads=3) == int(chosen.dense(100, heads=3).sum())


def test_a_router_for_each_head_is_planned_natively_and_needs_a_part_for_each() -> None:
    """Outputs and gradients are those of the heads alone."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 90, 8, requires_grad=True) for heads in (4, 2, 2))
    near = fl.window(3, 0) | fl.seen_by_all([0])
    parts = [TopBlocks(2, 4, 16, causal=True) | near, near, TopBlocks(3, 8, causal=True), fl.causal()]
    router = PerHeadRouter(parts)
    pattern = router(q, k) & fl.causal()
    assert isinstance(content_plan(pattern, Sizes.of(90, 90, batch=2, heads=4), TileShape()), ContentPlan)
    out = fl.attention(q, k, v, pattern, backend="cpu")
    by_head = zip(
        q.split(1, 1), k.repeat_interleave(2, 1).split(1, 1), v.repeat_interleave(2, 1).split(1, 1), parts, strict=True
    )
    alone = torch.cat([fl.attention(*inputs, part) for *inputs, part in by_head], 1)
    torch.testing.assert_close(out, alone)
    for together, apart in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, alone)), strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    with pytest.raises(fl.errors.PatternError, match="per_head was given 4 patterns, but there are 3 heads"):
        content_plan(pattern, Sizes.of(90, 90, heads=3), TileShape())


def random_clustering(rng: random.Random) -> tuple[Pattern, Sizes]:
    """Labels of one round or two, perhaps causal or padded, in union with a fixed pattern."""
    batch, heads = rng.choice([1, 2]), rng.choice([1, 3])
    n_k = rng.choice([1, 5, 31, 64, 100, 257])
    n_q = rng.choice([n_k, n_k, max(1, n_k - 7), n_k + 3])
    leading, labels = (rng.choice([1, batch]), rng.choice([1, heads])), rng.choice([1, 3, 9])
    rounds = () if rng.random() < 0.6 else (2,)
    tables = [torch.randint(-1, labels, (*leading, n, *rounds)) for n in (n_q, n_k)]
    pattern: Pattern = meets(*tables) if rounds else fl.clusters(*tables)
    is_causal = rng.random() < 0.5
    if is_causal:
        pattern = pattern & fl.causal()
    if rng.random() < 0.3:
        pattern = pattern & fl.padding(torch.rand(rng.choice([1, batch]), n_k) > 0.3)
    if rng.random() < 0.5:
        pattern = pattern | fl.window(rng.choice([0, 3, 32]), 0 if is_causal else rng.choice([None, 0, 2]))
    if rng.random() < 0.4:
        pattern = pattern | (fl.seen_by_all([0, 3]) & fl.causal() if is_causal else fl.global_tokens([0, -1]))
    return pattern, Sizes.of(n_q, n_k, batch=batch, heads=heads)


@pytest.mark.parametrize("seed", range(4))
def test_the_native_plan_of_labels(seed: int) -> None:
    """The pairs of the pattern, and the outputs and gradients of the torch backend, which plans the pattern in its own way."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for number in range(25):
        pattern, sizes = random_clustering(rng)
        plan = content_plan(pattern, sizes, TileShape())
        assert isinstance(plan, ContentPlan)
        shape = (sizes.batch, sizes.heads, sizes.n_q, sizes.n_k)
        dense = pattern.dense(sizes.n_q, sizes.n_k, batch=sizes.batch, heads=sizes.heads).expand(shape)
        assert torch.equal(plan.dense(), dense), (pattern, sizes)
        assert plan.pairs == int(dense.sum()) <= plan.visited
        if number % 5:
            continue
        q, k, v = (torch.randn(*shape[:2], n, 8, requires_grad=True) for n in (sizes.n_q, sizes.n_k, sizes.n_k))
        outs = [fl.attention(q, k, v, pattern, backend=backend) for backend in ("cpu", "torch")]
        torch.testing.assert_close(*outs)
        for native, tiled in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in outs), strict=True):
            torch.testing.assert_close(native, tiled, rtol=1e-4, atol=1e-5)


def compare_choices(rng: random.Random, draws: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Compare the native choice with that of torch on random scores; masks, GQA, more queries than keys, all budgets. Returns
    the number compared.
    """
    compared = 0
    for _ in range(draws):
        kv_heads, n_k = rng.choice([1, 2]), rng.choice([1, 5, 31, 64, 100, 257])
        n_q = rng.choice([n_k, n_k, 1, max(1, n_k - 7), n_k + 3])
        q = torch.randn(2, kv_heads * rng.choice([1, 3]), n_q, 24)
        k = torch.randn(2, kv_heads, n_k, 24)
        masks, router = random_masks(rng, 2, n_q, n_k), random_router(rng)
        try:
            native = links(router, q, k, **masks)
        except fl.errors.ArgumentError:
            continue  # causal queries that begin inside a query block
        with monkeypatch.context() as patch:
            patch.setattr(topblocks, "can_choose", lambda q: False)
            other = links(router, q, k, **masks)
        assert_same_choice(native, other, router, q, k, **masks)
        compared += 1
    return compared


@pytest.mark.parametrize("seed", range(2))
def test_the_native_choice_is_that_of_torch(seed: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    assert compare_choices(random.Random(seed), 25, monkeypatch) > 15


@pytest.mark.slow
def test_the_native_choice_of_two_thousand_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    assert compare_choices(random.Random(7), 2600, monkeypatch) >= 2000


def test_equal_scores_go_to_the_earlier_block() -> None:
    q = k = torch.zeros(1, 1, 64, 4)
    chosen = links(TopBlocks(3, 4, 8, causal=True), q, k)[0, 0, -1]
    assert chosen.nonzero().flatten().tolist() == [0, 1, 2, 3, *range(56, 64)]


@pytest.mark.parametrize("score", ["mean", "minmax", "softmax"])
@pytest.mark.parametrize("query_block", [1, 16])
def test_later_query_blocks_choose_nothing(score: str, query_block: int) -> None:
    """Tokens of later query blocks change no link of an earlier one; "mean" and "minmax" do not read later queries at all."""
    torch.manual_seed(0)
    router, q, k = (
        TopBlocks(6, 8, query_block, causal=True, score=score),
        torch.randn(1, 2, 128, 16),
        torch.randn(1, 2, 128, 16),
    )
    before = links(router, q, k)
    for position in (16, 48, 112):
        changed_q, changed_k = q.clone(), k.clone()
        changed_q[:, :, position:] = torch.randn(1, 2, 128 - position, 16) * 5
        changed_k[:, :, position:] = torch.randn(1, 2, 128 - position, 16) * 5
        assert torch.equal(links(router, changed_q, changed_k)[:, :, :position], before[:, :, :position])


ROUTERS = {
    "blocks of 8 for 16 queries": TopBlocks(6, 8, 16, causal=True, score="softmax")
    | fl.window(8, 0)
    | fl.seen_by_all([0, 1]) & fl.causal(),
    "one choice for a group": fl.window(4) | TopBlocks(3, 16, 16, per="group"),
    "each query": TopBlocks(4, 4, causal=True, score="minmax") | fl.window(2, 0),
    "each query, visiting": TopBlocks(2, 16, causal=True) | fl.window(2, 0) | fl.seen_by_all([0, 1]) & fl.causal(),
    "share": TopBlocks(share=0.2, block=8) | fl.global_tokens([0, -1]),
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_takes_a_router(name: str, dtype: torch.dtype, isa: str) -> None:
    """The same links and numbers as under the router's pattern, which are those of the dense formula."""
    torch.manual_seed(0)
    router = ROUTERS[name]
    q, k, v = (torch.randn(2, heads, 150, 32, dtype=dtype) for heads in (4, 2, 2))
    pattern = router(q, k)
    out = fl.attention(q, k, v, router, backend="cpu")
    assert torch.equal(out, fl.attention(q, k, v, pattern, backend="cpu"))
    mask = pattern.dense(150, batch=2, heads=4)
    truth, _ = attend(q.double(), k.double(), v.double(), mask, scale=32**-0.5)
    baseline, _ = attend(q, k, v, mask, scale=32**-0.5)
    assert_matches(out, truth, baseline, name)


@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_and_threads(name: str) -> None:
    """Gradients of the dense formula; dk and dv are the same bits on one thread and on four."""
    torch.manual_seed(0)
    router = ROUTERS[name]
    q, k, v = (torch.randn(1, heads, 200, 16, requires_grad=True) for heads in (4, 2, 2))
    mask, dout = router(q, k).dense(200, heads=4), torch.randn(1, 4, 200, 16)
    threads, grads = torch.get_num_threads(), []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            grads.append(torch.autograd.grad(fl.attention(q, k, v, router, backend="cpu"), (q, k, v), dout))
    finally:
        torch.set_num_threads(threads)
    for one, four in zip(*grads, strict=True):
        assert torch.equal(one, four)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, _ = attend(*exact, mask, scale=0.25)
    for grad, answer in zip(grads[0], torch.autograd.grad(out, exact, dout.double()), strict=True):
        torch.testing.assert_close(grad.double(), answer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(2))
def test_rows_that_visit_the_keys_of_their_own_lists(seed: int, isa: str) -> None:
    """Lists of single rows are read in each call: out and lse of the dense formula, whatever is united with them."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    visiting = 0
    for _ in range(12):
        n_k, batch, block = rng.choice([97, 256, 600]), rng.choice([1, 2]), rng.choice([8, 16, 40])
        n_q = rng.choice([n_k, n_k - 33])
        indices = torch.randint(-1, -(-n_k // block), (batch, rng.choice([1, 4]), n_q, 2))
        lists = fl.chosen_blocks(indices, block=block, query_block=1)
        pattern: Pattern = rng.choice([lists, lists & fl.causal(), lists & fl.padding(torch.rand(1, n_k) > 0.2)])
        pattern = rng.choice([pattern, pattern | fl.window(2, 0), pattern | fl.seen_by_all([0, n_k // 2])])
        dim, value_dim = rng.choice([(64, 64), (20, 33), (7, 7)])
        dtype = rng.choice([torch.float32, torch.bfloat16])
        q, k = torch.randn(batch, 4, n_q, dim, dtype=dtype), torch.randn(batch, 2, n_k, dim, dtype=dtype)
        v = torch.randn(batch, 2, n_k, value_dim, dtype=dtype)
        plan = content_plan(pattern, Sizes.of(n_q, n_k, batch=batch, heads=4), TileShape())
        assert plan is not None
        visiting += native_plan(plan).visits_rows(0, 1)
        out, lse = fl.attention(q, k, v, pattern, return_lse=True, backend="cpu")
        mask = pattern.dense(n_q, n_k, batch=batch, heads=4).expand(batch, 4, n_q, n_k)
        truth, true_lse = attend(q.double(), k.double(), v.double(), mask, scale=dim**-0.5)
        rounding = 1e-5 if dtype == torch.float32 else 2e-4
        torch.testing.assert_close(lse.double(), true_lse, rtol=rounding, atol=rounding)
        rounding = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out.double(), truth, rtol=rounding, atol=rounding)
    assert visiting >= 8


def test_a_plan_of_a_router_is_executed_as_given() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    pattern = TopBlocks(3, 8, 16, causal=True)(q, k)
    plan = fl.plan(pattern, 100, heads=2)
    assert isinstance(plan, ContentPlan)
    assert torch.equal(fl.attention(q, k, v, plan), fl.attention(q, k, v, pattern, backend="cpu"))
    torch.testing.assert_close(fl.attention(q, k, v, plan, backend="torch"), fl.attention(q, k, v, plan))
    with pytest.raises(fl.errors.PlanError, match="cannot be pickled; pickle its pattern"):
        plan.__reduce__()


@pytest.mark.parametrize("name", ROUTERS)
def test_tiles_planned_in_place_are_those_of_the_tables(name: str) -> None:
    """The first pass plans each tile where it computes it, later ones have tables: the same bits, under terms too."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 333, 16) for heads in (4, 2, 2))
    for more in ({}, {"score": fl.score.softcap(5.0)}, {"dropout": 0.3, "seed": 1, "sinks": torch.randn(4)}):
        pattern = ROUTERS[name](q, k)
        first, second, third = (fl.attention(q, k, v, pattern, return_lse=True, backend="cpu", **more) for _ in range(3))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        assert torch.equal(second[0], third[0])


def test_lists_are_kept_in_few_bits_and_seen_as_int64() -> None:
    """A pattern of a choice equals that of its int64 lists, in every notation and on every backend; long texts take 32 bits."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 8) for _ in range(3))
    pattern = TopBlocks(3, 8, 16)(q, k)
    assert pattern._tables[0].dtype == torch.int16
    public = fl.chosen_blocks(pattern.tables[0], block=8, query_block=16)
    assert public._tables[0].dtype == pattern.tables[0].dtype == torch.int64
    assert pattern == public == Pattern.from_json(pattern.to_json())
    assert (repr(pattern), str(pattern), hash(pattern)) == (repr(public), str(public), hash(public))
    assert torch.equal(pattern.dense(64, heads=2), public.dense(64, heads=2))
    for backend in ("cpu", "torch", "reference"):
        narrow, wide = (fl.attention(q, k, v, lists, backend=backend) for lists in (pattern, public))
        assert torch.equal(narrow, wide)
    k = torch.randn(1, 1, 33_000, 4)
    q = k[:, :, -3:] * 9
    pattern = TopBlocks(2, 1, 1)(q, k)
    assert pattern._tables[0].dtype == torch.int32
    best = (q @ k.transpose(2, 3)).topk(2, -1).indices.sort(-1).values
    assert torch.equal(pattern.tables[0], best)
    mask = fl.chosen_keys(best).dense(3, 33_000)
    truth, _ = attend(q.double(), k.double(), k.double(), mask, scale=0.5)
    torch.testing.assert_close(fl.attention(q, k, k, pattern, backend="cpu").double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("query_block", [1, 16])
def test_the_native_plan_holds_its_lists(query_block: int) -> None:
    """Every Python object of the pattern may be gone: the native object holds what its lists are in."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 512, 16) for _ in range(3))
    pattern = (TopBlocks(3, 16, query_block, causal=True) & fl.padding(torch.rand(1, 512) > 0.1))(q, k) | fl.window(2, 0)
    expected = fl.attention(q, k, v, pattern, backend="cpu")
    native = native_plan(fl.plan(pattern, 512, heads=2, backend="cpu"))
    lists = weakref.ref(pattern._tables[0])
    alone = module().Plan(*_arguments(pattern, Sizes.of(512, heads=2)))
    del pattern
    plans.clear()
    gc.collect()
    assert lists() is not None
    churn = [torch.full((1, 2, 512 // query_block, 3), 2**14, dtype=torch.int16) for _ in range(200)]
    for plan in (native, alone):
        for _ in range(2):
            out, lse = torch.empty(1, 2, 512, 16), torch.empty(1, 2, 512)
            views, shape = [strided_address(x) for x in (q, k, v)], [1, 2, 2, 16, 16]
            module().forward(plan, 0, 0, shape, *views, out.data_ptr(), lse.data_ptr(), 0.25, (0, 0, 0), 1.0, [], 0.0, 1)
            assert torch.equal(out, expected)
    del churn, native, alone, plan
    gc.collect()
    assert lists() is None


def _arguments(pattern: Pattern, sizes: Sizes) -> tuple[Any, ...]:
    """What `content_plan` passes to the native plan."""
    clauses = listed_clauses(pattern, sizes)
    assert clauses is not None
    owners = [table for clause in clauses for table in (clause.table, clause.real_keys) if table is not None]
    return [1, sizes.heads, sizes.n_q, sizes.n_k, 0], [_numbers(clause) for clause in clauses], owners, 8


def test_malformed_numbers_of_a_clause_are_refused() -> None:
    sizes, clauses, owners, gather = _arguments(fl.chosen_keys([[0], [1], [2], [3]]) | fl.seen_by_all([0]), Sizes.of(4))
    module().Plan(sizes, clauses, owners, gather)
    for place, number, bytes_of_index in ((0, 0, 3), (0, 0, 0), (1, 2, 4)):
        wrong = [list(clause) for clause in clauses]
        wrong[place][0], wrong[place][14] = number, bytes_of_index
        with pytest.raises(ValueError, match="an index of a clause has 2, 4 or 8 bytes"):
            module().Plan(sizes, wrong, owners, gather)
    with pytest.raises(ValueError, match="a clause has 16 numbers"):
        module().Plan(sizes, [clauses[0][:-1]], owners, gather)


def test_a_choice_is_planned_once_counted_and_released_with_its_pattern(cold_cache: None) -> None:
    q = k = v = torch.randn(1, 2, 300, 16)
    pattern = TopBlocks(3, 8, 16)(q, k)
    plan = content_plan(pattern, Sizes.of(300, heads=2), TileShape())
    assert plan is not None
    assert plan.derived is content_plan(pattern, Sizes.of(300, heads=2), TileShape()).derived  # type: ignore[union-attr]
    before = plans.info()
    assert (before.entries, before.nbytes > plan.nbytes) == (1, True)
    fl.attention(q, k, v, pattern, backend="cpu")
    assert plans.info().nbytes == before.nbytes, "the first pass plans each tile where it computes it"
    fl.attention(q, k, v, pattern, backend="cpu")
    after = plans.info()
    assert (after.entries, after.nbytes > before.nbytes) == (1, True), "the same plan, its tables and schedule"
    assert content_plan(fl.clusters(torch.arange(300) % 5) & fl.strided(2), Sizes.of(300), TileShape()) is None
    del pattern, plan
    assert plans.info().entries == 0
    assert plans.info().nbytes == 0


def test_an_index_out_of_range_is_named() -> None:
    q = k = v = torch.randn(1, 1, 64, 8)
    pattern = fl.chosen_blocks(torch.tensor([[[[0, 9]] * 4]]), block=16, query_block=16)
    with pytest.raises(fl.errors.PatternError, match="9 is not one of the 4 key blocks"):
        fl.attention(q, k, v, pattern, backend="cpu")


@pytest.mark.parametrize("index", [-2, 64, 2**62, -(2**63)])
@pytest.mark.parametrize("query_block", [1, 16])
def test_malformed_lists_are_refused(index: int, query_block: int) -> None:
    """Wherever the index stands, in lists of blocks and of keys, and by the bound of what is lost too."""
    q = torch.randn(1, 1, 64, 8)
    for place in ((0, 0), (64 // query_block - 1, 1)):
        table = torch.zeros(1, 1, 64 // query_block, 2, dtype=torch.int64)
        table[0, 0][place] = index
        lists: list[Pattern] = [fl.chosen_blocks(table, block=1, query_block=query_block)]
        lists += [fl.chosen_keys(table)] if query_block == 1 else []
        for pattern in lists:
            with pytest.raises(fl.errors.PatternError, match=str(index)):
                fl.attention(q, q, q, pattern | fl.window(2), return_lost=True, backend="cpu")


def test_malformed_numbers_of_a_choice_are_refused() -> None:
    x = torch.randn(1, 2, 16, 8)
    view = strided_address(x)
    right = [0, 1, 2, 2, 16, 16, 8, 0, 0, 1, 4, 4, 0, 0, 0, 0, 0, 0]
    module().choose(right, view, view, 2.0, 1.0, 1)
    for place, number in (
        (0, 2),
        (1, -1),
        (3, 0),
        (3, 3),
        (4, -1),
        (9, 0),
        (10, 0),
        (11, 0),
        (13, 1),
        (16, 3),
        (16, -1),
        (17, 4),
    ):
        wrong = [number if at == place else usual for at, usual in enumerate(right)]
        with pytest.raises(ValueError, match="of a choice"):
            module().choose(wrong, view, view, 2.0, 1.0, 1)
    with pytest.raises(ValueError, match="a choice has 18 numbers"):
        module().choose(right[:-1], view, view, 2.0, 1.0, 1)
    table = torch.empty(1, 2, 4, 4, dtype=torch.int16)
    module().choose_into(right, view, view, 2.0, 1.0, [table.data_ptr(), 4, 2], 1)
    for wrong in ([table.data_ptr(), 4], [table.data_ptr(), -1, 2], [table.data_ptr(), 4, 1]):
        with pytest.raises(ValueError, match="a table of lists is"):
            module().choose_into(right, view, view, 2.0, 1.0, wrong, 1)
    with pytest.raises(ValueError, match="longer than its table is wide"):
        module().choose_into(right, view, view, 2.0, 1.0, [table.data_ptr(), 1, 2], 1)


def test_weights_that_are_not_numbers_are_chosen_last(isa: str) -> None:
    """And infinite ones in their order; the widths reach over several vectors of every ISA."""
    q, k = torch.ones(1, 1, 1, 1), torch.randn(1, 1, 100, 1)
    k[0, 0, [3, 50, 97], 0] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    order = sorted((place for place in range(100) if place not in (3, 97)), key=lambda place: -float(k[0, 0, place, 0]))
    order += [97, 3]
    for count in (1, 2, 31, 97, 98, 99):
        chosen = TopBlocks(count, 1, 1)(q, k).dense(1, 100)[0, 0, 0]
        assert chosen.nonzero().flatten().tolist() == sorted(order[:count])


def test_a_router_has_its_queries_at_the_end() -> None:
    q = k = v = torch.randn(1, 1, 64, 8)
    with pytest.raises(fl.errors.ArgumentError, match="q_offset = 3 was given with a router"):
        fl.attention(q, k, v, TopBlocks(2, 8), q_offset=3)


def test_one_choice_for_a_group_is_the_same_for_its_heads() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 6, 96, 16), torch.randn(1, 2, 96, 16)
    chosen = links(TopBlocks(3, 8, 16, score="softmax", per="group"), q, k).unflatten(1, (2, 3))
    assert torch.equal(chosen, chosen[:, :, :1].expand_as(chosen))
    assert not torch.equal(chosen[:, 0], chosen[:, 1])


def test_compiled_attention_under_a_router() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    router = TopBlocks(3, 8, 16, causal=True, score="softmax") | fl.window(4, 0)
    compiled = torch.compile(lambda q, k, v: fl.attention(q, k, v, router), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), fl.attention(q, k, v, router))


def check_bound(rng: random.Random, lengths: list[int]) -> int:
    """Compare the bound with the true loss of every row of one random problem. Returns the number of rows."""
    kv_heads, n, scale = rng.choice([1, 2]), rng.choice(lengths), rng.choice([None, 0.5, -0.3, 0.0])
    dtype, spread = rng.choice([torch.float32, torch.bfloat16]), rng.choice([0.3, 1.0, 6.0])
    q, k, v = ((torch.randn(2, h, n, 24) * spread).to(dtype) for h in (2 * kv_heads, kv_heads, kv_heads))
    is_causal = rng.random() < 0.6
    if rng.random() < 0.3:
        k = k[:, :, ::8].repeat_interleave(8, 2)[:, :, :n].contiguous()
    router: Router = TopBlocks(rng.choice([1, 4, 40]), rng.choice([3, 8, 16]), rng.choice([1, 16]), is_causal, score="minmax")
    near = fl.window(3, 0) | fl.seen_by_all([0]) & fl.causal() if is_causal else fl.global_tokens([1])
    router = router | near
    if rng.random() < 0.3:
        router = PerHeadRouter([router, near] * kv_heads)
    pattern = router(q, k)
    out, _, lost = fl.attention(q, k, v, pattern, scale=scale, return_lse=True, return_lost=True, backend="cpu")
    assert torch.equal(out, fl.attention(q, k, v, pattern, scale=scale, backend="cpu"))
    full = torch.ones(n, n, dtype=torch.bool).tril() if is_causal else torch.ones(n, n, dtype=torch.bool)
    loss = true_loss(q, k, pattern.dense(n, batch=2, heads=2 * kv_heads), full, 24**-0.5 if scale is None else scale)
    assert bool((lost.double() >= loss - 1e-15).all()), (router, scale, float((loss - lost).max()))
    assert bool((lost <= 1).all())
    return loss.numel()


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_of_what_is_lost_is_never_violated(seed: int, isa: str) -> None:
    """Over the true loss of every row; 0 where everything is seen; equal keys of a granule make it tight."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    assert sum(check_bound(rng, [5, 64, 130, 257]) for _ in range(12)) > 1000


@pytest.mark.slow
def test_the_bound_is_never_violated_on_a_million_rows() -> None:
    torch.manual_seed(11)
    rng, rows = random.Random(11), 0
    while rows < 1_000_000:
        rows += check_bound(rng, [257, 640, 1024])


def test_nothing_is_lost_where_everything_is_seen() -> None:
    q = k = v = torch.randn(1, 2, 100, 16)
    _, lost = fl.attention(q, k, v, TopBlocks(100, 8, 16, causal=True), return_lost=True)
    assert float(lost.max()) == 0.0


@pytest.mark.parametrize("pattern", [fl.window(5), fl.window(5, 0) | fl.seen_by_all([0]) & fl.causal()], ids=repr)
def test_a_fixed_pattern_has_a_bound_too(pattern: Pattern) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 70, 16) / 64, torch.randn(1, 2, 70, 16)
    _, lost = fl.attention(q, k, k, pattern, return_lost=True, backend="cpu")
    full = torch.ones(70, 70, dtype=torch.bool)
    loss = true_loss(q, k, pattern.dense(70, heads=4), full.tril() if "causal" in repr(pattern) else full, 0.25)
    assert bool((lost.double() >= loss).all())
    assert float((lost - loss).max()) < 0.05


def test_the_bound_is_tight_where_the_keys_of_a_granule_are_equal() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 128, 16), torch.randn(1, 1, 16, 16).repeat_interleave(8, 2)
    pattern = TopBlocks(4, 8, 16, causal=True)(q, k)
    _, lost = fl.attention(q, k, k, pattern, return_lost=True, backend="cpu")
    full = torch.ones(128, 128, dtype=torch.bool).tril()
    torch.testing.assert_close(lost.double(), true_loss(q, k, pattern.dense(128), full, 0.25), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pattern": fl.strided(3)},
            "the bound is known for listed blocks or keys, windows and named tokens, on the CPU, but the pattern is strided(3)",
        ),
        ({"score": fl.score.softcap(5.0)}, "the bound is of scale · q·k alone, but score or sinks were given"),
    ],
)
def test_where_there_is_no_bound(change: dict[str, Any], message: str) -> None:
    q = torch.randn(1, 1, 32, 8)
    options = {"pattern": TopBlocks(2, 8, 8, causal=True), **change}
    with pytest.raises(fl.errors.UnsupportedError, match=re.escape(message)):
        fl.attention(q, q, q, options.pop("pattern"), return_lost=True, **options)
