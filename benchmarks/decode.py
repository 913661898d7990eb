"""One token through the cache: microseconds of `append` and `decode`, beside torch's attention over the same and over all keys.

    python benchmarks/decode.py [--length 16384] [--heads 8] [--kv-heads 8] [--dim 64] [--threads 2]

`kept` reads the kept keys alone, as one call of scaled_dot_product_attention on contiguous tensors: what the step would cost
if it were nothing but that. `all` reads every key of the text, as a cache that forgets nothing must. They are timed in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import farlight as fl
from farlight.bench.machine import machine
from farlight.bench.timing import Contender, interleaved


def patterns(heads: int) -> Iterator[tuple[str, Any]]:
    half = [fl.window(63, 0)] * (heads // 2) + [fl.window(1023, 0)] * (heads - heads // 2)
    yield "streaming(4, 1024)", fl.presets.streaming(4, 1024)
    yield "window(128, dilation=8)", fl.causal() & fl.window(128, dilation=8)
    yield "per_head: window 64 / 1024", fl.per_head(half)
    yield "window(63, 0) or strided(64)", fl.causal() & (fl.window(63, 0) | fl.strided(64))
    yield "TopBlocks(16, 64)", fl.routing.TopBlocks(16, 64, causal=True)
    yield "causal()", fl.causal()


def contenders(cache: fl.KVCache, q: Tensor, k: Tensor, v: Tensor) -> list[Contender]:
    some_k, some_v = k[:, :, : cache.kept].clone(), v[:, :, : cache.kept].clone()
    new_k, new_v = k[:, :, :1].clone(), v[:, :, :1].clone()
    options: Any = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return [
        Contender("append", lambda: cache.append(new_k, new_v), loops=20),
        Contender("decode", lambda: fl.decode(q, cache), loops=20),
        Contender("kept", lambda: scaled_dot_product_attention(q, some_k, some_v, **options), loops=20),
        Contender("all", lambda: scaled_dot_product_attention(q, k, v, **options), loops=20),
    ]


@torch.inference_mode()
def rows(given: argparse.Namespace) -> Iterator[str]:
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.randn(1, given.heads, 1, given.dim).to(dtype)
        k, v = (torch.randn(1, given.kv_heads, given.length, given.dim).to(dtype) for _ in range(2))
        for name, pattern in patterns(given.heads):
            cache = fl.KVCache(pattern, heads=given.heads)
            cache.append(k, v)
            for _ in range(2):  # the second drops what only the prompt needed
                cache.append(k[:, :, :1], v[:, :, :1])
            timings = interleaved(contenders(cache, q, k, v), repeats=given.repeats, budget=8)
            times = [f"{timings[x].low * 1e6:,.0f}" for x in ("append", "decode", "kept", "all")]
            kind = str(dtype).removeprefix("torch.")
            yield f"| `{name}` | {kind} | {cache.kept:,} | {cache.nbytes / 2**20:.1f} | {' | '.join(times)} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("length", 16_384), ("heads", 8), ("kv-heads", 8), ("dim", 64), ("threads", 2), ("repeats", 25)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    about = machine()
    print(f"{about['processor']}, {about['threads']} threads, torch {about['torch']}, farlight {about['farlight']};")
    print(f"{given.length:,} tokens, {given.heads} heads, {given.kv_heads} heads of keys, head_dim {given.dim};")
    print(f"µs, the fastest of {given.repeats} rounds of 20\n")
    print("| pattern | type | kept | MiB | append | decode | SDPA, kept keys | SDPA, all keys |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows(given):
        print(row, flush=True)


if __name__ == "__main__":
    main()
