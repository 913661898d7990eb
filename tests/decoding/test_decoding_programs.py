"""Random programs of append, step, crop, fork, select and forget, against attention over the whole text in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import farlight as fl
from farlight.decoding.pages import quantize
from farlight.patterns import Pattern, Sizes
from farlight.routing import TopBlocks
from farlight.testing.strategies import patterns

STORED: dict[Any, Any] = {None: lambda x: x, torch.bfloat16: lambda x: x.bfloat16().float(), "int8": lambda x: dequantized(x)}


def dequantized(x: Tensor) -> Tensor:
    codes, scale = quantize(x)
    return codes.float() * scale[..., None]


@dataclass
class Branch:
    """A cache, and the text that it should hold: k, v `(B, H_kv, N, D)` as stored."""

    cache: fl.KVCache
    k: Tensor
    v: Tensor


@dataclass
class Program:
    pattern: Pattern | TopBlocks
    heads: tuple[int, int]
    batch: int
    length: int
    dtype: Any
    keep_back: int
    operations: list[tuple[str, int]]


OPERATIONS = ("step", "step", "step", "append", "append", "crop", "fork", "switch", "select", "forget")


@st.composite
def programs(draw: st.DrawFn) -> Program:
    length, batch = draw(st.integers(4, 40)), draw(st.integers(1, 2))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)]))
    sizes = Sizes.of(length, batch=batch, heads=kv_heads * group)
    routers = st.sampled_from([TopBlocks(2, 4, causal=True), TopBlocks(3, 2, causal=True, score="minmax")])
    pattern = draw(st.one_of(*[patterns(sizes)] * 5, routers))
    names = draw(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2**20)), min_size=4, max_size=24))
    dtype, keep_back = draw(st.sampled_from(list(STORED))), draw(st.sampled_from([0, 0, 1, 5]))
    return Program(pattern, (kv_heads * group, kv_heads), batch, length, dtype, keep_back, names)


def run(program: Program) -> None:
    """Execute the program; every output and every set of held keys is checked."""
    generator = torch.Generator().manual_seed(program.length)
    heads, kv_heads = program.heads
    is_router = isinstance(program.pattern, TopBlocks)
    cache = fl.KVCache(
        program.pattern,
        max_length=None if is_router else program.length,
        heads=heads,
        dtype=program.dtype,
        keep_back=program.keep_back,
    )
    nothing = torch.zeros(program.batch, kv_heads, 0, 4)
    branches = [Branch(cache, nothing, nothing)]
    current = branches[0]
    for name, number in program.operations:
        present, batch = current.k.shape[2], current.k.shape[0]
        if name in ("step", "append"):
            n = min(1 if name == "step" else 1 + number % 9, program.length - present)
            if n:
                grow(program, current, n, name == "step", generator)
        elif name == "crop":
            crop(program, current, number % (present + 1))
        elif name == "fork":
            branches.append(Branch(current.cache.fork(), current.k, current.v))
        elif name == "switch":
            current = branches[number % len(branches)]
        elif name == "forget":
            current.cache.forget()
        elif present and (is_router or not program.pattern.varies_over_batch):
            items = [number % batch, (number // 2) % batch, (number // 4) % batch][: 1 + number % 3]
            current.cache.select(items)
            current.k, current.v = current.k[items], current.v[items]


def grow(program: Program, branch: Branch, n: int, as_step: bool, generator: torch.Generator) -> None:
    """Append n tokens to a branch and compare their outputs, and the keys that it holds."""
    (heads, kv_heads), batch, start = program.heads, branch.k.shape[0], branch.k.shape[2]
    q = torch.randn(batch, heads, n, 4, generator=generator)
    k, v = (torch.randn(batch, kv_heads, n, 4, generator=generator) for _ in range(2))
    branch.k, branch.v = (torch.cat((x, STORED[program.dtype](new)), 2) for x, new in ((branch.k, k), (branch.v, v)))
    if as_step:
        out, lse = fl.step(q, k, v, branch.cache, return_lse=True)
    else:
        branch.cache.append(k, v)
        out, lse = fl.decode(q, branch.cache, return_lse=True)
    mask = seen(program, branch, q, start)
    group = heads // kv_heads
    scores = (q.double() @ branch.k.double().repeat_interleave(group, 1).transpose(2, 3)) * 0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    true = scores.softmax(-1).nan_to_num(0.0) @ branch.v.double().repeat_interleave(group, 1)
    torch.testing.assert_close(out.double(), true, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=3e-6, rtol=3e-6)


def seen(program: Program, branch: Branch, q: Tensor, start: int) -> Tensor:
    """`(B, H, n, N)`: what the queries from position `start` on see."""
    batch, heads, n = q.shape[:3]
    if not isinstance(program.pattern, Pattern):
        return program.pattern(q, branch.k).dense(n, start + n, batch=batch, heads=heads).expand(batch, heads, n, start + n)
    whole = program.pattern.dense(program.length, batch=batch, heads=heads).expand(batch, heads, -1, -1)
    return whole[:, :, start : start + n, : start + n]


def crop(program: Program, branch: Branch, length: int) -> None:
    """Crop a branch; where it refuses, a key that a later query sees must be missing, and nothing may have changed."""
    if not branch.k.shape[2]:
        return
    before = branch.cache.positions
    try:
        branch.cache.crop(length)
    except fl.ArgumentError:
        assert isinstance(program.pattern, Pattern)
        assert torch.equal(before, branch.cache.positions)
        heads, kv_heads = program.heads
        batch = branch.k.shape[0]
        whole = program.pattern.dense(program.length, batch=batch, heads=heads).expand(batch, heads, -1, -1)
        needed = whole[:, :, length:, :length].any(2).unflatten(1, (kv_heads, heads // kv_heads)).any(2)
        held = torch.zeros(batch, kv_heads, program.length + 1, dtype=torch.bool)
        positions = before.expand(batch, kv_heads, -1)
        held.scatter_(2, torch.where(positions < 0, program.length, positions), True)
        assert bool((needed & ~held[:, :, :length]).any())
        return
    branch.k, branch.v = branch.k[:, :, :length], branch.v[:, :, :length]
    assert branch.cache.length == length


@settings(max_examples=150)
@given(programs())
def test_random_programs_equal_brute_force(program: Program) -> None:
    run(program)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(programs())
def test_ten_thousand_random_programs_equal_brute_force(program: Program) -> None:
    run(program)


def test_the_check_detects_a_fork_that_shares_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs can fail: without the copy on write, a fork sees the other's tokens."""
    from farlight.decoding.pages import Page

    monkeypatch.setattr(Page, "is_shared", False)
    steps = [("step", 0)] * 12
    program = Program(
        fl.window(5, 0),
        (1, 1),
        1,
        40,
        None,
        0,
        [*steps, ("fork", 0), ("step", 0), ("switch", 1), ("step", 0), ("switch", 0), ("step", 0)],
    )
    with pytest.raises(AssertionError):
        run(program)
