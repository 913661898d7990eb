"""Rollback: an append or select interrupted at any line leaves the cache as it was. Padding in a batch of one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.patterns import Pattern
from farlight.routing import TopBlocks

PATTERNS: dict[str, Pattern | fl.routing.Router] = {
    "streaming": fl.presets.streaming(2, 5),
    "holes": fl.causal() & (fl.window(2, dilation=3) | fl.strided(7, phase=1)),
    "documents": fl.causal() & fl.documents(lengths=[6, 9, 40]),
    "heads of different windows": fl.causal() & fl.per_head([fl.window(3), fl.window(9)]),
    "router": TopBlocks(2, 4, causal=True),
}


class Interrupt(BaseException):
    """Stands for KeyboardInterrupt, which may come at any line."""


def interrupted_at(line: int, call: Callable[[], Any]) -> bool:
    """Run `call`, raising at the `line`-th line of farlight.decoding that it executes; whether it got that far."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        if "decoding" not in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
            return None
        if event == "line":
            count += 1
            if count == line:
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def qkv(n: int, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(batch, 2, n, 4, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("padded", [False, True], ids=["one length", "padded"])
@pytest.mark.parametrize("name", PATTERNS)
def test_an_append_interrupted_at_any_line_is_rolled_back(name: str, padded: bool) -> None:
    """For each line: the same append again, and later ones, give the outputs of an uninterrupted cache."""
    pattern = PATTERNS[name]
    if padded and not isinstance(pattern, Pattern):
        pytest.skip("a router's cache has texts of one length")
    q, k, v = qkv(55)
    real = torch.rand(2, 55, generator=torch.Generator().manual_seed(1)) < 0.7 if padded else None
    length = 55 if name == "documents" else None

    def append(cache: fl.KVCache, start: int, stop: int) -> None:
        cache.append(k[:, :, start:stop], v[:, :, start:stop], real=None if real is None else real[:, start:stop])

    def outputs(cache: fl.KVCache, line: int) -> tuple[list[Tensor], int]:
        """The outputs of six appends, each first interrupted at this line, and the number of interruptions."""
        out, num_interrupted = [], 0
        for start, stop in ((0, 20), (20, 21), (21, 30), (30, 31), (31, 54), (54, 55)):
            interrupted = bool(line) and interrupted_at(line, lambda start=start, stop=stop: append(cache, start, stop))
            num_interrupted += interrupted
            if interrupted:
                cache._rollback_unfinished()
                if cache._num_columns == stop:  # interrupted after the append had taken effect
                    cache._rollback_last()
                assert cache._num_columns == start
            if interrupted or not line:
                append(cache, start, stop)
            out.append(fl.decode(q[:, :, start:stop], cache))
        return out, num_interrupted

    expected, _ = outputs(fl.KVCache(pattern, max_length=length, heads=2), 0)
    line = num_interrupted = 0
    while True:
        line += 1
        actual, interrupted = outputs(fl.KVCache(pattern, max_length=length, heads=2), line)
        num_interrupted += interrupted
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        if not interrupted:
            break
        line += line // 16  # most late lines are iterations of one loop
    assert num_interrupted > 60


def test_a_select_interrupted_at_any_line_is_atomic() -> None:
    for pattern in PATTERNS.values():
        if not isinstance(pattern, Pattern) or not pattern.varies_over_batch:
            q, k, v = qkv(20)
            line = 0
            while True:
                line += 1
                cache = fl.KVCache(pattern, max_length=55, heads=2)
                cache.append(k, v)
                interrupted = interrupted_at(line, lambda cache=cache: cache.select([1, 1, 0]))
                order = [1, 1, 0] if cache.batch == 3 else [0, 1]
                cache.append(k[order][:, :, :1], v[order][:, :, :1])
                other = fl.KVCache(pattern, max_length=55, heads=2)
                other.append(k[order], v[order])
                other.append(k[order][:, :, :1], v[order][:, :, :1])
                torch.testing.assert_close(fl.decode(q[order][:, :, :1], cache), fl.decode(q[order][:, :, :1], other))
                if not interrupted:
                    break
            assert line > 10


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("prompt", [20, 90])
def test_padding_in_a_batch_of_one(prompt: int, copies: int) -> None:
    """`real` of one item, on either side and between, of short and long prompts; and when the item is repeated."""
    q, k, v = qkv(prompt + 20, 1)
    pattern = fl.presets.streaming(2, 5)
    real = torch.rand(1, prompt + 20, generator=torch.Generator().manual_seed(prompt)) < 0.6
    real[:, :3] = False
    cache, alone = fl.KVCache(pattern), fl.KVCache(pattern)
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, prompt + 20))]:
        if start == prompt:
            cache.select([0] * copies)
        items, columns = cache.batch or 1, torch.arange(start, stop)[real[0, start:stop]]
        new_kv = (x[:, :, start:stop].expand(items, -1, -1, -1) for x in (k, v))
        cache.append(*new_kv, real=real[:, start:stop].expand(items, -1))
        alone.append(k[:, :, columns], v[:, :, columns])
        out, lse = fl.decode(q[:, :, start:stop].expand(items, -1, -1, -1), cache, return_lse=True)
        alone_out = fl.decode(q[:, :, columns], alone)
        torch.testing.assert_close(out[:, :, real[0, start:stop]], alone_out.expand(items, -1, -1, -1), atol=1e-6, rtol=1e-5)
        assert not bool(out[:, :, ~real[0, start:stop]].any())
        assert bool((lse[:, :, ~real[0, start:stop]] == float("-inf")).all())
        assert set(cache.lengths) == {alone.length}
        assert cache.kept == alone.kept
