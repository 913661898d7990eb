"""How farlight scales: with threads, down to calls that are all overhead, up to a million tokens."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from farlight.analysis.memory import peak_memory
from farlight.patterns import window
from farlight.planning import plan
from suite.allocator import kept_memory
from suite.contenders import FORWARD_FLOPS, best_backend, inputs, ours, refusal, sparse
from suite.fresh import FreshError, fresh_rows
from suite.machine import free_memory
from suite.settings import Box, Settings, name_of
from suite.timing import Contender, interleaved

__all__ = ["long_rows", "overhead_rows", "scaling_rows", "thread_rows"]

Row = dict[str, Any]
_SHORT = 128


def scaling_rows(settings: Settings, box: Box) -> Iterator[Row]:
    """Threads, call overhead, and the longest text, the last in a process of its own."""
    yield from thread_rows(settings, box)
    yield from overhead_rows(settings)
    about = {"measure": "long text"}
    why = box.refusal(settings.long_tokens[1] / 2**20 * 60)
    if why is not None:
        yield {**about, "skipped": why}
        return
    limit = max(60.0, 2 * box.left)
    try:
        for row in fresh_rows("suite.scaling:long_rows", {"settings": settings.to_dict()}, limit=limit):
            yield {**about, **row}
    except FreshError as error:
        yield {**about, "error": str(error)}


def thread_rows(settings: Settings, box: Box) -> Iterator[Row]:
    """One head of one text: one thread and all threads in turn."""
    n, most = settings.thread_tokens, torch.get_num_threads()
    for dtype in settings.types():
        for grads in (False, True):
            about = {
                "measure": "threads",
                "tokens": n,
                "dtype": name_of(dtype),
                "pass": "forward + backward" if grads else "forward",
            }
            why = "torch uses one thread here" if most == 1 else box.refusal(5.0)
            if why is not None:
                yield {**about, "skipped": why}
                continue
            pattern = settings.chosen()
            backend = best_backend(pattern, n, 1, settings.head_dim, dtype, grads)
            one = ours(backend, pattern, *inputs(n, 1, settings.head_dim, dtype), grads)
            set_one, set_all = partial(torch.set_num_threads, 1), partial(torch.set_num_threads, most)
            sides = [Contender("one", one.call, before=set_one), Contender("all", one.call, before=set_all)]
            try:
                # Many rounds: neighbours on a shared machine are seen most where all of its cores are wanted.
                timings = interleaved(sides, repeats=2 * settings.repeats + 1, budget=12.0)
            finally:
                torch.set_num_threads(most)
            single, every = timings["one"], timings["all"]
            row = {**about, "backend": backend, "threads": most, **every.row()}
            if single.error is None and every.error is None:
                row |= {"one_thread_seconds": single.seconds, "speed_up": single.seconds / every.seconds}
            yield row


def overhead_rows(settings: Settings) -> Iterator[Row]:
    """Calls on 128 tokens with a plan that is cached: what farlight adds to SDPA's own time."""
    pattern, dim = window(16), settings.head_dim
    for heads in (1, settings.heads):
        for dtype in settings.types():
            q, k, v = inputs(_SHORT, heads, dim, dtype)
            sides = [Contender("sdpa", partial(scaled_dot_product_attention, q, k, v))]
            for name in (*sparse(), "auto"):
                if name == "auto" or refusal(name, pattern, _SHORT, heads, dim, dtype, False) is None:
                    sides.append(ours(name, pattern, q, k, v))
            sides = [Contender(side.name, side.call, loops=settings.call_loops) for side in sides]
            timings = interleaved(sides, repeats=settings.repeats, budget=10.0)
            base = timings.pop("sdpa").seconds
            for name, timing in timings.items():
                about = {
                    "measure": "call overhead",
                    "contender": name,
                    "tokens": _SHORT,
                    "heads": heads,
                    "dtype": name_of(dtype),
                }
                row = {**about, **timing.row()}
                if timing.error is None:
                    row |= {"sdpa_us": base * 1e6, "us": timing.seconds * 1e6, "over_sdpa_us": (timing.seconds - base) * 1e6}
                yield row


def long_rows(settings: dict[str, Any]) -> Iterator[Row]:
    """The longest text forward in the last dtype: memory at its peak as a share of q + k + v + out, and seconds against a
    shorter one timed in turn: with memory that comes from the system for each call, and with memory that the process kept.
    """
    s = Settings.from_dict(settings)
    dtype = s.types()[-1]
    short, long = s.long_tokens
    about = {"tokens": long, "dtype": name_of(dtype), "pass": "forward", "from_tokens": short}
    pattern, backend = s.chosen(), best_backend(s.chosen(), long, s.heads, s.head_dim, dtype)
    size = 4 * s.heads * long * s.head_dim * torch.empty((), dtype=dtype).element_size()
    if 1.2 * size > free_memory():
        yield {**about, "skipped": f"needs {1.2 * size / 2**30:.1f} GiB, and {free_memory() / 2**30:.1f} GiB are free"}
        return
    sides = {n: inputs(n, s.heads, s.head_dim, dtype) for n in (short, long)}
    calls = [ours(backend, pattern, *qkv, name=str(n)) for n, qkv in sides.items()]
    calls[0].call()  # thread pools and the like
    with peak_memory() as first:
        _forget(calls[1].call())
    with peak_memory() as second:
        _forget(calls[1].call())
    # Growth during the call, out included, upon q, k and v, which stood there before.
    about |= {
        "backend": backend,
        "gib": size / 2**30,
        "peak_of_inputs_and_output": (0.75 * size + second.bytes) / size,
        "peak_first_call": (0.75 * size + first.bytes) / size,
        "memory_method": second.method,
    }
    flops = FORWARD_FLOPS * s.head_dim * plan(pattern, long, heads=s.heads).pairs
    for memory, kept in (("fresh", contextlib.nullcontext(True)), ("kept", kept_memory())):
        with kept as granted:
            if not granted:
                yield {**about, "memory": memory, "skipped": "this C library cannot be told to keep memory"}
                continue
            # The last call before was a fresh one; what is to be kept has to be had first.
            sides_in_turn = [dataclasses.replace(call, warm=memory == "kept" or call is calls[0]) for call in calls]
            timings = interleaved(sides_in_turn, repeats=3, budget=35.0)
        mine, base = timings[str(long)], timings[str(short)]
        row: Row = {**about, "memory": memory, **mine.row(), "short_seconds": base.seconds}
        if mine.error is None and base.error is None:
            row |= {"useful_gflops": flops / mine.seconds / 1e9, "of_linear": mine.seconds / (base.seconds * long / short)}
        yield row


def _forget(out: Tensor) -> None:
    del out
