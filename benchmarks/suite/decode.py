"""One token through a cache: `append` and `decode`, beside torch's attention over the kept keys and over all keys."""

from __future__ import annotations

from collections.abc import Iterator
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
_CACHE_SECONDS = 10.0


def decode_rows(settings: Settings, box: Box) -> Iterator[Row]:
    """For each cache rule and dtype: seconds of `append` and of `decode` for one token, of one `scaled_dot_product_attention`
    over contiguous copies of the kept keys, and of one over every key; all four timed in turn.
    """
    n, heads, dim = settings.tokens, settings.decode_heads, settings.head_dim
    for dtype in settings.types():
        with torch.inference_mode():
            q = torch.randn(1, heads, 1, dim).to(dtype)
            k, v = (torch.randn(1, heads, n, dim).to(dtype) for _ in range(2))
            for name, rule in _rules(n, heads):
                about = {"pattern": name, "tokens": n, "heads": heads, "head_dim": dim, "dtype": name_of(dtype)}
                why = box.refusal(_CACHE_SECONDS)
                yield {**about, "skipped": why} if why is not None else {**about, **_row(rule, q, k, v, settings.repeats)}


def _rules(n: int, heads: int) -> Iterator[tuple[str, Any]]:
    """Cache rules in proportion to the text: at 16 384 tokens windows of 1024 keys."""
    near, block = max(4, n // 16), max(4, n // 256)
    short, long = fl.window(block - 1, 0), fl.window(near - 1, 0)
    yield f"streaming(4, {near})", fl.presets.streaming(4, near)
    yield f"causal() & window({near // 8}, dilation=8)", fl.causal() & fl.window(near // 8, dilation=8)
    yield f"per_head: window {block} / {near}", fl.per_head([short] * (heads // 2) + [long] * (heads - heads // 2))
    yield f"window({block - 1}, 0) or strided({block})", fl.causal() & (short | fl.strided(block))
    yield f"TopBlocks(16, {block})", fl.routing.TopBlocks(16, block, causal=True)
    yield "causal()", fl.causal()


def _row(rule: Any, q: Tensor, k: Tensor, v: Tensor, repeats: int) -> Row:
    cache = fl.KVCache(rule, heads=q.shape[1])
    cache.append(k, v)
    new_k, new_v = k[:, :, :1].clone(), v[:, :, :1].clone()
    for _ in range(2):  # the second append drops the keys that only the prompt needed
        cache.append(new_k, new_v)
    kept_k, kept_v = k[:, :, : cache.kept].clone(), v[:, :, : cache.kept].clone()
    contenders = [
        Contender("append", lambda: cache.append(new_k, new_v), loops=20),
        Contender("decode", lambda: fl.decode(q, cache), loops=20),
        Contender("kept", lambda: scaled_dot_product_attention(q, kept_k, kept_v), loops=20),
        Contender("all", lambda: scaled_dot_product_attention(q, k, v), loops=20),
    ]
    timings = interleaved(contenders, repeats=5 * repeats, budget=6.0)
    row: Row = {"kept": cache.kept, "cache_mib": cache.nbytes / 2**20}
    return row | {f"{name}_seconds": timing.seconds for name, timing in timings.items()}
