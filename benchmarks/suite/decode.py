"""One token through a cache: `fl.step`, beside torch's attention over the kept keys and over all keys, and the bytes' limit.

Three sections of at most a minute: windows, blocks that a router chooses, and stored element types.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

import farlight as fl
from suite.settings import Box, Settings, name_of
from suite.timing import Contender, interleaved

__all__ = ["decode_block_rows", "decode_stored_rows", "decode_window_rows"]

Row = dict[str, Any]
# Seconds that one cache takes: filling it, and the timed rounds.
_CACHE_SECONDS = 4.0
_QUERIES = 64
# Caches that take steps in turn, as those of a model's layers do.
_LAYERS = 24
_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.int8: 1}


@dataclass(frozen=True)
class Rule:
    """One cache, or some that take steps in turn: pattern or router, and the keys that a step must read (None: all kept).

    `summaries`: int8 rows of block means for each key head; `same`: the rule of a plain window that reads as many keys,
    measured before; `stored`: of the cache, None = as appended; `contenders`: what is timed beside the step; `cosine`: of the
    output with that of unrounded keys is measured.
    """

    name: str
    pattern: Any
    dtype: torch.dtype
    stored: Any = None
    read: int | None = None
    summaries: int = 0
    batch: int = 1
    caches: int = 1
    same: str | None = None
    contenders: tuple[str, ...] = ("kept", "copy")
    cosine: bool = False


def decode_window_rows(settings: Settings, box: Box) -> Iterator[Row]:
    """Windows with sinks in batches of 1 and 8; dilated and per-head windows beside plain ones of as many keys (`of_plain`).

    One cache in a loop is found in the processor's own caches, a small window more so than a dilated one; `_LAYERS` caches in
    turn, as a model has them, are not.
    """
    steps: dict[tuple[str, str, int], float] = {}
    for rule in _windows(settings):
        row = _measured(settings, box, rule, max(8, settings.tokens // 8))
        step = row.get("step_seconds")
        if step is not None:
            steps[rule.name, row["dtype"], rule.caches] = step
            plain = None if rule.same is None else steps.get((rule.same, row["dtype"], rule.caches))
            row |= {} if plain is None else {"of_plain": step / plain}
        yield row


def _windows(settings: Settings) -> Iterator[Rule]:
    """At 16 384 tokens windows of 1024 keys."""
    heads, near, short = settings.decode_heads, max(4, settings.tokens // 16), max(4, settings.tokens // 256)
    for dtype in settings.types():
        for batch, caches in ((1, 1), (1, _LAYERS), (8, 1)):
            contenders = ("kept", "copy") if caches == 1 else ("copy",)
            streaming = fl.presets.streaming(4, near)
            yield Rule(f"streaming(4, {near})", streaming, dtype, batch=batch, caches=caches, contenders=contenders)
    for dtype, caches in itertools.product(settings.types(), (1, _LAYERS)):
        rule = functools.partial(Rule, dtype=dtype, caches=caches, contenders=("copy",))
        keys, mean = near // 8, (near + short) // 2
        plain, both = f"window({keys}, 0)", f"window({mean - 1}, 0)"
        yield rule(plain, fl.window(keys, 0))
        dilated = fl.window(keys, 0, dilation=8)
        yield rule(f"window({keys}, 0, dilation=8)", dilated, read=keys + 1, same=plain)
        yield rule(both, fl.window(mean - 1, 0))
        halves = [fl.window(short - 1, 0)] * (heads // 2) + [fl.window(near - 1, 0)] * (heads - heads // 2)
        name = f"per_head: windows of {short} and {near}, half of the heads each"
        yield rule(name, fl.per_head(halves), read=mean, same=both)


def decode_block_rows(settings: Settings, box: Box) -> Iterator[Row]:
    """Blocks of 64 and of 8 keys, chosen by their means, beside attention over all keys, at two lengths."""
    for n in (settings.tokens, 8 * settings.tokens):
        for count, block in ((16, 64), (32, 8)):
            for dtype in settings.types():
                if n > settings.tokens and dtype != torch.float32:
                    continue
                router, name = fl.routing.TopBlocks(count, block, causal=True), f"TopBlocks({count}, {block})"
                rule = Rule(name, router, dtype, read=count * block, summaries=n // block, contenders=("all", "copy"))
                yield _measured(settings, box, rule, n)


def decode_stored_rows(settings: Settings, box: Box) -> Iterator[Row]:
    """Every key of a long text, stored in float32, bfloat16 and int8; the cosine of the output with the unrounded one."""
    bfloat16 = None
    for dtype, stored in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8"), (torch.float32, "int8")):
        rule = Rule("causal()", fl.causal(), dtype, stored=stored, contenders=("copy",), cosine=True)
        row = _measured(settings, box, rule, settings.long_tokens[0])
        if dtype == torch.bfloat16 and stored is None:
            bfloat16 = row.get("step_seconds")
        if stored is not None and bfloat16 is not None and "step_seconds" in row:
            row["times_bfloat16"] = bfloat16 / row["step_seconds"]
        yield row


def _measured(settings: Settings, box: Box, rule: Rule, tokens: int) -> Row:
    """The row of one cache after a text of so many tokens: median seconds of the step and of its contenders, timed in turn."""
    heads, dim = settings.decode_heads, settings.head_dim
    about: Row = {"pattern": rule.name, "tokens": tokens, "heads": heads, "head_dim": dim, "dtype": name_of(rule.dtype)}
    about |= {"batch": rule.batch, "caches": rule.caches, "stored": "int8" if rule.stored else name_of(rule.dtype)}
    why = box.refusal(_CACHE_SECONDS)
    if why is not None:
        return {**about, "skipped": why}
    with torch.inference_mode():
        q, k, v = (torch.randn(rule.batch, heads, rows, dim) for rows in (1, tokens, tokens))
        return {**about, **_row(rule, q, k, v, settings.repeats)}


def _row(rule: Rule, q: Tensor, k: Tensor, v: Tensor, repeats: int) -> Row:
    row: Row = {}
    if rule.cosine:
        true = scaled_dot_product_attention(q, k, v)
    q, k, v = (x.to(rule.dtype) for x in (q, k, v))
    caches = [fl.KVCache(rule.pattern, heads=q.shape[1], dtype=rule.stored) for _ in range(rule.caches)]
    for cache in caches:
        cache.append(k, v)
    if rule.cosine:
        row["cosine"] = float(cosine_similarity(fl.decode(q, cache).double(), true.double(), dim=-1).min())
    new_k, new_v = k[:, :, :1].clone(), v[:, :, :1].clone()
    for cache in caches * 2:  # the second step drops the keys that only the prompt needed
        fl.step(q, new_k, new_v, cache)
    kept = k[:, :, : cache.kept].clone(), v[:, :, : cache.kept].clone()
    read = cache.kept if rule.read is None else min(rule.read, cache.kept)
    row_bytes = q.shape[3] + 4 if rule.stored else q.shape[3] * _BYTES[q.dtype]
    num_bytes = q.shape[0] * q.shape[1] * (2 * read * row_bytes + rule.summaries * (q.shape[3] + 4))
    copies = itertools.cycle([torch.zeros(2, max(1, num_bytes // 4)).unbind(0) for _ in caches])
    turns = itertools.cycle(caches)
    # Queries that differ: a router that chose the same blocks again would find them in the processor's cache.
    queries = itertools.cycle([torch.randn_like(q) for _ in range(_QUERIES)])
    calls: dict[str, Callable[[], Any]] = {
        "step": lambda: fl.step(next(queries), new_k, new_v, next(turns)),
        "kept": lambda: _cat_and_attend(q, kept, new_k, new_v),
        "all": lambda: scaled_dot_product_attention(q, k, v),
        "copy": lambda: _copy(next(copies)),
    }
    chosen = [Contender(name, calls[name], loops=max(10, 2 * rule.caches)) for name in ("step", *rule.contenders)]
    timings = interleaved(chosen, repeats=5 * repeats, budget=3.0)
    row |= {"kept": cache.kept, "read_bytes": num_bytes, "cache_mib": cache.nbytes / 2**20}
    row |= {f"{name}_seconds": timing.seconds for name, timing in timings.items()}
    step = row["step_seconds"]
    row["of_copy"] = step / row["copy_seconds"]
    if "kept" in timings:
        row["of_kept"] = step / row["kept_seconds"]
    if "all" in timings:
        row["times_all"] = row["all_seconds"] / step
    return row


def _copy(pair: tuple[Tensor, ...]) -> Tensor:
    return pair[0].copy_(pair[1])


def _cat_and_attend(q: Tensor, kept: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> Tensor:
    """What a window costs in plain torch: the oldest key out, the newest in, and attention."""
    keys, values = (torch.cat((old[:, :, 1:], new), 2) for old, new in zip(kept, (k, v), strict=True))
    return scaled_dot_product_attention(q, keys, values)
