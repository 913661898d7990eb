"""One token through a cache: `fl.step`, beside torch's attention over the kept keys and over all keys, and the bytes' limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import farlight as fl
from suite.settings import Box, Settings, name_of
from suite.timing import Contender, interleaved

__all__ = ["decode_rows"]

Row = dict[str, Any]
# Seconds that one cache takes: filling it, and the timed rounds.
_CACHE_SECONDS = 6.0
_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


@dataclass(frozen=True)
class Rule:
    """One cache: its pattern or router, the dtype that it stores, and the keys that a step must read (None: all kept)."""

    name: str
    pattern: Any
    stored: Any = None
    read: int | None = None
    summaries: int = 0  # float32 rows of block summaries for each key head
    batch: int = 1


def decode_rows(settings: Settings, box: Box) -> Iterator[Row]:
    """For each cache rule and dtype: seconds of one `fl.step`, of `scaled_dot_product_attention` over the kept keys after a
    `cat` of the new one, of one over all keys, and of a copy of as many bytes as the step must read; all timed in turn.
    """
    n, heads, dim = settings.tokens, settings.decode_heads, settings.head_dim
    for dtype in settings.types():
        with torch.inference_mode():
            for rule in _rules(n, heads):
                about = {"pattern": rule.name, "tokens": n, "heads": heads, "head_dim": dim, "dtype": name_of(dtype)}
                about |= {"batch": rule.batch, "stored": "int8" if rule.stored else name_of(dtype)}
                why = box.refusal(_CACHE_SECONDS)
                if why is not None:
                    yield {**about, "skipped": why}
                    continue
                q, k, v = (torch.randn(rule.batch, heads, rows, dim).to(dtype) for rows in (1, n, n))
                yield {**about, **_row(rule, q, k, v, settings.repeats)}


def _rules(n: int, heads: int) -> Iterator[Rule]:
    """Cache rules in proportion to the text: at 16 384 tokens windows of 1024 keys."""
    near, block = max(4, n // 16), max(4, n // 256)
    short, long = fl.window(block - 1, 0), fl.window(near - 1, 0)
    yield Rule(f"streaming(4, {near})", fl.presets.streaming(4, near))
    yield Rule(f"streaming(4, {near})", fl.presets.streaming(4, near), batch=8)
    yield Rule(f"streaming(4, {near})", fl.presets.streaming(4, near), stored="int8")
    dilated = fl.causal() & fl.window(near // 8, dilation=8)
    yield Rule(f"window({near // 8}, 0)", fl.window(near // 8, 0))
    yield Rule(f"causal() & window({near // 8}, dilation=8)", dilated, read=near // 8 + 1)
    halves = fl.per_head([short] * (heads // 2) + [long] * (heads - heads // 2))
    yield Rule(f"per_head: window {block} / {near}", halves, read=(block + near) // 2)
    yield Rule(f"window({(block + near) // 2 - 1}, 0)", fl.window((block + near) // 2 - 1, 0))
    strided = fl.causal() & (short | fl.strided(block))
    yield Rule(f"window({block - 1}, 0) or strided({block})", strided, read=block + n // block)
    for count, size in ((16, block), (32, max(2, block // 8))):
        chosen = fl.routing.TopBlocks(count, size, causal=True)
        yield Rule(f"TopBlocks({count}, {size})", chosen, read=count * size, summaries=n // size)
    yield Rule("causal()", fl.causal())
    yield Rule("causal()", fl.causal(), stored="int8")


def _row(rule: Rule, q: Tensor, k: Tensor, v: Tensor, repeats: int) -> Row:
    cache = fl.KVCache(rule.pattern, heads=q.shape[1], dtype=rule.stored)
    cache.append(k, v)
    new_k, new_v = k[:, :, :1].clone(), v[:, :, :1].clone()
    for _ in range(2):  # the second step drops the keys that only the prompt needed
        fl.step(q, new_k, new_v, cache)
    kept = k[:, :, : cache.kept].clone(), v[:, :, : cache.kept].clone()
    read = cache.kept if rule.read is None else min(rule.read, cache.kept)
    row_bytes = q.shape[3] + 4 if rule.stored else q.shape[3] * _BYTES[q.dtype]
    num_bytes = q.shape[0] * q.shape[1] * (2 * read * row_bytes + rule.summaries * q.shape[3] * 4)
    source = torch.zeros(max(1, num_bytes // 4))
    target = torch.empty_like(source)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("step", lambda: fl.step(q, new_k, new_v, cache)),
        ("kept", lambda: _cat_and_attend(q, kept, new_k, new_v)),
        ("all", lambda: scaled_dot_product_attention(q, k, v)),
        ("copy", lambda: target.copy_(source)),
    ]
    timings = interleaved([Contender(name, call, loops=10) for name, call in calls], repeats=5 * repeats, budget=3.0)
    row: Row = {"kept": cache.kept, "read_bytes": num_bytes, "cache_mib": cache.nbytes / 2**20}
    return row | {f"{name}_seconds": timing.seconds for name, timing in timings.items()}


def _cat_and_attend(q: Tensor, kept: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> Tensor:
    """What a window costs in plain torch: the oldest key out, the newest in, and attention."""
    keys, values = (torch.cat((old[:, :, 1:], new), 2) for old, new in zip(kept, (k, v), strict=True))
    return scaled_dot_product_attention(q, keys, values)
